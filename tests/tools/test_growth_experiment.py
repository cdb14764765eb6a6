"""The growth experiment: its Net2Net changes no logit, its trials can be run in order, its report adds up rightly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron.config import load_config
from megatron.model import LanguageModel
from tools.growth_experiment.net2net import expanded_model, logit_difference
from tools.growth_experiment.results import Result, read_results
from tools.growth_experiment.trials import PARTS, SIZES, TOKENS, TOKENS_PER_UPDATE, Trial, trials_of


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_net2net_changes_no_logit_and_noise_makes_copies_differ(noise: float) -> None:
    sizes = [Trial("c", "", 1, size, 1, kind="transformer").model_config() for size in SIZES]
    model = LanguageModel(sizes[0], seed=1).double()
    ids = torch.randint(sizes[0].vocab_size or 0, (2, 24), generator=torch.Generator().manual_seed(1))
    torch.set_default_dtype(torch.float64)
    try:
        for number, after in enumerate(sizes[1:]):
            wide = expanded_model(model, after, seed=number, noise=noise)
            difference, scale = logit_difference(model, wide, ids)
            assert difference < 1e-12 and scale > 0.1
            model = wide
    finally:
        torch.set_default_dtype(torch.float32)
    columns = dict(model.named_parameters())["layers.0.mlp.fc_out.weight"]
    width = sizes[0].hidden_size
    assert torch.equal(columns[:width], columns[width : 2 * width]) == (noise == 0)


def test_every_trial_has_a_valid_configuration_and_comes_after_its_parent(tmp_path: Path) -> None:
    trials = trials_of(TOKENS, PARTS, [1, 2, 3])
    folders = [trial.folder for trial in trials]
    assert len(set(folders)) == len(folders)
    for number, trial in enumerate(trials):
        assert trial.parent is None or trial.parent in folders[:number]
        load_config([], trial.config(tmp_path, documents=200))
    of_seeds = {part: {t.seed for t in trials if t.part == part} for part in PARTS}
    assert all(of_seeds[part] == {1, 2, 3} for part in "abhe") and all(of_seeds[part] == {1} for part in "rcdsf")
    assert [t.folder for t in trials_of(TOKENS, "b", [2])][0] == "a/seed2/S1", (
        "what a part starts from is trained first"
    )


def test_sizes_of_both_kinds_are_equal() -> None:
    for size in SIZES:
        found = []
        for part, kind in (("a", "tokenformer"), ("c", "transformer")):
            config = Trial(part, "", 1, size, 1, kind=kind).model_config()  # type: ignore[arg-type]
            model = LanguageModel(config, device="meta")
            found.append(sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "embedding" not in n))
        assert found[0] == found[1], size


def write_trial(folder: Path, losses: dict[int, float], **facts: object) -> None:
    folder.mkdir(parents=True)
    (folder / "trial.json").write_text(json.dumps({"tokens_per_update": TOKENS_PER_UPDATE, "seed": 1, **facts}))
    lines = [json.dumps({"iteration": update, "valid_lm_loss": loss}) for update, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 1')  # the last line of a killed run


def test_tokens_and_flops_are_those_of_the_whole_chain(tmp_path: Path) -> None:
    base = {"part": "a", "label": "", "size": "S1", "parent": None, "updates": 100, "flops_per_token": 10.0}
    write_trial(tmp_path / "a/seed1/S1", {50: 5.0, 100: 4.0}, **base)
    grown = {"part": "b", "label": "tenth", "size": "S2", "parent": "a/seed1/S1", "updates": 20,
             "flops_per_token": 30.0, "loss_after_growth": 4.0}  # fmt: skip
    write_trial(tmp_path / "b/seed1/tenth/S2", {10: 4.2, 20: 3.8}, **grown)
    write_trial(tmp_path / "b/seed1/tenth/S3", {10: 3.7}, **{**grown, "parent": "b/seed1/tenth/S2"})  # not finished
    results = {result.folder: result for result in read_results(tmp_path)}
    assert results.keys() == {"a/seed1/S1", "b/seed1/tenth/S2"}
    chain: Result = results["b/seed1/tenth/S2"]
    assert chain.cumulative_tokens(20) == 120 * TOKENS_PER_UPDATE
    assert chain.cumulative_flops(20) == (100 * 10 + 20 * 30) * TOKENS_PER_UPDATE
    assert chain.reaches(3.9) == pytest.approx(17.5) and chain.reaches(3.7) is None
    assert chain.stays_below(4.0) == pytest.approx(15)
