"""Damaged checkpoints: never a traceback, never another content in silence where a checksum or structure can tell."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron.checkpoint.reader import CheckpointReader, DamagedCheckpoint, file_sha256
from megatron.config import RunConfig
from megatron.engine.distributed import initialize_distributed
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.metrics import MetricsLog
from megatron.mpu import SINGLE
from megatron.training import train
from megatron.training.resume import open_for_resume
from megatron.training.soundness import require_sound
from tests.checkpoint.forged import Change, forge, in_manifest, record, tensors, text
from tests.damage import damaged
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("single_process")
MakeConfig = Callable[..., RunConfig]
SEED = int(os.environ.get("SOAK_SEED", "1"))
ROUNDS = int(os.environ.get("SOAK_ROUNDS", "1"))
SECONDS_A_FILE = 20.0


@pytest.fixture(scope="module")
def whole_run(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints 1 and 2."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    keys = {"train_iters": 2, "checkpoint_factor": 1, "eval_iters": 0, "hidden_dropout": 0.1, "ema_decay": 0.9}
    train(tiny_config(save=str(folder), **keys))
    return folder


@pytest.fixture(scope="module")
def run_in_parts(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two ranks, each of which has written its part."""
    folder = tmp_path_factory.mktemp("parts") / "run"
    keys = {"train_iters": 2, "checkpoint_factor": 1, "eval_iters": 0, "zero_optimization": {"stage": 1}}
    run_ranks(2, train_silently, tiny_config(save=str(folder), **keys))
    assert json.loads((folder / "global_step2" / "manifest.json").read_text())["version"] == 2
    return folder


def train_silently(config: RunConfig) -> None:
    train(config)


def copied(source: Path, target: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(source, target))


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    return copied(whole_run, tmp_path / "run")


def draws(kind: str, count: int) -> list[random.Random]:
    return [random.Random(f"{SEED}/{kind}/{number}") for number in range(count * ROUNDS)]


def content(reader: CheckpointReader) -> tuple[Any, ...]:
    kinds = ("model", "optimizer", "ema", "rng")
    tensors = {f"{k}/{n}": reader.tensor(k, n).numpy().tobytes() for k in kinds for n in reader.names(k)}
    return reader.iteration, reader.train_state, reader.config, tensors


def outcome(config: RunConfig) -> CheckpointReader:
    """What a start finds. Anything but a UserError, and a hang, fails the test."""
    start = time.monotonic()
    found = open_for_resume(config.checkpoint, SINGLE)
    assert time.monotonic() - start < SECONDS_A_FILE and found is not None
    assert isinstance(found.checkpoint.tensors, CheckpointReader)
    return found.checkpoint.tensors


