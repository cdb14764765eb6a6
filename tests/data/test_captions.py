"""Captions, and answers to prompts, become sequences beside their images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.image_files import Prepare, encoded, ids, pair, pixels, rows, tar_of


def captions(folder: Path) -> dict[bytes, list[tuple[bytes, int]]]:
    """By image: ids of its captions, and how many of them are a prompt."""
    images, texts = pair(folder, "image"), pair(folder, "text")
    bounds, found = texts.document_indices.tolist(), {}
    has_prompts = (folder / "out/x/x_prompt_length_document.idx").exists()
    lengths = pair(folder, "prompt_length").tokens.tolist() if has_prompts else [0] * len(texts)
    assert len(bounds) == len(images) + 1 and len(lengths) == len(texts)
    for number, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        found[images[number].tobytes()] = [(texts[place].tobytes(), lengths[place]) for place in range(first, end)]
    return found


def folder_of(folder: Path, name: str, *lines: Any) -> Path:
    """Three images, one of them in a folder, and a file of captions."""
    root = folder / "images"
    for number, image in enumerate(("a.png", "b.png", "deep/c.png")):
        (root / image).parent.mkdir(parents=True, exist_ok=True)
        (root / image).write_bytes(encoded(pixels(number)))
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / name).write_text(content, encoding="utf-8", errors="surrogatepass")
    return root


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_a_file_of_captions_names_the_images(tmp_path: Path, prepare: Prepare, name: str) -> None:
    lines = [
        {"file_name": "deep/c.png", "text": "été ", "width": 3}, "", {"image": "a.png", "text": ["one", "", "two"]},
        {"file_name": "./a.png", "caption": "three"},
    ]  # fmt: skip
    code, printed = prepare("--images", folder_of(tmp_path, name, *lines))
    assert code == 0 and "2 images to " in printed, printed
    first, third = encoded(pixels(0)), encoded(pixels(2))
    assert captions(tmp_path) == {
        first: [(ids("one"), 0), (ids("two"), 0), (ids("three"), 0)],
        third: [(ids("été"), 0)],
    }
    written = {path.name.split(".")[0] for path in (tmp_path / "out/x").iterdir()}
    assert written == {"x_image_document", "x_text_document"}


def test_an_answer_follows_its_prompt(tmp_path: Path, prepare: Prepare) -> None:
    lines = [
        {"image": "a.png", "prompt": "how many?", "text": " two"}, {"image": "a.png", "text": " dots "},
        {"image": "b.png", "prompt": ["what?", "who?"], "text": [" a dog", "me"]},
    ]  # fmt: skip
    assert prepare("--images", folder_of(tmp_path, "captions.jsonl", *lines))[0] == 0
    assert captions(tmp_path) == {
        encoded(pixels(0)): [(ids("how many? two"), 9), (ids("dots"), 0)],
        encoded(pixels(1)): [(ids("what? a dog"), 5), (ids("who?me"), 4)],
    }


def test_captions_of_shards_may_be_json(tmp_path: Path, prepare: Prepare) -> None:
    content = [encoded(pixels(number)) for number in range(3)]
    members = {
        "a_png": content[0], "a_json": b'{"caption": "a", "url": "none"}',
        "b_png": content[1], "b_json": b'{"prompt": "q", "text": ["r", "s"]}',
        "c_png": content[2], "c_txt": b" c\n", "c_json": b"{}",
    }  # fmt: skip
    assert prepare("--shards", tar_of(tmp_path, **members))[0] == 0
    assert captions(tmp_path) == {
        content[0]: [(ids("a"), 0)],
        content[1]: [(ids("qr"), 1), (ids("qs"), 1)],
        content[2]: [(ids("c"), 0)],
    }
    labelled = {"a_png": content[0], "a_cls": b"3", "a_json": b'{"width": 24}'}
    assert prepare("--shards", tar_of(tmp_path, **labelled))[0] == 0
    assert rows(tmp_path, "image", "label") and not (tmp_path / "out/x/x_text_document.idx").exists()


def test_captions_of_arrays(tmp_path: Path, prepare: Prepare) -> None:
    images = np.stack([pixels(i, 4, 4) for i in range(2)])
    texts = np.array([["one", "two"], ["three", ""]])
    for prompts, length in ((None, 0), (np.array(["a", "b"]), 1)):
        arrays = {"images": images, "text": texts} | ({} if prompts is None else {"prompt": prompts})
        np.savez(tmp_path / "a.npz", **arrays)
        assert prepare("--npz", tmp_path / "a.npz")[0] == 0
        asked = ["", ""] if prompts is None else prompts.tolist()
        assert list(captions(tmp_path).values()) in (
            [[(ids(asked[0] + "one"), length), (ids(asked[0] + "two"), length)], [(ids(asked[1] + "three"), length)]],
            [[(ids(asked[1] + "three"), length)], [(ids(asked[0] + "one"), length), (ids(asked[0] + "two"), length)]],
        )


def test_files_do_not_depend_on_workers(tmp_path: Path, prepare: Prepare) -> None:
    lines = [{"image": name, "prompt": "q", "text": [name, "x"]} for name in ("a.png", "b.png", "deep/c.png")]
    folder, written = folder_of(tmp_path, "captions.jsonl", *lines), []
    for workers in ("1", "2"):
        assert prepare("--images", folder, "--num-workers", workers)[0] == 0
        written.append({path.name: path.read_bytes() for path in (tmp_path / "out/x").iterdir()})
    assert written[0] == written[1] and len(written[0]) == 9


FAULTS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "captions.jsonl: line 2: is not valid JSON"),
    "a list": ("[1]", "line 2: is not a JSON object but list"),
    "not UTF-8": ('{"file_name": "a.png", "text": "\ud800"}', "line 2: is not UTF-8 text"),
    "no image": ({"text": "a"}, "line 2: has no file_name"),
    "no text": ({"file_name": "a.png"}, "line 2: has no text"),
    "an empty text": ({"file_name": "a.png", "text": " "}, "line 2: has no text"),
    "a number": ({"file_name": "a.png", "text": [1]}, "line 2: its text is neither text nor a list of texts"),
    "too many prompts": (
        {"file_name": "a.png", "text": "a", "prompt": ["b", "c"]}, "line 2: has 2 prompts for 1 texts",
    ),
    "outside": ({"file_name": "../a.png", "text": "a"}, "line 2: its file_name leads out of the folder"),
    "elsewhere": ({"file_name": "/a.png", "text": "a"}, "line 2: its file_name leads out of the folder"),
    "not there": ({"file_name": "d.png", "text": "a"}, "images/d.png: is named in "),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), FAULTS.values(), ids=FAULTS)
def test_a_line_that_cannot_be_used_ends_it_or_is_left_out(
    tmp_path: Path, prepare: Prepare, line: Any, message: str
) -> None:
    folder = folder_of(tmp_path, "captions.jsonl", {"file_name": "b.png", "text": "b"}, line)
    code, printed = prepare("--images", folder)
    assert code == 2 and message in printed and printed.count("error: ") == 1, printed
    code, printed = prepare("--images", folder, "--broken", "skip")
    assert code == 0 and captions(tmp_path) == {encoded(pixels(1)): [(ids("b"), 0)]}


def test_faults_of_shards_and_arrays(tmp_path: Path, prepare: Prepare) -> None:
    good = encoded(pixels(1))
    cases: list[tuple[bytes, str]] = [
        (b"{", "a.png: its .json cannot be used: is not valid JSON"),
        (b'{"text": 1}', "a.png: its .json cannot be used: its text is neither text nor a list"),
        (b"{}", "a.png and all other images have neither a label nor a caption"),
        (b'{"text": "a"}' + b" " * (1 << 20), "or its caption more than 1,048,576"),
    ]
    for content, message in cases:
        code, printed = prepare("--shards", tar_of(tmp_path, a_png=good, a_json=content))
        assert code == 2 and message in printed, printed
    images = np.stack([pixels(i, 4, 4) for i in range(2)])
    arrays: list[tuple[dict[str, Any], str]] = [
        ({"text": np.array(["a"])}, "1 text for 2 images"),
        ({"text": np.ones(2)}, "`text` must be a list of text, not float64 [2]"),
        ({"text": np.array(["a", ""])}, "image 1: has an empty caption"),
        ({"prompt": np.array(["a", "b"])}, "`prompt` needs a `text` that answers it"),
        ({"text": np.array(["a", "b"]), "prompt": np.array([["a", "b"]] * 2)}, "has 2 prompts for 1 texts"),
    ]
    for each, message in arrays:
        np.savez(tmp_path / "a.npz", images=images, **each)
        code, printed = prepare("--npz", tmp_path / "a.npz")
        assert code == 2 and message in printed, printed
