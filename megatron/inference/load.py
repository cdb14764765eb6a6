"""Any checkpoint to a model in eval mode: a training checkpoint folder, an official pytorch_model.bin or training
folder, or a folder in Hugging Face's form.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron.checkpoint.form import dtype_name, value_fault
from megatron.checkpoint.official_folder import find_official_folder, read_official_folder
from megatron.checkpoint.published import EMBEDDING, embedding_rows, read_flat_file, to_canonical, weight_fault
from megatron.checkpoint.store import CheckpointReader, find_checkpoint
from megatron.checkpoint.tensors import Tensors
from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig, language_section
from megatron.errors import UserError
from megatron.growth.schedule import grown_as_saved
from megatron.inference.huggingface_import import CONFIG, HuggingFaceCheckpoint
from megatron.model import LanguageModel, Pattention
from megatron.model.compatibility import (
    check_fit,
    check_same_model,
    described_model,
    saved_model_config,
    tau_fault,
)
from megatron.model.fill import fill
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.processes import first_rank_does


def load_model(
    path: str | Path,
    config: RunConfig | ModelConfig | None = None,
    dtype: torch.dtype | Literal["saved"] | None = None,
    device: torch.device | str | None = None,
    *,
    iteration: int | None = None,
    attention_backend: str = "sdpa",
    layout: Layout = SINGLE,
) -> LanguageModel:
    """A model in eval mode.

    Args:
        path: a training checkpoint (its folder, or the folder of all of a run's checkpoints), the official code's flat
            `pytorch_model.bin` or training folder (see megatron.checkpoint.official_folder), for which `config` is
            needed, or a folder in Hugging Face's form: an export of this package or a GPT-NeoX (Pythia) model.
        config: what the model must be. Folders carry their own; one given here must agree with it.
        dtype: of the parameters; default fp32, and `saved` is that of the checkpoint's embedding.
        device: default the CPU.
        iteration: which of a run's checkpoints; default the latest.
        layout: the grid; each tensor rank holds its share of the model, and gets whole logits.

    Raises: UserError when there is no checkpoint, it is damaged, it does not fit the configuration, or a tensor has
        values that are not finite, as saved or in `dtype`.
    """
    path = Path(path)
    model_config = config.language if isinstance(config, RunConfig) else config
    if os.path.isfile(path):
        names, shape_of, tensor_of, model_config = _open_flat(path, model_config)
    elif os.path.isfile(path / CONFIG):
        names, shape_of, tensor_of, model_config = _open_huggingface(path, model_config)
    elif (folder := find_official_folder(path, iteration)) is not None:
        names, shape_of, tensor_of, model_config = _open_flat(folder, model_config)
    else:
        names, shape_of, tensor_of, model_config = _open_training_checkpoint(path, config, iteration, layout)
    names = list(names)
    check_fit(LanguageModel(model_config, device="meta"), {name: shape_of(name) for name in names}, str(path))
    model = LanguageModel(model_config, device=device, attention_backend=attention_backend, layout=layout)
    dtype = tensor_of(EMBEDDING).dtype if dtype == "saved" else dtype or torch.float32
    fill(model, _Usable(names, shape_of, tensor_of, dtype, path), layout)
    return model.to(dtype).eval()


_Opened = tuple[Iterable[str], Callable[[str], tuple[int, ...]], Callable[[str], Tensor], ModelConfig]


def _open_flat(path: Path, config: ModelConfig | None) -> _Opened:
    if config is None:
        raise UserError(f"eval_ckpt: {path} holds tensors only; give the YAML configuration of its model too")
    flat = read_flat_file(path) if path.is_file() else read_official_folder(path)
    tensors = to_canonical(flat, config.num_layers, path)
    if config.padded_vocab_size is None:
        config = config.model_copy(update={"padded_vocab_size": embedding_rows(tensors, path)})
    keys = [name for name in tensors if name.endswith(".key_tokens_0")]
    tensors |= {name.replace("key_tokens_0", "tau_tokens"): torch.tensor(len(tensors[name])) for name in keys}
    return tensors, lambda name: tuple(tensors[name].shape), tensors.__getitem__, config


def _open_training_checkpoint(
    path: Path, config: RunConfig | ModelConfig | None, iteration: int | None, layout: Layout
) -> _Opened:
    folder = find_checkpoint(path, iteration)
    if folder is None:
        raise UserError(
            f"load: no checkpoint in {path}; train first, or set eval_ckpt to an official pytorch_model.bin"
        )
    reader = CheckpointReader(folder, verify=False)
    first_rank_does(lambda: reader.verify(leave_out=("optimizer", "rng")), layout)
    saved = language_section(saved_model_config(reader))
    if isinstance(config, RunConfig):  # its model is the one before the growths of its schedule
        lineage = reader.train_state.get("lineage", [])
        config = grown_as_saved(config.language, config.scaling, saved, lineage).model
    if config is not None:
        check_same_model(config, saved, folder)
    return (
        reader.names("model"),
        lambda name: reader.shape("model", name),
        lambda name: reader.tensor("model", name),
        saved,
    )


def _open_huggingface(path: Path, config: ModelConfig | None) -> _Opened:
    found = HuggingFaceCheckpoint(path)
    if config is not None:
        check_same_model(config, found.config, path)
    for prefix, module in described_model(found.config).named_modules():
        if not isinstance(module, Pattention):
            continue
        name = f"{prefix}.tau_tokens"
        if name not in found.names:
            raise UserError(f"{path} has no tensor {name}, without which a layer computes something else")
        tau = _usable(name, found.tensor(name), torch.float32, path)
        if fault := tau_fault(int(tau), module.num_tokens):
            raise UserError(f"{path}: {name} {fault}; give a model that is whole")
    return found.names, found.shape, found.tensor, found.config


@dataclass
class _Usable(Tensors):
    """Tensors that are looked at, whole, when they are read: all tensor ranks then stop alike."""

    found: list[str]
    shape_of: Callable[[str], tuple[int, ...]]
    tensor_of: Callable[[str], Tensor]
    dtype: torch.dtype
    path: Path

    def names(self, kind: str) -> list[str]:
        """Names of the model's tensors."""
        return self.found if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        return self.shape_of(name)

    def tensor(self, kind: str, name: str) -> Tensor:
        """The tensor; UserError where a model in `dtype` could not compute with it."""
        return _usable(name, self.tensor_of(name), self.dtype, self.path)


def _usable(name: str, tensor: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    """The tensor; UserError where a model in `dtype` could not compute with it."""
    if name.endswith(".tau_tokens"):
        is_count = tensor.dtype == torch.int64 and not tensor.ndim
        fault = None if is_count else f"is {dtype_name(tensor)} of shape {list(tensor.shape)} instead of one int64"
    else:
        fault = weight_fault(tensor)
    if fault := fault or value_fault("model", name, tensor):
        raise UserError(f"{path}: {name} {fault}; give a model that is whole")
    is_narrowed = tensor.is_floating_point() and torch.finfo(tensor.dtype).max > torch.finfo(dtype).max
    if is_narrowed and tensor.numel() and max(-tensor.min(), tensor.max()) > torch.finfo(dtype).max:
        raise UserError(
            f"precision: {name} of {path} has values that {str(dtype).removeprefix('torch.')} cannot hold; "
            "choose bf16 or fp32"
        )
    return tensor
