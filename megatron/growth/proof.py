"""Do two sets of tensors compute the same? Logits before and after a growth, one layer in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron.checkpoint.tensors import Tensors
from megatron.errors import UserError
from megatron.exchange import Checkpoint
from megatron.model.blocks import BuildOptions
from megatron.model.build import layer_lists
from megatron.model.fill import fill
from megatron.model.layered import LayerSpec
from megatron.mpu.collectives import max_over_ranks
from megatron.mpu.device import ieee_products, products_are_exact
from megatron.mpu.layout import SINGLE, Layout
from megatron.mpu.shard import allocate

# Largest difference of logits, as a part of the largest logit, that rounding in fp32 explains.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """Logits before and after: the largest difference, and the largest logit before."""

    largest: float
    scale: float

    def check(self, what: str) -> None:
        """Raise a UserError when rounding does not explain the difference."""
        if not math.isfinite(self.largest):
            raise UserError(
                f"growth: {what}: logits before or after are not finite, so nothing is proven; nothing was written; "
                "grow an earlier checkpoint"
            )
        if self.largest > TOLERANCE * max(1.0, self.scale):
            raise UserError(
                f"growth: {what} changes logits by {self.largest:.2e} (largest logit {self.scale:.2e}), more than "
                f"{TOLERANCE:.0e} of it; nothing was written and the checkpoint before is intact"
            )


@torch.no_grad()
def compare_logits(
    before: Checkpoint,
    after: Checkpoint,
    inputs: Sequence[Tensor],
    layout: Layout = SINGLE,
    dtype: torch.dtype = torch.float32,
) -> Difference:
    """Outputs of two checkpoints, which need not be on disk, for one input of each list of layers.

    For a language model these are the logits of ids [b, s].

    Tensor ranks share every layer; pipeline stages and data ranks each do the same work. Never more than one layer of
    each model is in memory. Products are taken in IEEE fp32 whatever TF32 settings say, in fp64 where a library keeps
    rounding them to fewer bits: TF32's error would hide, or pass for, a change of the function.
    """
    plain = replace(layout, sequence_parallel=False)
    options = BuildOptions(device="meta", layout=plain, gather_logits=False)
    device = inputs[0].device
    found = []
    with ieee_products():
        rounds = torch.tensor(not products_are_exact(device), dtype=torch.int32, device=device)
        if dtype == torch.float32 and max_over_ranks(rounds, plain.tensor):
            dtype = torch.float64
        lists = (layer_lists(checkpoint.model_config, options).items() for checkpoint in (before, after))
        olds, news = dict[str, Tensor](), dict[str, Tensor]()
        for x, (name, old_specs), (_, new_specs) in zip(inputs, *lists, strict=True):
            old = new = x
            for old_spec, new_spec in zip(old_specs, new_specs, strict=True):
                old = _run(old_spec, before.tensors, old, x, olds, plain, dtype)
                new = _run(new_spec, after.tensors, new, x, news, plain, dtype)
            olds[name], news[name] = old, new
            found.append(torch.stack([(old - new).abs().max(), old.abs().max()]))
    # Not a number becomes infinite: a maximum over ranks may lose the former.
    extremes = torch.stack(found).nan_to_num(nan=math.inf, posinf=math.inf).amax(0)
    largest, scale = max_over_ranks(extremes, plain.tensor).tolist()
    return Difference(largest, scale)


def _run(
    spec: LayerSpec, tensors: Tensors, x: Tensor, of_list: Tensor, outputs: Mapping[str, Tensor], layout: Layout,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The layer's output for x, in a list with the input `of_list`, from tensors that are let go of at once.

    outputs: of the lists before.
    """
    module = spec.build()
    allocate(module, x.device)
    module.to(dtype).eval()
    fill(module, tensors, layout, f"{spec.name}.")
    return spec.bound(module, of_list, outputs)(x)
