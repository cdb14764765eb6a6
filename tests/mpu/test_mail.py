"""Messages of all ranks to the first one, and its answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron.config import RunConfig
from megatron.engine.distributed import initialize_distributed
from megatron.mpu.mail import Mail
from tests.ranks import run_ranks


def answered(config: RunConfig, lengths: tuple[int, ...]) -> str:
    """Every rank sends a letter of such a length; the first one answers with how they begin, and how long they are."""
    layout = initialize_distributed(config)
    mail = Mail("a test", layout)
    mail.send("\u00e9" * lengths[layout.rank])
    if layout.rank:
        return mail.wait_for_answer()
    answer = " ".join(f"{letter[:1]}{len(letter)}" for letter in mail.collect())
    mail.answer(answer)
    return answer


@pytest.mark.processes
def test_a_letter_may_be_longer_than_the_store_lets_a_value_be(tiny_config: Callable[..., RunConfig]) -> None:
    """What a rank has written of a model of tens of thousands of tensors takes more than 8 MiB to tell."""
    expected = "\u00e95000000 0"
    assert run_ranks(2, answered, tiny_config(), (5_000_000, 0)) == [expected, expected]
