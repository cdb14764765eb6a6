"""Fixtures: both kinds of model, a tokenizer, a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.model import LanguageModel
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_config, make_model, save_random_models


@pytest.fixture(params=["tokenformer", "transformer"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make_model(request.param)


@pytest.fixture
def tokenizer() -> CharLevelTokenizer:
    return CharLevelTokenizer()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The folder of a run's checkpoints, iterations 5 and 10."""
    save_random_models(tmp_path / "checkpoints", make_config(), (5, 10))
    return tmp_path / "checkpoints"
