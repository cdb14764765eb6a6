"""`compile: blocks`: torch.compile of each block of a model, in place, so that no parameter changes its name.

A block is compiled as a whole where torch can follow it. What it cannot follow stays outside and is called as it is:
Pattentions whose implementation is kernels and a backward pass of its own, layers that tensor ranks share, which send
messages, and dropout that differs between tensor ranks. Norms, residuals, rotary positions and activations are fused
around them.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from megatron.errors import RankError
from megatron.model.attention import SelfAttention
from megatron.model.blocks import Block
from megatron.model.joint import JointLayer
from megatron.model.linear import RowParallelLinear
from megatron.model.pattention import Pattention
from megatron.ops.pattention_backends import select_backend

# Written in operations of torch throughout; autograd's backward pass.
_TRACED_BACKENDS = ("reference",)
_KINDS_OF_A_BLOCK = 4  # training and not, with gradients and without


def compile_blocks(blocks: Sequence[nn.Module], device: torch.device, tokens: int) -> None:
    """Compile each block for the shapes it meets; that happens when it is first called.

    Args:
        tokens: of a sample. Rotary tables are made for as many, so that compiled code does not meet a first time.

    Raises: RankError where there is no compiler.
    """
    _require_compiler(device)
    for block in blocks:
        _prepare(block, device, tokens)
        block.compile(dynamic=False)
    dynamo: Any = torch._dynamo
    # Blocks of one class share what is kept for it; those that have grown differently need one each.
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _KINDS_OF_A_BLOCK * len(blocks))


def forget_compiled() -> None:
    """Let go of compiled code, which refers to the blocks it was made of."""
    torch.compiler.reset()


def _prepare(block: nn.Module, device: torch.device, tokens: int) -> None:
    together = set[nn.Module]()
    for module in block.modules():
        if isinstance(module, SelfAttention):
            if module.rotary is not None:
                module.rotary(tokens, device)
            projections = {module.query, module.key, module.value}
            together |= projections
            if not all(_is_traced(projection, device) for projection in projections):
                _leave_out(module, "projected")
            if module.dropout and module.axis.size > 1:
                _leave_out(module, "_attended")
        if isinstance(module, Block) and module.dropout and module.layout.sequence_parallel:
            _leave_out(module, "_drop")
    for module in block.modules():
        if module not in together and not _is_traced(module, device):
            _leave_out(module, "forward")


def _is_traced(module: Any, device: torch.device) -> bool:
    if isinstance(module, JointLayer | RowParallelLinear):
        axis: Any = module.axis
        if axis.size > 1:
            return False
    return not isinstance(module, Pattention) or select_backend(module.backend, device.type)[0] in _TRACED_BACKENDS


def _leave_out(module: nn.Module, method: str) -> None:
    """Compiled code calls this module's method as it is."""
    setattr(module, method, torch.compiler.disable(getattr(module, method)))


def _require_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise RankError("compile: blocks needs triton on a GPU; pip install triton, or set compile: none")
        names = [os.environ.get("CC") or "gcc", "clang", "cc"]
    else:
        names = [os.environ.get("CXX") or "g++"]
    if not any(shutil.which(name) for name in names):
        raise RankError(
            f"compile: blocks needs a C++ compiler, and {names[0]} is not on PATH; install it, or set compile: none"
        )
