"""Files of tensors: those of safetensors to the byte, looked at and hashed while they are written."""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from megatron.checkpoint import writer as writer_module
from megatron.checkpoint.pieces import Box, Piece, coverage_fault, flat_boxes, slices, whole_pieces
from megatron.checkpoint.state import CanonicalState
from megatron.checkpoint.store import CheckpointReader, RunFolder
from megatron.checkpoint.writer import HashedFile, write_safetensors
from megatron.errors import UserError

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).view(2, 3), "a": torch.tensor(4), "half": torch.ones(3).bfloat16(),
    "bytes": torch.arange(5, dtype=torch.uint8), "none": torch.zeros(0, 4), "wide": torch.ones(2, dtype=torch.float64),
    "\u00e9\"": torch.zeros(1, dtype=torch.float16), "flag": torch.tensor([True]),
    "large": torch.arange(40_000.0),
}  # fmt: skip


def test_a_file_is_what_safetensors_would_have_written(tmp_path: Path) -> None:
    entry = write_safetensors(tmp_path / "file", TENSORS)
    content = (tmp_path / "file").read_bytes()
    assert content == save(TENSORS)
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_the_disk_begins_while_a_file_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, advise = [], os.posix_fadvise

    def noted(file: int, start: int, length: int, advice: int) -> None:
        begun.append((start, length))
        advise(file, start, length, advice)

    monkeypatch.setattr(writer_module, "FLUSH_BYTES", 100)
    monkeypatch.setattr(os, "posix_fadvise", noted)
    file = HashedFile(tmp_path / "file")
    for number in range(6):
        file.write(bytes([number]) * 60)
    assert file.close() == {"bytes": 360, "sha256": hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()}
    assert begun == [(0, 120), (120, 120), (240, 120)]


def state(iteration: int, kind: str, name: str, tensor: Tensor) -> CanonicalState:
    tensors = {"model": [("w", torch.ones(3))], "optimizer": [("exp_avg/w", torch.ones(3))]}
    tensors[kind] = [*tensors.get(kind, []), (name, tensor)]
    return CanonicalState(iteration, {}, {}, whole_pieces(tensors))


@pytest.mark.parametrize(
    ("kind", "name", "tensor"),
    [
        ("model", "v", torch.tensor([1.0, math.nan, 0.0])),
        ("model", "v", torch.tensor([1.0, -math.inf, 0.0])),
        ("optimizer", "exp_avg_sq/w", torch.tensor([1.0, math.inf, 0.0])),
        ("optimizer", "exp_avg_sq/w", torch.tensor([1.0, -1e-30, 0.0])),
        ("optimizer", "step/w", torch.tensor(math.nan)),
        ("model", "x.tau_tokens", torch.tensor(0)),
        ("ema", "v", torch.tensor([1.0, math.nan, 0.0])),
        ("model", "v", torch.cat([torch.ones(40_000), torch.tensor([math.nan])])),
    ],
    ids=["nan", "inf", "moment", "negative", "step", "tau", "average", "large"],
)
def test_values_to_go_on_from_are_all_that_is_saved(tmp_path: Path, kind: str, name: str, tensor: Tensor) -> None:
    RunFolder(tmp_path).save(state(1, "model", "v", torch.ones(3)))
    with pytest.raises(UserError, match=rf"global_step2 is not written: {name} \({kind}\) .*; earlier checkpoints are"):
        RunFolder(tmp_path).save(state(2, kind, name, tensor))
    assert RunFolder(tmp_path).find() == tmp_path / "global_step1" and RunFolder(tmp_path).iterations() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step1", "latest"]
    CheckpointReader(tmp_path / "global_step1")


def quarters(name: str, kind: str = "model") -> list[Piece]:
    """A tensor [4, 6] in four pieces, and what it is as a whole."""
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    places = [(row, column) for row in (0, 2) for column in (0, 3)]
    return [Piece(kind, name, (4, 6), (r, c), whole[r : r + 2, c : c + 3]) for r, c in places]


