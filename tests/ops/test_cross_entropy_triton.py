"""The row kernels under Triton's interpreter, and compiled for GPUs that are not there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron.ops import linear_cross_entropy as module
from megatron.ops.cross_entropy import cross_entropy
from megatron.ops.linear_cross_entropy import linear_cross_entropy
from tools.bench.kernels import registers

pytestmark = pytest.mark.long  # a GPU is interpreted, or compiled for
triton = pytest.importorskip("triton", reason="triton is not installed: it has no build for this platform")
from megatron.ops import cross_entropy_triton as kernels  # noqa: E402


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    """A process whose Triton compiles: it has to be told before kernels are defined, and here they are interpreted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "0")
            environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
            pool.submit(len, "").result()  # starts it
        yield pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 130, 4096, 9001])
def test_statistics_and_gradient_equal_torch(width: int, dtype: torch.dtype) -> None:
    rows = 5
    torch.manual_seed(width)
    logits = (torch.randn(rows, width) * 5).to(dtype)
    logits[1] += 60  # the sum of exponentials would overflow fp32 without the maximum
    logits[2, : width // 2] = -100.0  # the maximum comes late
    columns, mine = torch.randint(width, (rows,)), torch.tensor([True, True, False, True, True])
    log_sums, labels = kernels.row_statistics(logits, columns, mine)
    exact = logits.double()
    assert torch.allclose(log_sums.double(), torch.logsumexp(exact, -1), rtol=3e-7, atol=1e-6)
    assert torch.equal(labels, torch.where(mine, logits.float()[torch.arange(rows), columns], 0.0))

    factors = torch.tensor([1.0, 0.7, 1.0, 0.0, 1.3])
    corrections, shifts = torch.where(mine, factors, 0.0), log_sums - torch.log(factors)
    expected = torch.exp(exact - log_sums.double()[:, None]) * factors.double()[:, None]
    expected[torch.arange(rows), columns] -= corrections.double()
    kernels.logits_to_gradient(logits, columns, corrections, shifts)
    # The interpreter cuts off what bf16 cannot hold; compiled kernels round, which the test below looks for.
    rounding = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[dtype]
    assert torch.allclose(logits.double(), expected, rtol=rounding, atol=2e-6)
    assert logits[3].abs().max() == 0, "a row that does not count"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_whole_function_through_the_kernels(dtype: torch.dtype) -> None:
    """As on a GPU, in chunks, with a mask; beside torch's operations on the same tensors."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 16).to(dtype), torch.randn(150, 16).to(dtype)
    labels, mask = torch.randint(150, (20,)), torch.rand(20) > 0.3

    def results(loss: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = loss(*inputs)
        return [value, *torch.autograd.grad(value, inputs)]

    expected = results(lambda h, w: cross_entropy(h @ w.T, labels, mask))
    with (
        patch.dict(module.CHUNK_BYTES, cpu=8 * 150 * dtype.itemsize),
        patch.object(module, "_row_kernels", lambda _: kernels),
    ):
        found = results(lambda h, w: linear_cross_entropy(h, w, labels, mask))
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left.double(), right.double(), rtol=tolerance, atol=tolerance)


SIGNATURES: dict[str, dict[str, str]] = {
    "statistics_kernel": {
        "logits": "*{}", "columns": "*i64", "mine": "*i1", "log_sums": "*fp32", "label_logits": "*fp32",
        "stride": "i32", "width": "i32", "BLOCK": "constexpr",
    },
    "gradient_kernel": {
        "logits": "*{}", "columns": "*i64", "corrections": "*fp32", "shifts": "*fp32", "stride": "i32", "width": "i32",
        "BLOCK": "constexpr",
    },
}  # fmt: skip


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile_ahead_of_time_without_spills(
    compiler: Executor, name: str, kind: str, architecture: int
) -> None:
    compiler.submit(compile_one, name, kind, architecture).result()


def compile_one(name: str, kind: str, architecture: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {argument: form.format(kind) for argument, form in SIGNATURES[name].items()}
    # Rows whose length is a multiple of 16 entries, as a padded vocabulary's.
    aligned: Any = {(i,): [["tt.divisibility", 16]] for i, form in enumerate(signature.values()) if form != "constexpr"}
    source = ASTSource(getattr(kernels, name), signature, {"BLOCK": kernels._BLOCK}, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", architecture, 32), {"num_warps": kernels._WARPS})
    used, spilled = registers(compiled.asm["ptx"], architecture)
    assert spilled == 0 and used <= 64, (used, spilled)
    assert re.search(r"ld\.global\S*\.v4|ld\.global\S*\.v8", compiled.asm["ptx"]), "loads of 16 bytes"
    if name == "gradient_kernel" and kind != "fp32":
        assert re.search(rf"cvt\.rn\.{'bf16' if kind == 'bf16' else 'f16'}(x2)?\.f32", compiled.asm["ptx"]), "rounded"
