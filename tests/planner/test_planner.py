"""The planner: its counts are the model's, its activations are those autograd keeps, its layouts are valid."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.config import RunConfig, load_config
from megatron.config.checks import find_parallel_mistakes
from megatron.errors import UserError, run_command
from megatron.launch import launch
from megatron.model import LanguageModel
from megatron.model.blocks import Block, BuildOptions
from megatron.mpu import Layout
from megatron.mpu.gpus import peak_tflops
from megatron.ops.cross_entropy import cross_entropy
from megatron.planner import MACHINES, Choice, Workload, candidates, find_machine, plan, predict, read_machine, report
from megatron.planner.counts import Stage, flops_per_token, num_parameters, stages
from megatron.planner.memory import block_bytes, head_bytes, kept_bytes, state_bytes
from megatron.planner.step_time import data_volumes, step_time, tensor_elements

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "seq_length": 256, "rotary_pct": 0.25,
    "norm": "layernorm_nonparam", "final_norm": "layernorm", "padded_vocab_size": 512, "precision": "fp32",
    "train_micro_batch_size_per_gpu": 2,
}  # fmt: skip
TOKENS = {"qkv_slot_num": 64, "proj_slot_num": 96, "ffn_slot_num": 256}
H200 = MACHINES["H200-141GB"]
PUBLISHED = ("tokenformer/150M", "tokenformer/1-5B", "transformer/450M")


def small(kind: str = "tokenformer", **overrides: Any) -> Workload:
    return Workload.of(load_config([], {**SMALL, **(TOKENS if kind == "tokenformer" else {}), **overrides}))


def published(name: str, **overrides: Any) -> RunConfig:
    keys = {"padded_vocab_size": 50304, "train_batch_size": 1024, "gradient_accumulation_steps": None, **overrides}
    return load_config([ROOT / f"configs/{name}_train_pile.yml"], keys)


class Saved:
    """A tensor that a node of the graph holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Counts the bytes that the graph made inside `with` holds, parameters left out."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self._saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())  # a node that holds its own output would live for ever
        self._saved.add(saved)
        return saved

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor for saved in self._saved}
        return sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in self._own)


# ---- counts ----


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_flops_are_those_of_the_model(name: str) -> None:
    config = published(name).model
    model = LanguageModel(config, device="meta")
    assert num_parameters(config) == model.num_parameters()
    assert flops_per_token(config) == model.flops_per_token(config.seq_length)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "layernorm", "no_weight_tying": True},
        {"norm": "rmsnorm", "final_norm": None},
        {"kind": "global", "use_bias_in_attn_linear": False},
        {"kind": "global", "intermediate_size": 200},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_variants_are_counted_too(options: dict[str, Any]) -> None:
    config = small(**options).model
    model = LanguageModel(config, device="meta")
    assert num_parameters(config) == model.num_parameters()
    assert flops_per_token(config) == model.flops_per_token(config.seq_length)


@pytest.mark.parametrize("kind", ["tokenformer", "global"])
def test_the_first_ranks_share_is_counted_exactly(kind: str) -> None:
    config = small(kind).model
    shard = LanguageModel(config, device="meta", layout=Layout.for_world(0, 4, tensor_size=4))
    (stage,) = stages(config, 1)
    assert stage.parameters(config, 4) == sum(parameter.numel() for parameter in shard.parameters())


def test_uneven_shares_count_the_largest() -> None:
    config = small(qkv_slot_num=65, num_attention_heads=4).model
    largest = max(
        sum(
            p.numel()
            for p in LanguageModel(config, device="meta", layout=Layout.for_world(r, 4, tensor_size=4)).parameters()
        )
        for r in range(4)
    )
    assert stages(config, 1)[0].parameters(config, 4) == largest