def test_pieces_in_any_order_are_read_as_the_whole_tensors(tmp_path: Path) -> None:
    a, b = quarters("a"), quarters("b")
    mixed = [a[3], b[0], a[0], b[2], a[1], b[3], b[1], a[2]]
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    reader = CheckpointReader(RunFolder(tmp_path).save(CanonicalState(1, {}, {}, mixed)))
    for name in ("a", "b"):
        assert torch.equal(reader.tensor("model", name), whole)
        for ranges in ((slice(1, 3),), (slice(0, 2), slice(1, 6)), (slice(2, 4), slice(3, 6)), (slice(3, 3),)):
            assert torch.equal(reader.part("model", name, *ranges), whole[ranges])


@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 1, 5), (2, 3, 4), (1,), ()])
def test_ranges_of_memory_are_boxes(shape: tuple[int, ...]) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            boxes = list(flat_boxes(shape, start, stop))
            found = [whole[slices(box)].flatten() for box in boxes]
            assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)
            before, after = flat_boxes(shape, 0, start), flat_boxes(shape, stop, whole.numel())
            assert coverage_fault(shape, [*after, *boxes, *before]) is None


def test_a_tensor_of_which_a_piece_is_missing_is_not_saved(tmp_path: Path) -> None:
    pieces = [*quarters("a"), *quarters("b")[:3]]
    with pytest.raises(UserError, match=r"global_step1 is not written: b \(model\) has 18 of its 24 values only"):
        RunFolder(tmp_path).save(CanonicalState(1, {}, {}, pieces))
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_a_further_kind_are_saved_read_and_left_alone(tmp_path: Path) -> None:
    """Kinds are an open list: values of one that nobody knows here are not looked at."""
    odd = torch.tensor([math.nan, 1.0])
    pieces = [
        *quarters("w"),
        *quarters("w", "sums"),
        *whole_pieces({"sums": [("odd", odd)], "rng": [("r", torch.ones(1))]}),
    ]
    folder = RunFolder(tmp_path).save(CanonicalState(1, {}, {}, pieces))
    reader = CheckpointReader(folder)
    assert reader.names("sums") == ["w", "odd"] and reader.names("of nothing") == []
    assert torch.equal(reader.tensor("sums", "w"), reader.tensor("model", "w"))
    assert torch.equal(reader.part("sums", "w", slice(1, 3), slice(2, 4)), torch.tensor([[8.0, 9.0], [14.0, 15.0]]))
    assert sorted(path.name for path in folder.glob("*-*")) == [
        f"{k}-00000.safetensors" for k in ("model", "rng", "sums")
    ]
    (folder / "sums-00000.safetensors").write_bytes(b"")
    CheckpointReader(folder, verify=False).verify("model", "rng")
    with pytest.raises(UserError, match=r"sums-00000\.safetensors has 0 bytes"):
        CheckpointReader(folder)


def test_parts_are_told_apart_however_they_lie() -> None:
    columns: list[Box] = [((0, i), (1, 1)) for i in range(3000)]
    assert coverage_fault((1, 3000), columns) is None
    assert coverage_fault((1, 3000), [*columns[:-1], columns[7]]) == "has values twice"
    pinwheel: list[Box] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert coverage_fault((3, 3), pinwheel) is None
    assert coverage_fault((3, 3), [*pinwheel[:-1], ((0, 0), (1, 1))]) == "has values twice"
    assert coverage_fault((4,), [((0,), (3,)), ((4,), (0,)), ((2,), (1,))]) == "has values twice"
    assert coverage_fault((4,), [((0,), (3,)), ((2,), (0,)), ((3,), (1,))]) is None


def test_parts_that_take_turn_after_turn_to_tell_apart_are_refused() -> None:
    """A frame around a frame, and so on: each turn takes off one part, of which there may be any number."""
    frames, end = list[Box](), 400
    for i in range(0, end, 2):
        frames += [((i, i), (1, end - i)), ((i + 1, i), (end - i - 1, 1))]
        frames += [((i + 1, i + 1), (1, end - i - 1)), ((i + 2, i + 1), (end - i - 2, 1))]
    assert coverage_fault((end, end), frames) == "has too many parts across each other"
