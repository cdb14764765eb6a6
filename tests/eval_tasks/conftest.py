"""A small BPE tokenizer and a random model for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_tasks.adapter import TokenFormerLM
from megatron.tokenizer import HFTokenizer
from megatron.tokenizer.training import train_tokenizer
from tests.random_models import make_model

FIXTURES = Path(__file__).parents[1] / "fixtures" / "eval"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([(FIXTURES / "harbor_choice.jsonl").read_text(encoding="utf-8")], 320, path)
    return path


@pytest.fixture
def tokenizer(tokenizer_file: Path) -> HFTokenizer:
    return HFTokenizer(str(tokenizer_file))


@pytest.fixture
def lm(tokenizer: HFTokenizer) -> TokenFormerLM:
    return TokenFormerLM(make_model(padded_vocab_size=384), tokenizer, batch_size=3, progress=False)
