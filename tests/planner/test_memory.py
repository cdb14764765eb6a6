"""The activations that are predicted are those that autograd keeps; states are known numbers."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.model import LanguageModel
from megatron.model.blocks import Block, BuildOptions
from megatron.ops.cross_entropy import cross_entropy
from megatron.planner import Choice, Workload, predict
from megatron.planner.counts import stages
from megatron.planner.memory import block_bytes, head_bytes, kept_bytes, state_bytes
from megatron.planner.step_time import tensor_elements
from tests.planner.workloads import H200, published, small


class Saved:
    """A tensor that a node of the graph holds."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Kept:
    """Counts the bytes that the graph made inside `with` holds, parameters left out."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self._saved: weakref.WeakSet[Saved] = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)

    def _pack(self, tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())  # a node that holds its own output would live for ever
        self._saved.add(saved)
        return saved

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor for saved in self._saved}
        return sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in self._own)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"pattention_backend": "reference"},
        {"pattention_backend": "fused"},
        {"norm_activation_type": "gelu_l2_norm"},
        {"norm_activation_type": "softmax"},
        {"pattention_backend": "fused", "norm": "rmsnorm"},
        {"pattention_backend": "fused", "gpt_j_residual": True},
        {"kind": "global"},
        {"kind": "global", "activation": "relu"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_block_keeps_the_predicted_bytes_within_3_percent(options: dict[str, Any], dtype: str) -> None:
    work = small(**options, precision=dtype)
    kind = work.model.layer_kinds[0]
    entry = torch.float32 if dtype == "fp32" else torch.bfloat16
    block = Block(work.model, 0, BuildOptions(work.training.pattention_backend)).to(entry)
    x = torch.randn(2, 256, 64, dtype=entry, requires_grad=True)
    with Kept(block) as kept:
        _output = block(x)  # holds the graph
    assert block_bytes(work, work.configured(1), kind) == pytest.approx(kept.bytes, rel=0.03)


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_model_keeps_the_predicted_bytes_within_3_percent(recompute: int) -> None:
    keys = {"checkpoint_activations": recompute > 0, "checkpoint_num_layers": recompute or 1}
    work = small(pattention_backend="fused", **keys)
    model = LanguageModel(work.model, seed=0, pattention_backend="fused", checkpoint_layers=recompute)
    ids = torch.randint(512, (2, 256))
    with Kept(model) as kept:
        _loss = cross_entropy(model(ids), ids)  # holds the graph
    choice, vocabulary = work.configured(1), 512
    # Half of the logits' bytes, and the chunks, are needed only in the backward pass.
    later = (4 + 12) * ids.numel() * vocabulary
    predicted = kept_bytes(work, choice, stages(work.model, 1)[0]) + head_bytes(work, choice) - later
    assert predicted == pytest.approx(kept.bytes, rel=0.03)


def test_states_of_adam_in_16_bits_are_the_known_numbers() -> None:
    work = small(precision="bf16", zero_optimization={"stage": 1, "reduce_bucket_size": 1000})

    def states(stage: int) -> dict[str, float]:
        return state_bytes(work, Choice(1, 1, 4, False, stage, 2, 1, False), 400)

    parts = ("weights", "master", "moments", "gradients")
    assert [states(1)[part] for part in parts] == [800, 400, 800, 800 + 200]
    assert [states(2)[part] for part in parts] == [800, 400, 800, 400]
    assert [states(3)[part] for part in parts] == [200, 400, 800, 200]
    assert states(1)["buckets"] == 2000


def test_the_first_stage_of_a_pipeline_holds_the_most_micro_batches() -> None:
    work = small(num_layers=4)
    memory = predict(work, H200, Choice(1, 4, 1, False, 0, 2, 16, False)).memory
    one_block = block_bytes(work, Choice(1, 4, 1, False, 0, 2, 16, False), "tokenformer")
    assert memory.kept >= 4 * one_block


def test_sequence_parallelism_saves_activations_and_moves_as_much() -> None:
    work = Workload.of(published("tokenformer/1-5B"))
    plain, sharded = (Choice(4, 1, 2, flag, 1, 8, 64, False) for flag in (False, True))
    assert block_bytes(work, sharded, "tokenformer") < block_bytes(work, plain, "tokenformer")
    assert tensor_elements(work, sharded, "tokenformer") == tensor_elements(work, plain, "tokenformer")
