"""How the list of layers is cut into pipeline stages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.config import RunConfig, load_config
from megatron.engine.pipeline_model import layer_weights, partition
from megatron.model import LanguageModel

ROOT = Path(__file__).parents[2]
PUBLISHED = sorted((ROOT / "configs/tokenformer").glob("*.yml"))


@pytest.mark.engine
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_two_stages_of_published_models_hold_half_of_the_blocks_each(path: Path) -> None:
    model = load_config([path]).with_vocabulary(50277).model
    weights = layer_weights(model)
    parts = {stages: partition(weights, stages) for stages in (1, 2, 3, 4)}
    print(path.stem, parts)
    depth = model.num_layers
    assert len(weights) == depth + 3
    assert parts[1] == [0, depth + 3]
    assert parts[2] == [0, 1 + depth // 2, depth + 3]
    blocks = [stop - start for start, stop in zip(parts[4], parts[4][1:], strict=False)]
    blocks[0] -= 1
    blocks[-1] -= 2
    assert sum(blocks) == depth and max(blocks) - min(blocks) <= 1


@pytest.mark.engine
def test_weights_are_matmul_parameters_of_blocks(tiny_config: Callable[..., RunConfig]) -> None:
    config = tiny_config(attention_config=[[["global", "tokenformer"], 1]]).with_vocabulary(300).model
    model = LanguageModel(config, device="meta")
    expected = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in model.layers]
    assert layer_weights(config) == [0, *expected, 0, 0] and expected[0] != expected[1]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("weights", "stages", "parts"),
    [
        ([0, 5, 5, 5, 5, 0, 0], 2, [0, 3, 7]),
        ([0, 5, 5, 5, 0, 0], 2, [0, 3, 6]),  # the last stage has the head: it gets the smaller half
        ([0, 5, 5, 5, 5, 5, 5, 5, 0, 0], 3, [0, 4, 6, 10]),
        ([0, 9, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0], 2, [0, 2, 13]),
        ([0, 2, 7, 0, 0], 2, [0, 2, 5]),
    ],
)
def test_cuts_are_even(weights: list[int], stages: int, parts: list[int]) -> None:
    assert partition(weights, stages) == parts


@pytest.mark.engine
def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 pipeline stages for 2 blocks"):
        partition([0, 1, 1, 0, 0], 3)


@pytest.mark.launches
def test_the_model_needs_no_deepspeed() -> None:
    code = "import sys, megatron.model, megatron.training; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