@pytest.mark.engine
@pytest.mark.parametrize(("layers", "count"), [(12, 5), (7, 7), (40, 6)])
def test_stages_are_cut_as_the_pipeline_cuts_them(layers: int, count: int) -> None:
    from megatron.engine.pipeline_model import partition

    config = small(num_layers=layers).model
    bounds = partition([0, *[1] * layers, 0, 0], count)
    sizes = [sum(0 < i <= layers for i in range(a, b)) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert [len(stage.kinds) for stage in stages(config, count)] == sizes


# ---- memory ----


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"pattention_backend": "reference"},
        {"pattention_backend": "fused"},
        {"norm_activation_type": "gelu_l2_norm"},
        {"norm_activation_type": "softmax"},
        {"pattention_backend": "fused", "norm": "rmsnorm"},
        {"pattention_backend": "fused", "gpt_j_residual": True},
        {"kind": "global"},
        {"kind": "global", "activation": "relu"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_block_keeps_the_predicted_bytes_within_3_percent(options: dict[str, Any], dtype: str) -> None:
    work = small(**options, precision=dtype)
    kind = work.model.layer_kinds[0]
    entry = torch.float32 if dtype == "fp32" else torch.bfloat16
    block = Block(work.model, 0, BuildOptions(work.training.pattention_backend)).to(entry)
    x = torch.randn(2, 256, 64, dtype=entry, requires_grad=True)
    with Kept(block) as kept:
        _output = block(x)  # holds the graph
    assert block_bytes(work, work.configured(1), kind) == pytest.approx(kept.bytes, rel=0.03)


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_model_keeps_the_predicted_bytes_within_3_percent(recompute: int) -> None:
    keys = {"checkpoint_activations": recompute > 0, "checkpoint_num_layers": recompute or 1}
    work = small(pattention_backend="fused", **keys)
    model = LanguageModel(work.model, seed=0, pattention_backend="fused", checkpoint_layers=recompute)
    ids = torch.randint(512, (2, 256))
    with Kept(model) as kept:
        _loss = cross_entropy(model(ids), ids)  # holds the graph
    choice, vocabulary = work.configured(1), 512
    # Half of the logits' bytes, and the chunks, are needed only in the backward pass.
    later = (4 + 12) * ids.numel() * vocabulary
    predicted = kept_bytes(work, choice, stages(work.model, 1)[0]) + head_bytes(work, choice) - later
    assert predicted == pytest.approx(kept.bytes, rel=0.03)


def test_states_of_adam_in_16_bits_are_the_known_numbers() -> None:
    work = small(precision="bf16", zero_optimization={"stage": 1, "reduce_bucket_size": 1000})

    def states(stage: int) -> dict[str, float]:
        return state_bytes(work, Choice(1, 1, 4, False, stage, 2, 1, False), 400)

    parts = ("weights", "master", "moments", "gradients")
    assert [states(1)[part] for part in parts] == [800, 400, 800, 800 + 200]
    assert [states(2)[part] for part in parts] == [800, 400, 800, 400]
    assert [states(3)[part] for part in parts] == [200, 400, 800, 200]
    assert states(1)["buckets"] == 2000


def test_the_first_stage_of_a_pipeline_holds_the_most_micro_batches() -> None:
    work = small(num_layers=4)
    memory = predict(work, H200, Choice(1, 4, 1, False, 0, 2, 16, False)).memory
    one_block = block_bytes(work, Choice(1, 4, 1, False, 0, 2, 16, False), "tokenformer")
    assert memory.kept >= 4 * one_block


def test_sequence_parallelism_saves_activations_and_moves_as_much() -> None:
    work = Workload.of(published("tokenformer/1-5B"))
    plain, sharded = (Choice(4, 1, 2, flag, 1, 8, 64, False) for flag in (False, True))
    assert block_bytes(work, sharded, "tokenformer") < block_bytes(work, plain, "tokenformer")
    assert tensor_elements(work, sharded, "tokenformer") == tensor_elements(work, plain, "tokenformer")


# ---- time ----


@pytest.mark.parametrize(("kind", "units", "statistics"), [("tokenformer", 16, 20), ("global", 8, 0)])
def test_tensor_volumes_of_a_layer(kind: str, units: int, statistics: int) -> None:
    work = small(kind)
    count = 2 * 256
    entries, rows = tensor_elements(work, Choice(4, 1, 1, False, 0, 2, 1, False), kind)
    assert entries == units * count * 64 * 3 / 4
    assert rows == statistics * count * 3 / 4


def test_data_volumes_of_each_zero_stage() -> None:
    def volume(stage: int, **zero: Any) -> tuple[float, float]:
        work = small(precision="bf16", zero_optimization={"stage": max(1, stage), **zero})
        return data_volumes(work, Choice(1, 1, 4, False, stage, 2, 5, False), 1000)

    unit = 2 * 1000 * 3 / 4
    assert volume(0) == (2 * unit, 0)
    assert volume(1) == volume(2) == (2 * unit, unit)
    assert volume(2, use_multi_rank_bucket_allreduce=False) == (unit, unit)
    assert volume(3) == (unit, 2 * 5 * unit)


def test_bubble_is_the_known_fraction() -> None:
    work = small(num_layers=4)
    time = step_time(work, Choice(1, 4, 1, False, 0, 2, 16, False), H200)
    assert time.bubble == pytest.approx((time.compute + time.pipeline) * 3 / 16)


def test_groups_that_leave_a_node_are_slower() -> None:
    inside, across = H200.link(8, 1), H200.link(8, 8)
    assert inside[0] == H200.intra_node_bandwidth * H200.link_fraction
    assert across[0] == H200.inter_node_bandwidth * H200.link_fraction
    assert H200.link(16, 1)[0] == 8 * across[0]  # eight members of the group in each node


def test_peaks_are_those_of_the_metrics() -> None:
    for name, machine in MACHINES.items():
        found = peak_tflops(f"NVIDIA {name.partition('-')[0]}")
        assert found is not None and machine.peak_flops == found[0] * 1e12


# ---- the plan ----


def test_every_layout_is_one_the_configuration_accepts() -> None:
    config = published("tokenformer/150M")
    found = candidates(Workload.of(config), H200, 24)
    assert {c.choice.tensor for c in found} <= {1, 2, 3, 4, 6, 12}
    for candidate in found:
        choice = candidate.choice
        assert choice.gpus == 24
        assert choice.samples == 1024
        assert choice.pipeline == 1 or choice.zero_stage <= 1
        zero = config.parallel.zero_optimization.model_copy(update={"stage": choice.zero_stage})
        axes = {"model_parallel_size": choice.tensor, "pipe_parallel_size": choice.pipeline, "zero_optimization": zero}
        asked = config.model_copy(update={"parallel": config.parallel.model_copy(update=axes)})
        assert not [*find_parallel_mistakes(asked.model, asked.parallel)]


def test_best_comes_first_and_everything_fits() -> None:
    best = plan(Workload.of(published("tokenformer/1-5B")), MACHINES["A100-40GB"], 8)
    assert all(candidate.memory.total <= MACHINES["A100-40GB"].usable_bytes for candidate in best)
    assert all(a.time.total < 1.011 * b.time.total for a, b in zip(best, best[1:], strict=False))
    assert 0 < best[0].mfu < 1


def test_advice_can_be_given_back_as_keys() -> None:
    config = published("tokenformer/450M")
    choice = plan(Workload.of(config), H200, 16)[0].choice
    again = published("tokenformer/450M", **choice.overrides())
    assert Workload.of(again).configured(16) == choice


def test_report_says_by_how_much_nothing_fits(tmp_path: Path) -> None:
    machine = tmp_path / "toy.yml"
    machine.write_text("base: A100-40GB\nmemory_bytes: 4e9\n")
    text = report(published("tokenformer/1-5B"), read_machine(str(machine)), 8)
    assert "does not fit" in next(line for line in text.splitlines() if line.startswith("configured"))
    assert text.splitlines()[-1].startswith("nothing fits 8 x toy: the smallest layout")
    assert plan(Workload.of(published("tokenformer/1-5B")), read_machine(str(machine)), 8) == []


def test_a_run_that_grows_is_planned_at_its_largest() -> None:
    counts = {"qkv_slot_num": 2140, "proj_slot_num": 2140, "ffn_slot_num": 8560}
    text = report(published("tokenformer/150M", growth=[{"at_iteration": 10, **counts}]), H200, 8)
    grown, before = published("tokenformer/150M", **counts).model, published("tokenformer/150M").model
    assert f"model: {num_parameters(grown):,} parameters" in text
    assert f"after the last growth (1 in all); at first it has {num_parameters(before):,} parameters" in text
    assert text.splitlines()[-1] == report(published("tokenformer/150M", **counts), H200, 8).splitlines()[-1]


def test_report_names_what_the_configured_layout_lacks() -> None:
    text = report(published("tokenformer/150M", model_parallel_size=4), H200, 6)
    assert "configured: cannot run on 6 GPUs: 6 processes cannot hold" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: B300\n", "base: unknown 'B300'; choose one of H200-141GB"),
        ("base: H100-80GB\nmemory: 3\n", "memory: unknown field; known are base, name, memory_bytes"),
        ("base: H100-80GB\ngpus_per_node: 2.5\n", "gpus_per_node: expected a positive whole number, got 2.5"),
        ("base: H100-80GB\nlink_fraction: 2\n", "link_fraction: expected a number above 0, at most 1, got 2"),
        ("peak_flops: 1e15\n", "memory_bytes: missing; give it, or start from a known machine"),
        ("- 1\n", "expected `field: value` lines"),
        ("a: [\n", "cannot be read as YAML"),
    ],
)
def test_mistakes_in_a_machine_file_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "machine.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"machine\.yml") as error:
        find_machine(str(path))
    assert message in str(error.value)


