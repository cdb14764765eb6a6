"""Files of an earlier version of this package: a run that has grown once, and its export. They stay readable, and
what is written today is the same to the byte.

The run: two TokenFormer blocks of width 8 on random bytes, Adam, three iterations, a growth at the second.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from megatron.checkpoint.pieces import whole_pieces
from megatron.checkpoint.reader import CheckpointReader
from megatron.checkpoint.state import CanonicalState
from megatron.checkpoint.store import RunFolder
from megatron.exchange import open_checkpoint
from megatron.exchange.convert import from_huggingface, to_huggingface
from megatron.inference import load_model
from megatron.training.soundness import require_sound

FILES = Path(__file__).parents[1] / "fixtures" / "checkpoints"
RUN, EXPORT = FILES / "global_step3", FILES / "export"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_is_whole_and_saved_again_to_the_byte(tmp_path: Path) -> None:
    opened, reader = open_checkpoint(RUN), CheckpointReader(RUN)
    require_sound(reader)
    tensors = {
        kind: [(name, opened.tensors.tensor(kind, name)) for name in opened.tensors.names(kind)]
        for kind in ("model", "optimizer", "rng")
    }
    assert (
        opened.iteration == 3
        and opened.train_state["lineage"][0]["added"] == "qkv 6 -> 10, ffn 9 -> 12 in layers 0 to 1"
    )
    assert opened.language.token_segments == {"qkv": [[6, 4]] * 2, "proj": [[5, 0]] * 2, "ffn": [[9, 3]] * 2}
    environment = json.loads((RUN / "environment.json").read_text())
    pieces = whole_pieces(tensors)
    state = CanonicalState(3, opened.train_state, opened.resolved(), pieces, environment)
    assert contents(RunFolder(tmp_path).save(state)) == contents(RUN)


def test_an_export_is_written_again_to_the_byte(tmp_path: Path) -> None:
    """But for its code, which is made from the sources of today."""
    to_huggingface(RUN, tmp_path / "export")
    found = contents(tmp_path / "export")
    assert {name: found[name] for name in contents(EXPORT)} == contents(EXPORT)


def test_both_are_one_model(tmp_path: Path) -> None:
    shutil.copytree(EXPORT, tmp_path / "export")
    from_huggingface(tmp_path / "export", tmp_path / "run")
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        first, *others = (load_model(path, dtype=torch.float64)(ids) for path in (RUN, EXPORT, tmp_path / "run"))
    assert all((logits - first).abs().max() < 1e-12 for logits in others)
