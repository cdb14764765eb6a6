"""Checkpoints whose contents are others, under checksums that hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from megatron.checkpoint.form import dtype_name, manifest_checksum
from megatron.checkpoint.reader import file_sha256

Change = Callable[[Path, dict[str, Any]], object]


def forge(folder: Path, change: Change) -> None:
    """Change files and manifest of a checkpoint, and make all its checksums right."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(folder, manifest)
    for name in manifest["files"] if isinstance(manifest["files"], dict) else ():
        if (folder / name).is_file():
            path = folder / name
            manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    text = json.dumps({**manifest, "sha256": manifest_checksum(manifest)})
    (folder / "manifest.json").write_text(text)


def record(file: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Change what train_state.json or config.yml holds."""

    def apply(folder: Path, manifest: dict[str, Any]) -> None:
        path = folder / file
        values = json.loads(path.read_text()) if file.endswith("json") else yaml.safe_load(path.read_text())
        change(values)
        path.write_text(json.dumps(values) if file.endswith("json") else yaml.safe_dump(values))

    return apply


def tensors(kind: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Change tensors, and the manifest with them."""

    def apply(folder: Path, manifest: dict[str, Any]) -> None:
        file = f"{kind}-00000.safetensors"
        values = load_file(folder / file)
        change(values)
        (folder / file).unlink()
        save_file({name: tensor.contiguous() for name, tensor in values.items()}, folder / file)
        manifest["tensors"][kind] = {n: [file, dtype_name(t), list(t.shape)] for n, t in values.items()}

    return apply


def in_manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder, manifest: change(manifest)


def text(file: str, content: str) -> Change:
    return lambda folder, manifest: (folder / file).write_text(content)
