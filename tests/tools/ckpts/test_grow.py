"""tools/ckpts/grow.py and inspect.py: a grown checkpoint is a run of its own, and says what is in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron.checkpoint.store import RunFolder
from megatron.config import load_config
from megatron.config.sections.model import ModelConfig
from megatron.errors import run_command
from megatron.growth import proof as growth_proof
from megatron.inference import load_model
from megatron.training import train
from tests.growth.grown_runs import (
    CONTINUE,
    COUNTS,
    STEADY,
    MakeConfig,
    assert_equal,
    checkpoint,
    is_new,
    logits,
    metric,
    run,
    stage,
    state,
    tensors,
    worst,
)
from tools.ckpts import convert as convert_tool
from tools.ckpts import describe as describe_tool
from tools.ckpts import grow as grow_tool

pytestmark = pytest.mark.usefixtures("single_process")
ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "fixtures" / "golden" / "model_A"
IDS = torch.randint(290, (2, 16), generator=torch.Generator().manual_seed(0))
FLAGS = ["--qkv", "48", "--proj", "36", "--ffn", "72"]


@pytest.fixture(scope="module")
def base(tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, single_process: None) -> Path:
    """A run of 8 iterations that never grows, saved at each."""
    folder = tmp_path_factory.mktemp("base")
    run(tiny_config, folder, **STEADY, train_iters=8, checkpoint_factor=1, gradient_clipping=0.0, hidden_dropout=0.1)
    return folder


@pytest.fixture(scope="module")
def golden_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model's configuration."""
    arguments = json.loads((GOLDEN / "config.json").read_text())["neox_args"]
    model = {key: value for key, value in arguments.items() if key in ModelConfig.model_fields}
    path = tmp_path_factory.mktemp("golden") / "model.yml"
    path.write_text(yaml.safe_dump({**model, "tokenizer_type": "CharLevelTokenizer", "save": None}))
    return path


