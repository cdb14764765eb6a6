"""The experiment's text as bytes: what is trained on, what settings are chosen on, what results come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data import IndexedDataset
from megatron.errors import UserError
from megatron.files import read_errors, read_json, replaced_file
from tools.demo.prepare import read_addresses
from tools.growth_experiment.regime.sizes import HELD_OUT_SEQUENCES
from tools.growth_experiment.regime.trials import Plan
from tools.growth_experiment.runs import write_token_files

_PIECES = 1200
"""Pieces of equal length that a text is cut into which comes as one file."""


def prepare(
    output: Path, updates: int, text: Path | None = None, sequences: int = HELD_OUT_SEQUENCES, plan: Plan = "full"
) -> None:
    """Write output/data and data.json, unless they are there.

    Args:
        updates: of the base.
        text: a file, of which every twelfth piece is held out; default the State of the Union addresses.
        sequences: held out for each of the two texts.
        plan: which trials there are.
    """
    description = output / "data.json"
    if description.is_file():
        return
    (output / "data").mkdir(parents=True, exist_ok=True)
    facts = write_token_files(output / "data", _pieces(text) if text else read_addresses(), sequences)
    facts |= {"updates": updates, "sequences": sequences}
    name = text.name if text else "State of the Union"
    with replaced_file(description) as file:
        file.write(json.dumps({**facts, "text": name, "plan": plan}, indent=1).encode())
    print(f"{facts['training_tokens']:,} training tokens, {facts['held_out_tokens']:,} held out for each use")


def read_facts(output: Path) -> dict[str, Any]:
    """What data.json says. Raises UserError when `output` is not prepared, or the file is damaged."""
    if not (output / "data.json").is_file():
        raise UserError(f"--output: {output} is not prepared; give the command prepare first")
    return read_json(output / "data.json", "delete it and give the command prepare again")


def held_out_ids(output: Path, text: str) -> np.ndarray:
    """Held-out tokens of `text` or `tuning`."""
    dataset = IndexedDataset(output / "data" / text)
    return np.asarray(dataset[len(dataset) - 1])


def _pieces(file: Path) -> list[str]:
    with read_errors("--text"):
        content = file.read_text(encoding="utf-8", errors="replace")
    length = max(1, len(content) // _PIECES)
    return [content[i : i + length] for i in range(0, len(content), length)]
