from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import DataLoader

from megatron.config import RunConfig
from megatron.data import BlendedDataset, Datasets, GPTDataset, IndexedDataset, batches, build_datasets, loader
from megatron.errors import UserError
from megatron.signals import STOP_SIGNALS
from tests.data.counting_corpora import CORPUS, run_config, write_corpus


def datasets_of(config: RunConfig, train: int, valid: int, test: int, order: Any = None) -> Datasets:
    """What `build_datasets` makes of a run's configuration."""
    return build_datasets(config.data, config.language.seq_length, config.training.seed, (train, valid, test), order)


@pytest.fixture(scope="module")
def dataset() -> GPTDataset:
    return GPTDataset(IndexedDataset(CORPUS), 64, 1234, 500)


def update(dataset: GPTDataset, number: int, micro: int, steps: int, ranks: int, start: int = 0) -> list[bytes]:
    """The samples of one update, of all ranks and micro-steps, sorted."""
    rows = []
    for rank in range(ranks):
        loaded = list(batches(dataset, micro, steps, rank, ranks, start))
        for batch in loaded[number * steps : (number + 1) * steps]:
            rows += [row.numpy().tobytes() for row in batch["tokens"]]
    return sorted(rows)


@pytest.mark.parametrize(("micro", "steps", "ranks"), [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)])
def test_an_update_consumes_the_same_samples_in_any_layout(
    dataset: GPTDataset, micro: int, steps: int, ranks: int
) -> None:
    expected = sorted(dataset[i].tobytes() for i in range(24, 32))
    assert update(dataset, 3, micro, steps, ranks) == expected
    assert update(dataset, 1, micro, steps, ranks, start=16) == expected


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_goes_on_with_the_next_sample(dataset: GPTDataset, num_workers: int) -> None:
    full = [batch["tokens"] for batch in batches(dataset, 4, num_workers=num_workers)]
    rest = [batch["tokens"] for batch in batches(dataset, 4, start_sample=600, num_workers=num_workers)]
    assert len(full) == 153 and full[0].shape == (4, 65) and full[0].dtype == torch.int64
    assert torch.equal(torch.stack(rest), torch.stack(full[150:]))


def loader_workers() -> list[psutil.Process]:
    return psutil.Process().children()


