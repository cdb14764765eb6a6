"""prepare_data.py --index-for: what it builds before a run, the run finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.config import RunConfig
from megatron.errors import UserError
from megatron.training import train
from megatron.training.orders import build_orders
from prepare_data import main

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def _every_order_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.samples.CACHE_MIN_SAMPLES", 1)


def _build_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.data.samples.build_order", lambda *arguments: pytest.fail("an order was built"))


@pytest.mark.usefixtures("_every_order_in_files")
def test_a_run_finds_what_was_built_before_it(
    tiny_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: dict[str, Any] = {"data_cache_dir": str(tmp_path / "orders"), "train_iters": 3, "eval_interval": 2}
    keys |= {"save": str(tmp_path / "run"), "load": str(tmp_path / "run")}
    config = tiny_config(**keys)
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump({key: value for key, value in config.flat().items() if value is not None}))
    main(["--index-for", str(file)])
    assert len(list((tmp_path / "orders").glob("*.npy"))) == 6  # three arrays of each of two sets
    assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patched:
        _build_nothing(patched)
        assert train(config).iteration == 3
    # A longer run goes on from there with a block of its own.
    longer = tiny_config(**{**keys, "train_iters": 200})
    build_orders(longer)
    _build_nothing(monkeypatch)
    assert train(longer.replaced(**{"training.exit_interval": 5})).iteration == 5


@pytest.mark.usefixtures("_every_order_in_files")
def test_processes_decide_the_samples(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    def built(processes: int | None, **keys: Any) -> set[str]:
        folder = tmp_path / f"{processes}-{len(keys)}"
        build_orders(tiny_config(data_cache_dir=str(folder), train_iters=40, eval_iters=0, **keys), processes)
        return {path.name for path in folder.glob("*.npy")}

    assert built(8) != built(1) == built(None)
    assert built(None, num_gpus=8) == built(8)
    with pytest.raises(UserError, match="--processes: 3 processes cannot hold"):
        build_orders(tiny_config(model_parallel_size=2), 3)


def test_mistakes_are_one_line(tmp_path: Path, tiny_config: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError, match="config file .* not found"):
        main(["--index-for", str(tmp_path / "none.yml")])
    with pytest.raises(UserError, match="nowhere"):
        build_orders(tiny_config(data_path=str(tmp_path / "nowhere")))
