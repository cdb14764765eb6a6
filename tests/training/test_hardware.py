"""Where MFU has a denominator, and where compiled optimizers are built."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import RunConfig, load_config
from megatron.engine import extensions
from megatron.engine import settings as engine_settings
from megatron.engine.distributed import initialize_distributed
from megatron.engine.settings import EngineSettings
from megatron.errors import UserError
from megatron.growth import proof
from megatron.training import train
from megatron.training.hardware import peak_flops
from tests.conftest import TINY
from tests.ranks import run_ranks

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "dtype", "peak", "words"),
    [
        ("NVIDIA H200", torch.bfloat16, 989.5e12, "data sheet"),
        ("NVIDIA H200", torch.float32, None, "fp32"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.float16, None, "MIG slice"),
        ("NVIDIA Something New", torch.float16, None, "not in the table"),
    ],
)
def test_a_peak_comes_from_a_data_sheet_or_from_nowhere(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, peak: float | None, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    found, origin = peak_flops(GPU, dtype)
    assert found == peak and words in origin
    assert peak_flops(GPU, dtype, 3.0) == (3e12, "peak_tflops of the configuration")


def test_mfu_is_left_out_where_there_is_no_peak(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, single_process: None
) -> None:
    for name, keys in (("without", {}), ("with", {"peak_tflops": 1.0})):
        train(tiny_config(train_iters=1, eval_iters=0, save=str(tmp_path / name), **keys))
        (line,) = [json.loads(text) for text in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert ("mfu" in line) == bool(keys)


ASKING = {
    "nccl": ({"distributed_backend": "nccl"}, "distributed_backend: nccl", ["distributed_backend=gloo"]),
    "bf16": ({"distributed_backend": None, "precision": "bf16"}, "precision: bf16", ["distributed_backend=gloo"]),
    "fp16": ({"precision": None, "fp16": {"enabled": True}}, "precision: fp16", ["precision=bf16"]),
    "published": (
        {"distributed_backend": "nccl", "precision": "fp16"}, "precision: fp16",
        ["precision=bf16", "distributed_backend=gloo"],
    ),
    "liger": ({"cross_entropy": "liger"}, "cross_entropy: liger", ["cross_entropy=auto"]),
    "flash-attn": ({"attention_backend": "flash_attn"}, "attention_backend: flash_attn", ["attention_backend=sdpa"]),
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("case", ASKING)
def test_a_run_that_asks_for_a_gpu_is_not_trained_on_the_cpu(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    keys, request, overrides = ASKING[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {key: value for key, value in {**TINY, **keys}.items() if value is not None}
    with pytest.raises(UserError) as error:
        initialize_distributed(load_config([], given))
    message = str(error.value)
    assert message.startswith(f"{request} needs a GPU") and "torch 2." in message
    assert all(f"`--set {override}`" in message for override in overrides)
    without = load_config([], {**given, **dict(override.split("=") for override in overrides)})
    assert without.gpu_request() == (None, [])


@pytest.mark.parametrize("keys", [{"precision": "bf16"}, {"distributed_backend": None}, {"precision": "fp32"}])
def test_a_run_that_does_not_ask_for_one_may_use_the_cpu(keys: dict[str, Any]) -> None:
    given = {key: value for key, value in {**TINY, **keys}.items() if value is not None}
    assert load_config([], given).gpu_request() == (None, [])


def test_ranks_that_share_a_gpu_need_gloo() -> None:
    with pytest.raises(UserError, match="ranks_per_gpu: NCCL refuses 2 processes on one GPU"):
        load_config([], {**TINY, "distributed_backend": "nccl", "ranks_per_gpu": 2})
    assert load_config([], {**TINY, "ranks_per_gpu": 2}).launch.ranks_per_gpu == 2


def _deepspeed(config: RunConfig) -> dict[str, Any]:
    return EngineSettings(config, config.update_size(1)).deepspeed


@pytest.mark.engine
@pytest.mark.parametrize("on_gpu", [False, True])
def test_offloaded_states_are_pinned_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    monkeypatch.setattr(engine_settings, "uses_gpu", lambda: on_gpu)
    for zero in ({"stage": 1, "cpu_offload": True}, {"stage": 3, "offload_param": {"device": "cpu"}}):
        table = _deepspeed(load_config([], {**TINY, "zero_optimization": zero}))["zero_optimization"]
        offload = table.get("offload_optimizer") or table["offload_param"]
        assert offload == {"device": "cpu", "pin_memory": on_gpu}
    given = {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": not on_gpu}}
    config = load_config([], {**TINY, "zero_optimization": given})
    assert _deepspeed(config)["zero_optimization"] == given


# ---- extensions ----


@pytest.mark.engine
def test_extensions_are_built_in_a_private_folder_of_the_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setattr(extensions.tempfile, "gettempdir", lambda: str(tmp_path))
    with extensions.one_build_at_a_time():
        folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
        assert folder.parent.parent == tmp_path and folder.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    folder.parent.chmod(0o777)
    with pytest.raises(UserError, match="is not this user's alone"):
        extensions.build_folder()


def build(folder: str) -> list[float]:
    import time

    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    with extensions.one_build_at_a_time():
        begin = time.monotonic()
        time.sleep(0.3)
        return [begin, time.monotonic()]


@pytest.mark.processes
def test_processes_of_a_node_build_one_after_the_other(tmp_path: Path) -> None:
    mark = tmp_path / "cpu_adam" / "lock"
    mark.parent.mkdir()
    mark.touch()  # left behind by a build that was killed: torch would wait for it for ever
    first, second = sorted(run_ranks(2, build, str(tmp_path)))
    assert first[1] <= second[0] and not mark.exists()


# ---- numbers ----


def test_a_growth_is_proven_in_fp64_where_products_keep_being_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config([], {**TINY, "padded_vocab_size": 64}).model
    from megatron.exchange.checkpoint import of_model
    from megatron.model import LanguageModel

    model = LanguageModel(config, seed=0)

    seen: list[torch.dtype] = []
    original = proof._run

    def record(*args: Any) -> torch.Tensor:
        seen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(proof, "_run", record)
    checkpoint = of_model(model)
    for exact, dtype in ((True, torch.float32), (False, torch.float64)):
        monkeypatch.setattr(proof, "products_are_exact", lambda device, exact=exact: exact)
        assert proof.compare_logits(checkpoint, checkpoint, [torch.zeros(1, 4, dtype=torch.int64)]).largest == 0
        assert set(seen) == {dtype}
        seen.clear()


def train_twice(configs: list[RunConfig]) -> list[str | None]:
    for config in configs:
        train(config)
    return [os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")]


@pytest.mark.processes
def test_overlapping_communication_with_tensor_ranks_changes_nothing(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    configs = [
        tiny_config(
            model_parallel_size=2, train_iters=3, eval_iters=0, save=str(tmp_path / str(overlap)),
            zero_optimization={"stage": 1, "overlap_comm": overlap}, deterministic=True,
        )
        for overlap in (False, True)
    ]  # fmt: skip
    assert run_ranks(2, train_twice, configs) == [["1"]] * 2
    losses = [
        [json.loads(line)["lm_loss"] for line in (tmp_path / str(overlap) / "metrics.jsonl").read_text().splitlines()]
        for overlap in (False, True)
    ]
    assert len(losses[0]) == 3 and losses[0] == losses[1]
