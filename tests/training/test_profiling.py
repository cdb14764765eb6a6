"""The key `profile`: a trace of the iterations that it names, and nothing of others."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import RunConfig
from megatron.config.sections.logging import LoggingConfig
from megatron.errors import UserError
from megatron.training import train
from megatron.training.profiling import Profiler

pytestmark = pytest.mark.usefixtures("single_process")


def _operations(folder: Path) -> dict[str, list[str]]:
    found = {}
    for file in folder.glob("trace_*.json.gz"):
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        found[file.name] = [event["name"] for event in events if "name" in event]
    return found


@pytest.mark.engine
def test_the_named_iterations_are_traced(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    keys: dict[str, Any] = {"train_iters": 6, "eval_iters": 0, "save": str(tmp_path / "run")}
    config = tiny_config(**keys, log_dir=str(tmp_path / "log"), profile={"start": 3, "stop": 4})
    train(config)
    traces = _operations(tmp_path / "log")
    assert list(traces) == ["trace_3_4.json.gz"]
    updates = [name for name in traces["trace_3_4.json.gz"] if name.startswith("Optimizer.step")]
    assert len(updates) == 2
    assert "profile of iterations 3 to 4: " in (tmp_path / "log" / "train.log").read_text()


@pytest.mark.engine
def test_a_run_that_ends_sooner_writes_what_it_had(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    train(tiny_config(train_iters=3, eval_iters=0, save=str(tmp_path), profile={"start": 2, "stop": 90}))
    assert list(_operations(tmp_path)) == ["trace_2_3.json.gz"]


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    options = LoggingConfig.model_validate({"profile": {"start": 1, "stop": 1}, "log_dir": str(tmp_path / "file")})
    profiler = Profiler(options, None, torch.device("cpu"), 0)
    profiler.before(1)
    profiler.after(1)
    assert package_log.text.count("profile: cannot be written to") == 1


def test_a_gpu_gets_a_snapshot_of_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("waited"))
    monkeypatch.setattr(memory, "_record_memory_history", lambda enabled="all", max_entries=0: calls.append(enabled))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: calls.append(Path(path).name))
    options = LoggingConfig.model_validate({"profile": {"start": 2, "stop": 3}})
    profiler = Profiler(options, str(tmp_path), torch.device("cuda"), 0)
    for iteration in range(1, 5):
        profiler.before(iteration)
        profiler.after(iteration)
    assert calls == ["all", "waited", "memory_2_3.pickle", None]
    assert list(_operations(tmp_path)) == ["trace_2_3.json.gz"]
    other = Profiler(options, str(tmp_path / "other"), torch.device("cuda"), 1)
    other.before(2)
    other.after(3)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"start": 5, "stop": 4}, "profile: stop 4 is before start 5"),
        ({"start": 0, "stop": 4}, "profile.start: "),
        ({"start": 1}, "profile.stop"),
        ("yes", "profile: "),
    ],
)
def test_mistakes_are_one_line(tiny_config: Callable[..., RunConfig], value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        tiny_config(profile=value)
    assert message in str(error.value) and str(error.value).count("\n") == 0
    assert "profile.profile" not in str(error.value)


def test_the_key_of_gpt_neox_is_on_or_off(tiny_config: Callable[..., RunConfig]) -> None:
    assert tiny_config(profile=False).logging.profile is None
    found = tiny_config(profile=True).logging.profile
    assert found is not None and (found.start, found.stop) == (10, 12)
