"""timm and torchvision, for tests and fixtures that compare with them."""

from __future__ import annotations

import pytest

from tools.bench.with_timm import mend_torchvision


def need_timm() -> None:
    """Skip the test where timm and torchvision are not installed (requirements/requirements-vision-dev.txt)."""
    mend_torchvision()
    for package in ("timm", "torchvision"):
        pytest.importorskip(package, reason=f"{package} is not installed: requirements/requirements-vision-dev.txt")
