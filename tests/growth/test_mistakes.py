"""A mistake in a growing run ends train.py with one line and exit code 2; checkpoints stay as they were."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import train as train_script
from megatron.data import Datasets, IndexedDatasetBuilder
from megatron.errors import run_command
from megatron.growth import proof as growth_proof
from megatron.tasks import build_task
from tests.conftest import TINY
from tests.growth.grown_runs import CONTINUE, COUNTS, MakeConfig, assert_equal, run, stage, state, tensors

pytestmark = pytest.mark.usefixtures("single_process")
Command = Callable[..., str]


@pytest.fixture
def refusal(
    tmp_path: Path, tokenizer_file: Path, corpus_prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Command:
    """Runs train.py, which has to end with one line and exit code 2; returns the line."""

    def run(**keys: Any) -> str:
        paths = {"vocab_file": str(tokenizer_file), "data_path": corpus_prefix}
        file = tmp_path / "run.yml"
        file.write_text(yaml.safe_dump({**TINY, **paths, **keys}), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["train.py", str(file)])
        monkeypatch.setattr("megatron.training.loop.shut_down", lambda: None)  # other tests share the process group
        capsys.readouterr()
        code = run_command(train_script.main)
        error: str = capsys.readouterr().err
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


@pytest.fixture(scope="module")
def base(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run of two iterations, which every test leaves as it is."""
    folder = tmp_path_factory.mktemp("base")
    run(tiny_config, folder, train_iters=2)
    return folder


