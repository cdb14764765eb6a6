"""TokenFormer in Hugging Face's form: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

The folder carries its own code (see megatron.exchange.huggingface_source). The tokens of a grown layer are joined into
one segment; its tau_tokens is kept. A model with several row norms keeps its segments.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron.config.sections.model import ModelConfig
from megatron.errors import UserError
from megatron.exchange.checkpoint import Checkpoint
from megatron.exchange.huggingface_folder import (
    CONFIG,
    SHARD_BYTES,
    TOKENIZER,
    architectures,
    is_tied,
    language_files,
    open_folder,
    write_folder,
)
from megatron.exchange.huggingface_source import LANGUAGE, configuration_source, modeling_source
from megatron.exchange.huggingface_weights import read_json
from megatron.exchange.joined import JoinedTensors, joined_config
from megatron.exchange.model_card import NO_CARD, README, Card, Loading, model_card
from megatron.exchange.names import EMBEDDING, HEAD

ARCHITECTURE = "TokenFormerForCausalLM"


def matches(path: Path, iteration: int | None = None, key: str = "load") -> Path | None:
    """`path` if it is a folder with a config.json, of whichever architecture."""
    return path if os.path.isfile(path / CONFIG) else None


def open(path: Path, config: object = None, key: str = "load") -> Checkpoint:
    """An export, which says for itself what it is. Raises UserError for a damaged one or another architecture."""
    source = path / CONFIG
    found = read_json(source)
    if ARCHITECTURE not in (named := architectures(found)):
        raise UserError(
            f"{source}: architecture {', '.join(named) or 'unknown'} is not supported; "
            f"{ARCHITECTURE}, GPTNeoXForCausalLM and TokenFormerForImageClassification are"
        )
    keys = {name: found[name] for name in ModelConfig.model_fields if name in found}
    keys["vocab_size"] = found.get("tokenizer_vocab_size")
    keys["no_weight_tying"] = not is_tied(found, True, str(source))
    return open_folder(path, keys, lambda name: [_canonical_name(name)], layers_key="num_layers")


def write(
    target: str | Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    card: Card = NO_CARD,
) -> None:
    """Write a folder that transformers loads; complete or not at all.

    Args:
        target: must not exist or be empty.
        checkpoint: any. HFTokenizer and GPT2BPETokenizer are written too, so that AutoTokenizer works; of other kinds
            only the end-of-document id is.
        dtype: of the parameters in the files; default the checkpoint's, bit for bit.
        shard_bytes: size from which weights are spread over several files.
        card: what its README.md says besides.

    Raises: UserError when the folder is not empty or cannot be written, and for tensors without usable values.
    """
    if checkpoint.language.segment_norms is None:
        joined = JoinedTensors(checkpoint.tensors)
        checkpoint = replace(checkpoint, model_config=joined_config(checkpoint.language, joined), tensors=joined)
    config, source = checkpoint.language, checkpoint.tensors
    tensors = ((_export_name(name), source.tensor("model", name)) for name in source.names("model"))
    dtype = dtype or source.tensor("model", EMBEDDING).dtype
    sources = {f"{LANGUAGE.modeling}.py": modeling_source(), f"{LANGUAGE.configuration}.py": configuration_source()}
    files = language_files(checkpoint, _own_config(config), dtype)
    loading = Loading("AutoModelForCausalLM", True, "AutoTokenizer" if TOKENIZER in files else None)
    readme = model_card(checkpoint, config, Path(target).name, dtype, loading, card)
    write_folder(target, tensors, dtype, shard_bytes, {**sources, **files, README: readme})


def _export_name(canonical: str) -> str:
    return "lm_head.weight" if canonical == HEAD else f"model.{canonical}"


def _canonical_name(exported: str) -> str:
    return HEAD if exported.startswith("lm_head.weight") else exported.removeprefix("model.")


# Where config.json has had them since its first version, so that a model is always exported to the same bytes.
_BEFORE_NORM = ("seq_length", "max_position_embeddings", "pos_emb", "rotary_pct", "rotary_emb_base")


def _own_config(config: ModelConfig) -> dict[str, Any]:
    dumped = config.model_dump(mode="json")
    names = [name for name in dumped if name not in LANGUAGE.renamed and name not in _BEFORE_NORM]
    place = names.index("norm")
    keys = {name: dumped[name] for name in (*names[:place], *_BEFORE_NORM, *names[place:])}
    if config.segment_norms is not None:
        keys |= {key: dumped[key] for key in ("token_segments", "segment_norms")}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "tokenformer",
        "auto_map": {
            "AutoConfig": f"{LANGUAGE.configuration}.{LANGUAGE.config_class}",
            "AutoModel": f"{LANGUAGE.modeling}.TokenFormerModel",
            "AutoModelForCausalLM": f"{LANGUAGE.modeling}.{ARCHITECTURE}",
        },
        **keys,
        "max_position_embeddings": config.max_position_embeddings or config.seq_length,
        "tokenizer_vocab_size": config.vocab_size,
        "tie_word_embeddings": not config.no_weight_tying,
    }
