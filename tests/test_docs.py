"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.test_architecture import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ROW = re.compile(r"^\| (?P<equation>.+) \| (?P<file>megatron/\S+\.py) \| `(?P<line>.+)` \|$", re.MULTILINE)
DOTTED = re.compile(r"\bmegatron(?:\.[A-Za-z_]\w*)+")
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def test_every_equation_is_computed_on_the_line_the_page_names() -> None:
    rows = list(ROW.finditer((ROOT / "docs/equations.md").read_text(encoding="utf-8")))
    assert len(rows) >= 13
    for row in rows:
        lines = [line.strip() for line in (ROOT / row["file"]).read_text(encoding="utf-8").splitlines()]
        assert lines.count(row["line"]) == 1, row["equation"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(
        r"\b(?:configs|requirements|tools|docs|megatron|eval_tasks|tests)/[\w./-]+\.(?:yml|txt|py|md|png)\b", text
    ):
        assert (ROOT / name).exists(), name


def test_the_page_on_architecture_has_every_floor() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    for name in FLOORS:
        place = name.rpartition(".")[2]
        assert name == "megatron" or re.search(rf"`(?:megatron/)?{place}(?:\.py)?`", page), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_modules_and_functions_exist(page: Path) -> None:
    for dotted in DOTTED.findall(page.read_text(encoding="utf-8")):
        *packages, last = dotted.split(".")
        folder = ROOT.joinpath(*packages)
        if (folder / last).is_dir() or (folder / f"{last}.py").is_file():
            continue
        home = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        assert home.is_file() and re.search(rf"\b{last}\b", home.read_text(encoding="utf-8")), dotted


@pytest.mark.parametrize("name", ["README.md", "docs/growth.md"])
def test_examples_run_as_they_are_printed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fenced blocks of a page, one after the other, as a reader would paste them."""
    monkeypatch.chdir(ROOT)
    blocks = EXAMPLE.findall((ROOT / name).read_text(encoding="utf-8"))
    assert blocks, "the page has lost its example"
    known: dict[str, object] = {}
    with torch.random.fork_rng():
        for block in blocks:
            exec(compile(block, name, "exec"), known)
