"""Triton's interpreter rounds as GPUs do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """fp32 -> bf16 to the nearest: the interpreter of Triton 3.7 cuts the lower half off, the hardware does not."""
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if target.name == "bf16" and source.name == "fp32":
            numbers = torch.from_numpy(np.ascontiguousarray(values)).view(torch.float32)
            return numbers.bfloat16().view(torch.uint16).numpy().reshape(values.shape)
        return original(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    yield
