"""Published configurations of GPT-NeoX and TokenFormer: what can run here loads, the rest is refused for true reasons.

Each entry of the fixture has a file's values, `with` for an overlay that needs a model's file, and the keys that are
`refused`, all of them at once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron.config import resolve_config
from megatron.errors import UserError

PUBLISHED = json.loads((Path(__file__).parents[1] / "fixtures/config/published_yamls.json").read_text())
LINE = re.compile(r"(?P<file>\S+):(?P<line>\d+): (?P<key>[\w.-]+): (?P<text>.+)")


def write(folder: Path, values: dict[str, Any]) -> list[str]:
    """Write values as a file with a key a line; returns the keys by line, the first line's is empty."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
    (folder / "a.yml").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return ["", *values]


def mistakes(folder: Path, entry: dict[str, Any], values: dict[str, Any]) -> list[re.Match[str]]:
    """What is wrong with an entry's file; every line has file, line and key."""
    keys, files = write(folder, values), [folder / "a.yml"]
    if "with" in entry:
        base = next(e for e in PUBLISHED if (e["repository"], e["file"]) == ("GPT-NeoX", entry["with"]))
        (folder / "base.yml").write_text(json.dumps(base["values"]))
        files.insert(0, folder / "base.yml")
    try:
        resolve_config(files)
    except UserError as error:
        found = [LINE.fullmatch(line) for line in str(error).split("\n")]
        assert all(found), error
        for match in filter(None, found):
            table = match["key"].split(".")[0].replace("-", "_")
            assert keys[int(match["line"]) - 1].replace("-", "_") == table or match["key"] == "lr", match[0]
        return [match for match in found if match]
    return []


@pytest.mark.parametrize("entry", PUBLISHED, ids=lambda entry: f"{entry['repository']}/{entry['file']}")
def test_a_published_file_loads_or_names_all_that_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    found = mistakes(tmp_path, entry, entry["values"])
    assert [match["key"] for match in found] == entry.get("refused", [])


@pytest.mark.parametrize(
    "entry", [e for e in PUBLISHED if "refused" in e], ids=lambda entry: f"{entry['repository']}/{entry['file']}"
)
def test_the_advice_of_a_refusal_works(tmp_path: Path, entry: dict[str, Any]) -> None:
    values = json.loads(json.dumps(entry["values"]))
    for match in mistakes(tmp_path, entry, values):
        *tables, name = match["key"].split(".")
        target = values
        for table in tables:
            target = target[table]
        target[name] = advised(match["text"])
    assert mistakes(tmp_path, entry, values) == []


def advised(text: str) -> Any:
    """The value that a message advises; null where it says to remove the key, or to set another one."""
    if "remove it" in text or "set that instead" in text or "instead" in text:
        return None
    if "known are tokenformer, global and flash" in text or "make them equal" in text:
        return [[["global"], "all"]]
    if "choose a divisor" in text:
        return 16
    if "expected a number" in text:
        return 1e-8
    if "choose one of" in text:
        return text.rpartition("choose one of ")[2].split(", ")[0]
    word = re.search(r"set (true|false|regular|\d+)", text)
    assert word, text
    return {"true": True, "false": False}.get(word[1], int(word[1]) if word[1].isdigit() else word[1])


def test_all_files_are_there() -> None:
    assert len(PUBLISHED) == 114
    assert sum("refused" in entry for entry in PUBLISHED) == 44