@pytest.mark.processes
@pytest.mark.parametrize("form", ["whole_run", "run_in_parts"])
def test_a_damaged_file_costs_one_warning_and_the_checkpoint_before_is_taken(
    form: str, tmp_path: Path, tiny_config: MakeConfig, caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    whole_run: Path = request.getfixturevalue(form)
    run = copied(whole_run, tmp_path / "run")
    names = sorted(path.name for path in (run / "global_step2").iterdir())
    config = tiny_config(save=str(run), load=str(run))
    expected = {n: content(CheckpointReader(whole_run / f"global_step{n}")) for n in (1, 2)}
    logger = get_logger()
    logger.addHandler(caplog.handler)
    try:
        for number, draw in enumerate(draws("checkpoint", 49)):
            path = run / "global_step2" / names[number % len(names)]
            path.write_bytes(damaged(path.read_bytes(), draw))
            caplog.clear()
            reader = outcome(config)
            assert content(reader) == expected[reader.iteration], path.name
            warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
            if reader.iteration == 2:  # only where other bytes say the same
                assert path.name == "manifest.json" and not warnings
                shutil.rmtree(run / "global_step2")
            else:
                assert len(warnings) == 1 and "global_step2" in warnings[0] and "global_step1" in warnings[0]
                assert (run / "latest").read_text() == "global_step1\n"
                shutil.rmtree(run / "damaged-global_step2")
            shutil.copytree(whole_run / "global_step2", run / "global_step2")
            shutil.copy(whole_run / "latest", run)
    finally:
        logger.removeHandler(caplog.handler)


def chosen_where_one_rank_reads_another_manifest(config: RunConfig) -> int:
    """The iteration that this rank goes on from, when the manifest of 2 is cut off for the last rank."""
    layout, read = initialize_distributed(config), CheckpointReader._read_manifest

    def cut_off(reader: CheckpointReader) -> dict[str, Any]:
        if layout.rank and reader.folder.name == "global_step2":
            raise reader.damaged("manifest.json", "is not valid JSON")
        return read(reader)

    with patch.object(CheckpointReader, "_read_manifest", cut_off):
        found = open_for_resume(config.checkpoint, layout)
    assert found is not None and found.checkpoint.iteration is not None
    return found.checkpoint.iteration


@pytest.mark.processes
def test_a_manifest_that_one_rank_alone_cannot_read_is_damage_for_all(run: Path, tiny_config: MakeConfig) -> None:
    """As where one node sees old bytes of a network's file system."""
    config = tiny_config(load=str(run))
    assert run_ranks(2, chosen_where_one_rank_reads_another_manifest, config) == [1, 1]


def test_a_damaged_latest_leads_to_a_checkpoint_of_the_run(run: Path, tiny_config: MakeConfig) -> None:
    (run.parent / "elsewhere").mkdir()
    shutil.copytree(run / "global_step2", run.parent / "elsewhere" / "global_step2")
    contents = [damaged(b"global_step2\n", draw) for draw in draws("latest", 10)]
    outside = [b"../elsewhere/global_step2", b"/etc", b"", b"\0", b"global_step02", b"x" * 9000]
    for given in [*contents, *outside]:
        (run / "latest").write_bytes(given)
        reader = outcome(tiny_config(save=str(run), load=str(run)))
        assert reader.folder.parent == run and reader.iteration in (1, 2), given
        assert (run / "latest").read_text().strip() == reader.folder.name


def test_damaged_metrics_are_kept_and_those_that_can_be_read_go_on(run: Path, tiny_config: MakeConfig) -> None:
    path = run / "metrics.jsonl"
    whole = path.read_bytes()
    config = tiny_config(save=str(run), load=str(run))
    for draw in draws("metrics", 16):
        path.write_bytes(changed := damaged(whole, draw))
        log = MetricsLog(config, 0, 2)
        log.log({"iteration": 3, "lm_loss": 1.0})
        log.close()
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert lines[-1] == {"iteration": 3, "lm_loss": 1.0} and all(line["iteration"] <= 3 for line in lines)
        kept = list(run.glob("metrics.jsonl.*"))
        assert not kept or kept[0].read_bytes() == changed
        for file in kept:
            file.unlink()


NORM, KEYS = "final_norm.weight", "layers.0.mlp.key_tokens_0"
TAU = "layers.0.mlp.tau_tokens"
GROWTH = {"iteration": 1, "updates": 1, "consumed_tokens": 1, "parameters": 1, "added": "a token"}
FORGERIES: dict[str, Change] = {
    "no optimizer table": in_manifest(lambda m: m["tensors"]["optimizer"].clear()),
    "no optimizer at all": in_manifest(
        lambda m: (m["tensors"]["optimizer"].clear(), m["files"].pop("optimizer-00000.safetensors"))
    ),
    "a moment less": tensors("optimizer", lambda t: t.pop(f"exp_avg_sq/{NORM}")),
    "a parameter without moments": tensors("optimizer", lambda t: [t.pop(n) for n in list(t) if n.endswith(NORM)]),
    "a moment of another shape": tensors("optimizer", lambda t: t.update({f"exp_avg/{NORM}": torch.ones(5)})),
    "a moment that is a number": tensors("optimizer", lambda t: t.update({f"exp_avg/{NORM}": torch.tensor(1.0)})),
    "moments of integers": tensors("optimizer", lambda t: t.update({f"exp_avg/{NORM}": torch.ones(32).int()})),
    "a negative second moment": tensors("optimizer", lambda t: t[f"exp_avg_sq/{NORM}"].neg_().sub_(1)),
    "a moment of no parameter": tensors("optimizer", lambda t: t.update({"exp_avg/x": torch.ones(5)})),
    "an infinite moment": tensors("optimizer", lambda t: t[f"exp_avg/{NORM}"].fill_(float("inf"))),
    "an average less": tensors("ema", lambda t: t.pop(KEYS)),
    "an average more": tensors("ema", lambda t: t.update({TAU: torch.tensor(20)})),
    "an average of another shape": tensors("ema", lambda t: t.update({KEYS: torch.ones(40, 31)})),
    "an average in half precision": tensors("ema", lambda t: t.update({KEYS: t[KEYS].half()})),
    "an average that is NaN": tensors("ema", lambda t: t[NORM].fill_(float("nan"))),
    "a weight that is NaN": tensors("model", lambda t: t[NORM].fill_(float("nan"))),
    "a parameter less": tensors("model", lambda t: t.pop(KEYS)),
    "a parameter more": tensors("model", lambda t: t.update(x=torch.ones(2))),
    "a parameter of another shape": tensors("model", lambda t: t.update({KEYS: torch.ones(40, 31)})),
    "half precision": tensors("model", lambda t: t.update({KEYS: t[KEYS].half()})),
    "no tau": tensors("model", lambda t: t.pop(TAU)),
    "tau of 0": tensors("model", lambda t: t[TAU].fill_(0)),
    "tau of more tokens": tensors("model", lambda t: t[TAU].fill_(41)),
    "tau of two row norms": tensors("model", lambda t: t.update({TAU: torch.tensor([20, 20])})),
    "tau of no row norm": tensors("model", lambda t: t.update({TAU: torch.ones(0, dtype=torch.int64)})),
    "tau as a float": tensors("model", lambda t: t.update({TAU: t[TAU].float()})),
    "two tensors exchanged": in_manifest(lambda m: m["tensors"]["model"].update(
        {NORM: m["tensors"]["model"][KEYS], KEYS: m["tensors"]["model"][NORM]})),
    "a tensor of another file": in_manifest(
        lambda m: m["tensors"]["model"][NORM].__setitem__(0, "rng-00000.safetensors")
    ),
    "an entry without a shape": in_manifest(lambda m: m["tensors"]["model"][NORM].pop()),
    "a shape of text": in_manifest(lambda m: m["tensors"]["model"][NORM].__setitem__(2, ["32"])),
    "a table that is a list": in_manifest(lambda m: m["tensors"].update(model=[])),
    "a kind less": in_manifest(lambda m: m["tensors"].pop("rng")),
    "a file outside": in_manifest(lambda m: m["files"].update({"../latest": m["files"]["config.yml"]})),
    "an unknown key": in_manifest(lambda m: m.update(other=1)),
    "no files": in_manifest(lambda m: m.update(files=[])),
    "another iteration": in_manifest(lambda m: m.update(iteration=3)),
    "an iteration that is true": in_manifest(lambda m: m.update(iteration=True)),
    "a short generator": tensors("rng", lambda t: t.update({"rank0/torch": torch.ones(3).byte()})),
    "no numpy generator": tensors("rng", lambda t: t.pop("rank0/numpy")),
    "a negative generator": tensors("rng", lambda t: t["rank0/numpy"].fill_(-1)),
    "a generator of no rank": tensors("rng", lambda t: t.update({"rank7/torch": t["rank0/torch"].clone()})),
    "no state": record("train_state.json", lambda s: s.clear()),
    "a key less": record("train_state.json", lambda s: s.pop("consumed_samples")),
    "a key misspelt": record("train_state.json", lambda s: s.update(consumed_sample=s.pop("consumed_samples"))),
    "an iteration of text": record("train_state.json", lambda s: s.update(iteration="2")),
    "a state of another iteration": record("train_state.json", lambda s: s.update(iteration=1)),
    "more skipped": record("train_state.json", lambda s: s.update(skipped_iterations=3)),
    "samples below 0": record("train_state.json", lambda s: s.update(consumed_samples=-1)),
    "samples without end": record("train_state.json", lambda s: s.update(consumed_samples=10**30)),
    "blocks of text": record("train_state.json", lambda s: s["epoch_blocks"].update({"train/0": "12"})),
    "blocks of 0": record("train_state.json", lambda s: s["epoch_blocks"].update({"train/0": [0]})),
    "two later blocks": record("train_state.json", lambda s: s["epoch_blocks"].update({"train/0/later": [1, 2]})),
    "two periods": record("train_state.json", lambda s: s["epoch_blocks"].update({"train/period": [1, 2]})),
    "blocks of no set": record("train_state.json", lambda s: s["epoch_blocks"].update({"tests/0": [1]})),
    "a scaler of text": record("train_state.json", lambda s: s.update(loss_scaler={"cur_scale": "1"})),
    "a scale that is NaN": record("train_state.json", lambda s: s.update(loss_scaler={"cur_scale": float("nan")})),
    "a lineage of text": record("train_state.json", lambda s: s.update(lineage="none")),
    "a growth without time": record("train_state.json", lambda s: s.update(lineage=[{"scheduled": True}])),
    "keys that decay since a number": record(
        "train_state.json", lambda s: s.update(lineage=[{**GROWTH, "decays_since": 5}])
    ),
    "keys that decay since text": record(
        "train_state.json", lambda s: s.update(lineage=[{**GROWTH, "decays_since": {"qkv": "1"}}])
    ),
    "more left out": record("train_state.json", lambda s: s.update(left_out_iterations=3)),
    "left out of text": record("train_state.json", lambda s: s.update(left_out_iterations="1")),
    "spikes below 0": record("train_state.json", lambda s: s.update(spikes_in_a_row=-1)),
    "skips that end before": record("train_state.json", lambda s: s.update(skips=[[3, 2]])),
    "skips of one": record("train_state.json", lambda s: s.update(skips=[3])),
    "a window of text": record("train_state.json", lambda s: s.update(spike_window={"lm_loss": ["1"]})),
    "a window that is a list": record("train_state.json", lambda s: s.update(spike_window=[1.0])),
    "rollbacks of text": record("train_state.json", lambda s: s.update(rollbacks=["1"])),
    "restarts below 0": record("train_state.json", lambda s: s.update(restarts=-1)),
    "no width": record("config.yml", lambda c: c.pop("hidden_size")),
    "another width": record("config.yml", lambda c: c.update(hidden_size=64)),
    "a billion layers": record("config.yml", lambda c: c.update(num_layers=10**12)),
    "tokens beyond memory": record("config.yml", lambda c: c.update(ffn_slot_num=2**62)),
    "a width of text": record("config.yml", lambda c: c.update(hidden_size="wide")),
    "norms of others": record("config.yml", lambda c: c.update(segment_norms=["joint", "segment"])),
    "segments of others": record("config.yml", lambda c: c.update(token_segments={"qkv": [[1]]})),
    "no optimizer settings": record("config.yml", lambda c: c.update(optimizer=5)),
    "another optimizer": record("config.yml", lambda c: c["optimizer"].update(type="Lion")),
    "ranks of text": record("config.yml", lambda c: c.update(model_parallel_size="two")),
    "deep YAML": text("config.yml", "a: " + "[" * 200_000),
    "deep JSON": text("train_state.json", "[" * 200_000),
    "a bomb": text("config.yml", "a0: &a0 [1,1,1,1,1,1,1,1]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12))),
    "YAML with code": text("config.yml", "a: !!python/object/apply:os.system [x]"),
}  # fmt: skip


def test_forged_contents_under_right_checksums_are_named(whole_run: Path, tmp_path: Path) -> None:
    """The file and what is wrong with it are in the message, and nothing else is raised."""
    for number, (name, change) in enumerate(FORGERIES.items()):
        folder = Path(shutil.copytree(whole_run / "global_step2", tmp_path / str(number) / "global_step2"))
        forge(folder, change)
        start = time.monotonic()
        with pytest.raises(DamagedCheckpoint, match=r"^load: checkpoint .* is damaged: \S+\.(json|yml|safetensors) "):
            require_sound(CheckpointReader(folder, verify=False))
            pytest.fail(f"{name} is taken for whole")
        assert time.monotonic() - start < SECONDS_A_FILE, name
        shutil.rmtree(folder)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in _places(item, (*path, key)))]


