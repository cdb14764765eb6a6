"""Files of tensors: those of safetensors to the byte, looked at and hashed while they are written."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from megatron.checkpoint import CanonicalState, CheckpointReader, find_checkpoint, save_checkpoint
from megatron.checkpoint.store import list_iterations
from megatron.checkpoint.writer import write_safetensors
from megatron.errors import UserError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.tensor(4), "half": torch.ones(3).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8), "none": torch.zeros(0, 4), "wide": torch.ones(2, dtype=torch.float64),
    "\u00e9\"": torch.zeros(1, dtype=torch.float16), "flag": torch.tensor([True]),
}  # fmt: skip


def test_a_file_is_what_safetensors_would_have_written(tmp_path: Path) -> None:
    entry = write_safetensors(tmp_path / "file", TENSORS)
    content = (tmp_path / "file").read_bytes()
    assert content == save(TENSORS)
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def state(iteration: int, kind: str, name: str, tensor: Tensor) -> CanonicalState:
    tensors = {"model": [("w", torch.ones(3))], "optimizer": [("exp_avg/w", torch.ones(3))]}
    tensors[kind] = [*tensors[kind], (name, tensor)]
    return CanonicalState(iteration, {}, {}, tensors)


@pytest.mark.parametrize(
    ("kind", "name", "tensor"),
    [
        ("model", "v", torch.tensor([1.0, math.nan, 0.0])),
        ("model", "v", torch.tensor([1.0, -math.inf, 0.0])),
        ("optimizer", "exp_avg_sq/w", torch.tensor([1.0, math.inf, 0.0])),
        ("optimizer", "exp_avg_sq/w", torch.tensor([1.0, -1e-30, 0.0])),
        ("optimizer", "step/w", torch.tensor(math.nan)),
        ("model", "x.tau_tokens", torch.tensor(0)),
    ],
    ids=["nan", "inf", "moment", "negative", "step", "tau"],
)
def test_values_to_go_on_from_are_all_that_is_saved(tmp_path: Path, kind: str, name: str, tensor: Tensor) -> None:
    save_checkpoint(tmp_path, state(1, "model", "v", torch.ones(3)))
    with pytest.raises(UserError, match=rf"global_step2 is not written: {name} \({kind}\) .*; earlier checkpoints are"):
        save_checkpoint(tmp_path, state(2, kind, name, tensor))
    assert find_checkpoint(tmp_path) == tmp_path / "global_step1" and list_iterations(tmp_path) == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]
    CheckpointReader(tmp_path / "global_step1")
