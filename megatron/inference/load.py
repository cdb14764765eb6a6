"""Any checkpoint to a model in eval mode."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megatron.checkpoint.tensors import TensorView
from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig
from megatron.errors import UserError
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.exchange.names import EMBEDDING
from megatron.growth.schedule import GrowthSchedule
from megatron.model import LanguageModel
from megatron.model.compatibility import check_same_model
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
            `pytorch_model.bin` or training folder (see megatron.exchange.official_folder), for which `config` is
            needed, or a folder in Hugging Face's form: an export of this package or a GPT-NeoX (Pythia) model.
        config: what the model must be. Folders carry their own; one given here must agree with it.
        dtype: of the parameters; default fp32, and `saved` is that of the checkpoint's embedding.
        device: default the CPU.
        iteration: which of a run's checkpoints; default the latest.
        layout: the grid; each tensor rank holds its share of the model, and gets whole logits.

    Raises: UserError when there is no checkpoint, it is damaged, it does not fit the configuration, or a tensor has
        values that are not finite, as saved or in `dtype`.
    """
    checkpoint = open_checkpoint(path, config, iteration)
    return model_of(checkpoint, config, dtype, device, attention_backend=attention_backend, layout=layout)


def model_of(
    checkpoint: Checkpoint,
    config: RunConfig | ModelConfig | None = None,
    dtype: torch.dtype | Literal["saved"] | None = None,
    device: torch.device | str | None = None,
    *,
    attention_backend: str = "sdpa",
    layout: Layout = SINGLE,
) -> LanguageModel:
    """`load_model` of a checkpoint that is open. Collective."""
    first_rank_does(lambda: checkpoint.verify("model"), layout)
    described = checkpoint.language
    if isinstance(config, RunConfig):  # its model is the one before the growths of its schedule
        lineage = checkpoint.train_state.get("lineage", [])
        config = GrowthSchedule(config.scaling).as_saved(config.language, described, lineage).model
    if config is not None:
        check_same_model(config, described, checkpoint.folder)
    model = LanguageModel(described, device=device, attention_backend=attention_backend, layout=layout)
    if dtype is None or dtype == "saved":
        dtype = checkpoint.tensors.tensor("model", EMBEDDING).dtype if dtype else torch.float32
    tensors = _Narrowed(checkpoint, dtype)
    fill(model, tensors, layout)
    return model.to(dtype).eval()


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