def mutate(value: Any, draw: random.Random) -> None:
    """Replace or remove one value somewhere inside."""
    *path, last = draw.choice(_places(value)[1:])
    for key in path:
        value = value[key]
    replacement = draw.choice([None, True, -1, 0, 10**19, 1.5, float("inf"), "", "x", [], [[]], {}, {"x": 1}, "remove"])
    if replacement == "remove":
        del value[last]
    else:
        value[last] = replacement


@pytest.mark.processes
@pytest.mark.parametrize(
    ("form", "file"),
    [*(("whole_run", f"{name}") for name in ("manifest.json", "train_state.json", "config.yml")),
     ("run_in_parts", "manifest.json")],
)  # fmt: skip
def test_values_of_other_kinds_are_user_errors_or_harmless(
    form: str, file: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = copied(request.getfixturevalue(form) / "global_step2", tmp_path / "global_step2")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for draw in draws(file, 30):
        change = (lambda f, m, d=draw: mutate(m, d)) if file == "manifest.json" else record(
            file, lambda values, d=draw: mutate(values, d))  # fmt: skip
        forge(folder, change)
        try:
            reader = CheckpointReader(folder, verify=False)
            require_sound(reader)
            assert file == "config.yml" or content(reader)[3]
        except UserError as error:
            assert "\n" not in str(error)
        for name, data in whole.items():
            (folder / name).write_bytes(data)


def test_a_manifest_without_a_checksum_of_its_own_is_read(run: Path) -> None:
    """Checkpoints of earlier versions have none, and no rollbacks or what came after them."""
    path, record_path = run / "global_step2/manifest.json", run / "global_step2/train_state.json"
    state = json.loads(record_path.read_text())
    for later in ("rollbacks", "restarts", "left_out_iterations", "skips", "spike_window", "spikes_in_a_row"):
        del state[later]
    record_path.write_text(json.dumps(state))
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["files"]["train_state.json"] = {
        "bytes": record_path.stat().st_size, "sha256": file_sha256(record_path)}  # fmt: skip
    path.write_text(json.dumps(manifest))
    require_sound(CheckpointReader(run / "global_step2"))
    for draw in draws("old manifest", 10):
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, draw))
        try:
            require_sound(CheckpointReader(run / "global_step2"))
        except UserError as error:
            assert "\n" not in str(error)
        path.write_bytes(whole)


def test_a_manifest_that_says_something_else_than_its_checksum_is_damaged(run: Path) -> None:
    """Also where nothing but the checksum can tell."""
    path = run / "global_step2/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["environment.json"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json does not have its own checksum"):
        CheckpointReader(run / "global_step2", verify=False)
