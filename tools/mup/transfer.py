"""The transfer check of muP: `python -m tools.mup.transfer results.json`; see docs/mup.md.

Models that are 2 and 4 times as wide or as deep, or with 2, 4 and 16 times as many tokens as a base model, are trained
on State of the Union addresses, read as bytes, at rates that double from one to the next; those of 4 times and more
without muP too. The file is written after every run, and a later call goes on from it; further seeds are for models of
up to 4 times.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.config import RunConfig, load_config
from megatron.config.sections.mup import MupKeys
from megatron.engine.optimizer import build_optimizer
from megatron.engine.settings import EngineSettings
from megatron.errors import UserError, run_command
from megatron.files import write_output
from megatron.model.build import build_model
from megatron.ops.cross_entropy import cross_entropy
from megatron.training.coord_check import AXES, sized_model
from tools.demo.prepare import read_addresses

BASE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "qkv_slot_num": 32, "proj_slot_num": 32,
    "ffn_slot_num": 64, "seq_length": 64, "rotary_pct": 0.25, "norm": "layernorm_nonparam", "final_norm": "layernorm",
    "output_layer_init_method": "scaled_normal", "init_method_std": 0.1, "mup_output_temp": 0.5,
    "padded_vocab_size": 256,
    "train_micro_batch_size_per_gpu": 8, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95]}},
}  # fmt: skip
FACTORS = {"width": (2, 4), "tokens": (2, 4, 16), "depth": (2, 4)}
"""By axis; a model is as many times the base model's size."""
PLAIN_FROM = ALL_SEEDS_TO = 4
"""The smallest factor that is tried without muP too, and the largest that is tried with further seeds."""
FIRST_SEED = 1234
"""Of the initialisation, the default one; those of further seeds follow it."""
RATES = tuple(2.0**-power for power in range(9, 3, -1))
"""From 2^-9 to 2^-4."""
UPDATES, WARMUP, LAST = 300, 0.1, 50
"""Of a run; the part of them before the peak rate; how many losses its result is the mean of."""


@dataclass(frozen=True)
class Run:
    """A training of one model at one rate."""

    use_mup: bool
    axis: str
    factor: int
    rate: float
    seed: int = 1

    @property
    def kind(self) -> str:
        """What its line in the table is called. The base model is the same with muP and without."""
        return "base" if self.factor == 1 else f"{'mup' if self.use_mup else 'plain'} {self.axis} {self.factor}"

    @property
    def name(self) -> str:
        """Of its loss in the file."""
        return run_name(self.kind, self.rate, self.seed)


def run_name(kind: str, rate: float, seed: int) -> str:
    """Of a loss in the file."""
    return f"{kind} {rate:g}" + (f" seed {seed}" if seed > 1 else "")


def configuration(use_mup: bool, axis: str, factor: int, rate: float, **keys: Any) -> RunConfig:
    """The base model with the sizes of one axis times `factor`. Without muP nothing else is another."""
    config = load_config([], {**BASE, **keys, "use_mup": True, "optimizer.params.lr": rate})
    model = sized_model(config.language, axis, factor)
    if not use_mup:
        model = model.replaced(**{key: None for key in MupKeys.model_fields if key.startswith("mup_base_")})
    return config.replaced(model=model)


def trained(config: RunConfig, batch: Callable[[int], Tensor], updates: int, last: int = LAST) -> float:
    """The mean loss of the last updates of a run; the rate rises, then falls to zero in a line.

    Args:
        batch: the token ids [b, s + 1] of an update.
    """
    settings = EngineSettings(config, config.update_size(1))
    model = build_model(config.model, seed=config.training.seed)
    optimizer = build_optimizer(model, settings)
    losses, warmup = [], max(1, round(WARMUP * updates))
    for number in range(updates):
        part = min((number + 1) / warmup, (updates - number) / (updates - warmup))
        for group in optimizer.param_groups:
            group["lr"] = settings.optimization.optimizer.params.lr * part * group["lr_scale"]
        ids = batch(number)
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    result = sum(losses[-last:]) / last
    return result if math.isfinite(result) else math.inf


