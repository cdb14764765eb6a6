"""A model as a folder in Hugging Face's form.

TokenFormer: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; the folder carries its own code
(see megatron.inference.huggingface_source). Transformer models that GPTNeoXForCausalLM can express are written as such
and need no code. The tokens of a grown layer are joined into one segment; its tau_tokens is kept.
"""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron.checkpoint.new_folder import new_folder
from megatron.config.sections.model import ModelConfig
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.inference import gpt_neox
from megatron.inference.huggingface_import import ARCHITECTURE, CONFIG, WEIGHTS
from megatron.inference.huggingface_source import (
    CONFIGURATION,
    EXPORT_NAMES,
    MODELING,
    configuration_source,
    modeling_source,
)
from megatron.model import LanguageModel, Pattention
from megatron.tokenizer import GPT2BPETokenizer, HFTokenizer, Tokenizer, build_tokenizer
from megatron.tokenizer.base import END_OF_TEXT

SHARD_BYTES = 5 * 1000**3
# Padding rows of the vocabulary that generation_config.json may list one by one.
_MOST_SUPPRESSED = 1024


def export_huggingface(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: TokenizerConfig | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` as a folder that transformers loads; complete or not at all.

    Args:
        model: on any device; its tensors are written bit for bit, unless `dtype` says otherwise.
        folder: must not exist or be empty.
        tokenizer: HFTokenizer and GPT2BPETokenizer are written too, so that AutoTokenizer works; of others, only the
            end-of-document id is.
        dtype: of the parameters in the files; default the model's.
        shard_bytes: size from which weights are spread over several files.

    Raises: UserError when the folder is not empty or cannot be written.
    """
    tensors = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in joined_tensors(model).items()}
    config, built = joined_config(model), build_tokenizer(tokenizer) if tokenizer else None
    with new_folder(folder) as temporary:
        if gpt_neox.is_expressible(config):
            tensors, described = (
                gpt_neox.neox_tensors(tensors, config.num_attention_heads),
                gpt_neox.neox_config(config),
            )
        else:
            tensors, described = {_export_name(n): t for n, t in tensors.items()}, _own_config(config)
            (temporary / f"{MODELING}.py").write_text(modeling_source(), encoding="utf-8")
            (temporary / f"{CONFIGURATION}.py").write_text(configuration_source(), encoding="utf-8")
        _write_weights(temporary, tensors, shard_bytes)
        _write_configs(temporary, config, described, str(tensors[next(iter(tensors))].dtype), built)
        if isinstance(built, HFTokenizer | GPT2BPETokenizer):
            _write_tokenizer(temporary, built, config.seq_length)


def joined_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Parameters and buffers under canonical names, as if every Pattention had one segment."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for prefix, module in model.named_modules():
        if isinstance(module, Pattention) and len(module.segments) > 1:
            for kind in ("key", "value"):
                parts = [tensors.pop(f"{prefix}.{kind}_tokens_{i}") for i in module.segments]
                tensors[f"{prefix}.{kind}_tokens_0"] = torch.cat(parts)
    return tensors


def joined_config(model: LanguageModel) -> ModelConfig:
    """The model's configuration, with the token counts that its layers have."""
    counts: dict[str, set[int]] = {"qkv_slot_num": set(), "proj_slot_num": set(), "ffn_slot_num": set()}
    for name, module in model.named_modules():
        if isinstance(module, Pattention):
            key = {"proj": "proj_slot_num", "mlp": "ffn_slot_num"}.get(name.rpartition(".")[2], "qkv_slot_num")
            counts[key].add(module.num_tokens)
    for key, found in counts.items():
        if len(found) > 1:
            raise UserError(f"{key}: layers differ ({sorted(found)} tokens); a configuration has one number for all")
    update = {key: found.pop() for key, found in counts.items() if found}
    return model.config.model_copy(update={**update, "token_segments": None})


def _export_name(canonical: str) -> str:
    return "lm_head.weight" if canonical == "head.final_linear.weight" else f"model.{canonical}"


def _own_config(config: ModelConfig) -> dict[str, Any]:
    keys = {key: value for key, value in config.model_dump(mode="json").items() if key not in EXPORT_NAMES}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "tokenformer",
        "auto_map": {
            "AutoConfig": f"{CONFIGURATION}.TokenFormerConfig",
            "AutoModel": f"{MODELING}.TokenFormerModel",
            "AutoModelForCausalLM": f"{MODELING}.{ARCHITECTURE}",
        },
        **keys,
        "max_position_embeddings": config.max_position_embeddings or config.seq_length,
        "tokenizer_vocab_size": config.vocab_size,
        "tie_word_embeddings": not config.no_weight_tying,
    }


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if filled + tensor.nbytes > shard_bytes and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        _write_tensors(folder / WEIGHTS, tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / f"{WEIGHTS}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)  # what the umask gives; safetensors lets only the owner read
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    path.chmod(mode)


def _write_configs(
    folder: Path, config: ModelConfig, described: dict[str, Any], dtype: str, tokenizer: Tokenizer | None
) -> None:
    """config.json and generation_config.json; rows of the embedding without a token are never generated."""
    eod = None if tokenizer is None else tokenizer.eod_id
    special = {"bos_token_id": eod, "eos_token_id": eod, "pad_token_id": eod}
    _write_json(folder / CONFIG, {**described, "dtype": dtype.removeprefix("torch."), **special})
    generation: dict[str, Any] = {"do_sample": False, **special}
    used = tokenizer.vocab_size if tokenizer is not None else config.vocab_size
    rows = config.padded_vocab_size or 0
    if used is not None and 0 < rows - used <= _MOST_SUPPRESSED:
        generation["suppress_tokens"] = list(range(used, rows))
    _write_json(folder / "generation_config.json", generation)


def _write_tokenizer(folder: Path, tokenizer: HFTokenizer | GPT2BPETokenizer, seq_length: int) -> None:
    tokenizer._backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT,
        "padding_side": "left", "model_max_length": seq_length, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(folder: Path, target: Path) -> TokenizerConfig:
    """Copy a folder's tokenizer.json; the configuration that names it, or the byte-level tokenizer without one."""
    if not (folder / "tokenizer.json").is_file():
        return TokenizerConfig(tokenizer_type="CharLevelTokenizer")
    file = target / "tokenizer.json"
    try:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / "tokenizer.json", file)
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error}; free space or choose another folder") from error
    return TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(file))
