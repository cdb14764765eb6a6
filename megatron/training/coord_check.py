"""The coordinate check of `coord_check`: do activations keep their size in models of several sizes, as they train?

With muP they do, and move equally far; see docs/mup.md. Source: Yang et al., Tensor Programs V, appendix D.1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.config.sections.model import ModelConfig
from megatron.config.update_size import UpdateSize
from megatron.engine.distributed import initialize_distributed
from megatron.engine.optimizer import build_optimizer
from megatron.engine.settings import EngineSettings
from megatron.files import write_errors
from megatron.log import get_logger
from megatron.model.build import build_model
from megatron.model.layered import LayeredModel, block_of
from megatron.mpu.device import process_device
from megatron.mpu.layout import ALONE, SINGLE
from megatron.mpu.processes import first_rank_does
from megatron.tasks import Task, build_task
from megatron.training.data import RunData
from megatron.training.state import TrainState

STEPS = 8
"""Updates, at the peak learning rate from the first on."""
AXES = {
    "width": ("hidden_size",),
    "tokens": ("qkv_slot_num", "proj_slot_num", "ffn_slot_num"),
    "depth": ("num_layers",),
}
"""The sizes that grow together."""
_BASES = (*(key for keys in AXES.values() for key in keys), "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Coordinates:
    """Root mean squares of one activation on the same inputs, before the first update and after each."""

    sizes: list[float]
    changes: list[float]
    """Of the difference to what it was before the first update."""


def sized_model(model: ModelConfig, axis: str, factor: int) -> ModelConfig:
    """The base model, or without one the model itself, with the sizes of one axis times `factor`."""
    sizes = {key: getattr(model, f"mup_base_{key}") or getattr(model, key) for key in _BASES}
    grown = {key: size * factor for key, size in sizes.items() if key in AXES[axis] and size}
    if "hidden_size" in grown and sizes["intermediate_size"]:
        grown["intermediate_size"] = sizes["intermediate_size"] * factor
    bases = {f"mup_base_{key}": size for key, size in sizes.items()}
    kinds = [[list(dict.fromkeys(model.layer_kinds)), "all"]]  # of a model of any depth
    return model.replaced(**sizes | grown | bases, attention_config=kinds, token_segments=None, segment_norms=None)


def coordinates(config: RunConfig, task: Task[Any], batches: Sequence[Any]) -> dict[str, Coordinates]:
    """Activations of the model of `config`, by name, as it trains on one batch after the other.

    Args:
        task: splits batches, and has the loss.
        batches: one an update; the activations are those on the first.
    """
    device, settings = process_device(), EngineSettings(config, _update(config))
    model = build_model(config.model, seed=config.training.seed, device=device)
    optimizer = build_optimizer(model, settings)
    for group in optimizer.param_groups:
        group["lr"] = settings.optimization.optimizer.params.lr * group.get("lr_scale", 1.0)
    inputs, _ = task.split(batches[0], device)
    found = [_activations(model, inputs)]
    for batch in batches:
        inputs_now, targets = task.split(batch, device)
        task.loss(model(*inputs_now), targets, SINGLE).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(_activations(model, inputs))
    return {
        name: Coordinates([_size(each[name]) for each in found], [_size(each[name] - first) for each in found])
        for name, first in found[0].items()
    }


def _size(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


@torch.no_grad()
def _activations(model: LayeredModel, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Output of the first layer, the stream after the first and the last block, and the model's output."""
    parts = list(model.parts())
    blocks = [module for name, module in parts if block_of(name) is not None]
    watched = {"embedding": parts[0][1], "first block": blocks[0], "last block": blocks[-1]}
    found: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        found.setdefault(name, output)  # a tied embedding is called once more, as the head

    hooks = [m.register_forward_hook(lambda _, __, out, name=n: note(name, out)) for n, m in watched.items()]
    output = model.eval()(*inputs)
    model.train()
    for hook in hooks:
        hook.remove()
    return {**found, "logits": output}


def _update(config: RunConfig) -> UpdateSize:
    """One micro-batch on one process, whatever the run has."""
    micro = config.training.train_micro_batch_size_per_gpu or 1
    return UpdateSize.of(micro, None, None, 1, config.model.tokens_per_sample())


def check_coordinates(config: RunConfig) -> None:
    """What a command does in place of training with `coord_check`: the first of its processes checks. Collective."""
    first_rank_does(lambda: measure_coordinates(config), initialize_distributed(config))


def measure_coordinates(config: RunConfig) -> dict[str, Any]:
    """Train models of three sizes along each axis for a few updates; log a table, and write what was measured.

    It goes to coord_check.json in log_dir, else save, and where matplotlib is installed to coord_check.png.

    Returns: axis -> size -> activation -> `sizes` and `changes`.
    """
    task = build_task(config.replaced(**{"data.num_workers": 0}))
    stream = RunData(task, TrainState(), _update(task.config), ALONE).training()
    batches = [next(stream)[0] for _ in range(STEPS)]
    found = _measured(task, batches, config.training.mup_width_scale)
    use_mup = task.config.language.use_mup
    get_logger().info("coordinate check, use_mup: %s\n%s", str(use_mup).lower(), "\n".join(table(found)))
    if folder := config.logging.log_dir or config.checkpoint.save:
        _write(Path(folder), {"use_mup": use_mup, **found})
    return found


def _measured(task: Task[Any], batches: Sequence[Any], scale: int) -> dict[str, Any]:
    model, found = task.config.language, dict[str, Any]()
    smallest: dict[str, Coordinates] = {}
    for axis in AXES if model.qkv_slot_num else ("width", "depth"):
        sizes = found.setdefault(axis, {})
        for factor in (1, scale, scale**2):
            sized = sized_model(model, axis, factor)
            known = smallest if factor == 1 else {}  # the same along every axis
            measured = known or coordinates(task.config.replaced(model=sized), task, batches)
            smallest = smallest or measured
            size = f"{AXES[axis][0]} {getattr(sized, AXES[axis][0])}"
            sizes[size] = {name: vars(activation) for name, activation in measured.items()}
    return found


def _write(folder: Path, document: dict[str, Any]) -> None:
    with write_errors(f"log_dir: {folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "coord_check.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        _draw({axis: document[axis] for axis in AXES if axis in document}, folder / "coord_check.png")


def table(found: dict[str, Any]) -> Iterator[str]:
    """Lines: each activation's size after the last update, and how far it has moved."""
    yield f"{'':22}{'activation':14}{'size at first':>15}{f'after {STEPS}':>12}{'moved':>12}"
    for sizes in found.values():
        for size, activations in sizes.items():
            for name, values in activations.items():
                first, last, moved = values["sizes"][0], values["sizes"][-1], values["changes"][-1]
                yield f"{size:22}{name:14}{first:15.4f}{last:12.4f}{moved:12.4f}"


def _draw(found: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        get_logger().info("no figure: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(next(iter(found.values())).values())))
    figure, axes = pyplot.subplots(len(found), len(names), figsize=(3 * len(names), 2.6 * len(found)), squeeze=False)
    for row, (axis, sizes) in zip(axes, found.items(), strict=True):
        for place, name in zip(row, names, strict=True):
            for update in range(1, STEPS + 1):
                moved = [activations[name]["changes"][update] for activations in sizes.values()]
                place.plot([size.split()[-1] for size in sizes], moved, marker=".", label=f"update {update}")
            place.set_yscale("log")
            place.set_title(f"{name}: moved, by {axis}", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
