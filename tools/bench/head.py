"""Time and memory of the head and its loss in chunks beside all logits at once, measured in turn in one run.

    python -m tools.bench.head [--tokens 2048] [--width 768] [--vocabulary 50304] [--dtype fp32] [--rounds 7]
                               [--json FILE] [--cpu-seconds]

One forward and backward pass from the hidden state to the gradients of hidden state and weight, and the losses alone.
Peaks are what torch's allocator held at once besides inputs; that of the chunks is measured for two numbers of tokens
and extrapolated to --target-tokens, forward and backward pass each by a line. Errors are those of both gradients
against fp64, of the first 512 tokens. On a machine that others load, --cpu-seconds counts what one thread works instead
of how long it takes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.errors import run_command
from megatron.mpu.device import DTYPES
from megatron.ops.cross_entropy import cross_entropy
from megatron.ops.linear_cross_entropy import chunk_rows, linear_cross_entropy
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

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
ERROR_TOKENS = 512


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits, then their loss."""
    return cross_entropy(torch.nn.functional.linear(hidden, weight), labels)


CONTESTANTS: dict[str, Loss] = {"eager": eager, "chunked": linear_cross_entropy}


class Inputs:
    """A hidden state, a weight and labels at the scale of a model's first step."""

    def __init__(self, tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(tokens, width, generator=generator, device=device)
        weight = torch.randn(vocabulary, width, generator=generator, device=device) * 0.02
        self.hidden, self.weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        self.labels = torch.randint(vocabulary, (tokens,), generator=generator, device=device)

    def first(self, tokens: int, dtype: torch.dtype) -> Inputs:
        """The first tokens, in another dtype."""
        part = object.__new__(Inputs)
        part.hidden = self.hidden.detach()[:tokens].to(dtype, copy=True).requires_grad_()
        part.weight = self.weight.detach().to(dtype, copy=True).requires_grad_()
        part.labels = self.labels[:tokens]
        return part

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden state, weight, labels."""
        return self.hidden, self.weight, self.labels

    def train(self, loss: Loss) -> None:
        """Forward and backward."""
        loss(*self.tensors).backward()

    def evaluate(self, loss: Loss) -> None:
        """The loss alone."""
        with torch.no_grad():
            loss(*self.tensors)

    def forget(self) -> None:
        """Take the gradients away."""
        self.hidden.grad = self.weight.grad = None

    def gradients(self, loss: Loss) -> list[Tensor]:
        """In fp64."""
        self.train(loss)
        found = [x.grad.double() for x in (self.hidden, self.weight) if x.grad is not None]
        self.forget()
        return found


def worked(work: Callable[[], object], after: Callable[[], object]) -> Callable[[], float]:
    """`work` timed by the CPU seconds of this process; `after` tidies up when the clock has stopped."""

    def run() -> float:
        start = time.process_time()
        work()
        elapsed = time.process_time() - start
        after()
        return elapsed

    return run


def peak(inputs: Inputs, loss: Loss, device: torch.device) -> int:
    """Of one forward and backward pass, its gradients included."""
    found = peak_bytes(partial(inputs.train, loss), device)
    inputs.forget()
    return found


def errors(inputs: Inputs, dtype: torch.dtype) -> dict[str, float]:
    """Of each contestant, the larger relative error of its two gradients."""
    exact = inputs.first(ERROR_TOKENS, torch.float64).gradients(eager)
    small, found = inputs.first(ERROR_TOKENS, dtype), {}
    for name, loss in CONTESTANTS.items():
        pairs = zip(small.gradients(loss), exact, strict=True)
        found[name] = max(((left - right).norm() / right.norm()).item() for left, right in pairs)
    return found


def peaks_of_passes(inputs: Inputs, device: torch.device) -> list[int]:
    """Of the chunks' forward pass, and of their backward pass with what the forward pass has left."""
    losses: list[Tensor] = []
    forward = peak_bytes(lambda: losses.append(linear_cross_entropy(*inputs.tensors)), device)
    kept = kept_bytes(lambda: linear_cross_entropy(*inputs.tensors), inputs.tensors)
    backward = kept + peak_bytes(losses[0].backward, device)
    inputs.forget()
    return [forward, backward]


def extrapolated_peak(make: Callable[[int], Inputs], rows: int, target: int, device: torch.device) -> int:
    """Peak of the chunks at `target` tokens: each pass's is a line beyond one chunk, drawn through two numbers."""
    few, more = 2 * rows, 3 * rows
    lines = zip(*(peaks_of_passes(make(tokens), device) for tokens in (few, more)), strict=True)
    return max(round(high + (high - low) / (more - few) * (target - more)) for low, high in lines)


def main() -> int:
    """Measure and print two tables, of training and of evaluation."""
    flags = parser(__doc__, rounds=7)
    for name, default in (("tokens", 2048), ("width", 768), ("vocabulary", 50304), ("target-tokens", 64 * 2048)):
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--dtype", choices=DTYPES, default="fp32")
    flags.add_argument("--cpu-seconds", action="store_true", help="one thread, timed by the CPU seconds it takes")
    options = flags.parse_args()
    if options.cpu_seconds:
        torch.set_num_threads(1)
    device, dtype = default_device(), DTYPES[options.dtype]
    make = partial(Inputs, width=options.width, vocabulary=options.vocabulary, dtype=dtype, device=device)
    inputs = make(options.tokens)
    tables: dict[str, dict[str, Result]] = {}
    for title, use in (("training", inputs.train), ("evaluation", inputs.evaluate)):
        clock = worked if options.cpu_seconds else partial(clocked, device=device)
        timed = {name: clock(partial(use, loss), after=inputs.forget) for name, loss in CONTESTANTS.items()}
        tables[title] = compare(take_turns(timed, options.rounds), "eager")
    distances = errors(inputs, dtype)
    for name, result in tables["training"].items():
        result.peak_bytes, result.facts["error"] = peak(inputs, CONTESTANTS[name], device), f"{distances[name]:.2e}"
    rows = chunk_rows(options.vocabulary, dtype.itemsize, device.type)
    settings: dict[str, Any] = {**vars(options), "chunk_rows": rows}
    settings["extrapolated_peak_bytes"] = extrapolated_peak(make, rows, options.target_tokens, device)
    sizes = f"{options.tokens} tokens, width {options.width}, vocabulary {options.vocabulary}"
    print(f"{sizes}, {options.dtype}, {where(device)}")
    for title, results in tables.items():
        print(f"\n{title}\n{table(results, ['error'] if title == 'training' else [])}")
    gib = settings["extrapolated_peak_bytes"] / 2**30
    print(f"\nchunks of {rows} rows; their peak extrapolated to {options.target_tokens} tokens: {gib:.2f} GiB")
    write_json(options.json, as_document("head", tables, settings, device))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