@pytest.fixture(scope="module")
def grown(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run that has grown, which every test leaves as it is."""
    folder = tmp_path_factory.mktemp("grown")
    run(tiny_config, folder, train_iters=3, growth=[stage(2)])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name != "metrics.jsonl"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"growth": [stage(5, qkv_slot_num=20)]}, "growth[0]: qkv_slot_num: 20 is fewer than the 24 tokens"),
        ({"growth": [stage(5), stage(4)]}, "entries are out of order, at_iteration 4 follows 5"),
        ({"growth": [stage(5, tower="text")]}, "growth[0]: tower: text of a model that has no towers; leave it out"),
        ({"growth": [stage(5)], "norm_activation_type": "softmax"}, "12 more are no multiple of 24; choose 48"),
        ({"growth": [stage(5, new_keys="rotated")]}, "growth[0]: proj_slot_num: 36 are 12 more than the 24 tokens"),
        (
            {"growth": [stage(5, new_keys="rotated")], "norm_activation_type": "gelu_l2_norm"},
            "growth[0]: new_keys: rotated needs norm_activation_type l2_norm_gelu, this model has gelu_l2_norm",
        ),
        ({"growth": [stage(5, new_keys="random")]}, "growth: entry 1: new_keys: random keys would change the row norm"),
        (
            {"growth": [stage(5, new_keys="zero", row_norm="segment")]},
            "entry 1: new_keys: zero keys cannot learn under",
        ),
        ({"new_keys": "random"}, "new_keys: random keys would change the row norm that they share with the old ones"),
        ({"growth": [stage(5, layers=[2])]}, "growth[0]: layers: 2 is not a tokenformer block of this model"),
        ({"growth": [stage(5)], "save": None}, "growth: a run that grows goes through a checkpoint; give `save`"),
        ({"growth": [stage(5)], "no_save_optim": True}, "no_save_optim"),
        ({"freeze_old_tokens": True}, "freeze_old_tokens: the model has not grown, there would be nothing to train"),
        ({"pretrain_partial_init": "nowhere"}, "pretrain_partial_init: no checkpoint in nowhere"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_a_mistake_is_named_before_anything_is_trained(
    refusal: Command, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    assert message in refusal(**{"save": str(tmp_path / "out"), **keys})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**COUNTS, "hidden_size": 64}, "hidden_size: 64 in the configuration, 32 in checkpoint"),
        ({**COUNTS, "ffn_slot_num": 39}, "ffn_slot_num: 39 is fewer than the 40 tokens of layer 0"),
        ({**COUNTS, "num_layers": 3}, "num_layers: 3 in the configuration, 2 in checkpoint"),
        ({**COUNTS, "norm_activation_type": "gelu_l2_norm"}, "norm_activation_type: gelu_l2_norm in the configuration"),
        ({**COUNTS, "padded_vocab_size": 512}, "padded_vocab_size: 512 does not fit this checkpoint"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_another_model_cannot_be_grown_into_this_one(
    base: Path, refusal: Command, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    before = contents(base)
    assert message in refusal(pretrain_partial_init=str(base), save=str(tmp_path / "out"), **keys)
    assert not (tmp_path / "out").exists() and contents(base) == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "qkv_slot_num: 24 in the configuration, 48 in the checkpoint; use the configuration the model was"),
        ({"growth": [stage(2, ffn_slot_num=80)]}, "the first 1 growths of the schedule do not lead to the model"),
        ({"growth": [stage(2, row_norm="segment")]}, "the first 1 growths of the schedule do not lead to the model"),
        ({"growth": [stage(2, layers=[1])]}, "the first 1 growths of the schedule do not lead to the model"),
        ({"growth": [stage(2), stage(5, qkv_slot_num=40)]}, "growth[1]: qkv_slot_num: 40 is fewer than the 48"),
        ({"growth": [stage(2)], "hidden_size": 64}, "hidden_size: 64 in the configuration, 32 in checkpoint"),
    ],
    ids=[
        "old configuration",
        "other counts",
        "another norm",
        "other layers",
        "a new stage that shrinks",
        "other width",
    ],
)
def test_a_grown_run_needs_the_schedule_that_it_had(
    grown: Path, refusal: Command, keys: dict[str, Any], message: str
) -> None:
    before = contents(grown)
    error = refusal(save=str(grown), load=str(grown), train_iters=6, **keys)
    assert message in error and contents(grown) == before


def test_stages_may_be_added_to_a_schedule(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path, train_iters=3, growth=[stage(2)])
    run(tiny_config, tmp_path, train_iters=6, growth=[stage(2), stage(4, ffn_slot_num=80, **CONTINUE)])
    assert [entry["iteration"] for entry in state(tmp_path)["lineage"]] == [2, 4]


def test_a_growth_that_changes_logits_is_not_made(
    tiny_config: MakeConfig, refusal: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_config, tmp_path / "plain", train_iters=4)
    folders = {"save": str(tmp_path / "out"), "load": str(tmp_path / "out")}
    keys = {"train_iters": 8, "growth": [stage(4, **CONTINUE)], **folders}
    with monkeypatch.context() as patch:
        patch.setattr(growth_proof, "TOLERANCE", -1.0)
        error = refusal(**keys)
        assert "qkv 24 -> 48, proj 24 -> 36, ffn 40 -> 72 in layers 0 to 1 changes logits by" in error
        assert "nothing was written and the checkpoint before is intact" in error
        before = contents(tmp_path / "out")
        assert refusal(**keys) == error  # the same again, and the checkpoint as it was
        assert contents(tmp_path / "out") == before
    assert state(tmp_path / "out")["lineage"] == []
    run(tiny_config, tmp_path / "out", **keys)
    assert state(tmp_path / "out")["iteration"] == 8 and len(state(tmp_path / "out")["lineage"]) == 1


def test_logits_that_are_not_finite_prove_nothing(
    base: Path, refusal: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (float("nan"), float("inf")):
        monkeypatch.setattr(growth_proof, "_run", lambda spec, source, x, *_, value=value: x.float() * value)
        error = refusal(pretrain_partial_init=str(base), save=str(tmp_path / "out"), **COUNTS)
        assert "are not finite, so nothing is proven" in error and not (tmp_path / "out").exists()


def test_a_growth_that_comes_with_the_end_is_made_when_the_run_goes_on(tiny_config: MakeConfig, tmp_path: Path) -> None:
    keys = {"growth": [stage(4, **CONTINUE)], "lr_decay_iters": 6}
    run(tiny_config, tmp_path / "parts", train_iters=4, **keys)
    assert state(tmp_path / "parts")["lineage"] == []
    run(tiny_config, tmp_path / "parts", train_iters=6, **keys)
    run(tiny_config, tmp_path / "whole", train_iters=6, **keys)
    assert_equal(tensors(tmp_path / "parts"), tensors(tmp_path / "whole"))


@pytest.mark.parametrize("file", ["train_state.json", "config.yml"])
@pytest.mark.parametrize("content", [None, b"", b"a: [1", b"\xff", b"num_layers: 2\n"], ids=str)
def test_a_damaged_checkpoint_is_named_with_file_and_key(
    base: Path, refusal: Command, tmp_path: Path, file: str, content: bytes | None
) -> None:
    damaged, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(base, damaged)
    if content is None:
        (damaged / "global_step2" / file).unlink()
    else:
        (damaged / "global_step2" / file).write_bytes(content)
    before = contents(damaged)
    for key, keys in (
        ("load", {"save": str(damaged), "load": str(damaged), "growth": [stage(5)]}),
        ("pretrain_partial_init", {"save": str(out), "pretrain_partial_init": str(damaged), **COUNTS}),
    ):
        error = refusal(**keys)
        assert f"error: {key}: checkpoint {damaged / 'global_step2'} is damaged: {file} " in error
        assert contents(damaged) == before and not out.exists()


def test_data_of_another_tokenizer_is_named_before_a_growth_is_proven(
    base: Path, refusal: Command, tmp_path: Path
) -> None:
    builder, random = IndexedDatasetBuilder(str(tmp_path / "other"), np.uint16), np.random.RandomState(0)
    for _ in range(40):
        builder.add_document(random.randint(320, 2000, 100).tolist())
    builder.finalize()
    before = contents(base)
    for keys in (
        {"pretrain_partial_init": str(base), "save": str(tmp_path / "out"), **COUNTS},
        {"save": str(base), "load": str(base), "growth": [stage(2)]},
    ):
        for eval_iters in (0, 2):
            error = refusal(**keys, data_path=str(tmp_path / "other"), eval_iters=eval_iters)
            assert "error: data_path: the data has token id " in error and "the embedding 320 rows" in error
    assert contents(base) == before and not (tmp_path / "out").exists()


def test_a_run_without_data_has_ids_to_prove_a_growth_with(tiny_config: MakeConfig) -> None:
    """At the run's end without evaluation no data set is built."""
    config = tiny_config(padded_vocab_size=320)
    (ids,) = build_task(config).held_out(Datasets(None, None, None), 4)
    assert ids.shape[1] == 16 and ids.dtype == torch.int64 and int(ids.min()) >= 0 and int(ids.max()) < 320
    assert torch.equal(ids, build_task(config).held_out(Datasets(None, None, None), 4)[0])


OFFICIAL = Path(__file__).parents[1] / "fixtures" / "golden" / "model_A" / "pytorch_model.bin"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("text", "is not a readable PyTorch file of tensors (it is damaged, or of another kind)"),
        ("cut", "(PytorchStreamReader failed reading zip archive: failed finding central directory)"),
        ("no tensors", "is not a flat dictionary of tensors"),
        ("other depth", "has a tensor 'sequential.9.x' that a model with num_layers 2 lacks"),
        ("other width", "embedding.word_embeddings.weight has shape [512, 64], the configuration makes it [320, 32]"),
        ("no module", "has no 'module' with a model's tensors"),
        ("split", "is split over 2 model-parallel ranks"),
        ("ZeRO 3", "holds ZeRO stage 3 shards"),
        ("no index", "pytorch_model.bin.index.json has no weight_map"),
        ("missing shard", "no.bin does not exist"),
        ("latest of nothing", "global_step5 is not a complete checkpoint"),
    ],
)
def test_what_is_no_smaller_model_is_named_with_its_key(
    refusal: Command, tmp_path: Path, form: str, message: str
) -> None:
    folder = tmp_path / "official"
    folder.mkdir()
    source = folder / "pytorch_model.bin"
    if form == "text":
        source.write_text("hello")
    elif form == "cut":
        source.write_bytes(OFFICIAL.read_bytes()[:2000])
    elif form == "no tensors":
        torch.save([1], source)
    elif form == "other depth":
        torch.save({"sequential.9.x": torch.ones(1)}, source)
    elif form == "other width":
        shutil.copy(OFFICIAL, source)
    elif form == "latest of nothing":
        (folder / "latest").write_text("global_step5")
    elif form in ("no index", "missing shard"):
        content = "[]" if form == "no index" else '{"weight_map": {"a": "no.bin"}}'
        (folder / "pytorch_model.bin.index.json").write_text(content)
    elif form == "ZeRO 3":
        (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    else:
        torch.save({}, folder / "mp_rank_00_model_states.pt")
        if form == "split":
            torch.save({}, folder / "mp_rank_01_model_states.pt")
    error = refusal(
        pretrain_partial_init=str(source if source.exists() else folder), save=str(tmp_path / "out"), **COUNTS
    )
    assert error.startswith(f"error: pretrain_partial_init: {folder}") and message in error
    assert error.count("(") == error.count(")") and not (tmp_path / "out").exists()
