"""How long the order of samples takes to build, by measurement, and what that makes of the Pile and of 2T tokens.

    python -m tools.bench.samples [--documents 1000000 5000000] [--length 2048] [--rounds 3] [--json FILE]

Every number of documents is measured at two mean lengths. Time, memory and files grow with documents and with samples;
both costs are fitted to the measurements and extrapolated. An order of more than 2^28 samples is built epoch by epoch,
each when it is reached, so what is extrapolated for 2T tokens is one epoch of a corpus that large, and that of a run
that reads the Pile again and again is the Pile's.
"""

from __future__ import annotations

import sys
import tracemalloc
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from megatron.data.samples import build_order, count_samples
from megatron.errors import UserError, run_command
from megatron.text import align
from tools.bench.measure import as_document, clocked, compare, parser, take_turns, write_json

_MEAN_TOKENS = (600, 2400)
# Documents (Gao et al., The Pile, 2020) and tokens (Biderman et al., Pythia, 2023); 2T tokens at the same mean length.
_PILE_DOCUMENTS, _PILE_TOKENS = 210_607_728, 300e9
TARGETS = {
    "the Pile, one epoch": (_PILE_DOCUMENTS, _PILE_TOKENS),
    "2T tokens, one epoch": (_PILE_DOCUMENTS * 2e12 / _PILE_TOKENS, 2e12),
}


@dataclass
class Order:
    """One measured order."""

    documents: int
    samples: int
    seconds: float = 0.0
    peak: int = 0
    """Bytes that building it holds at once."""
    files: int = 0
    """Bytes of its three arrays."""


def lengths(documents: int, mean: int) -> Any:
    """Tokens of each document, int32; lengths spread as in web text."""
    random = np.random.RandomState(documents % 2**32)
    return np.maximum(1, random.exponential(mean, documents)).astype(np.int32)


def measured(documents: list[int], length: int, rounds: int) -> tuple[list[Order], dict[str, Any]]:
    """Every number of documents at both mean lengths: the orders, and their results by name."""
    orders, work = dict[str, Order](), dict[str, Any]()
    for number in documents:
        for mean in _MEAN_TOKENS:
            sizes = lengths(number, mean)
            samples = count_samples(1, int(sizes.sum(dtype=np.int64)), length)
            if samples < 1:
                raise UserError(f"--documents: {number} documents hold no sample of {length} tokens; give more")
            name = f"{number:,} documents, {samples:,} samples"
            orders[name], work[name] = Order(number, samples), partial(build_order, sizes, (0, number), 1, length, 1)
    cpu = torch.device("cpu")
    results = compare(take_turns({n: clocked(w, cpu) for n, w in work.items()}, rounds, warmup=0), next(iter(work)))
    for name, order in orders.items():
        order.seconds = results[name].minimum
        order.files, order.peak = _bytes(work[name])
    return list(orders.values()), results


def _bytes(work: Any) -> tuple[int, int]:
    tracemalloc.start()
    try:
        arrays = work()
        return sum(array.nbytes for array in arrays), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def fitted(orders: list[Order], what: str) -> tuple[float, float]:
    """(cost of a document, cost of a sample) that fit the measurements best, relative to each."""
    values = np.array([getattr(order, what) for order in orders], dtype=np.float64)
    counts = np.array([[order.documents, order.samples] for order in orders], dtype=np.float64)
    costs, *_ = np.linalg.lstsq(counts / values[:, None], np.ones(len(orders)), rcond=None)
    return float(max(0.0, costs[0])), float(max(0.0, costs[1]))


def extrapolated(orders: list[Order], length: int) -> list[Order]:
    """What the costs make of the targets."""
    found = []
    for documents, tokens in TARGETS.values():
        order = Order(int(documents), count_samples(1, int(tokens), length))
        for what in ("seconds", "peak", "files"):
            of_document, of_sample = fitted(orders, what)
            setattr(order, what, of_document * order.documents + of_sample * order.samples)
        found.append(order)
    return found


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--documents", type=int, nargs="+", default=[1_000_000, 5_000_000])
    flags.add_argument("--length", type=int, default=2048, help="tokens of a sample")
    options = flags.parse_args()
    if min(*options.documents, options.length, 1) < 1:
        raise UserError("--documents, --length: give positive numbers")
    orders, results = measured(options.documents, options.length, options.rounds)
    targets = dict(zip(TARGETS, extrapolated(orders, options.length), strict=True))
    rows: list[tuple[str, ...]] = [("", "documents", "samples", "seconds", "peak", "files")]
    rows += [_row("measured", order) for order in orders]
    rows += [_row(name, order) for name, order in targets.items()]
    print("\n".join(align(rows, [0])))
    settings = {**vars(options), "extrapolated": {name: vars(order) for name, order in targets.items()}}
    write_json(options.json, as_document("samples", {"measured": results}, settings, torch.device("cpu")))
    return 0


def _row(name: str, order: Order) -> tuple[str, ...]:
    sizes = (f"{value / 2**30:.2f} GiB" for value in (order.peak, order.files))
    return (name, f"{order.documents:,}", f"{order.samples:,}", f"{order.seconds:.2f}", *sizes)


if __name__ == "__main__":
    sys.exit(run_command(main))
