"""Exports as transformers loads them, for the tests of Hugging Face's form."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

IDS = torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(0))
PROMPTS = [[5, 9, 17, 3, 40, 8], [7], [88, 2, 4, 61]]


@contextmanager
def private_modules(folder: Path) -> Iterator[None]:
    """Code of exports is copied below `folder`, and what this process imported of it is let go at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        _forget_modules()
        yield
        _forget_modules()  # they refer to a folder that is gone


def _forget_modules() -> None:
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def loaded(folder: Path, **arguments: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **arguments)


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(row)) + row for row in prompts]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
