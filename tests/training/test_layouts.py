"""Every layout does what one process does on the same batches: losses, norms, weights, their average, moments."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint.store import CheckpointReader
from megatron.config import RunConfig
from megatron.mpu.shard import shard_spec
from megatron.training import train
from megatron.training.loop import Trainer
from tests.ranks import run_ranks
from tests.training.cases import CLIP, MODELS, TOLERANCE, Case, metrics

pytestmark = pytest.mark.processes

MakeConfig = Callable[..., RunConfig]


# Tensor ranks share a model's tokens, so each model has them, by itself and with sequences shared. What ZeRO and stages
# share does not depend on what a layer computes: there each model has one layout at least, and each layout one model.
CASES = [
    *(
        Case(model=model, tensor=2, sequence=sequence)
        for sequence in (False, True)
        for model in ("tokenformer", "uneven", "softmax", "transformer")
    ),
    Case(pipeline=2),
    Case(pipeline=2, model="transformer"),
    Case(data=2, zero=1, model="uneven"),
    Case(data=2, zero=2, model="softmax"),
    Case(data=2, zero=3, model="transformer"),
    Case(tensor=2, pipeline=2, model="uneven"),
    Case(data=2, tensor=2),
    Case(pipeline=2, zero=1, model="mup"),
    Case(tensor=2, zero=3, model="mup"),
    Case(pipeline=2, zero=1, model="untied"),
    Case(tensor=2, sequence=True, model="untied"),
    Case(pipeline=2, model="deep", keys={"checkpoint_activations": True, "checkpoint_num_layers": 2}),
    Case(pipeline=3, model="deep"),
    Case(data=2, pipeline=2, model="softmax"),
    Case(data=2, pipeline=2, zero=1),
    Case(data=2, zero=3, keys={"checkpoint_activations": True}),
    Case(tensor=2, zero=1),
    Case(tensor=2, zero=2, model="uneven"),
    Case(tensor=2, zero=3, sequence=True, model="transformer"),
    Case(data=2, tensor=2, zero=2, model="uneven"),
    Case(data=2, tensor=2, zero=3, sequence=True, model="uneven"),
    Case(pipeline=2, tensor=2, zero=1, sequence=True, model="transformer"),
]


DRAWN = {"transformer": {"sample_order": "random_segments", "random_split": True}}
"""By model: its samples are drawn at random, and must be the same in every layout."""


def keys_of(case: Case) -> dict[str, Any]:
    return {**case.config_keys(), **DRAWN.get(case.model, {})}


def train_all(configs: list[RunConfig]) -> list[int]:
    return [train(config).iteration for config in configs]


def tensors(folder: Path, iteration: int = 5) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder / f"global_step{iteration}")
    return {f"{kind}/{n}": reader.tensor(kind, n) for kind in ("model", "optimizer", "ema") for n in reader.names(kind)}


def assert_same_run(found: Path, expected: Path, case: str, iteration: int = 5) -> None:
    for key in ("lm_loss", "valid_lm_loss", "test_lm_loss"):
        assert metrics(found, key) == pytest.approx(metrics(expected, key), abs=TOLERANCE), (case, key)
    norms = pytest.approx(metrics(expected, "grad_norm"), rel=TOLERANCE)
    assert metrics(found, "grad_norm") == norms, case
    left, right = tensors(found, iteration), tensors(expected, iteration)
    assert left.keys() == right.keys(), case
    for name, tensor in right.items():
        assert left[name].shape == tensor.shape, (case, name)
        assert torch.allclose(left[name].double(), tensor.double(), rtol=0, atol=TOLERANCE), (case, name)


@pytest.fixture(scope="module")
def one_process(
    tiny_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory, single_process: None
) -> dict[str, Path]:
    """Runs of one process, by model."""
    root = tmp_path_factory.mktemp("one")
    for model in MODELS:
        train(tiny_config(**keys_of(Case(model=model)), save=str(root / model), extra_save_iters=[0]))
    return {model: root / model for model in MODELS}


@pytest.mark.parametrize("world", sorted({case.world for case in CASES}))
def test_a_layout_trains_as_one_process_does(
    tiny_config: MakeConfig, one_process: dict[str, Path], tmp_path: Path, world: int
) -> None:
    cases = [case for case in CASES if case.world == world]
    configs = [tiny_config(**keys_of(case), save=str(tmp_path / case.name)) for case in cases]
    assert run_ranks(world, train_all, configs) == [[5] * len(cases)] * world
    for case in cases:
        assert_same_run(tmp_path / case.name, one_process[case.model], case.name)
        start, end = tensors(one_process[case.model], 0), tensors(one_process[case.model])
        for kind in ("model/", "ema/"):
            moved = max((end[name] - start[name]).abs().max().item() for name in start if name.startswith(kind))
            assert moved > 1e-3, (case.model, kind)
    assert min(metrics(one_process["tokenformer"], "grad_norm")) > CLIP, "clipping has to be at work"


def test_checkpoints_move_between_layouts(
    tiny_config: MakeConfig, one_process: dict[str, Path], tmp_path: Path
) -> None:
    """Five iterations in each layout, one after the other, are those of one process that never stopped."""
    model = "uneven"
    legs = [
        Case(data=2, zero=1, model=model),
        Case(pipeline=2, model=model),
        Case(data=2, zero=1, model=model),
        Case(tensor=2, zero=3, sequence=True, model=model),
        Case(pipeline=2, zero=1, model=model),
        Case(model=model),
    ]
    total = 5 * len(legs)
    whole = {**Case(model=model).config_keys(), "train_iters": total}
    train(tiny_config(**whole, save=str(tmp_path / "whole")))
    parts = {"save": str(tmp_path / "parts"), "load": str(tmp_path / "parts")}
    configs = [
        tiny_config(**{**leg.config_keys(), "train_iters": 5 * number}, **parts) for number, leg in enumerate(legs, 1)
    ]
    assert run_ranks(2, train_all, configs[:-1])[1] == [5, 10, 15, 20, 25]
    train(configs[-1])
    for key, tolerance in (("lm_loss", {"abs": TOLERANCE}), ("grad_norm", {"rel": 2 * TOLERANCE})):
        assert metrics(tmp_path / "parts", key) == pytest.approx(metrics(tmp_path / "whole", key), **tolerance), key
    left, right = tensors(tmp_path / "parts", total), tensors(tmp_path / "whole", total)
    assert left.keys() == right.keys()
    for name in right:
        assert torch.allclose(left[name], right[name], rtol=0, atol=2 * TOLERANCE), name


def test_one_checkpoint_continues_in_every_layout(tiny_config: MakeConfig, tmp_path: Path) -> None:
    """Saved at data 2 with ZeRO 1, the next five iterations in other layouts are those of the run that went on."""
    first = Case(data=2, zero=1)
    folders = {"save": str(tmp_path / "first"), "load": str(tmp_path / "first")}
    run_ranks(2, train_all, [tiny_config(**first.config_keys(), **folders)])
    legs = [first, Case(tensor=2), Case(pipeline=2), Case(tensor=2, pipeline=2)]
    for leg in legs:
        shutil.copytree(tmp_path / "first", tmp_path / leg.name)
        folder = {key: str(tmp_path / leg.name) for key in folders}
        run_ranks(leg.world, train_all, [tiny_config(**{**leg.config_keys(), "train_iters": 10}, **folder)])
    for leg in legs[1:]:
        assert_same_run(tmp_path / leg.name, tmp_path / first.name, leg.name, iteration=10)


def whole_parameters_and_generators(configs: list[RunConfig]) -> list[dict[str, list[float]]]:
    """For each run its parameters that every tensor rank holds alike, and the state of the default generator."""
    found = []
    for config in configs:
        train(config)
        run = Trainer(config)
        named = run.engine.model.named_parameters()
        found.append({name: p.flatten().tolist() for name, p in named if shard_spec(p) is None})
        found[-1]["generator"] = torch.get_rng_state().tolist()
        run.close()
    return found


def test_tensor_ranks_agree_with_dropout_and_resume_exactly(tiny_config: MakeConfig, tmp_path: Path) -> None:
    def keys(name: str, **more: Any) -> RunConfig:
        case = Case(tensor=2, sequence=True, keys={"hidden_dropout": 0.1, "attention_dropout": 0.1})
        folder = str(tmp_path / name)
        return tiny_config(**{**case.config_keys(), "train_iters": 6, **more}, save=folder, load=folder)

    configs = [keys("whole"), keys("parts", exit_interval=3), keys("parts")]
    first, second = run_ranks(2, whole_parameters_and_generators, configs)
    assert first == second
    assert metrics(tmp_path / "parts", "lm_loss") == metrics(tmp_path / "whole", "lm_loss")
    left, right = tensors(tmp_path / "parts", 6), tensors(tmp_path / "whole", 6)
    assert all(torch.equal(left[name], right[name]) for name in right)


def test_another_grid_starts_new_random_numbers_and_says_so(
    tiny_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], single_process: None
) -> None:
    keys = {"load": str(tmp_path), "save": str(tmp_path)}
    run_ranks(2, train_all, [tiny_config(**Case(tensor=2, keys={"train_iters": 1}).config_keys(), **keys)])
    reader = CheckpointReader(tmp_path / "global_step1")
    assert torch.equal(reader.tensor("rng", "rank0/torch"), reader.tensor("rng", "rank1/torch"))
    train(tiny_config(**Case(keys={"train_iters": 2}).config_keys(), **keys))
    assert capsys.readouterr().out.count("has no random-number states of this process grid") == 1