@pytest.mark.launches
def test_killed_workers_are_replaced_and_every_batch_comes_once(
    dataset: GPTDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # s; how soon a death is seen
    expected = [batch["tokens"] for batch in batches(dataset, 4, 3)]
    before = {child.pid for child in loader_workers()}
    stream = batches(dataset, 4, 3, num_workers=2)
    found = [next(stream)["tokens"] for _ in range(4)]
    workers = [child for child in loader_workers() if child.pid not in before]
    assert len(workers) == 2
    ids = " ".join(str(worker.pid) for worker in workers)  # signals of another process: they obey this one
    subprocess.run(["sh", "-c", "".join(f"kill -{number.value} {ids};" for number in STOP_SIGNALS)], check=True)
    found += [next(stream)["tokens"] for _ in range(4)]
    assert all(worker.status() != psutil.STATUS_ZOMBIE for worker in workers), "they are deaf to signals"
    workers[0].kill()
    found += [batch["tokens"] for batch in stream]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert {child.pid for child in loader_workers()} <= before


@pytest.mark.launches
def test_where_every_worker_is_killed_the_process_loads_itself(
    dataset: GPTDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr("megatron.data.loader._init_worker", lambda parent, worker: os.kill(os.getpid(), 9))
    assert len(list(batches(dataset, 4, num_workers=2))) == 153


def test_only_whole_updates_are_given(dataset: GPTDataset) -> None:
    counts = {len(list(batches(dataset, 4, 3, rank, 5))) for rank in range(5)}
    assert counts == {612 // 60 * 3}
    assert list(batches(dataset, 4, start_sample=611)) == []


def test_loading_leaves_the_random_state_alone(dataset: GPTDataset) -> None:
    before = torch.get_rng_state()
    next(batches(dataset, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_a_split_gives_disjoint_documents() -> None:
    built = datasets_of(run_config(data_path=str(CORPUS), split="80,15,5"), 500, 20, 5)
    assert [part.documents for part in (built.train, built.valid, built.test)] == [(0, 160), (160, 190), (190, 200)]
    assert built.epoch_blocks == {"train/0": [2], "valid/0": [1], "test/0": [1]}


def test_nothing_is_built_for_no_samples() -> None:
    built = datasets_of(run_config(data_path=str(CORPUS), split="1,0,0"), 10, 0, 0)
    assert built.valid is None and built.test is None and isinstance(built.train, GPTDataset)


def test_saved_blocks_are_extended() -> None:
    config = run_config(data_path=str(CORPUS), split="1")
    short = datasets_of(config, 600, 0, 0)
    longer = datasets_of(config, 700, 0, 0, short.epoch_blocks)
    assert longer.epoch_blocks == {"train/0": [1, 1]}
    assert np.array_equal(longer.train[5], short.train[5])


@pytest.fixture
def blended(tmp_path: Path) -> dict[str, object]:
    write_corpus(tmp_path / "a", [50] * 10)
    write_corpus(tmp_path / "b", [50] * 30)
    return {"train_data_paths": [str(tmp_path / "a"), str(tmp_path / "b")], "valid_data_paths": [str(tmp_path / "b")]}


def test_blends_follow_their_weights(blended: dict[str, object]) -> None:
    built = datasets_of(run_config(9, **blended, train_data_weights=[1, 3]), 400, 20, 5)
    assert isinstance(built.train, BlendedDataset) and np.bincount(built.train.dataset_index).tolist() == [100, 300]
    assert len(built.train) == 400 and built.test is None
    assert built.epoch_blocks == {"train/0": [2], "train/1": [2], "valid/0": [1]}


def test_an_extended_blend_keeps_its_prefix(blended: dict[str, object]) -> None:
    config = run_config(9, **blended, weight_by_num_documents=True, weighted_sampler_alpha=0.3)
    short = datasets_of(config, 300, 0, 0)
    longer = datasets_of(config, 3000, 0, 0, short.epoch_blocks)
    assert all(np.array_equal(longer.train[i], short.train[i]) for i in range(300))


def test_a_set_that_is_not_built_keeps_its_order() -> None:
    config = run_config(data_path=str(CORPUS), split="8,2")
    first = datasets_of(config, 600, 500, 0)
    without = datasets_of(config, 700, 0, 0, first.epoch_blocks)
    assert without.valid is None and without.epoch_blocks["valid/0"] == first.epoch_blocks["valid/0"]


@pytest.mark.parametrize("damage", [{"train/0": "2"}, {"train/0": [-1]}, {"train/0/later": [0]}, {"train/0": [True]}])
def test_a_forged_record_of_the_order_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(UserError, match="epoch_blocks: the checkpoint's 'train/0.*positive numbers"):
        datasets_of(run_config(data_path=str(CORPUS), split="1"), 600, 0, 0, damage)
    with pytest.raises(UserError, match="does not fit in memory"):
        datasets_of(run_config(data_path=str(CORPUS), split="1"), 600, 0, 0, {"train/0": [10**17]})


def test_a_very_long_blend_repeats_its_choices_with_new_samples(
    blended: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(9, **blended, train_data_weights=[1, 3])
    whole = datasets_of(config, 400, 0, 0)
    for module in ("datasets", "samples"):
        monkeypatch.setattr(f"megatron.data.{module}.WHOLE_ORDER_SAMPLES", 400)
    monkeypatch.setattr("megatron.data.datasets.BLEND_PERIOD", 100)
    built = datasets_of(config, 1000, 0, 0)
    assert built.epoch_blocks["train/period"] == [100] and len(built.train) == 1000
    assert [built.train.locate(i) for i in range(100)] == [whole.train.locate(i) for i in range(100)]
    seen = {built.train.locate(i) for i in range(1000)}
    assert len(seen) == 1000 and sum(number == 0 for number, _ in seen) == 250
    longer = datasets_of(config, 5000, 0, 0, built.epoch_blocks)
    assert all(np.array_equal(longer.train[i], built.train[i]) for i in range(0, 1000, 9))
    # A run that was shorter keeps what it consumed: its choices repeat only after the limit.
    resumed = datasets_of(config, 1000, 0, 0, whole.epoch_blocks)
    assert resumed.epoch_blocks["train/period"] == [400]
    assert all(np.array_equal(resumed.train[i], whole.train[i]) for i in range(400))


def test_a_thousand_million_updates_start_in_seconds(blended: dict[str, object]) -> None:
    for config in (run_config(data_path=str(CORPUS), split="8,2"), run_config(9, **blended, train_data_weights=[1, 3])):
        built = datasets_of(config, 10**9 * 1024, 10**7 * 1024, 10)
        last = next(batches(built.train, 4, start_sample=10**12))
        assert last["tokens"].shape[0] == 4
        assert built.epoch_blocks["train/0/later"] and built.epoch_blocks["valid/0/later"]
        again = datasets_of(config, 10**10 * 1024, 10, 10, built.epoch_blocks)
        assert torch.equal(next(batches(again.train, 4, start_sample=10**12))["tokens"], last["tokens"])


def test_missing_paths_are_named(blended: dict[str, object]) -> None:
    with pytest.raises(UserError, match="data_path: missing"):
        datasets_of(run_config(), 1, 0, 0)
    config = run_config(9, train_data_paths=blended["train_data_paths"])
    with pytest.raises(UserError, match="valid_data_paths: missing.*eval_iters: 0"):
        datasets_of(config, 1, 1, 0)


def test_a_split_without_documents_is_refused() -> None:
    with pytest.raises(UserError, match="split: '1,0,0' gives valid none of the 200 documents.*eval_iters: 0"):
        datasets_of(run_config(data_path=str(CORPUS), split="1,0,0"), 1, 1, 0)
    with pytest.raises(UserError, match="split: '0,1,0' gives train none"):
        datasets_of(run_config(data_path=str(CORPUS), split="0,1,0"), 1, 1, 0)


@pytest.mark.parametrize(("split", "is_said"), [("9,1,0", False), ("9,1", False), ("9,1,0.001", True)])
def test_a_test_set_that_nobody_asked_for_is_not_missed(
    split: str, is_said: bool, package_log: pytest.LogCaptureFixture
) -> None:
    assert datasets_of(run_config(data_path=str(CORPUS), split=split), 1, 1, 1).test is None
    assert ("no test set" in package_log.text) == is_said


@pytest.mark.launches
def test_importing_data_imports_no_engine() -> None:
    code = "import sys, megatron.data; assert not {'deepspeed', 'wandb'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_batches_are_pinned_where_a_gpu_is(dataset: GPTDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def noted(*arguments: Any, pin_memory: bool, **options: Any) -> Any:
        asked.append(pin_memory)
        return DataLoader(*arguments, **options)

    monkeypatch.setattr(loader, "DataLoader", noted)
    for has_gpu, workers in product((True, False), (0, 1)):
        monkeypatch.setattr(loader, "uses_gpu", lambda has_gpu=has_gpu: has_gpu)
        next(batches(dataset, 4, num_workers=workers))
    assert asked == [True, True, False, False]
