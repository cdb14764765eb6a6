"""Any checkpoint to a model in eval mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megatron.checkpoint.tensors import TensorView
from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig, ModelSection, language_section
from megatron.errors import UserError
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.exchange.names import is_parameter
from megatron.growth.schedule import GrowthSchedule
from megatron.model import LanguageModel
from megatron.model.blocks import BuildOptions
from megatron.model.build import build_model
from megatron.model.compatibility import check_same_model, check_same_task
from megatron.model.fill import fill
from megatron.model.layered import LayeredModel
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
    use_ema: bool = True,
) -> LanguageModel:
    """A model in eval mode.

    Args:
        path: a training checkpoint (its folder, or the folder of all of a run's checkpoints), the official code's flat
            `pytorch_model.bin` or training folder (see megatron.exchange.official_folder), for which `config` is
            needed, or a folder in Hugging Face's form: an export of this package or a GPT-NeoX (Pythia) model.
        config: what the model must be. Folders carry their own; one given here must agree with it.
        dtype: of the parameters; default fp32, and `saved` is that of the checkpoint's.
        device: default the CPU.
        iteration: which of a run's checkpoints; default the latest.
        layout: the grid; each tensor rank holds its share of the model, and gets whole logits.
        use_ema: the average of the weights where the run has kept one (ema_decay); False: the weights.

    Raises: UserError when there is no checkpoint, it is damaged, it does not fit the configuration, or a tensor has
        values that are not finite, as saved or in `dtype`.
    """
    checkpoint = open_checkpoint(path, config, iteration)
    if use_ema:
        checkpoint = checkpoint.averaged()
    return language_model_of(checkpoint, config, dtype, device, attention_backend=attention_backend, layout=layout)


def language_model_of(checkpoint: Checkpoint, *arguments: Any, **keywords: Any) -> LanguageModel:
    """`model_of` a checkpoint that has to be of a language model."""
    language_section(checkpoint.model_config)
    model = model_of(checkpoint, *arguments, **keywords)
    assert isinstance(model, LanguageModel), "of such a section"
    return model


def model_of(
    checkpoint: Checkpoint,
    config: RunConfig | ModelSection | None = None,
    dtype: torch.dtype | Literal["saved"] | None = None,
    device: torch.device | str | None = None,
    *,
    attention_backend: str = "sdpa",
    layout: Layout = SINGLE,
) -> LayeredModel:
    """`load_model` of a checkpoint that is open, whatever its model learns. Collective."""
    first_rank_does(lambda: checkpoint.verify("model"), layout)
    described = checkpoint.model_config
    if isinstance(config, RunConfig):  # its model is the one before the growths of its schedule
        check_same_task(config.model, described, checkpoint.folder)
        lineage = checkpoint.train_state.get("lineage", [])
        config = GrowthSchedule(config.scaling).as_saved(config.model, described, lineage).model
    if config is not None:
        check_same_model(config, described, checkpoint.folder)
    model = build_model(described, BuildOptions(attention_backend=attention_backend, layout=layout), device=device)
    if dtype is None or dtype == "saved":
        dtype = _saved_dtype(checkpoint) if dtype else torch.float32
    tensors = _Narrowed(checkpoint, dtype)
    fill(model, tensors, layout)
    return model.to(dtype).eval()


def _saved_dtype(checkpoint: Checkpoint) -> torch.dtype:
    first = next(filter(is_parameter, checkpoint.tensors.names("model")))
    return checkpoint.tensors.tensor("model", first).dtype


class _Narrowed(TensorView):
    """The tensors of a model that will compute in `dtype`; whole ones are looked at, so that all ranks stop alike."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        super().__init__(checkpoint.tensors)
        self._folder, self._dtype, self._largest = checkpoint.folder, dtype, torch.finfo(dtype).max

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor; UserError where `dtype` cannot hold its values."""
        tensor = super().tensor(kind, name)
        is_narrowed = tensor.is_floating_point() and torch.finfo(tensor.dtype).max > self._largest
        if is_narrowed and tensor.numel() and max(-tensor.min(), tensor.max()) > self._largest:
            raise UserError(
                f"precision: {name} of {self._folder} has values that {str(self._dtype).removeprefix('torch.')} "
                "cannot hold; choose bf16 or fp32"
            )
        return tensor
