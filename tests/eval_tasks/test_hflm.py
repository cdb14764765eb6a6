"""Our scores are those of lm-eval's own model for transformers, of an export and of a GPT-NeoX model."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from eval_tasks.adapter import TokenFormerLM
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.exchange.convert import export_huggingface
from tests.random_models import make_model

pytestmark = pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("accelerate")), reason="needs transformers and accelerate"
)

SENTENCE = "The ferry leaves the harbor at noon, and the children skate on the pond until supper."
PAIRS = [
    (SENTENCE[:40], SENTENCE[40:]),
    ("Question: where does the ferry leave from?\nAnswer:", " the harbor"),
    ("Question: where does the ferry leave from?\nAnswer:", " t"),
    ("", SENTENCE[:40]),
    ("a", " b"),
    ("white space goes over   ", "to the other side"),
    ("M\u00fcde, \u4f60\u597d", " \U0001f642 and so on"),
    (SENTENCE * 3, " The context is cut from the left."),
]
TEXTS = [SENTENCE, SENTENCE * 4, "", "a"]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(params=["tokenformer", "gpt-neox"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_file: Path) -> Path:
    """A random model in Hugging Face's form, with a context of 48 tokens: exported by us, or made by transformers."""
    exported, other = tmp_path / "tokenformer", tmp_path / "gpt-neox"
    tokenizer = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    export_huggingface(make_model(dtype=torch.float32, padded_vocab_size=384), exported, tokenizer)
    if request.param == "tokenformer":
        return exported
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(5)
    config = GPTNeoXConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=48, initializer_range=0.3,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exported / name, other)
    return other


@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_equal_those_of_transformers(folder: Path, batch_size: int) -> None:
    ours = TokenFormerLM.create_from_arg_obj({"pretrained": str(folder), "batch_size": batch_size})
    from lm_eval.models.huggingface import HFLM  # takes seconds, which a process that runs other files is spared

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size, trust_remote_code=True)
    ours.progress = False
    assert ours.max_length == theirs.max_length == 48
    found, expected = (lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True) for lm in (ours, theirs))
    for (score, greedy), (reference, expected_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(float(reference), abs=1e-4) and greedy == bool(expected_greedy)
    rolling = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    found, expected = (lm.loglikelihood_rolling(rolling, disable_tqdm=True) for lm in (ours, theirs))
    assert found == pytest.approx([float(value) for value in expected], abs=2e-4)
