"""tools/ckpts/branch.py: a branch anneals as the run that decayed at once, and the trunk does not notice."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from megatron.config import load_config
from megatron.errors import run_command
from megatron.training import train
from tests.growth.grown_runs import (
    MakeConfig,
    assert_equal,
    checkpoint,
    metric,
    run,
    stage,
    state,
    tensors,
)
from tools.ckpts import branch as branch_tool

pytestmark = pytest.mark.usefixtures("single_process")
ROOT = Path(__file__).parents[3]
EVERYTHING = ("model", "optimizer", "ema", "rng")
TRUNK = {
    "lr_decay_style": "WSD", "lr_warmup_iters": 2, "hidden_dropout": 0.1, "checkpoint_factor": 3, "train_iters": 9,
    "eval_iters": 1, "zero_optimization": {"stage": 1}, "ema_decay": 0.9,
}  # fmt: skip
DECAY = {"lr_wsd_decay_style": "minus_sqrt", "lr_wsd_decay_iters": 4}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def branch(source: Path, target: Path, *flags: str) -> None:
    """The tool, and the command that it names."""
    branch_tool.main([str(source), str(target), *flags])
    train(load_config(target / "config.yml"))


@pytest.fixture(scope="module")
def trunk(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run of 9 iterations at a constant rate after its warm-up, with a folder of logs outside its own."""
    folder = tmp_path_factory.mktemp("trunk")
    run(tiny_config, folder / "run", **TRUNK, log_dir=str(folder / "logs"))
    return folder / "run"


def test_a_branch_equals_the_run_that_decayed_at_once(tiny_config: MakeConfig, trunk: Path, tmp_path: Path) -> None:
    before = contents(trunk.parent)
    branch(trunk, tmp_path / "branch", "--iteration", "6", "--decay-iters", "4", "--decay-style", "minus_sqrt")
    assert contents(trunk.parent) == before
    run(tiny_config, tmp_path / "at once", **{**TRUNK, **DECAY, "train_iters": 10})
    assert_equal(tensors(tmp_path / "branch", kinds=EVERYTHING), tensors(tmp_path / "at once", kinds=EVERYTHING))
    assert state(tmp_path / "branch") == state(tmp_path / "at once") and state(tmp_path / "branch")["iteration"] == 10
    logs, whole = tmp_path / "branch" / "log", tmp_path / "at once"
    for key in ("lm_loss", "grad_norm", "learning_rate", "valid_lm_loss"):
        found, expected = metric(logs, key), metric(whole, key)
        assert found == {number: expected[number] for number in found} and found, key
    rates = metric(logs, "learning_rate")
    assert rates == pytest.approx({6 + k: 1e-4 + 9e-4 * (1 - ((k - 1) / 4) ** 0.5) for k in (1, 2, 3, 4)}, abs=1e-15)


def test_a_branch_stopped_half_way_resumes(trunk: Path, tmp_path: Path) -> None:
    for name, parts in (("whole", [None]), ("parts", [8, None])):
        branch_tool.main([str(trunk), str(tmp_path / name), "--iteration", "6", "--decay-iters", "4"])
        for interval in parts:
            train(load_config(tmp_path / name / "config.yml", {"exit_interval": interval}))
    assert_equal(tensors(tmp_path / "parts", kinds=EVERYTHING), tensors(tmp_path / "whole", kinds=EVERYTHING))


def test_growth_goes_on_from_the_trunk(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """A trunk that restarts at its growths never decays before its end; a branch of it makes no more of them."""
    folder, keys = tmp_path / "run", {**TRUNK, **DECAY, "train_iters": 14}
    growth = [stage(4, warmup=0.0, lr=8e-4), stage(8, qkv_slot_num=60, ffn_slot_num=80, lr_warmup_iters=1)]
    run(tiny_config, folder, **{**keys, "exit_interval": 6}, growth=growth)
    before = contents(folder)
    branch(folder, tmp_path / "branch", "--decay-iters", "3", "--min-lr", "0", "--decay-style", "linear")
    assert contents(folder) == before
    assert [entry["scheduled"] for entry in state(tmp_path / "branch")["lineage"]] == [False]
    assert metric(tmp_path / "branch", "learning_rate") == pytest.approx({7: 8e-4, 8: 16e-4 / 3, 9: 8e-4 / 3})
    assert (tmp_path / "branch" / "latest").read_text().strip() == "global_step9"
    run(tiny_config, folder, **keys, growth=growth)
    rates = metric(folder, "learning_rate")
    assert [rates[i] for i in (3, 4, 5, 8, 9, 10, 11)] == pytest.approx([1e-3, 1e-3, 8e-4, 8e-4, 0, 1e-3, 1e-3])
    assert [rates[i] for i in (12, 13)] == pytest.approx([1e-4 + 9e-4 * (1 - (k / 4) ** 0.5) for k in (1, 2)])
    assert [entry["iteration"] for entry in state(folder)["lineage"]] == [4, 8]


def test_a_run_with_another_schedule_branches_from_the_rate_that_it_has(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run(tiny_config, tmp_path / "run", train_iters=8, checkpoint_factor=4, tensorboard_dir=str(tmp_path / "tb"))
    branch_tool.main([str(tmp_path / "run" / "global_step4"), str(tmp_path / "branch"), "--decay-iters", "2"])
    saved = checkpoint(tmp_path / "branch").config
    assert saved["optimizer"]["params"]["lr"] == pytest.approx(5.5e-4)  # half way down a cosine
    assert saved["tensorboard_dir"] == str(tmp_path / "branch" / "tensorboard") and saved["log_dir"] is None


def test_mistakes_are_one_line_and_leave_nothing(
    tiny_config: MakeConfig, trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_config, tmp_path / "bare", train_iters=1, no_save_optim=True)
    out, flags = str(tmp_path / "out"), ["--decay-iters", "4"]
    for source, more, message in (
        (trunk, ["--decay-iters", "0"], "--decay-iters: 0 is no number of iterations; give 1 or more"),
        (trunk, [*flags, "--min-lr", "-1"], "--min-lr: -1 is no learning rate"),
        (trunk, [*flags, "--min-lr", "nan"], "--min-lr: nan is no learning rate"),
        (trunk, [*flags, "--min-lr", "0.5"], "is 0.001, which is not above min_lr 0.5"),
        (trunk, [*flags, "--iteration", "5"], "global_step5 is not a complete checkpoint; iterations found there: 3"),
        (tmp_path / "none", flags, "IN: no checkpoint in "),
        (tmp_path / "bare", flags, "has no optimizer state (no_save_optim)"),
    ):
        capsys.readouterr()
        arguments = [str(source), out, *more]
        assert run_command(lambda arguments=arguments: branch_tool.main(arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
        assert not Path(out).exists() and not list(tmp_path.glob(".*"))
    assert run_command(lambda: branch_tool.main([str(trunk), str(trunk), *flags])) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_tool_runs_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["branch.py", str(tmp_path), str(tmp_path / "out"), "--decay-iters", "1"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "tools" / "ckpts" / "branch.py"), run_name="__main__")
    assert capsys.readouterr().err.startswith("error: IN: no checkpoint in ") and sys.path[0] == str(ROOT)
