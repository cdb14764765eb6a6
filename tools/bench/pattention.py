"""Time and memory of Pattention's backends, of the paper's formula op by op, and of an MLP of equal FLOPs.

    python -m tools.bench.pattention [--tokens 2048] [--width 768] [--slots 768 3072] [--dtype fp32|bf16|fp16]
                                     [--activation l2_norm_gelu] [--backends fused compiled] [--rounds 15] [--json FILE]

One layer, forward and backward, all contestants in turn in every round. Ratios are to the MLP: two matrices and GELU,
no bias. u is one score matrix (tokens x slots entries); *kept u* is what autograd holds for the backward pass besides
input and parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import ConfigError, run_command
from megatron.ops.pattention import ParameterTokens
from megatron.ops.pattention_backends import BACKENDS, select_backend
from tools.bench import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MLP = "MLP"
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def op_by_op(x: Tensor, key: Tensor, value: Tensor, activation: str) -> Tensor:
    """The formula in single operations of torch, in the dtype of x, as the published models were trained."""
    scores = x @ key.transpose(0, 1)
    if activation == "softmax":
        return (torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True) * scores.shape[-1]) @ value
    values = F.gelu(scores) if activation == "gelu_l2_norm" else scores
    scaled = values / torch.norm(values, p=2, dim=-1, keepdim=True) * scores.shape[-1] ** 0.5
    return (scaled if activation == "gelu_l2_norm" else F.gelu(scaled)) @ value


def contestants(names: list[str], activation: str, device: torch.device) -> dict[str, Layer]:
    """Functions of x [T, d], key [n, d], value [n, d], the MLP first; a backend that cannot run here is left out."""
    found: dict[str, Layer] = {MLP: lambda x, key, value: F.gelu(x @ key.T) @ value}
    found["op by op"] = partial(op_by_op, activation=activation)
    for name in names:
        for recompute in (False, True) if name != "reference" else (False,):
            try:
                function = select_backend(name, device.type, recompute)[1]
            except ConfigError as error:
                print(f"{name} is left out: {error}")
                break
            label = f"{name}, scores recomputed" if recompute else name
            found[label] = partial(_one_layer, function, activation)
    return found


def _one_layer(function: Any, activation: str, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    tau_tokens = torch.tensor(len(key), device=x.device)
    result: Tensor = function(x, [ParameterTokens(key, value, tau_tokens)], activation)[0]
    return result


def compare(layers: dict[str, Layer], inputs: list[Tensor], rounds: int) -> dict[str, measure.Result]:
    """The contestants on one shape."""
    x, key, _ = inputs
    device, gradient = x.device, torch.randn_like(x)

    def work(layer: Layer) -> None:
        layer(*inputs).backward(gradient)

    def after() -> None:
        for tensor in inputs:
            tensor.grad = None

    timed = {name: measure.clocked(partial(work, layer), device, after) for name, layer in layers.items()}
    results = measure.compare(measure.take_turns(timed, rounds, warmup=2), MLP)
    unit = len(x) * len(key) * x.element_size()
    for name, layer in layers.items():
        results[name].kept_bytes = measure.kept_bytes(partial(layer, *inputs), inputs)
        results[name].peak_bytes = measure.peak_bytes(partial(work, layer), device)
        results[name].facts["kept u"] = round(results[name].kept_bytes / unit, 2)  # type: ignore[operator]
        after()
    return results


def main() -> int:
    """Measure, and print a table a shape."""
    parser = measure.parser(__doc__, rounds=15)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--slots", type=int, nargs="+", default=[768, 3072])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--activation", choices=("l2_norm_gelu", "gelu_l2_norm", "softmax"), default="l2_norm_gelu")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["reference", "fused", "triton"])
    options = parser.parse_args()
    device, tables = measure.default_device(), {}
    layers = contestants(options.backends, options.activation, device)
    for slots in options.slots:
        shapes = [(options.tokens, options.width), (slots, options.width), (slots, options.width)]
        made = [torch.randn(shape, device=device) * 0.1 for shape in shapes]
        inputs = [tensor.to(DTYPES[options.dtype]).requires_grad_() for tensor in made]
        title = f"{options.tokens} tokens, width {options.width}, {slots} slots, {options.dtype}, {options.activation}"
        tables[title] = compare(layers, inputs, options.rounds)
        print(f"{title}, {measure.where(device)}\n{measure.table(tables[title], ['kept u'])}\n", flush=True)
    measure.write_json(options.json, measure.as_document("pattention", tables, vars(options), device))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