def text_batches(size: int, length: int, seed: int = 1) -> Callable[[int], Tensor]:
    """The same bytes of the addresses for an update of any run of a seed."""
    text = np.frombuffer("\n\n".join(read_addresses()).encode(), dtype=np.uint8)

    def batch(number: int) -> Tensor:
        starts = np.random.default_rng(number + (seed - 1) * UPDATES).integers(len(text) - length - 1, size=size)
        return torch.from_numpy(np.stack([text[at : at + length + 1] for at in starts])).long()

    return batch


def runs(seeds: int = 1) -> Iterator[Run]:
    """Every run; those of the largest models with the first seed only."""
    for seed in range(1, seeds + 1):
        yield from (Run(True, "width", 1, rate, seed) for rate in RATES)
        for use_mup, axis in product((True, False), AXES):
            factors = [factor for factor in FACTORS[axis] if use_mup or factor >= PLAIN_FROM]
            factors = [factor for factor in factors if factor <= ALL_SEEDS_TO or seed == 1]
            yield from (Run(use_mup, axis, factor, rate, seed) for factor, rate in product(factors, RATES))


def means(losses: Mapping[str, float], kind: str) -> list[float]:
    """Mean losses of a kind of run, such as `base` or `mup tokens 4`, at RATES, over the seeds that have all of them.

    Empty where none has.
    """
    found = []
    for seed in count(1):
        names = [run_name(kind, rate, seed) for rate in RATES]
        if not all(name in losses for name in names):
            break
        found.append([losses[name] for name in names])
    return [statistics.mean(column) for column in zip(*found, strict=True)]


def best_rate(losses: Mapping[str, float], kind: str) -> float:
    """The best rate of a kind of run."""
    values = means(losses, kind)
    return RATES[values.index(min(values))]


def report(losses: Mapping[str, float]) -> Iterator[str]:
    """Markdown: a line a model that has been trained at every rate, its mean losses, the best one in bold."""
    yield f"| | {' | '.join(f'2^{round(math.log2(rate))}' for rate in RATES)} |"
    yield f"|---|{'---|' * len(RATES)}"
    for kind in dict.fromkeys(run.kind for run in runs()):
        if values := means(losses, kind):
            cells = [f"**{value:.3f}**" if value == min(values) else f"{value:.3f}" for value in values]
            yield f"| {kind} | {' | '.join(cells)} |"


def known_losses(path: Path) -> dict[str, float]:
    """What a file of results has, by name of the run; nothing where there is none. UserError for another file."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["losses"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"FILE: {path} is no file of results; name another one") from None


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="transfer.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("results", type=Path, metavar="FILE", help="results as JSON, read first where it is there")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name contains this")
    parser.add_argument("--seeds", type=int, default=1, help="how many, of initialisation and order of data")
    return parser.parse_args(argv)


def main() -> int:
    """Run what the file does not have yet, and print the table."""
    options = parse(sys.argv[1:])
    path: Path = options.results
    losses = known_losses(path)
    torch.set_num_threads(1)
    size, length = BASE["train_micro_batch_size_per_gpu"], BASE["seq_length"]
    batches = {seed: text_batches(size, length, seed) for seed in range(1, options.seeds + 1)}
    for run in runs(options.seeds):
        if run.name in losses or options.only not in run.name:
            continue
        begin = time.perf_counter()
        config = configuration(run.use_mup, run.axis, run.factor, run.rate, seed=FIRST_SEED + run.seed - 1)
        losses[run.name] = round(trained(config, batches[run.seed], UPDATES), 4)
        print(f"{run.name}: {losses[run.name]:.4f} ({time.perf_counter() - begin:.0f} s)", flush=True)
        document = {"base": BASE, "updates": UPDATES, "rates": RATES, "losses": losses}
        write_output(path, json.dumps(document, indent=1) + "\n", "FILE")
    print("\n".join(report(losses)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
