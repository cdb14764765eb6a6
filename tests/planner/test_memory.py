"""The activations that are predicted are those that autograd keeps; states are known numbers."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron.model import LanguageModel
from megatron.model.blocks import Block, BuildOptions
from megatron.ops import linear_cross_entropy as loss_in_chunks
from megatron.ops.cross_entropy import cross_entropy
from megatron.ops.linear_cross_entropy import linear_cross_entropy
from megatron.planner import Choice, Workload, predict
from megatron.planner.ends import LanguageEnds, stream_bytes
from megatron.planner.memory import block_bytes, kept_bytes, state_bytes
from megatron.planner.networks import num_parameters, stages
from megatron.planner.step_time import tensor_elements
from tests.planner.workloads import H200, published, small
from tools.bench.measure import peak_bytes

head_bytes = LanguageEnds().head_bytes


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
        {"pattention_backend": "fused", "pos_emb": "none"},
        {"kind": "global"},
        {"kind": "global", "activation": "relu"},
        {"kind": "global", "pos_emb": "none"},
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


@pytest.mark.parametrize("way", ["eager", "chunked"])
@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_model_keeps_the_predicted_bytes_within_3_percent(recompute: int, way: str) -> None:
    keys = {"checkpoint_activations": recompute > 0, "checkpoint_num_layers": recompute or 1, "cross_entropy": way}
    work = small(pattention_backend="fused", **keys)
    chunked = way == "chunked"
    model = LanguageModel(
        work.model, seed=0, pattention_backend="fused", checkpoint_layers=recompute, defer_logits=chunked
    )
    ids = torch.randint(512, (2, 256))
    count, width, vocabulary = ids.numel(), 64, 512
    with Kept(model) as kept:  # the loss holds the graph
        if chunked:
            _loss = model(ids).through(lambda hidden, weight: linear_cross_entropy(hidden, weight, ids))
            # The head's input is gone by now, and so is the chunk, which has all rows here.
            transient = 4 * count * (width + vocabulary)
        else:
            _loss = cross_entropy(model(ids), ids)
            # Half of the logits' bytes, and the chunks, are needed only in the backward pass.
            transient = (4 + 12) * count * vocabulary
    choice = work.configured(1)
    predicted = kept_bytes(work, choice, stages(work.model, 1)[0]) + head_bytes(work, choice) - transient
    assert predicted == pytest.approx(kept.bytes, rel=0.03)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 0.05), ("bf16", 0.2)])
@pytest.mark.parametrize(("rows", "tokens"), [(128, 256), (128, 2048)], ids=str)
def test_norm_head_and_loss_in_chunks_take_the_predicted_bytes(
    rows: int, tokens: int, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk decides the peak of the first, gradients of hidden and weight that of the second.

    Products of 16-bit matrices take scratch space on a CPU.
    """
    work = small(padded_vocab_size=2048, seq_length=tokens, train_micro_batch_size_per_gpu=1, precision=precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(loss_in_chunks.CHUNK_BYTES, device, rows * 2048 * dtype.itemsize)
    monkeypatch.setitem(loss_in_chunks.PIECE_BYTES, "cpu", 1)  # the kernels of a GPU need no fp32 copies
    stream = torch.randn(tokens, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(2048, 64, dtype=dtype, requires_grad=True)
    labels = torch.randint(2048, (tokens,))

    def pass_through() -> None:
        hidden = torch.nn.functional.layer_norm(stream, (64,))
        linear_cross_entropy(hidden, weight, labels).backward()

    choice = work.configured(1)
    predicted = head_bytes(work, choice) - stream_bytes(work, choice)  # it was there before
    assert peak_bytes(pass_through, stream.device) == pytest.approx(predicted, rel=tolerance)


def test_the_head_of_150m_takes_less_than_2_gib_at_64_sequences() -> None:
    keys = {"train_micro_batch_size_per_gpu": 64, "train_batch_size": None, "precision": "bf16"}
    ways = ("auto", "eager")
    chunked, eager = (Workload.of(published("tokenformer/150M", **keys, cross_entropy=way)) for way in ways)
    choice = Choice(1, 1, 1, False, 1, 64, 1, False)
    assert head_bytes(chunked, choice) < 2 * 2**30 and head_bytes(eager, choice) > 24 * 2**30


def test_states_of_adam_in_16_bits_are_the_known_numbers() -> None:
    work = small(precision="bf16", zero_optimization={"stage": 1, "reduce_bucket_size": 1000})

    def states(stage: int) -> dict[str, float]:
        return state_bytes(work, Choice(1, 1, 4, False, stage, 2, 1, False), 400)

    parts = ("weights", "master", "moments", "gradients")
    assert [states(1)[part] for part in parts] == [800, 400, 800, 800 + 200]
    assert [states(2)[part] for part in parts] == [800, 400, 800, 400]
    assert [states(3)[part] for part in parts] == [200, 400, 800, 200]
    assert states(1)["buckets"] == 2000 and states(1)["average"] == 0


def test_an_average_of_the_weights_takes_as_much_as_their_fp32_values() -> None:
    choices = [Choice(1, 1, 4, False, stage, 2, 1, False) for stage in (0, 1, 3)]
    plain, averaged = (small(precision="fp32", **keys) for keys in ({}, {"ema_decay": 0.9999}))
    assert [state_bytes(averaged, choice, 400)["average"] for choice in choices] == [1600, 400, 400]
    totals = [predict(work, H200, choices[1]).memory.total for work in (plain, averaged)]
    assert totals[1] - totals[0] == pytest.approx(4 * num_parameters(plain.model) / 4)
    offloaded = small(ema_decay=0.9999, zero_optimization={"stage": 1, "cpu_offload": True})
    assert state_bytes(offloaded, choices[1], 400)["average"] == 0


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
