"""Losses of other packages get what they want, and give what ours gives. The packages are fakes: they need a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.errors import UserError
from megatron.ops import loss_packages
from megatron.ops.linear_cross_entropy import linear_cross_entropy
from megatron.ops.loss_packages import select_linear_loss


def liger_fused_linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, bias: Any = None, ce_weight: Any = None, ignore_index: int = -100,
    lse_square_scale: float = 0.0, label_smoothing: float = 0.0, reduction: str = "mean", softcap: Any = None,
    return_z_loss: bool = False, accum_dtype: Any = None, use_token_scaling: bool = False,
    return_token_accuracy: bool = False, return_predicted_tokens: bool = False, chunk_mem_const: int = 1,
) -> Tensor:  # fmt: skip
    """The signature of liger-kernel 0.8.5."""
    assert input.dim() == 2 and target.dim() == 1 and accum_dtype == torch.float32
    return F.cross_entropy(input @ weight.T, target, ignore_index=ignore_index, reduction=reduction)


def chunked_linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, chunk_size: int = 4096, ignore_index: int = -100,
    reduction: str = "mean", tuned: bool = True, use_scaled_exp: bool | None = None,
) -> Tensor:  # fmt: skip
    """The signature of quack-kernels 0.6.5, which is given numbers of tokens that 8 divides."""
    assert x.dim() == 2 and len(x) % 8 == 0
    return F.cross_entropy(x @ weight.T, target, ignore_index=ignore_index, reduction=reduction)


FAKES: dict[str, Callable[..., Tensor]] = {
    "liger": liger_fused_linear_cross_entropy, "quack": chunked_linear_cross_entropy,
}  # fmt: skip


@pytest.fixture(params=FAKES)
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package that is installed, as far as imports can tell."""
    _, path, function = loss_packages._PACKAGES[request.param]
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    setattr(sys.modules[path], function, FAKES[request.param])
    return str(request.param)


@pytest.mark.parametrize("masked", ["no mask", "mask", "nothing counts"])
def test_a_package_gives_the_mean_over_the_mask(installed: str, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_packages._Package, "_check", lambda *_: None)  # it would refuse the CPU
    hidden, weight, labels = torch.randn(2, 8, 6), torch.randn(30, 6), torch.randint(30, (2, 8))
    mask = {"no mask": None, "mask": torch.rand(2, 8) > 0.4, "nothing counts": torch.zeros(2, 8)}[masked]
    found, expected = [], []
    for loss, results in ((select_linear_loss(installed), found), (linear_cross_entropy, expected)):
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = loss(*inputs, labels, mask)
        results += [value, *torch.autograd.grad(value, inputs)]
    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right, atol=1e-6)


def test_what_a_package_cannot_do_is_one_line(installed: str) -> None:
    loss = select_linear_loss(installed)
    with pytest.raises(UserError, match=f"cross_entropy: {installed}: it needs a GPU; set cross_entropy: auto"):
        loss(torch.zeros(8, 4), torch.zeros(9, 4), torch.zeros(8, dtype=torch.int64))
    if installed == "quack":
        on_a_device = torch.zeros(12, 4, device="meta")
        with pytest.raises(UserError, match="12 tokens of a micro-batch are no multiple of 8"):
            loss(on_a_device, torch.zeros(9, 4, device="meta"), torch.zeros(12, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize(("name", "package"), [("liger", "liger-kernel"), ("quack", "quack-kernels")])
def test_a_package_that_is_missing_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    top = loss_packages._PACKAGES[name][1].split(".")[0]
    monkeypatch.setitem(sys.modules, top, None)
    with pytest.raises(UserError, match=f"cross_entropy: {name}: {package} .*pip install -r requirements/"):
        select_linear_loss(name)


def test_a_package_without_the_function_is_said_to_be_of_no_use(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path, function = loss_packages._PACKAGES[installed]
    monkeypatch.delattr(sys.modules[path], function)
    with pytest.raises(UserError, match=f"cannot be used: .*{function}"):
        select_linear_loss(installed)


def test_every_other_name_is_ours() -> None:
    assert all(select_linear_loss(name) is linear_cross_entropy for name in ("auto", "chunked", "eager"))
