"""A GPU that is not there, is another's, or is one of several: decided from what torch and the launcher say."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.errors import RankError, UserError
from megatron.mpu import device
from megatron.mpu.device import (
    claim_device,
    device_index,
    ieee_products,
    products_are_exact,
    refuse_shared_gpu,
    require_gpu,
    set_cuda_environment,
    set_numerics,
    why_no_gpu,
)

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040).\n Please update your GPU driver by downloading"
)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with GPUs, as torch would describe it: `gpus(visible=4, uuid="a")`; returns the device chosen last."""
    chosen: list[int] = []

    def make(visible: int, uuid: str = "0") -> list[int]:
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1] if chosen else 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuid))
        return chosen

    for name in ("LOCAL_RANK", "LOCAL_PROCESS", "OMPI_COMM_WORLD_LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what the test leaves behind is undone
        monkeypatch.delenv(name)
    return make


def test_a_request_for_a_gpu_is_refused_with_what_torch_says_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(OLD_DRIVER)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UserError) as error:
        require_gpu("distributed_backend: nccl", "train on the CPU")
    message = str(error.value)
    assert message.startswith("distributed_backend: nccl needs a GPU") and "\n" not in message
    assert "driver on your system is too old (found version 11040)" in message and message.endswith("train on the CPU")
    require_gpu(None, "nothing asks for one")


def test_a_hidden_gpu_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert why_no_gpu() == "DS_ACCELERATOR=cpu in the environment"


@pytest.mark.parametrize(
    ("local_rank", "visible", "ranks_per_gpu", "index"),
    [(0, 8, 1, 0), (7, 8, 1, 7), (3, 1, 1, 0), (0, 1, 1, 0), (1, 1, 2, 0), (3, 2, 2, 1)],
)
def test_a_process_takes_the_gpu_of_its_number_or_the_only_one(
    local_rank: int, visible: int, ranks_per_gpu: int, index: int
) -> None:
    assert device_index(local_rank, visible, ranks_per_gpu) == index


def test_a_number_beyond_the_visible_gpus_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(RankError, match=r"LOCAL_RANK: process 2 of .* finds 2 GPUs \(CUDA_VISIBLE_DEVICES=0,1\)"):
        device_index(2, 2)


def test_deepspeed_is_told_the_number_of_the_device(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = gpus(visible=1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    claim_device()
    assert chosen == [0]
    assert (os.environ["LOCAL_RANK"], os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]) == ("0", "0")
    assert os.environ["LOCAL_PROCESS"] == "3"


def test_two_processes_on_one_gpu_are_refused_unless_asked_for(gpus: Any) -> None:
    gpus(visible=1, uuid="GPU-1")
    store = dist.HashStore()
    refuse_shared_gpu(store)
    with pytest.raises(RankError, match="more than 1 processes on one GPU .*GPU-1.*ranks_per_gpu"):
        refuse_shared_gpu(store)
    gpus(visible=1, uuid="GPU-2")
    refuse_shared_gpu(store)
    refuse_shared_gpu(store, ranks_per_gpu=2)
    with pytest.raises(RankError, match="more than 2 processes"):
        refuse_shared_gpu(store, ranks_per_gpu=2)


def test_variables_of_cuda_are_set_where_they_matter_and_never_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG")

    def after(**call: Any) -> list[str | None]:
        for name in names:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        set_cuda_environment(**call)
        return [os.environ.pop(name, None) for name in names]

    assert after(deterministic=False, tensor_size=1) == [None, None]
    assert after(deterministic=True, tensor_size=2) == ["1", ":4096:8"]
    monkeypatch.setenv(names[0], "8")
    set_cuda_environment(deterministic=False, tensor_size=4)
    assert os.environ[names[0]] == "8"


def test_deterministic_runs_leave_only_deterministic_kernels() -> None:
    try:
        set_numerics(deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()
    finally:
        set_numerics(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    matmul = torch.backends.cuda.matmul
    assert not matmul.allow_fp16_reduced_precision_reduction and not matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_ieee_inside_and_as_before_afterwards(precision: str) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with ieee_products():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32 and products_are_exact(torch.device("cpu"))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


def test_newer_settings_are_respected_too() -> None:
    matmul: Any = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has the older settings only")
    before = torch.get_float32_matmul_precision()
    try:
        matmul.fp32_precision = "tf32"
        with ieee_products():
            assert matmul.fp32_precision == "ieee" and products_are_exact(torch.device("cpu"))
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)


def test_rounded_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "eye", lambda n, device: torch.ones(n, n, device=device) * 0.5)
    assert not device.products_are_exact(torch.device("cpu"))
