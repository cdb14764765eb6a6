"""A training step of TokenFormer beside models of equal FLOPs, measured in turn in one run.

    python -m tools.bench.step [--layers 12 --width 768 --heads 12 --length 512 --samples 1] [--backend auto]
                               [--contestants TokenFormer official ..] [--rounds 5] [--json FILE]

TokenFormer and Transformer are this project's, as training runs have them; `official` is the same TokenFormer with
Pattention as the published code writes it, one torch operation after the other; `MLPs` the same with two matrices and
GELU in its place; GPTNeoX is transformers'. The three have torch's own head and cross entropy. A step is forward,
backward, clipping and AdamW, in fp32 on a CPU and bf16 on a GPU. `peak` is what a step allocates beyond weights and
moments, `kept` what autograd holds at its fullest.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron.engine.adamw import AdamW
from megatron.errors import UserError, run_command
from megatron.mpu.gpus import peak_tflops
from tools.bench.measure import (
    Result,
    as_document,
    clocked,
    compare,
    default_device,
    kept_bytes,
    parser,
    peak_bytes,
    table,
    take_turns,
    where,
    write_json,
)
from tools.bench.step_models import Contestant, Shape, contestants

NAMES = ("TokenFormer", "official", "MLPs", "Transformer", "GPTNeoX")


def train_step(contestant: Contestant, ids: Tensor) -> Callable[[], None]:
    """What does one update."""
    model, parameters = contestant.model, list(contestant.model.parameters())
    optimizer = AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model.train()

    def step() -> None:
        contestant.loss(ids).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    shape: Shape, samples: int, names: list[str], backend: str, rounds: int, device: torch.device
) -> dict[str, Result]:
    """Results by contestant, ratios to the first."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ids = torch.randint(1, shape.vocabulary, (samples, shape.length + 1), generator=torch.Generator().manual_seed(0))
    ids, makers = ids.to(device), contestants(shape, device, backend)
    steps, kept = {}, dict[str, int]()
    for name in names:
        contestant = makers[name]()
        contestant.model.to(dtype)
        forward, own = partial(contestant.loss, ids), [*contestant.model.parameters(), ids]
        kept[name] = kept_bytes(forward, own)
        steps[name] = train_step(contestant, ids)
    results = compare(take_turns({name: clocked(step, device) for name, step in steps.items()}, rounds), names[0])
    for name, result in results.items():
        result.peak_bytes, result.kept_bytes = peak_bytes(steps[name], device), kept[name]
        result.facts = _rates(shape, samples, result, device)
    return results


def _rates(shape: Shape, samples: int, result: Result, device: torch.device) -> dict[str, Any]:
    tokens = samples * shape.length / result.median
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    facts: dict[str, Any] = {"tokens/s": f"{tokens:,.0f}"}
    return facts | ({"MFU": f"{tokens * shape.flops_per_token / (peak[0] * 1e12):.1%}"} if peak else {})


def _installed() -> list[str]:
    if find_spec("transformers") is not None:
        return list(NAMES)
    print("transformers is not installed: GPTNeoX is left out")
    return [name for name in NAMES if name != "GPTNeoX"]


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__, rounds=5)
    sizes = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50304, "length": 512, "samples": 1}
    for name, default in sizes.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--backend", default="auto", help="pattention_backend of the TokenFormer")
    flags.add_argument("--contestants", nargs="+", choices=NAMES, help="default: all that are installed")
    options = flags.parse_args()
    options.contestants = options.contestants or _installed()
    if min(getattr(options, name) for name in sizes) < 1:
        raise UserError("--layers, --width, --heads, --vocabulary, --length, --samples: give positive numbers")
    shape = Shape(options.layers, options.width, options.heads, options.vocabulary, options.length)
    device = default_device()
    results = measure(shape, options.samples, options.contestants, options.backend, options.rounds, device)
    print(
        f"{options.layers} blocks, width {options.width}, {options.samples} x {options.length} tokens, {where(device)}"
    )
    print(f"ratios are to {options.contestants[0]}'s; below 1 is faster")
    print(table(results, ["tokens/s", "MFU"] if device.type == "cuda" else ["tokens/s"]))
    write_json(options.json, as_document("step", {"step": results}, vars(options), device))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
