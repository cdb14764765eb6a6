"""Training checkpoints: the canonical form (megatron.checkpoint.state), opened and written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.new_folder import new_folder
from megatron.checkpoint.pieces import whole_pieces
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.state import EMA, TENSOR_KINDS, CanonicalState
from megatron.checkpoint.store import RunFolder
from megatron.config.sections.data import DataConfig
from megatron.config.sections.model import ModelConfig, ModelSection, model_section
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data.classes import are_class_names, class_lines, classes_file
from megatron.errors import UserError
from megatron.exchange.checkpoint import Checkpoint
from megatron.model.compatibility import check_fit, count_layers, described_model, tau_fault

TOKENIZER_FILE, CLASSES_FILE = "tokenizer.json", "classes.txt"


def matches(path: Path, iteration: int | None = None, key: str = "load") -> Path | None:
    """The folder of one checkpoint: `path`, or the `iteration` or latest one under it; None if there is none.

    Raises: UserError when `latest` or `iteration` names one that is not there, or the path cannot be read.
    """
    return RunFolder(path, key).find(iteration)


def open(path: Path, config: object = None, key: str = "load") -> Checkpoint:
    """A training checkpoint, which says for itself what it is: `config` is not looked at.

    Raises: DamagedCheckpoint where its records, its sizes and its tensors do not belong together. Tensors and
        checksums are for `Checkpoint.verify`.
    """
    reader = CheckpointReader(path, verify=False, key=key)
    model = model_config_of(reader)
    return Checkpoint(
        reader.folder,
        model,
        reader,
        reader.config,
        reader.iteration,
        reader.train_state,
        partial(_tokenizer_of, reader),
        partial(_class_names_of, reader, getattr(model, "num_classes", 0)),
    )


def model_config_of(reader: CheckpointReader) -> ModelSection:
    """The model section of the configuration in a checkpoint.

    Raises: DamagedCheckpoint unless the tensors are those of such a model.
    """
    try:
        section = model_section(reader.config.get("task", ModelConfig.task))
    except ValueError as error:
        raise reader.damaged("config.yml", f"cannot be used: {error}") from None
    config = reader.section(section)
    for prefix, tower in config.towers().items():  # seen to before a list of thousands of layers is made
        layers = count_layers(reader.names("model"), prefix)
        if tower.num_layers != layers:
            key = tower.spelled("num_layers")
            raise reader.damaged("config.yml", f"does not say {key} {layers}, as the tensors do")
    try:
        model = described_model(config)
    except ValueError as error:
        raise reader.damaged("config.yml", f"describes no model: {error}") from None
    try:
        check_fit(model, reader, "the manifest")
    except UserError as error:
        raise reader.damaged("config.yml", f"describes another model: {error}") from None
    if fault := tau_fault(model, reader):
        raise reader.damaged("manifest.json", fault)
    return config


def _tokenizer_of(reader: CheckpointReader) -> TokenizerConfig:
    """What the run was trained with; where that file is gone, a tokenizer.json beside the checkpoint or its run."""
    found = reader.section(TokenizerConfig)
    if found.vocab_file is None or os.path.exists(found.vocab_file):
        return found
    beside = (folder / TOKENIZER_FILE for folder in (reader.folder, reader.folder.parent))
    file = next((str(file) for file in beside if file.is_file()), None)
    return found if file is None else TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=file)


def _class_names_of(reader: CheckpointReader, count: int) -> list[str] | None:
    """What a classes.txt beside the checkpoint or its run says, else what lies beside the data it was trained with."""
    if not count:
        return None
    data = reader.section(DataConfig)
    sets = [data.data_path, *(data.train_data_paths or [])]
    places = [folder / CLASSES_FILE for folder in (reader.folder, reader.folder.parent)]
    places += [classes_file(prefix) for prefix in sets if prefix]
    found = next((class_lines(file) for file in places if file.is_file()), [])
    return found if len(found) == count and are_class_names(found) else None


def write(target: str | Path, checkpoint: Checkpoint, environment: Mapping[str, Any] | None = None) -> Path:
    """A new run's folder with this checkpoint in it, in fp32, or not at all; returns the path of the checkpoint.

    A model that was no training checkpoint starts at iteration 0; one without settings of its own takes its
    tokenizer.json along. Names of classes that are known are written to classes.txt.

    Args:
        target: must not exist or be empty.
        environment: to be recorded beside the checkpoint.

    Raises: UserError when the folder is not empty or cannot be written, and for values that no run can go on from.
    """
    with new_folder(target) as temporary:
        if checkpoint.settings is None and checkpoint.tokenizer is not None:
            checkpoint = _with_tokenizer(checkpoint, checkpoint.tokenizer, temporary, Path(target))
        if (names := checkpoint.class_names) is not None:
            (temporary / CLASSES_FILE).write_text("\n".join(names) + "\n", encoding="utf-8")
        pieces = whole_pieces({kind: _whole(checkpoint, kind) for kind in (*TENSOR_KINDS, EMA)})
        state = CanonicalState(
            checkpoint.iteration or 0, checkpoint.train_state, checkpoint.resolved(), pieces, environment or {}
        )
        name = RunFolder(temporary).save(state).name
    return Path(target) / name


def _with_tokenizer(checkpoint: Checkpoint, found: TokenizerConfig, folder: Path, target: Path) -> Checkpoint:
    """The checkpoint with its tokenizer copied to `folder`, which will be called `target`."""
    assert found.vocab_file is not None, "a folder in Hugging Face's form has a tokenizer.json or none"
    shutil.copyfile(found.vocab_file, folder / TOKENIZER_FILE)
    copied = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(target / TOKENIZER_FILE))
    return replace(checkpoint, find_tokenizer=lambda: copied)


def _whole(checkpoint: Checkpoint, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a kind, each read when its turn comes."""
    for name in checkpoint.tensors.names(kind):
        tensor = checkpoint.tensors.tensor(kind, name)
        yield name, tensor.float() if kind == "model" and tensor.is_floating_point() else tensor
