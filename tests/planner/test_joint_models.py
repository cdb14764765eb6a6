"""Plans of models of several networks, and of their averages: counts, FLOPs, memory, layouts and the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.config import RunConfig, load_config
from megatron.launch import launch
from megatron.model.blocks import BuildOptions
from megatron.model.build import build_model
from megatron.mpu import Layout
from megatron.planner import Choice, Workload, candidates, predict, report
from megatron.planner.memory import kept_bytes, memory_of
from megatron.planner.networks import flops_per_token, num_parameters, stages
from tests.planner.test_memory import Kept
from tests.planner.workloads import H200, ROOT
from tests.tasks import image_runs, image_text_runs, pair_runs

PAIRS = {**pair_runs.KEYS, "padded_vocab_size": 512}
IMAGE_TEXT = {**image_text_runs.KEYS, "padded_vocab_size": 512}


def published(name: str, **keys: Any) -> RunConfig:
    return load_config([ROOT / f"configs/clip/{name}_datacomp.yml"], {"padded_vocab_size": 49408, **keys})


@pytest.mark.parametrize(("name", "parameters"), [("B16", 149_421_057), ("ViT_B16", 149_620_737)])
def test_parameters_and_flops_are_those_of_the_two_towers(name: str, parameters: int) -> None:
    model = published(name).model
    built = build_model(model, device="meta")
    assert num_parameters(model) == built.num_parameters() == parameters
    assert flops_per_token(model) == pytest.approx(built.flops_per_token(), rel=1e-4)


@pytest.mark.parametrize("keys", [PAIRS, IMAGE_TEXT], ids=["clip", "image_to_text"])
def test_what_a_rank_holds_and_a_model_keeps_is_predicted(keys: dict[str, Any]) -> None:
    work = Workload.of(load_config([], keys))
    grids = (BuildOptions(device="meta", layout=Layout.for_world(rank, 2, tensor_size=2)) for rank in range(2))
    shares = [build_model(work.model, options, device="meta") for options in grids]
    largest = max(sum(parameter.numel() for parameter in share.parameters()) for share in shares)
    own = num_parameters(work.model) - sum(stages(p.model, 1)[0].parameters(p.network, 1) for p in work.parts())
    assert sum(stages(p.model, 1)[0].parameters(p.network, 2) for p in work.parts()) + own == largest
    assert num_parameters(work.model) == build_model(work.model, device="meta").num_parameters()

    choice, model = work.configured(1), build_model(work.model, BuildOptions("fused"), seed=0)
    tower = work.parts()[0].model
    images, ids = torch.randn(8, 1, tower.image_size, tower.image_size), torch.ones(8, 16, dtype=torch.int64)
    if keys is PAIRS:
        ids = torch.ones(8, work.parts()[1].model.tokens_per_sample(), dtype=torch.int64)
    with Kept(model) as kept:
        _outputs = model(images, ids)  # holds the graph
    waiting = 5 * images.numel()  # the images themselves are no activations
    predicted = sum(kept_bytes(part, choice, stages(part.model, 1)[0]) for part in work.parts()) - waiting
    assert predicted < kept.bytes == pytest.approx(predicted, rel=0.07), "what heads keep apart"


def test_a_joint_loss_is_cheaper_in_one_micro_batch() -> None:
    work = Workload.of(published("B16"))
    once, twice = (predict(work, H200, Choice(1, 1, 8, False, 1, 1024 // m, m, False)) for m in (1, 2))
    assert twice.time.compute == pytest.approx(once.time.compute * 4 / 3, rel=0.05)
    assert twice.memory.kept == pytest.approx(once.memory.kept / 2)
    found = candidates(work, H200, 16)
    assert all(c.choice.pipeline == 1 and not c.choice.sequence_parallel for c in found)
    assert {c.choice.tensor for c in found} == {1, 2, 4}, "divisors of the heads of both towers"


@pytest.mark.parametrize("keys", [image_runs.KEYS, PAIRS, IMAGE_TEXT], ids=["images", "clip", "image_to_text"])
def test_an_average_of_the_weights_takes_four_bytes_a_parameter(keys: dict[str, Any]) -> None:
    plain, averaged = (Workload.of(load_config([], {**keys, "ema_decay": decay})) for decay in (None, 0.999))
    for stage, ranks in ((0, 1), (1, 4), (3, 4)):
        choice = Choice(1, 1, ranks, False, stage, 2, 1, False)
        before, after = memory_of(plain, choice), memory_of(averaged, choice)
        networks = sum(stages(p.model, 1)[0].parameters(p.network, 1) for p in plain.parts())
        assert after.states - before.states == after.average == 4 * networks / (ranks if stage else 1)


def test_a_growth_of_one_tower_is_planned() -> None:
    growth = [{"at_iteration": 100_000, "tower": "text", "ffn_slot_num": 2048, "row_norm": "segment"}]
    config = published("B16", growth=growth, ema_decay=0.999)
    lines = {line.split("  ")[0]: line.split() for line in report(config, H200, 8).splitlines()}
    assert lines["at first"][2:4] == ["100,000", "149,421,057"]
    assert lines["after growth 1"][3:5] == ["56,250", f"{149_421_057 + 12 * 2 * 512 * 512:,}"]
    assert "row norms: up to 2 in a layer (row_norm: segment)" in lines


def test_dry_run_plans_pairs_and_texts_about_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("megatron.config.hostfile.CLUSTER_HOSTFILE", "/nonexistent/hostfile")
    for name, unit in (("clip/B16_datacomp", "pairs, images of 224 x 224 x 3, 197 and 77 tokens each"),
                       ("image_to_text/demo_digits", "pairs, images of 8 x 8 x 1, 17 and 32 tokens each")):  # fmt: skip
        assert launch(["train.py", f"configs/{name}.yml", "--dry-run", "--gpus", "8"]) == 0
        printed = capsys.readouterr().out
        assert unit in printed and "pairs/s" in printed and "for layout 1: " in printed
