"""Plans of image classifiers: counts, FLOPs, memory, layouts and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import RunConfig, load_config
from megatron.errors import UserError, run_command
from megatron.launch import launch
from megatron.model.blocks import Block, BuildOptions
from megatron.model.build import build_model
from megatron.mpu import Layout
from megatron.planner import Choice, Workload, candidates, plan, report
from megatron.planner.memory import block_bytes, kept_bytes
from megatron.planner.networks import flops_per_token, num_parameters, stages
from tests.planner.test_memory import Kept
from tests.planner.workloads import H200, ROOT
from tests.tasks.image_runs import KEYS

SMALL = {**KEYS, "hidden_size": 64, "num_attention_heads": 4, "patch_size": 1, "train_micro_batch_size_per_gpu": 4}
TRANSFORMER: dict[str, Any] = dict.fromkeys(("qkv_slot_num", "proj_slot_num", "ffn_slot_num"))


def published(name: str, **keys: Any) -> RunConfig:
    return load_config([ROOT / f"configs/vision/{name}_in1k.yml"], keys)


def small(**keys: Any) -> Workload:
    return Workload.of(load_config([], {**SMALL, "train_batch_size": None, **keys}))


@pytest.mark.parametrize(
    ("name", "parameters", "gflops"),
    [
        ("B16_matched", 86_447_848, 105.4), ("B16", 114_759_400, 138.8), ("L16_matched", 304_007_144, None),
        ("L16", 404_670_440, 488.3), ("ViT_B16", 86_567_656, 105.4), ("ViT_L16", 304_326_632, None),
    ],
)  # fmt: skip
def test_parameters_and_flops_are_those_of_the_model(name: str, parameters: int, gflops: float | None) -> None:
    work = Workload.of(published(name))
    model = build_model(work.model, device="meta")
    assert num_parameters(work.model) == model.num_parameters() == parameters
    assert flops_per_token(work.model) == pytest.approx(model.flops_per_token(), rel=1e-12)
    found = work.model.tokens_per_sample() * flops_per_token(work.model) / 1e9
    assert gflops is None or found == pytest.approx(gflops, abs=0.05)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        TRANSFORMER,
        {"class_token": False, "global_pool": "avg", "num_classes": 7},
        {"patch_bias": False, "pre_norm": True},
    ],
)
def test_the_largest_share_and_the_stages_are_counted_exactly(keys: dict[str, Any]) -> None:
    work = small(patch_size=2, **keys)
    grids = (BuildOptions(device="meta", layout=Layout.for_world(rank, 4, tensor_size=4)) for rank in range(4))
    shares = [build_model(work.model, options, device="meta") for options in grids]
    largest = max(sum(parameter.numel() for parameter in share.parameters()) for share in shares)
    assert stages(work.model, 1)[0].parameters(work.network, 4) == largest
    both = [stage.parameters(work.network, 1) for stage in stages(work.model, 2)]
    assert sum(both) == num_parameters(work.model)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("keys", [{"pre_norm": True}, TRANSFORMER, {"class_token": False, "global_pool": "avg"}])
def test_a_model_keeps_the_predicted_bytes_within_3_percent(keys: dict[str, Any], dtype: str) -> None:
    work = small(pattention_backend="fused", precision=dtype, **keys)
    entry = torch.float32 if dtype == "fp32" else torch.bfloat16
    options = BuildOptions("fused")
    model = build_model(work.model, options, seed=0).to(entry)
    block, choice = Block(work.model, 0, options, causal=False).to(entry), work.configured(1)
    tokens = work.model.tokens_per_sample()
    x = torch.randn(4, tokens, 64, dtype=entry, requires_grad=True)
    with Kept(block) as of_block:
        _output = block(x)  # holds the graph
    assert block_bytes(work, choice, work.model.layer_kinds[0]) == pytest.approx(of_block.bytes, rel=0.03)
    with Kept(model) as of_model:
        _loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 1, 8, 8)).float(), torch.arange(4))
    stream, pixels = 4 * tokens * 64 * work.element_bytes, 4 * 64
    waiting = 5 * pixels  # the images themselves are no activations
    # What is read of the last stream by taking a mean of it is kept no longer than that; gradients come later.
    in_flight = stream + stream * ("class_token" in keys)
    predicted = kept_bytes(work, choice, stages(work.model, 1)[0]) + work.network.ends.head_bytes(work, choice)
    assert predicted - waiting - in_flight == pytest.approx(of_model.bytes, rel=0.03)


def test_layouts_are_those_that_the_run_accepts() -> None:
    config = published("B16")
    found = candidates(Workload.of(config), H200, 16)
    assert found and all(candidate.choice.samples == 4096 for candidate in found)
    assert not any(candidate.choice.sequence_parallel for candidate in found), "one rank would have the class token"
    assert not any(candidate.choice.micro_batch % 2 for candidate in found), "images are mixed two by two"
    plain = published("B16", mixup=0, cutmix=0, class_token=False, global_pool="avg")
    others = candidates(Workload.of(plain), H200, 16)
    assert any(candidate.choice.micro_batch % 2 for candidate in others)
    assert any(candidate.choice.sequence_parallel for candidate in others)


def test_more_stages_and_ranks_take_less_memory_each() -> None:
    work = Workload.of(published("L16"))
    best = plan(work, H200, 8)[0]
    alone, cut = (
        kept_bytes(work, Choice(t, 1, 8 // t, False, 1, 64, 8, False), stages(work.model, 1)[0]) for t in (1, 4)
    )
    assert cut < alone and 0 < best.mfu < 1


def test_a_growing_run_has_a_line_for_each_of_its_models() -> None:
    text = report(published("B16_86M_to_115M"), H200, 8)
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    assert "of images, one takes 46.28 GFLOP forward, 138.8 in training" in text
    assert "update: 4096 images of 224 x 224 x 3, 197 tokens each, number of GPUs: 8" in text
    assert lines["at first"][2:5] == ["62,557", "86,447,848", "105.4"]
    assert lines["after growth 1"][3:6] == ["31,279", "114,759,400", "138.8"]
    first, later = float(lines["at first"][5]), float(lines["after growth 1"][6])
    assert first < later
    assert float(lines["in all"][-1]) == pytest.approx((62557 * first + 31279 * later) / 3600, rel=0.02)
    assert "images/s" in text and "tokens/s" not in text


def test_dry_run_plans_images_and_names_what_it_cannot_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tests.tasks.toys  # noqa: F401 -- registers a task that is neither

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("megatron.config.hostfile.CLUSTER_HOSTFILE", "/nonexistent/hostfile")
    assert launch(["train.py", "configs/vision/L16_in1k.yml", "--dry-run", "--gpus", "64"]) == 0
    assert "404,670,440 parameters" in capsys.readouterr().out
    (tmp_path / "toy.yml").write_text("task: vectors\nnum_layers: 2\nhidden_size: 16\nffn_slot_num: 24\n")
    assert run_command(lambda: launch(["train.py", str(tmp_path / "toy.yml"), "--dry-run", "--gpus", "8"])) == 2
    known = "language, image_classification, clip, image_to_text"
    message = f"task: plans are made for {known}, and not for what learns 'vectors'"
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="plans are made for"):
        Workload.of(load_config([tmp_path / "toy.yml"]))
