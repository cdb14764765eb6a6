"""What ranks send while they evaluate and generate is what NCCL takes, in one order on all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.evaluation.batching import Batches
from megatron.evaluation.corpus import Document
from megatron.evaluation.perplexity import corpus_perplexity
from megatron.evaluation.sharing import shared
from megatron.inference.generate import generate
from megatron.inference.load import load_model
from megatron.mpu.environment import ensure_process_environment
from megatron.mpu.processes import join
from megatron.tokenizer import CharLevelTokenizer
from tests.random_models import make_config, save_random_models
from tests.ranks import run_ranks
from tests.strict_collectives import Traffic, order_faults, strict_collectives

pytestmark = pytest.mark.processes

PROMPTS = ["The Union " * n + chr(97 + n) for n in range(3)]
OPTIONS: list[dict[str, Any]] = [
    {"maximum_tokens": 3},
    {"maximum_tokens": 3, "recompute": True},
    {"maximum_tokens": 3, "temperature": 1.0, "top_p": 0.9, "seed": 5},
]
KINDS: dict[str, dict[str, Any]] = {
    "uneven": {"qkv_slot_num": 23, "ffn_slot_num": 41, "padded_vocab_size": 643},
    "softmax": {"norm_activation_type": "softmax"},
}
DOCUMENTS = [Document([n + i for i in range(40 - 9 * n)], 10, 60) for n in range(3)]


def evaluated(tensor_size: int, root: str) -> tuple[Traffic, list[str], list[float | None]]:
    """Texts and perplexities of each kind of model, and the messages that they took; in fp64, as in one process."""
    ensure_process_environment()
    texts, numbers = [], []
    with strict_collectives() as traffic:
        layout = join(tensor_size, "gloo")
        for kind in KINDS:
            model = load_model(f"{root}/{kind}", dtype=torch.float64, layout=layout)
            for options in OPTIONS:
                found = generate(model, CharLevelTokenizer(), PROMPTS, batch_size=2, **options)
                texts += [completion.text for completion in found]
            numbers += corpus_perplexity(model, DOCUMENTS, 0, 16, batches=Batches(2), axis=layout.data).values()
            numbers += shared(list(range(7)), lambda n: n, lambda items: [float(n) for n in items], layout.data)
    return traffic, texts, numbers


def test_evaluation_and_generation_send_what_nccl_takes(tmp_path: Path) -> None:
    for kind, keys in KINDS.items():
        save_random_models(tmp_path / kind, make_config(**keys), (1,))
    _, texts, numbers = evaluated(1, str(tmp_path))
    reports = run_ranks(4, evaluated, 2, str(tmp_path))
    traffic = [report[0] for report in reports]
    assert [rank.faults for rank in traffic] == [[]] * 4
    assert min(len(rank.messages) for rank in traffic) > 100
    assert order_faults([rank.messages for rank in traffic]) == []
    # Whoever reads a result before it is there reads something else.
    for _, found_texts, found_numbers in reports:
        assert found_texts == texts and found_numbers == pytest.approx(numbers, rel=1e-9)