# ---- deepy.py --dry-run ----


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("megatron.mpu.environment._DEVICE_FILES", ())
    monkeypatch.setattr("megatron.config.hostfile.CLUSTER_HOSTFILE", "/nonexistent/hostfile")
    monkeypatch.setattr("megatron.launch.start.run_plan", lambda plan: pytest.fail("a process was started"))
    monkeypatch.delenv("DLTS_HOSTFILE", raising=False)


@pytest.mark.usefixtures("_here")
def test_dry_run_prints_command_world_and_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train.py", "-d", "configs", "tokenformer/150M_train_pile.yml", "--dry-run", "--machine", "A100-40GB"]
    assert launch([*arguments, "--gpus=8"]) == 0
    command, world, machine, *_ = capsys.readouterr().out.splitlines()
    assert command.endswith("train.py -d configs tokenformer/150M_train_pile.yml")
    assert world == "world: nodes x processes 1 x 1 -> data 1 x pipeline 1 x tensor 1"
    assert machine.startswith("machine: A100-40GB")
    assert "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1"


@pytest.mark.usefixtures("_here")
def test_dry_run_plans_for_a_cluster_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train.py", "configs/tokenformer/150M_train_pile.yml", "--set", "model_parallel_size=4", "--dry-run"]
    assert launch([*arguments, "--gpus", "8"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("command: none here: ")
    assert "\nconfigured" in output
    assert run_command(lambda: launch(arguments)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "8"], "--gpus and --machine are for --dry-run"),
        (["--dry-run", "--gpus", "0"], "expected a positive whole number, got '0'"),
        (["--dry-run", "--machine", "B300"], "'B300' is neither a file nor one of H200-141GB"),
    ],
)
def test_mistakes_in_plan_flags_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        launch(["train.py", "configs/demo.yml", *flags])
    assert message in str(error.value)


