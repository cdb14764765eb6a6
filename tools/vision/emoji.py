"""Emoji with their names, pictures and texts that belong together: `python -m tools.vision.emoji FOLDER`.

npm fetches what is drawn, the packages emoji-datasource-google and -twitter (pictures: Noto, Apache-2.0, and Twemoji,
CC-BY 4.0). FOLDER/train has Google's drawing of each emoji and most of Twitter's, FOLDER/test Twitter's of the others:
pictures that were not seen of emoji that were. Each is a folder for `prepare_data.py --images`, PNGs of 64 x 64 on
white and a metadata.jsonl. Flags, skin tones and second emoji of a name are left out.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megatron.errors import UserError, run_command

VERSION = "16.0.0"
NUM_TEST = 300
_LEFT_OUT = ("Flags", "Component")


@dataclass(frozen=True)
class Emoji:
    """One drawing: its file's name, what it is called, and the bytes of a PNG."""

    file: str
    text: str
    content: bytes


def fetch(source: str, folder: Path) -> Path:
    """The package of a source (google or twitter), fetched unless it is there. Raises UserError where npm fails."""
    package = f"emoji-datasource-{source}"
    path = folder / f"{package}-{VERSION}.tgz"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package}@{VERSION}"]
        try:
            done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        except FileNotFoundError:
            raise UserError(f"emoji: npm is not installed, which fetches {package}") from None
        if done.returncode or not path.exists():
            raise UserError(f"emoji: `{' '.join(command)}` failed; run it in {folder}")
    return path


def drawings(path: Path, source: str) -> Iterator[Emoji]:
    """The emoji of a package, in the order of its list. Raises UserError for a file that is no such package."""
    pictures, start = dict[str, bytes](), f"package/img/{source}/64/"
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isreg() else None
                if file is not None and (member.name.startswith(start) or member.name == "package/emoji.json"):
                    pictures[member.name.removeprefix(start)] = file.read()
        entries = json.loads(pictures["package/emoji.json"])
        known = set[str]()
        for entry in entries:
            text = entry["name"].lower()
            if entry["category"] not in _LEFT_OUT and entry[f"has_img_{source}"] and text not in known:
                known.add(text)
                yield Emoji(entry["image"], text, pictures[entry["image"]])
    except (OSError, EOFError, ValueError, KeyError, tarfile.TarError) as error:
        reason = f"{path} cannot be read ({type(error).__name__})"
        raise UserError(f"emoji: {reason}; remove it, to fetch it again") from None


def on_white(content: bytes) -> bytes:
    """A PNG whose transparent parts are white."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    file = io.BytesIO()
    whole.convert("RGB").save(file, "PNG")
    return file.getvalue()


def write_folder(folder: Path, emoji: Sequence[tuple[str, Emoji]]) -> None:
    """Drawings, each with its source, in {folder}/{source}, and metadata.jsonl."""
    lines = []
    for source, each in emoji:
        (folder / source).mkdir(parents=True, exist_ok=True)
        (folder / source / each.file).write_bytes(on_white(each.content))
        lines.append(json.dumps({"file_name": f"{source}/{each.file}", "text": each.text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def prepare(folder: Path, num_test: int = NUM_TEST) -> tuple[int, int]:
    """Write FOLDER/train and FOLDER/test. Returns how many drawings each has."""
    google, twitter = (list(drawings(fetch(source, folder / "packages"), source)) for source in ("google", "twitter"))
    order = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(len(twitter))
    held_out = {twitter[number].text for number in order[:num_test]}
    train = [("google", each) for each in google]
    train += [("twitter", each) for each in twitter if each.text not in held_out]
    test = [("twitter", each) for each in twitter if each.text in held_out]
    write_folder(folder / "train", train)
    write_folder(folder / "test", test)
    return len(train), len(test)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, and say what there is."""
    parser = argparse.ArgumentParser(
        "python -m tools.vision.emoji", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder: Path = parser.parse_args(argv).folder
    train, test = prepare(folder)
    print(f"{train} drawings to train on, {test} held out, in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
