"""What a process tells of itself while its main thread hangs."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megatron.log import get_logger, last_words, log_to_file
from megatron.mpu import SINGLE
from megatron.mpu.mail import Mail
from megatron.mpu.stacks import main_place, record_collectives, waits_for_others, write_stacks
from megatron.training.saving import SaveResult, in_thread


def test_the_flight_recorder_is_on_before_a_process_group_is_made_unless_it_is_set() -> None:
    env: dict[str, str] = {}
    record_collectives(env)
    assert env == {
        "TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"
    }  # fmt: skip
    env = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
    record_collectives(env)
    assert env == {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}


def test_what_nccl_recorded_is_written_as_torch_gives_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"recorded", raising=False)
    write_stacks(tmp_path / "new", 3, "a reason")
    assert (tmp_path / "new" / "nccl_trace_rank_3").read_bytes() == b"recorded"


def test_stacks_are_appended_and_lost_where_they_cannot_be_written(tmp_path: Path) -> None:
    for reason in ("first", "second"):
        write_stacks(tmp_path, 2, reason)
    text = (tmp_path / "rank2.txt").read_text()
    assert text.count(" rank 2: ") == 2 and "rank 2: second ==" in text
    assert text.count(f'File "{__file__}"') == 2 and "in test_stacks_are_appended" in text
    write_stacks(tmp_path / "rank2.txt", 2, "a file is no folder")


def test_a_main_thread_that_computes_waits_for_nobody_and_has_a_place() -> None:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend([waits_for_others(), main_place()]))
    thread.start()
    thread.join()
    assert found[0] is False and str(found[1]).startswith("tests/mpu/test_stacks.py:")
    assert str(found[1]).endswith(f" {sys._getframe().f_code.co_name}")


@pytest.mark.parametrize("is_mail", [True, False], ids=["waits for the first rank", "hangs itself"])
def test_a_main_thread_that_waits_for_a_save_waits_for_whom_the_save_waits(
    monkeypatch: pytest.MonkeyPatch, is_mail: bool
) -> None:
    store, release, found = dist.HashStore(), threading.Event(), list[bool]()
    monkeypatch.setattr(distributed_c10d, "_get_default_store", lambda: store)

    def save() -> SaveResult:
        return SaveResult(Mail("save", SINGLE).wait_for_answer()) if is_mail else SaveResult(str(release.wait()))

    def look() -> None:
        time.sleep(0.3)
        found.append(waits_for_others())
        store.set("save/answer", "")
        release.set()

    future = in_thread(save)
    threading.Thread(target=look).start()
    future.result()
    assert found == [is_mail]


def test_last_words_need_no_lock(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log_to_file(tmp_path / "train.log")
    handlers = list(get_logger().handlers)
    held = [handler.lock for handler in handlers if handler.lock is not None]
    try:
        for lock in held:
            lock.acquire()
        thread = threading.Thread(target=last_words, args=("rank 1 hangs",), daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    finally:
        for lock in held:
            lock.release()
        get_logger().removeHandler(handlers[-1])
    assert capfd.readouterr().err == "error: rank 1 hangs\n"
    assert (tmp_path / "train.log").read_text().endswith(" error: rank 1 hangs\n")