def failure(tool: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a tool ends with."""
    capsys.readouterr()
    assert run_command(lambda: tool.main(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_a_checkpoint_grown_by_the_tool_keeps_all_and_says_so(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grown"
    grow_tool.main([str(base / "global_step5"), str(out), *FLAGS, "--layers", "0-1"])
    printed = capsys.readouterr().out
    assert "qkv 24 -> 48, proj 24 -> 36, ffn 40 -> 72 in layers 0 to 1" in printed and "logits differ by " in printed
    assert sorted(path.name for path in out.iterdir()) == ["global_step5", "latest"]
    everything = ("model", "optimizer", "rng")
    before, after = tensors(base, 5, everything), tensors(out, kinds=everything)
    assert all(is_new(name) and name.startswith("model/") for name in after.keys() - before.keys())
    assert_equal({name: after[name] for name in before}, before)
    assert worst(logits(out, IDS), logits(base / "global_step5", IDS)) < 1e-12
    [entry] = state(out)["lineage"]
    assert {**state(out), "lineage": []} == state(base, 5)
    assert entry["scheduled"] is False and entry["iteration"] == 5 and entry["logit_difference"] < 1e-5
    config = checkpoint(out).config
    assert (config["save"], config["load"], config["ffn_slot_num"]) == (str(out), str(out), 72)
    assert config["token_segments"]["ffn"] == [[40, 32], [40, 32]]


@pytest.mark.parametrize("source", ["counts in the YAML", "config.yml of the checkpoint"])
def test_training_goes_on_from_what_the_tool_wrote(
    tiny_config: MakeConfig, base: Path, tmp_path: Path, source: str
) -> None:
    """Same samples, dropout masks, moments and function as the run that did not grow."""
    out = tmp_path / "grown"
    grow_tool.main([str(base / "global_step5"), str(out), *FLAGS])
    keys = {**STEADY, "train_iters": 8, "gradient_clipping": 0.0, "hidden_dropout": 0.1}
    if source == "counts in the YAML":
        run(tiny_config, out, **keys, **COUNTS, checkpoint_factor=1)
    else:
        file = tmp_path / "resolved.yml"
        file.write_text((out / "global_step5" / "config.yml").read_text())
        train(load_config(file))
    assert metric(out)[6] == pytest.approx(metric(base)[6], abs=1e-6)
    grown, plain = tensors(out, 6), tensors(base, 6)
    assert all(worst(grown[name].float(), plain[name].float()) < 1e-6 for name in plain)
    assert len(state(out)["lineage"]) == 1


def test_the_tool_continues_a_scheduled_run_as_a_new_one(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run(tiny_config, tmp_path / "first", train_iters=4, growth=[stage(2, freeze_old_tokens=True, **CONTINUE)])
    out = tmp_path / "second"
    grow_tool.main([str(tmp_path / "first"), str(out), "--ffn", "80", "--seed", "5"])
    assert [entry["scheduled"] for entry in state(out)["lineage"]] == [False, False]
    keys = {**COUNTS, "ffn_slot_num": 80, "growth": [stage(6, ffn_slot_num=100, **CONTINUE)]}
    run(tiny_config, out, train_iters=8, **keys)
    assert [entry["scheduled"] for entry in state(out)["lineage"]] == [False, False, True]
    assert checkpoint(out).config["token_segments"]["ffn"] == [[40, 32, 8, 20]] * 2


def test_the_golden_model_grows_by_tool_and_by_partial_init(
    golden_yaml: Path, tmp_path: Path, corpus_prefix: str
) -> None:
    io, flat = load_file(GOLDEN / "io.safetensors"), GOLDEN / "pytorch_model.bin"
    counts = ["--qkv", "128", "--proj", "128", "--ffn", "512"]
    grow_tool.main([str(flat), str(tmp_path / "tool"), *counts, "--config", str(golden_yaml)])
    keys = {
        "qkv_slot_num": 128, "proj_slot_num": 128, "ffn_slot_num": 512, "pretrain_partial_init": str(flat),
        "save": str(tmp_path / "run"), "extra_save_iters": [0], "train_iters": 1, "eval_iters": 0, "num_workers": 0,
        "data_path": corpus_prefix, "train_micro_batch_size_per_gpu": 1, "split": "1,0,0",
        "padded_vocab_size": io["logits"].shape[-1],
    }  # fmt: skip
    train(load_config(golden_yaml, keys))
    for folder in (tmp_path / "tool", tmp_path / "run" / "global_step0"):
        model = load_model(folder)
        assert (model.config.qkv_slot_num, model.config.ffn_slot_num) == (128, 512)
        with torch.no_grad():
            assert worst(model(io["input_ids"]), io["logits"]) < 1e-5
    by_tool, by_run = tensors(tmp_path / "tool", 0, ("model",)), tensors(tmp_path / "run", 0, ("model",))
    assert_equal(by_tool, by_run)  # the same seed gives the same new values
    assert not checkpoint(tmp_path / "tool").names("optimizer")
    keys = {**keys, "pretrain_partial_init": None, "save": str(tmp_path / "tool"), "load": str(tmp_path / "tool")}
    train(load_config(golden_yaml, keys))
    assert state(tmp_path / "tool")["iteration"] == 1 and len(state(tmp_path / "tool")["lineage"]) == 1


def test_a_grown_model_is_exported_but_not_to_the_official_file(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "grown"
    grow_tool.main([str(base), str(out), *FLAGS])
    convert_tool.main(["to-hf", str(out), str(tmp_path / "hf")])
    assert worst(logits(tmp_path / "hf", IDS), logits(out, IDS)) < 1e-12
    assert int(load_file(tmp_path / "hf" / "model.safetensors")["model.layers.0.mlp.tau_tokens"]) == 40
    error = failure(convert_tool, ["to-official", str(out), str(tmp_path / "official")], capsys)
    assert "has 48 tokens and tau^2 = 24; the official flat file cannot say so" in error
    grow_tool.main([str(base), str(tmp_path / "one"), "--ffn", "72", "--layers", "1"])
    capsys.readouterr()
    error = failure(convert_tool, ["to-hf", str(tmp_path / "one"), str(tmp_path / "hf1")], capsys)
    assert "ffn_slot_num: layers differ ([40, 72] tokens)" in error


def test_a_model_grown_by_rotated_keys_is_an_official_one(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tau is the root of its token count in every layer, which is all that the official file can say."""
    out, flat = tmp_path / "grown", tmp_path / "official"
    error = failure(grow_tool, [str(base), str(out), *FLAGS, "--new-keys", "rotated"], capsys)
    assert "proj_slot_num: 36 are 12 more than the 24 tokens of layer 0; new_keys rotated needs 24 more" in error
    assert "grow to 48, or leave new_keys out" in error and not out.exists()
    flags = ["--qkv", "48", "--proj", "48", "--ffn", "80", "--new-keys", "rotated"]
    grow_tool.main([str(base), str(out), *flags])
    before, after = tensors(base), tensors(out)
    is_old = {name: not is_new(name) and not name.endswith("tau_tokens") for name in after}
    assert_equal({n: t for n, t in after.items() if is_old[n]}, {n: t for n, t in before.items() if is_old[n]})
    assert not any(after[name].any() for name in after if "value_tokens_1" in name)
    taus = {int(after[name]) for name in after if name.endswith("mlp.tau_tokens")}
    assert taus == {80} and worst(logits(out, IDS), logits(base, IDS)) < 1e-5
    describe_tool.main([str(out)])
    assert "ffn 40 -> 80 in layers 0 to 1 by rotated keys" in capsys.readouterr().out
    convert_tool.main(["to-official", str(out), str(flat)])
    saved = checkpoint(out).config
    model = ModelConfig(**{key: saved[key] for key in ModelConfig.model_fields if key != "token_segments"})
    with torch.no_grad():
        official = load_model(flat / "pytorch_model.bin", model, dtype=torch.float64)(IDS)
    assert worst(official, logits(out, IDS)) < 1e-12


def test_tokens_with_a_row_norm_of_their_own_leave_the_old_ones_alone(
    tiny_config: MakeConfig, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grown by the tool, described, trained on, exported and read back; the official file is refused."""
    out, model = tmp_path / "grown", tmp_path / "hf"
    error = failure(grow_tool, [str(base), str(out), *FLAGS, "--row-norm", "segment", "--new-keys", "zero"], capsys)
    assert "new_keys: zero keys cannot learn under a row norm of their own, which is zero; leave new_keys out" in error
    grow_tool.main([str(base), str(out), *FLAGS, "--row-norm", "segment"])
    before, after = tensors(base), tensors(out)
    assert_equal({n: t for n, t in after.items() if n in before and "tau" not in n}, {
        n: t for n, t in before.items() if "tau" not in n
    })  # fmt: skip
    assert after["model/layers.1.mlp.tau_tokens"].tolist() == [40, 32]
    assert worst(logits(out, IDS), logits(base, IDS)) < 1e-12
    describe_tool.main([str(out)])
    text = capsys.readouterr().out
    assert "40 | 32 (tau^2 40 | 32), layers 0 to 1" in text
    assert "in layers 0 to 1 by random keys with a row norm of their own; " in text
    run(tiny_config, out, **STEADY, **COUNTS, train_iters=10)
    convert_tool.main(["to-hf", str(out), str(model)])
    convert_tool.main(["from-hf", str(model), str(tmp_path / "back")])
    assert worst(logits(out, IDS), logits(base, IDS)) > 1e-3
    for other in (model, tmp_path / "back"):
        assert worst(logits(other, IDS), logits(out, IDS)) < 1e-12
    error = failure(convert_tool, ["to-official", str(out), str(tmp_path / "official")], capsys)
    assert "row_norm: tokens of this model have row norms of their own; the official flat file cannot say so" in error


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_mistakes_are_one_line_and_leave_nothing(
    base: Path, golden_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, out, flat = tmp_path / "taken", tmp_path / "out", str(GOLDEN / "pytorch_model.bin")
    taken.mkdir()
    (taken / "file").touch()
    before = contents(base)
    for arguments, message in (
        ([str(base), str(taken), *FLAGS], "taken: exists already; give a new or an empty folder"),
        ([str(base), str(base), *FLAGS], "exists already"),
        ([str(base), str(out), "--qkv", "20"], "qkv_slot_num: 20 is fewer than the 24 tokens of layer 0"),
        ([str(base), str(out), "--qkv", "48", "--layers", "0,2"], "layers: 2 is not a tokenformer block"),
        ([str(base), str(out), "--qkv", "48", "--layers", "0-x"], "--layers: 0-x is no list of blocks"),
        ([str(tmp_path / "none"), str(out), *FLAGS], "IN: no checkpoint in "),
        ([flat, str(out), *FLAGS], "holds tensors only; give the YAML configuration of its model too (--config YAML)"),
        ([str(base), str(out), *FLAGS, "--config", str(golden_yaml)], "leave the flag off"),
    ):
        assert message in failure(grow_tool, arguments, capsys), arguments
        assert not out.exists() and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(growth_proof, "TOLERANCE", -1.0)
    error = failure(grow_tool, [str(base), str(out), *FLAGS], capsys)
    assert "changes logits by" in error and "nothing was written" in error
    assert not out.exists() and contents(base) == before


def test_a_disk_that_refuses_leaves_nothing_half_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunFolder.save

    def full(folder: RunFolder, *arguments: Any) -> Path:
        real(folder, *arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "save", full)
    assert "No space left" in failure(grow_tool, [str(base), str(tmp_path / "out"), *FLAGS], capsys)
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_what_is_in_a_checkpoint(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    growth = [stage(2, **CONTINUE), stage(4, layers=[1], ffn_slot_num=100, freeze_old_tokens=True, **CONTINUE)]
    run(tiny_config, tmp_path, train_iters=5, growth=growth, ema_decay=0.95)
    capsys.readouterr()
    describe_tool.main([str(tmp_path), "--json", "--verify"])
    facts = json.loads(capsys.readouterr().out)
    assert (facts["iteration"], facts["consumed_tokens"], facts["checksums"]) == (5, 5 * 64, "hold")
    model = load_model(tmp_path)
    assert facts["parameters"] == model.num_parameters() == sum(facts["parameters_of"].values())
    assert facts["blocks"] == {"tokenformer": 2} and facts["tau_tokens"] == {
        "qkv": [24] * 2,
        "proj": [24] * 2,
        "ffn": [40] * 2,
    }
    assert facts["segments"]["ffn"] == [[40, 32, 0], [40, 32, 28]]
    assert [entry["iteration"] for entry in facts["lineage"]] == [2, 4]
    new = sum(p.numel() for name, p in model.named_parameters() if is_new(name, 2))
    assert facts["optimizer"]["parameters_with_state"] == new and facts["optimizer"]["updates"] == [1]
    assert facts["bytes"][""] == sum(f.stat().st_size for f in (tmp_path / "global_step5").iterdir())
    describe_tool.main([str(tmp_path / "global_step5")])
    text = capsys.readouterr().out
    for words in (
        "iteration    5; 320 tokens", f"{facts['parameters']:,}", "40 + 32 + 28 (tau^2 40), layer 1",
        "growth 2     at iteration 4 (256 tokens): ffn 72 -> 100 in layer 1", "not checked (--verify)",
        "Adam: exp_avg, exp_avg_sq, step of", "EMA          of every parameter, decay 0.95", "EMA 0.",
    ):  # fmt: skip
        assert words in text, (words, text)
    assert max(map(len, text.splitlines()[1:])) < 200


def test_inspect_reads_what_other_tools_wrote_and_names_what_is_damaged(
    base: Path, golden_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = str(GOLDEN / "pytorch_model.bin")
    convert_tool.main(["from-official", flat, str(tmp_path / "run"), "--config", str(golden_yaml)])
    capsys.readouterr()
    describe_tool.main([str(tmp_path / "run")])
    assert "never grown" in (text := capsys.readouterr().out) and "Adam without state" in text
    assert "no checkpoint" in failure(describe_tool, [str(tmp_path)], capsys)
    assert "no checkpoint" in failure(describe_tool, [flat], capsys)
    file = tmp_path / "run" / "global_step0" / "model-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "model-00000.safetensors does not have the checksum" in failure(
        describe_tool, [str(tmp_path / "run"), "--verify"], capsys
    )
    file.write_bytes(file.read_bytes()[:1000])
    assert "is damaged: model-00000.safetensors has 1000 bytes" in failure(
        describe_tool, [str(tmp_path / "run")], capsys
    )


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train_state.json", None, "train_state.json is missing"),
        ("train_state.json", b'{"iterat', "train_state.json has 8 bytes instead of"),
        ("config.yml", None, "config.yml is missing"),
        ("config.yml", b"", "config.yml has 0 bytes instead of"),
        ("config.yml", b"a: [1", "config.yml has 5 bytes instead of"),
        ("config.yml", b"num_layers: 2\n", "config.yml has 14 bytes instead of"),
        ("optimizer-00000.safetensors", b"cut", "optimizer-00000.safetensors has 3 bytes instead of"),
    ],
)
def test_a_damaged_file_is_named_by_both_tools(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes | None, message: str
) -> None:
    folder, out = tmp_path / "global_step8", tmp_path / "out"
    shutil.copytree(base / "global_step8", folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    assert f"global_step8 is damaged: {message}" in failure(describe_tool, [str(folder)], capsys)
    error = failure(grow_tool, [str(folder), str(out), *FLAGS], capsys)
    assert error.startswith("error: IN: ") and message in error and not out.exists()


def test_a_file_that_is_no_official_model_is_named_with_the_tools_argument(
    golden_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "pytorch_model.bin"
    cut.write_bytes((GOLDEN / "pytorch_model.bin").read_bytes()[:2000])
    error = failure(grow_tool, [str(cut), str(tmp_path / "out"), *FLAGS, "--config", str(golden_yaml)], capsys)
    assert f"error: IN: {cut} is not a readable PyTorch file" in error and not (tmp_path / "out").exists()


def test_layers_and_counts_of_the_tool_have_to_be_given(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for flags, message in (
        ([], "--qkv, --proj, --ffn: give the tokens afterwards of at least one"),
        (["--ffn", "72", "--layers", ""], "--layers: is no list of blocks"),
        (["--ffn", "72", "--layers", "1-0"], "--layers: 1-0 runs backwards"),
    ):
        assert message in failure(grow_tool, [str(base), out, *flags], capsys)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    assert "latest does not name a checkpoint" in failure(grow_tool, [str(tmp_path), out, *FLAGS], capsys)
    assert not Path(out).exists()


@pytest.mark.launches
@pytest.mark.parametrize(
    "start",
    [["tools/ckpts/grow.py"], ["tools/ckpts/describe.py"], ["tools/ckpts/inspect.py"], ["-m", "tools.ckpts.grow"]],
    ids=str,
)
def test_the_tools_run_by_path_and_as_modules(start: list[str], tmp_path: Path) -> None:
    arguments = ["none", str(tmp_path / "out"), "--qkv", "8"] if "grow" in start[-1] else ["none"]
    result = subprocess.run([sys.executable, *start, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result
