"""Time and memory of Pattention's backends beside a bias-free MLP of equal FLOPs, measured in turn in one run.

    python -m tools.bench.pattention [--tokens 2048] [--width 768] [--slots 3072] [--dtype fp32] [--rounds 15]

Prints, for each, the median ratio of its forward + backward time to the MLP's in the same round, and how many score
matrices (u = tokens x slots entries) autograd keeps for the backward pass besides input and parameters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import run_command
from megatron.ops.pattention import pattention_reference
from megatron.ops.pattention_fused import pattention_fused

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def layers(slots: int, device: torch.device) -> dict[str, Layer]:
    """The contestants: functions of x [T, d], key [n, d], value [n, d]."""
    tau = torch.tensor(slots, device=device)
    return {
        "MLP (two matrices, GELU)": lambda x, key, value: F.gelu(x @ key.T) @ value,
        "Pattention reference": lambda x, key, value: pattention_reference(x, key, value, tau, "l2_norm_gelu"),
        "Pattention fused": lambda x, key, value: pattention_fused(x, key, value, tau, "l2_norm_gelu"),
    }


def seconds(layer: Layer, inputs: list[Tensor]) -> float:
    """Time of one forward and backward pass."""
    start = time.perf_counter()
    layer(*inputs).sum().backward()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    for tensor in inputs:
        tensor.grad = None
    return elapsed


def kept_bytes(layer: Layer, inputs: list[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, inputs and parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(*inputs)
    total = sum(kept.values())
    del output
    return total


def main() -> int:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 2048), ("width", 768), ("slots", 3072), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    options = parser.parse_args()
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), DTYPES[options.dtype]
    shapes = [(options.tokens, options.width), (options.slots, options.width), (options.slots, options.width)]
    inputs = [(torch.randn(shape, device=device, dtype=dtype) * 0.1).requires_grad_() for shape in shapes]
    contestants = layers(options.slots, device)
    rounds = [{name: seconds(layer, inputs) for name, layer in contestants.items()} for _ in range(options.rounds + 2)]
    baseline, unit = next(iter(contestants)), options.tokens * options.slots * inputs[0].element_size()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{options.tokens} tokens, width {options.width}, {options.slots} slots, {options.dtype}, {where}")
    for name, layer in contestants.items():
        ratio = statistics.median(times[name] / times[baseline] for times in rounds[2:])
        print(f"{name:26s} time x {ratio:5.2f}   keeps {kept_bytes(layer, inputs) / unit:5.2f} u")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
