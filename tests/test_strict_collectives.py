"""The strict network of the tests finds what it is there for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.strict_collectives import Traffic, order_faults, strict_collectives

pytestmark = pytest.mark.processes


def right() -> None:
    """Some of everything, as it should be."""
    rank, ones = dist.get_rank(), torch.ones(4)
    dist.all_reduce(ones)
    work = dist.all_reduce(ones, async_op=True)
    assert ones.isnan().all(), "the result is not there yet"
    work.wait()
    assert ones.tolist() == [4.0] * 4
    everyone = torch.zeros(4, dtype=torch.int64)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, torch.tensor([rank, 7]))
    assert everyone.tolist() == [0, 7, 1, 7]
    objects = [None, None]
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": 0}, {"rank": 1}]
    if rank == 0:
        dist.send(ones, 1)
    else:
        dist.recv(ones.zero_(), 0)
    assert ones.tolist() == [4.0] * 4
    dist.barrier()


def strided() -> None:
    dist.all_reduce(torch.ones(2, 3).T)


def of_a_wrong_type() -> None:
    """gloo refuses it, too, where it computes with it."""
    message = torch.ones(2, dtype=torch.int16)
    dist.send(message, 1) if dist.get_rank() == 0 else dist.recv(message, 0)


def empty() -> None:
    dist.all_reduce(torch.ones(0))


def never_waited_for() -> None:
    dist.all_reduce(torch.ones(2), async_op=True)


def changed_on_its_way() -> None:
    message = torch.ones(2)
    if dist.get_rank() == 0:
        work = dist.isend(message, 1)
        message.zero_()
        work.wait()
    else:
        dist.recv(message, 0)


def in_another_order() -> None:
    """Harmless with gloo where both are on their way at once; two kernels that wait for each other with NCCL."""
    first, second = dist.new_group([0, 1]), dist.new_group([0, 1])
    groups = (first, second) if dist.get_rank() == 0 else (second, first)
    for work in [dist.all_reduce(torch.ones(2), group=group, async_op=True) for group in groups]:
        work.wait()


def of_another_kind() -> None:
    """What gloo does not see either: both ranks send 16 bytes."""
    dtype, size = (torch.float32, 4) if dist.get_rank() == 0 else (torch.float64, 2)
    dist.broadcast(torch.ones(size, dtype=dtype), 0)


FAULTS: dict[Callable[[], None], str] = {
    strided: "not contiguous, [3, 2] by [1, 3]: allreduce SUM",
    of_a_wrong_type: "NCCL has no torch.int16: message 0 -> 1",
    empty: "empty: allreduce",
    never_waited_for: "nothing waited for allreduce",
    changed_on_its_way: "changed while it was sent: message 0 -> 1",
}


def watched(functions: list[Callable[[], None]]) -> list[Traffic]:
    dist.init_process_group("gloo")
    found = []
    for function in functions:
        with strict_collectives() as traffic:
            function()
        found.append(traffic)
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones.item() == 2, "outside, messages are what they were"
    return found


Found = dict[Callable[[], None], tuple[Traffic, Traffic]]


@pytest.fixture(scope="module")
def traffic() -> Found:
    functions = [right, *FAULTS, in_another_order, of_another_kind]
    return dict(zip(functions, zip(*run_ranks(2, watched, functions), strict=True), strict=True))


def test_messages_as_they_should_be_pass(traffic: Found) -> None:
    first, second = traffic[right]
    assert first.faults == second.faults == order_faults([first.messages, second.messages]) == []
    assert len(first.messages) == 7, "an object is gathered as its size and its bytes"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_message_that_nccl_does_not_take_is_found(traffic: Found, fault: Callable[[], None]) -> None:
    found = traffic[fault][0].faults
    assert len(found) == 1 and found[0].startswith(FAULTS[fault])


@pytest.mark.parametrize("fault", [in_another_order, of_another_kind])
def test_ranks_that_do_not_send_alike_are_found(traffic: Found, fault: Callable[[], None]) -> None:
    (found,) = order_faults([rank.messages for rank in traffic[fault]])
    assert found.startswith("message 0 of ranks 0 and 1: ")