@pytest.mark.usefixtures("_here")
def test_a_model_alone_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.yml").write_text("num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\n")
    assert launch(["train.py", str(tmp_path / "model.yml"), "--dry-run", "--gpus", "8"]) == 0
    output = capsys.readouterr().out
    assert "batch: unknown, train_micro_batch_size_per_gpu 1 assumed" in output and "\nconfigured " in output
    assert run_command(lambda: launch(["train.py", str(tmp_path / "model.yml")])) == 2
    assert "training needs train_iters, train_micro_batch_size_per_gpu, data_path" in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("override", "gpus"),
    [("launcher=pdsh", 4), ("launcher=openmpi", 4), ("deepspeed_slurm=true", 8), ("num_gpus=2", 4)],
)
def test_launchers_need_not_be_installed_to_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, gpus: int
) -> None:
    monkeypatch.setattr("megatron.launch.command.shutil.which", lambda name: None)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    hostfile = [] if "slurm" in override else ["--set", f"hostfile={tmp_path / 'hosts'}"]
    arguments = ["train.py", "configs/tokenformer/150M_train_pile.yml", *hostfile, "--set", override]
    assert launch([*arguments, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("command: ") and f"number of GPUs: {gpus}" in output and "\nconfigured" in output
    assert run_command(lambda: launch(arguments)) == 2


@pytest.mark.usefixtures("_here")
def test_more_gpus_keep_the_update_or_say_that_they_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train.py", "configs/tokenformer/150M_train_pile.yml", "--dry-run", "--gpus", "64"]

    def update(*flags: str) -> str:
        assert launch([*arguments, *flags]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("update: "))

    assert update() == (
        "update: 8192 samples x 2048 tokens, number of GPUs: 64 (128 samples a data rank: it grows with the GPUs; "
        "give train_batch_size to keep it)"
    )
    kept = ["--set", "train_batch_size=1024", "--set", "gradient_accumulation_steps=null"]
    assert update(*kept) == "update: 1024 samples x 2048 tokens, number of GPUs: 64"


def test_a_stage_without_ends_has_no_vocabulary() -> None:
    config = small().model
    middle = Stage(config.layer_kinds[:1], first=False, last=False)
    assert middle.parameters(config, 1) == 2 * 64 * (3 * 64 + 96 + 256)
