"""Process groups that are made once and kept.

A group costs a connection to each of its ranks, on GPUs an NCCL communicator with buffers of its own, and there is no
safe way of giving one back while a run goes on. A process that builds several engines, as one does whose model grows,
therefore uses the groups of the first one again.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup


class _Purpose(NamedTuple):
    """What a group is for. Two purposes never share a group: their messages may be on their way at the same time."""

    role: str
    ranks: tuple[int, ...]
    timeout: timedelta | None


# By the world they are part of: a world that is left takes its groups with it.
_groups: WeakKeyDictionary[ProcessGroup, dict[_Purpose, ProcessGroup]] = WeakKeyDictionary()


def process_group(role: str, ranks: Iterable[int], timeout: timedelta | None = None) -> ProcessGroup:
    """The group of `ranks` that serves `role`, made when it is first asked for.

    Collective over the world, for all ranks: torch makes a group on those, too, that are not in it. These get torch's
    mark for "not a member".

    Args:
        timeout: how long a collective waits for a rank; default that of the backend. Another limit is another group.
    """
    world = dist.group.WORLD
    if world is None:
        raise ValueError("process_group: there is no process group to be part of; join one first")
    groups = _groups.setdefault(world, {})
    purpose = _Purpose(role, tuple(sorted(ranks)), timeout)
    if purpose not in groups:
        groups[purpose] = dist.new_group(list(purpose.ranks), timeout=timeout)
    return groups[purpose]
