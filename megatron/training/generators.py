"""Random-number generators of a process: seeded, saved and restored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron.checkpoint.reader import CheckpointReader
from megatron.exchange import Checkpoint
from megatron.log import get_logger
from megatron.mpu import Layout
from megatron.mpu.device import uses_gpu


def random_states(rank: int) -> Iterator[tuple[str, Tensor]]:
    """This process's generator states, `rank{r}/{generator}`."""
    yield from ((f"rank{rank}/{kind}", state) for kind, state in _local_random_states().items())


def _local_random_states() -> dict[str, Tensor]:
    _, python_state, _ = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    keys, position = numpy_state[1:3]
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(python_state, dtype=torch.int64),
        "numpy": torch.tensor([*map(int, keys), position], dtype=torch.int64),
    }
    if uses_gpu():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def seed_generators(seed: int, layout: Layout, iteration: int = 0) -> None:
    """Seed this process's generators; the tensor ranks of one place of the grid draw the same numbers.

    Dropout that has to differ between tensor ranks derives its own streams (megatron.mpu.random).
    """
    place = layout.rank // layout.tensor.size
    if iteration:
        digest = hashlib.blake2b(f"{seed}/{iteration}/{place}".encode(), digest_size=4).digest()
        seed, place = int.from_bytes(digest, "little"), 0
    torch.manual_seed(seed + place)
    random.seed(seed + place)
    np.random.seed((seed + place) % 2**32)


def restore_random_states(seed: int, checkpoint: Checkpoint, layout: Layout) -> None:
    """Set this rank's generators as saved; seed them afresh when the run that saved had another grid."""
    saved, tensors = checkpoint.resolved(), checkpoint.tensors
    axes = {"model_parallel_size": layout.tensor, "pipe_parallel_size": layout.pipeline}
    saved_ranks = {name.partition("/")[0] for name in tensors.names("rng")}
    same_axes = all(max(1, saved.get(key) or 1) == axis.size for key, axis in axes.items())
    if not same_axes or len(saved_ranks) != layout.world_size:
        seed_generators(seed, layout, checkpoint.iteration or 0)
        get_logger().info(
            "%s has no random-number states of this process grid: going on from a new seed", checkpoint.folder
        )
        return
    prefix = f"rank{layout.rank}/"
    values = {n.removeprefix(prefix): tensors.tensor("rng", n) for n in tensors.names("rng") if n.startswith(prefix)}
    torch.set_rng_state(values["torch"])
    random.setstate(_python_state(values["python"]))
    np.random.set_state(_numpy_state(values["numpy"]))
    if "cuda" in values and uses_gpu():
        torch.cuda.set_rng_state(values["cuda"])


def _python_state(saved: Tensor) -> tuple[int, tuple[int, ...], None]:
    return 3, tuple(saved.tolist()), None


def _numpy_state(saved: Tensor) -> tuple[str, Any, int, int, float]:
    *keys, position = saved.tolist()
    return "MT19937", np.array(keys, dtype=np.uint32), position, 0, 0.0


def check_saved_states(reader: CheckpointReader) -> str | None:
    """What is wrong with the generators' states of a checkpoint, tried on generators of no use."""
    ranks: dict[str, set[str]] = {}
    for name in reader.names("rng"):
        rank, _, kind = name.partition("/")
        ranks.setdefault(rank, set()).add(kind)
        try:
            _try_state(kind, reader.tensor("rng", name))
        except (RuntimeError, TypeError, ValueError, OverflowError, IndexError):
            return f"has no random-number state in {name[:80]}"
    expected = {f"rank{number}" for number in range(len(ranks))}
    if ranks.keys() != expected or not all(kinds >= {"torch", "python", "numpy"} for kinds in ranks.values()):
        return "lacks random-number states of some ranks"
    return None


def _try_state(kind: str, saved: Tensor) -> None:
    if kind == "torch":
        torch.Generator().set_state(saved)
    elif kind == "python":
        random.Random().setstate(_python_state(saved))
    elif kind == "numpy":
        np.random.RandomState().set_state(_numpy_state(saved))
    elif kind != "cuda" or saved.dtype != torch.uint8 or saved.dim() != 1:
        raise ValueError(kind)
