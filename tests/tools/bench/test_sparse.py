"""The benchmark of sparse inference, at toy size: who takes turns, what is gathered, and what of it is left behind."""

from __future__ import annotations

from argparse import Namespace

import torch

from megatron.model.forward_only import evaluating
from megatron.ops import pattention_sparse
from tests.random_models import make_model
from tools.bench.sparse import ALL, WAYS, decoding, one_layer


def test_contestants_take_turns() -> None:
    model = make_model(dtype=torch.float32)
    options, before = (
        Namespace(rounds=2, shares=[0.5, 0.1], context=7, cpu_seconds=True),
        pattention_sparse.LIMITS,
    )
    with evaluating(model):
        alone = one_layer(model, 1, options, torch.device("cpu"))
        many = one_layer(model, 30, options, torch.device("cpu"))
        tokens = decoding(model, 2, options, torch.device("cpu"))
    assert before == pattention_sparse.LIMITS
    assert list(tokens) == [ALL, "0.5", "0.1"] and all(result.minimum > 0 for result in tokens.values())
    assert list(alone) == [ALL, *(f"{share}{way}" for share in ("0.5", "0.1") for way in WAYS)]
    assert alone["0.1, zeros"].facts["union"] == "10%" and alone[ALL].ratio == 1
    assert all(
        int(many[name].facts["union"][:-1]) > int(alone[name].facts["union"][:-1]) for name in alone if name != ALL
    )
