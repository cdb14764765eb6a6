"""Emoji become two folders of pictures with names; those of the second are in no other."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron.errors import UserError
from tests.data.image_files import encoded
from tools.vision import emoji

COUNT = 12


def package(folder: Path, source: str, shade: int) -> Path:
    """What npm packs: emoji of one grey, and three that are left out."""
    entries: list[dict[str, Any]] = [
        {"name": f"FACE {number}", "image": f"{number}.png", "category": "Smileys", f"has_img_{source}": True}
        for number in range(COUNT)
    ]
    entries += [
        {**entries[0], "image": "flag.png", "name": "FLAG", "category": "Flags"},
        {**entries[0], "image": "again.png"},
        {**entries[0], "image": "undrawn.png", "name": "UNDRAWN", f"has_img_{source}": False},
    ]
    picture = np.full((64, 64, 4), (shade, shade, shade, 255), np.uint8)
    picture[:32] = 0  # transparent
    members = {"package/emoji.json": json.dumps(entries).encode()}
    members |= {f"package/img/{source}/64/{entry['image']}": encoded(picture) for entry in entries}
    path = folder / "packages" / f"emoji-datasource-{source}-{emoji.VERSION}.tgz"
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def lines(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_drawings_are_held_out_of_names_that_are_known(tmp_path: Path) -> None:
    package(tmp_path, "google", 100)
    package(tmp_path, "twitter", 200)
    assert emoji.prepare(tmp_path, num_test=5) == (2 * COUNT - 5, 5)
    train, test = lines(tmp_path / "train"), lines(tmp_path / "test")
    names = {f"face {number}" for number in range(COUNT)}
    assert {line["text"] for line in train if line["file_name"].startswith("google/")} == names
    seen = {line["text"] for line in train if line["file_name"].startswith("twitter/")}
    assert {line["text"] for line in test} == names - seen and len(test) == 5
    for folder, found in (("train", train), ("test", test)):
        for line in found:
            with Image.open(tmp_path / folder / line["file_name"]) as picture:
                shade = 100 if line["file_name"].startswith("google/") else 200
                assert picture.mode == "RGB" and picture.size == (64, 64)
                assert picture.getpixel((9, 9)) == (255,) * 3 and picture.getpixel((9, 60)) == (shade,) * 3


def test_a_package_that_is_damaged_or_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = package(tmp_path, "google", 100)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"emoji: .*google-16.0.0.tgz cannot be read \(.*\); remove it"):
        list(emoji.drawings(path, "google"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="emoji: npm is not installed, which fetches emoji-datasource-twitter"):
        emoji.fetch("twitter", tmp_path / "packages")
    (tmp_path / "npm").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    with pytest.raises(UserError, match="emoji: `npm pack .*twitter@16.0.0` failed; run it in"):
        emoji.fetch("twitter", tmp_path / "packages")
