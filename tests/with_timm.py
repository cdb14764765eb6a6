"""timm and torchvision beside a CPU build of torch, for tests and fixtures that compare with them."""

from __future__ import annotations

import pytest
import torch

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_defined: list[torch.library.Library] = []  # an operator lives as long as its library


def mend_torchvision() -> None:
    """Declare the compiled operators that PyPI's torchvision registers a fake for and does not have on a CPU build."""
    if not _defined and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in _OPERATORS:
            library.define(operator)
        _defined.append(library)


def need_timm() -> None:
    """Skip the test where timm and torchvision are not installed (requirements/requirements-vision-dev.txt)."""
    mend_torchvision()
    for package in ("timm", "torchvision"):
        pytest.importorskip(package, reason=f"{package} is not installed: requirements/requirements-vision-dev.txt")
