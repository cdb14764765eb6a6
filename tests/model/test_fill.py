"""One fill: parameters and buffers from tensors by name; a tensor rank takes its share and reads no more."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron.checkpoint.tensors import TensorView
from megatron.exchange.checkpoint import of_model
from megatron.model import LanguageModel
from megatron.model.fill import fill
from megatron.model.init import InitialTensors
from megatron.mpu.layout import SINGLE, Axis
from tests.random_models import make_config, make_model


class Watched(TensorView):
    """Says what was read whole, and how many values in parts."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(of_model(model).tensors)
        self.whole, self.values = set[str](), 0

    def tensor(self, kind: str, name: str) -> Tensor:
        self.whole.add(name)
        return super().tensor(kind, name)

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        found = self.source.part(kind, name, *ranges)
        self.values += found.numel()
        return found


def test_tensor_ranks_read_their_shares_which_make_the_whole() -> None:
    whole = make_model(dtype=torch.float32)
    shared, values = set[str](), 0
    for rank in (0, 1, 2):
        layout = replace(SINGLE, tensor=Axis(3, rank, None))
        model, tensors = LanguageModel(make_config().model, layout=layout), Watched(whole)
        fill(model, tensors, layout)
        shared = {name for name, _ in model.named_parameters()} - tensors.whole
        values += tensors.values
        keys = model.layers[1].mlp.get_parameter("key_tokens_0")
        start, stop = layout.tensor.share(40)
        assert torch.equal(keys, whole.layers[1].mlp.get_parameter("key_tokens_0")[start:stop])
    parameters = dict(whole.named_parameters())
    assert "embedding.word_embeddings.weight" in shared and values == sum(parameters[name].numel() for name in shared)


def test_a_part_of_a_model_is_filled_by_its_place_in_it() -> None:
    whole, part = make_model(dtype=torch.float32), make_model(dtype=torch.float32).layers[0]
    fill(part, of_model(whole).tensors, prefix="layers.1.")
    expected = whole.layers[1].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in part.state_dict().items())


def test_first_values_are_those_of_the_seed() -> None:
    """The same as a model that is built with it; tau_tokens included."""
    config = make_config().model
    model = LanguageModel(config)
    fill(model, InitialTensors(LanguageModel(config, device="meta"), config, seed=7))
    expected = LanguageModel(config, seed=7).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
