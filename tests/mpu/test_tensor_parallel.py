"""Tensor and sequence parallel layers on real processes, in fp64, against the same layers in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.config.sections.model import ModelConfig, RowNorm
from megatron.model import LanguageModel, Pattention
from megatron.model.blocks import Block, BuildOptions
from megatron.model.embedding import HeadInput
from megatron.model.pattention import ACTIVATIONS
from megatron.mpu.collectives import gather, gather_shares, sum_scatter
from megatron.mpu.layout import ALONE, Axis, Layout
from megatron.mpu.random import dropout, own_stream
from megatron.mpu.shard import take_share
from megatron.ops.cross_entropy import cross_entropy
from megatron.ops.linear_cross_entropy import CHUNK_BYTES, linear_cross_entropy
from megatron.ops.pattention_backends import BACKENDS
from tests.ranks import run_ranks

pytestmark = pytest.mark.processes

WIDTH, LENGTH, BATCH = 32, 8, 3


def connected(tensor_size: int, sequence_parallel: bool = False) -> Layout:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    return Layout.for_world(rank, world, tensor_size=tensor_size, sequence_parallel=sequence_parallel).connect()


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def take_parameters(sharded: nn.Module, whole: nn.Module, layout: Layout) -> None:
    source = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in sharded.named_parameters():
            parameter.copy_(take_share(source[name], parameter, layout.tensor))


def gradient_distances(sharded: nn.Module, whole: nn.Module, layout: Layout) -> Iterator[tuple[str, float]]:
    source = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        expected = source[name].grad
        assert expected is not None and parameter.grad is not None, name
        yield name, worst(parameter.grad, take_share(expected, parameter, layout.tensor))


# ---- one layer ----


_CASES = [(tokens, zero_keys) for tokens in ([32], [21], [8, 13]) for zero_keys in (False, True)]


def one_layer(tensor_size: int) -> dict[str, float]:
    layout = connected(tensor_size)
    distances: dict[str, float] = {}
    # How many the others are is nothing to the kernels, which the interpreter takes long for.
    backends = BACKENDS if tensor_size == 2 else ("reference", "fused")
    for activation in ACTIVATIONS:
        for backend in backends:
            # 21, 8 + 13: no multiple of the number of ranks. Interpreted kernels take long: they get this case.
            cases = [([8, 13], True)] if backend in ("compiled", "triton") else _CASES
            for tokens, zero_keys in cases:
                case = f"{activation} {backend} {tokens} zero_keys={zero_keys}"
                distances[case] = compare_layer(layout, activation, backend, tokens, zero_keys)
            norms: list[RowNorm] = ["joint", "segment", "joint"]
            distances[f"{activation} {backend} norms"] = compare_layer(
                layout, activation, backend, [9, 7, 5], True, norms
            )
            distances[f"{activation} {backend} mask"] = compare_layer(
                layout, activation, backend, [8, 13], True, masked=True
            )
    return distances


def some_masks(*shape: int) -> Tensor:
    """A row that has all tokens hidden, and one that has a single token: on all ranks but one there is none."""
    mask = torch.rand(shape) > 0.4
    mask[0, 1] = mask[0, 2] = False
    mask[0, 2, -1] = True
    return mask


def compare_layer(
    layout: Layout,
    activation: str,
    backend: str,
    tokens: list[int],
    zero_keys: bool,
    row_norms: list[RowNorm] | None = None,
    masked: bool = False,
) -> float:
    torch.manual_seed(1)
    dtype = torch.float32 if backend == "triton" else torch.float64  # in fp64 its kernels are not asked
    tau = 17 if row_norms is None else [7, 10]
    build = {"activation": activation, "backend": backend, "tau_tokens": tau, "dtype": dtype, "row_norms": row_norms}
    whole = Pattention(WIDTH, WIDTH, tokens, **build)  # type: ignore[arg-type]
    # The interpreter runs a program a row.
    shape = (2, 3) if backend == "triton" else (BATCH, LENGTH)
    x = torch.randn(*shape, WIDTH, dtype=dtype)
    with torch.no_grad():
        if zero_keys:
            whole.key_tokens_0[3:].zero_()
        x[0, 0].zero_()  # a row of scores that is all zero
    sharded = Pattention(WIDTH, WIDTH, tokens, axis=layout.tensor, **build)  # type: ignore[arg-type]
    take_parameters(sharded, whole, layout)
    grad_out = torch.randn(*shape, WIDTH, dtype=dtype)
    mask = some_masks(*shape, sum(tokens)) if masked else None
    results = []
    for layer in (whole, sharded):
        leaf = x.clone().requires_grad_()
        out = layer(leaf, mask)
        out.backward(grad_out)
        assert leaf.grad is not None
        results.append((out.detach(), leaf.grad))
    distances = [worst(a, b) for a, b in zip(*results, strict=True)]
    distances += [distance for _, distance in gradient_distances(sharded, whole, layout)]
    assert sharded.num_tokens == sum(tokens) and sharded.tau_tokens.tolist() == tau
    largest = max(
        max(t.abs().max().item() for t in results[0]), *(p.grad.abs().max().item() for p in whole.parameters())
    )
    return max(distances) / (largest if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("tensor_size", [2, 4])
def test_one_layer_equals_the_unsharded_one(tensor_size: int) -> None:
    for distances in run_ranks(tensor_size, one_layer, tensor_size):
        assert len(distances) == (66 if tensor_size == 2 else 48)
        for case, distance in distances.items():
            assert distance < (1e-6 if " triton " in case else 1e-12), (case, distance)


# ---- the whole model ----

BASE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 4, "seq_length": LENGTH, "rotary_pct": 0.25,
    "norm": "layernorm", "padded_vocab_size": 50,
}  # fmt: skip
TOKENS = {"qkv_slot_num": 13, "proj_slot_num": 10, "ffn_slot_num": 31}
OWN_NORMS = {
    "token_segments": {"qkv": [[7, 6]] * 2, "proj": [[5, 5]] * 2, "ffn": [[16, 15]] * 2},
    "segment_norms": ["joint", "segment"],
}
MODELS: dict[str, dict[str, Any]] = {
    **{activation: {**TOKENS, "norm_activation_type": activation} for activation in ACTIVATIONS},
    "row norms": {**TOKENS, **OWN_NORMS},
    "rmsnorm, untied head": {**TOKENS, "norm": "rmsnorm", "no_weight_tying": True},
    "vocabulary of 51": {**TOKENS, "padded_vocab_size": 51},  # 50 / 2 = 25 is odd, and 51 no multiple of 2
    "parallel residual": {**TOKENS, "gpt_j_residual": True, "norm": "layernorm_nonparam", "final_norm": "layernorm"},
    "transformer": {"intermediate_size": 50},
    "transformer without biases": {"use_bias_in_attn_linear": False, "intermediate_size": 37, "activation": "silu"},
    "both kinds of block": {**TOKENS, "attention_config": [[["tokenformer"], 1], [["global"], 1]]},
}


def whole_models(tensor_size: int) -> dict[str, float]:
    layouts = {"tp": connected(tensor_size), "tp and sp": connected(tensor_size, sequence_parallel=True)}
    distances = {}
    for name, keys in MODELS.items():
        config = ModelConfig(**{**BASE, **keys})
        for kind, layout in layouts.items():
            for recomputed in (0, 1):
                distances[f"{name}, {kind}, {recomputed}"] = compare_model(config, layout, recomputed)
    return distances


def compare_model(config: ModelConfig, layout: Layout, checkpoint_layers: int) -> float:
    """With recomputation the loss takes the logits in chunks, without it all at once."""
    whole = LanguageModel(config, seed=3, dtype=torch.float64)
    torch.manual_seed(5)
    for parameter in whole.parameters():  # at their initial size gradients would be small enough to pass unseen
        parameter.data.mul_(8.0).add_(torch.randn_like(parameter), alpha=0.1)
    sharded = LanguageModel(
        config, dtype=torch.float64, layout=layout, gather_logits=False, checkpoint_layers=checkpoint_layers,
        defer_logits=checkpoint_layers > 0,
    )  # fmt: skip
    take_parameters(sharded, whole, layout)
    assert sharded.num_parameters() == whole.num_parameters()
    assert sharded.flops_per_token(LENGTH) == whole.flops_per_token(LENGTH)
    ids, labels = torch.randint(0, 50, (2, BATCH, LENGTH)).unbind()
    mask = torch.rand(BATCH, LENGTH) > 0.3
    expected = cross_entropy(whole(ids), labels, mask)
    expected.backward()
    targets = labels, mask, layout.tensor, config.padded_vocab_size
    output = sharded(ids)
    if isinstance(output, HeadInput):
        with patch.dict(CHUNK_BYTES, cpu=10 * -(-(config.padded_vocab_size or 0) // layout.tensor.size) * 8):
            found = output.through(lambda hidden, weight: linear_cross_entropy(hidden, weight, *targets))
    else:
        found = cross_entropy(output, *targets)
    found.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
    assert norm > 0.05
    gathered = LanguageModel(config, dtype=torch.float64, layout=layout)
    take_parameters(gathered, whole, layout)
    distances = [abs(expected.item() - found.item()), worst(gathered(ids), whole(ids))]
    return max([*distances, *(distance for _, distance in gradient_distances(sharded, whole, layout))])


def test_the_whole_model_equals_the_unsharded_one() -> None:
    for distances in run_ranks(2, whole_models, 2):
        assert len(distances) == 4 * len(MODELS)
        worst_case = max(distances, key=distances.__getitem__)
        assert distances[worst_case] < 1e-10, worst_case


# ---- what is communicated ----


@contextmanager
def counted(volumes: dict[str, list[float]], tensor_size: int) -> Iterator[None]:
    """Collects what a rank sends in a ring, in elements, call by call of torch.distributed."""
    part = (tensor_size - 1) / tensor_size

    def wrap(name: str, elements: Callable[..., int], rounds: int) -> Callable[..., Any]:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            volumes.setdefault(name, []).append(rounds * elements(*args) * part)
            return original(*args, **kwargs)

        return call

    wrapped = {
        "all_reduce": wrap("all_reduce", lambda x: x.numel(), 2),
        "all_gather_single": wrap("all_gather_single", lambda out, x: out.numel(), 1),
        "reduce_scatter_single": wrap("reduce_scatter_single", lambda out, x: x.numel(), 1),
        "all_gather_into_tensor": wrap("all_gather_into_tensor", lambda out, x: out.numel(), 1),
        "reduce_scatter_tensor": wrap("reduce_scatter_tensor", lambda out, x: x.numel(), 1),
    }
    others = ("all_gather", "reduce_scatter", "all_to_all_single", "all_to_all", "broadcast", "send", "recv")
    with pytest.MonkeyPatch.context() as patch:
        for name, call in wrapped.items():
            patch.setattr(dist, name, call)
        for name in others:
            patch.setattr(dist, name, lambda *args, **kwargs: pytest.fail("a collective that is not counted"))
        yield


def block_volumes(tensor_size: int) -> dict[str, tuple[float, int]]:
    """Elements that a block sends, forward and backward, in units of s b d (t-1)/t, and in how many messages."""
    keys = {**BASE, "norm": "layernorm_nonparam", "hidden_size": 64}
    result: dict[str, tuple[float, int]] = {}
    for sequence_parallel in (False, True):
        layout = connected(tensor_size, sequence_parallel)
        norms = {**TOKENS, **OWN_NORMS}
        kinds: dict[str, dict[str, Any]] = {"tokenformer": TOKENS, "norms": norms, "global": {"intermediate_size": 128}}
        for kind, more in kinds.items():
            for backend in ("reference", "fused"):  # the others send what fused does
                config = ModelConfig(**{**keys, **more})
                block = Block(config, 0, BuildOptions(pattention_backend=backend, layout=layout))
                tokens = LENGTH // tensor_size if sequence_parallel else LENGTH
                x = torch.randn(BATCH, tokens, 64, requires_grad=True)
                volumes: dict[str, list[float]] = {}
                with counted(volumes, tensor_size):
                    block(x).sum().backward()
                # Besides activations: row statistics, and the gradients of two biases added to shares of the tokens.
                biases = 2 * 2 * 64 if kind == "global" and sequence_parallel else 0
                statistics = {"tokenformer": 20, "norms": 40, "global": 0}[kind] * BATCH * LENGTH
                small = (statistics or biases) * (tensor_size - 1) / tensor_size
                unit = BATCH * LENGTH * 64 * (tensor_size - 1) / tensor_size
                case = f"{kind} {backend} sequence_parallel={sequence_parallel}"
                calls = [volume for found in volumes.values() for volume in found]
                result[case] = (sum(calls) - small) / unit, len(calls)
    return result


@pytest.mark.parametrize("tensor_size", [2, 4])
def test_a_block_communicates_what_the_arithmetic_says(tensor_size: int) -> None:
    for volumes in run_ranks(tensor_size, block_volumes, tensor_size):
        assert len(volumes) == 12
        for case, (found, messages) in volumes.items():
            assert found == pytest.approx(8 if case.startswith("global") else 16, abs=1e-9), case
            if case.startswith("norms"):  # the statistics of all groups go together
                assert messages == volumes[case.replace("norms", "tokenformer")][1], case


# ---- random numbers, shares ----


def random_streams() -> dict[str, Any]:
    layout, sequence = connected(2), connected(2, sequence_parallel=True)
    torch.manual_seed(7)
    x, result = torch.ones(64), {}
    result["agreed"] = dropout(x, 0.5, True, layout)
    result["own"] = dropout(x, 0.5, True, sequence)
    with own_stream(layout.tensor, x.device):
        result["own again"] = torch.rand(64)
    result["agreed after"] = torch.rand(64)
    config = ModelConfig(**{**BASE, **TOKENS, "attention_dropout": 0.5, "hidden_dropout": 0.3})
    for name, grid in (("tp", layout), ("sp", sequence)):
        for recomputed in (0, 1):
            model = LanguageModel(config, seed=1, layout=grid, gather_logits=False, checkpoint_layers=recomputed)
            torch.manual_seed(9)
            ids = torch.arange(LENGTH).repeat(2, 1)
            loss = cross_entropy(model(ids), ids, None, grid.tensor, 50)
            loss.backward()
            gradient = model.get_parameter("layers.0.attention.proj.value_tokens_0").grad
            assert gradient is not None
            result[f"{name} {recomputed}"] = (loss.detach(), gradient)
    return {
        name: [t.tolist() for t in value] if isinstance(value, tuple) else value.tolist()
        for name, value in result.items()
    }


def test_dropout_differs_between_tensor_ranks_where_it_must_and_agrees_where_it_must() -> None:
    first, second = run_ranks(2, random_streams)
    for name in ("agreed", "agreed after"):
        assert first[name] == second[name], name
    for name in ("own", "own again"):
        assert first[name] != second[name], name
    for name in ("tp", "sp"):
        assert first[f"{name} 0"][0] == second[f"{name} 0"][0], "the ranks agree on the loss"
        for results in (first, second):
            assert results[f"{name} 0"] == results[f"{name} 1"], "recomputing draws the same numbers again"


def uneven_shares() -> None:
    layout = connected(2)
    whole = torch.arange(14.0, dtype=torch.float64).view(2, 7)
    start, stop = layout.tensor.share(7)
    leaf = whole[:, start:stop].clone().requires_grad_()
    gathered = gather_shares(leaf, 7, layout.tensor)
    assert torch.equal(gathered, whole)
    gathered.backward(whole)
    assert leaf.grad is not None and torch.equal(leaf.grad, whole[:, start:stop])
    for call in (lambda: gather(torch.ones(3, 2), 0, ALONE), lambda: sum_scatter([torch.ones(3, 2)], 0, ALONE)[0]):
        assert torch.equal(call(), torch.ones(3, 2))
    with pytest.raises(ValueError, match="cannot be sharded evenly over 2 ranks"):
        sum_scatter([torch.ones(3, 2)], 0, layout.tensor)


def test_shares_may_differ_by_one() -> None:
    run_ranks(2, uneven_shares)
    for size in range(40):
        for ranks in (1, 2, 3, 8):
            shares = [Axis(ranks, rank).share(size) for rank in range(ranks)]
            assert [start for start, _ in shares] == [0, *(stop for _, stop in shares[:-1])]
            assert shares[-1][1] == size
            assert max(b - a for a, b in shares) - min(b - a for a, b in shares) <= 1
