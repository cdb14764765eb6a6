"""Saving and loading a training state, ours beside torch.distributed.checkpoint, in turns and on the same disk.

    python -m tools.bench.checkpoint [--layers 12 --width 768 --heads 12] [--folder DIR] [--rounds 5] [--json FILE]

One process, weights and both moments in fp32. `blocked` is how long training waits for an asynchronous save, after a
first one that is left out (its copy's memory is being made then); `done` is the time until the checkpoint is on the
disk, files flushed, and ours with its checksums. `load` begins with files that are not in the page cache, and ours
compares all checksums and looks at all values. `memory` is what a process has resident beyond its state after two
saves, each in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from megatron.checkpoint.pieces import whole_pieces
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.snapshot import HostBuffers
from megatron.checkpoint.state import CanonicalState
from megatron.checkpoint.store import RunFolder
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.engine.state import EngineState
from megatron.errors import UserError, run_command
from megatron.model.build import build_model
from megatron.model.fill import fill
from megatron.mpu import SINGLE
from megatron.training.saving import in_thread, save_together
from tools.bench.measure import as_document, compare, parser, table, take_turns, write_json
from tools.bench.step_models import Shape

NAMES = ("ours", "torch")


class Contestant(Protocol):
    """Who saves and loads."""

    def begin(self, folder: Path, number: int) -> Callable[[], object]:
        """Begin a save, as soon as training may go on; returns how to wait for its end."""

    def load(self, folder: Path) -> None:
        """Read the state that was saved there."""


class Ours(Contestant):
    """The saves of this project."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._state, self._buffers = model, EngineState(model, optimizer, 0), HostBuffers()

    def begin(self, folder: Path, number: int) -> Callable[[], object]:
        """See Contestant."""
        pieces = [*self._state.pieces(), *whole_pieces({"rng": [("rank0/torch", torch.get_rng_state())]})]
        state = CanonicalState(number, {}, {}, self._buffers.copies(pieces))
        work = partial(save_together, RunFolder(folder), state, SINGLE, False, CheckpointConfig())
        return in_thread(work).result

    def load(self, folder: Path) -> None:
        """See Contestant."""
        found = RunFolder(folder).find()
        assert found is not None
        reader = CheckpointReader(found)
        fill(self._model, reader)
        self._state.write_optimizer_state(reader)


class Torchs(Contestant):
    """torch.distributed.checkpoint, with the stager that keeps the memory of its copy, as ours does."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        moments = {names[p]: state for p, state in optimizer.state.items()}  # type: ignore[index]
        self._state: dict[str, Any] = {"model": dict(model.state_dict()), "optimizer": moments}
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(options)

    def begin(self, folder: Path, number: int) -> Callable[[], object]:
        """See Contestant."""
        target = folder / f"save{number}"
        found: Any = dcp.async_save(self._state, checkpoint_id=target, async_stager=self._stager, no_dist=True)
        return found.result

    def load(self, folder: Path) -> None:
        """See Contestant."""
        dcp.load(self._state, checkpoint_id=next(folder.glob("save*")), no_dist=True)


def training_state(shape: Shape) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after an update."""
    model = build_model(shape.tokenformer(), seed=0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def contestants(shape: Shape) -> dict[str, Contestant]:
    """Both, of the same tensors."""
    model, optimizer = training_state(shape)
    return {"ours": Ours(model, optimizer), "torch": Torchs(model, optimizer)}


Seconds = dict[str, list[float]]
"""Of each contestant, in each round."""


def saves(both: dict[str, Contestant], root: Path, rounds: int) -> tuple[Seconds, Seconds]:
    """Seconds by contestant: that training waited, and until the checkpoint was there. A first round does not count."""
    blocked: Seconds = {name: [] for name in both}
    numbers = {name: iter(range(rounds + 1)) for name in both}

    def save(name: str) -> float:
        folder = fresh(root / name)
        number, start = next(numbers[name]), time.perf_counter()
        finish = both[name].begin(folder, number)
        if number:
            blocked[name].append(time.perf_counter() - start)
        finish()
        return time.perf_counter() - start

    return blocked, take_turns({name: partial(save, name) for name in both}, rounds)


def fresh(folder: Path) -> Path:
    """An empty folder in the place of this one; what was written before is on the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.sync()
    return folder


def loads(both: dict[str, Contestant], root: Path, rounds: int) -> Seconds:
    """Seconds by contestant, of files that are not in memory."""

    def load(name: str) -> float:
        forget(root / name)
        start = time.perf_counter()
        both[name].load(root / name)
        return time.perf_counter() - start

    return take_turns({name: partial(load, name) for name in both}, rounds)


def forget(folder: Path) -> None:
    """Take the files of a folder out of the page cache."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def state_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def memory(shape: Shape, name: str, root: Path) -> tuple[int, int]:
    """(bytes resident after two saves beyond those before, bytes of the state) of a process that only saves."""
    both = contestants(shape)
    model, optimizer = both["ours"]._model, both["ours"]._state.inner  # type: ignore[attr-defined]
    moments = (value for state in optimizer.state.values() for value in state.values())
    size = state_bytes(model.parameters()) + state_bytes(moments)
    before = psutil.Process().memory_info().rss
    for number in range(2):
        both[name].begin(fresh(root / name), number)()
    return psutil.Process().memory_info().rss - before, size


def memory_apart(options: argparse.Namespace, name: str) -> tuple[int, int]:
    """`memory` of a new process."""
    command = [sys.executable, "-m", "tools.bench.checkpoint", "--memory-of", name, "--folder", options.folder]
    command += [f"--{key}={getattr(options, key)}" for key in ("layers", "width", "heads")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(output[-2]), int(output[-1])


def report(options: argparse.Namespace, shape: Shape, root: Path) -> None:
    """Measure and print."""
    both = contestants(shape)
    blocked, done = saves(both, root, options.rounds)
    tables = {"blocked": blocked, "done": done, "load": loads(both, root, options.rounds)}
    results = {what: compare(times, "torch") for what, times in tables.items()}
    for what, found in results.items():
        print(f"{what}; ratios are to torch's, below 1 is faster")
        print(f"{table(found)}\n")
    copies = {name: memory_apart(options, name) for name in NAMES}
    for name, (extra, size) in copies.items():
        print(f"memory of {name}: {extra / 2**30:.2f} GiB beyond a state of {size / 2**30:.2f} GiB: {extra / size:.2f}")
    document = as_document("checkpoint", results, vars(options), torch.device("cpu"))
    write_json(options.json, document | {"memory": copies})


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__, rounds=5)
    for name, default in {"layers": 12, "width": 768, "heads": 12}.items():
        flags.add_argument(f"--{name}", type=int, default=default)
    flags.add_argument("--folder", help="on the disk to be measured; default the one for temporary files")
    flags.add_argument("--memory-of", choices=NAMES, help=argparse.SUPPRESS)
    options = flags.parse_args()
    if min(options.layers, options.width, options.heads) < 1:
        raise UserError("--layers, --width, --heads: give positive numbers")
    shape = Shape(options.layers, options.width, options.heads)
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=options.folder) as root:
        options.folder = options.folder or str(Path(root).parent)
        if options.memory_of:
            print(*memory(shape, options.memory_of, Path(root)))
        else:
            report(options, shape, Path(root))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
