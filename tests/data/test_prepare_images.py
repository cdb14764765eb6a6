"""Folders, webdataset tars and arrays of images become pairs; what is broken is told by name."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron.data import image_sources
from megatron.data.decode import FORMATS, BrokenImageError, decode
from tests.data.image_files import Prepare, encoded, ids, label, pair, pixels, rows, tar_of, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of cats and two of dogs, in PNG and JPEG."""
    root = tmp_path / "animals"
    for number, name in enumerate(("dog/b.jpeg", "cat/1.png", "cat/deep/2.JPG", "dog/a.png", "cat/3.webp")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        kind = {"png": "PNG", "webp": "WEBP"}.get(name.rpartition(".")[2], "JPEG")
        (root / name).write_bytes(encoded(pixels(number), kind))
    (root / "cat" / "notes.md").write_text("not an image")
    (root / "cat" / ".hidden.png").write_text("nor this")
    return root


def test_a_folder_becomes_images_labels_and_classes(folder: Path, tmp_path: Path, prepare: Prepare) -> None:
    code, printed = prepare("--images", folder)
    assert code == 0 and "5 images of 2 classes" in printed and "5/5" in printed
    assert "passed over 1 files that are no images by their endings: 1 .md" in printed
    files = {
        path.read_bytes(): path
        for path in folder.rglob("*.*")
        if path.suffix.lower() in (".png", ".jpeg", ".jpg", ".webp")
    }
    found = rows(tmp_path, "image", "label")
    assert {content for content, _ in found} == {c for c, path in files.items() if not path.name.startswith(".")}
    for content, number in found:
        assert number == label(int("dog" in files[content].parts))
    assert (tmp_path / "out/x/x_classes.txt").read_text() == "cat\ndog\n"
    assert pair(tmp_path, "image").dtype == np.uint8 and pair(tmp_path, "label").dtype == np.int32


def test_the_order_is_random_and_the_seeds(tmp_path: Path, prepare: Prepare) -> None:
    np.savez(tmp_path / "a.npz", images=np.stack([pixels(i, 8, 8) for i in range(40)]), labels=np.arange(40) // 10)
    written = []
    for flags in ((), (), ("--order-seed", "9"), ("--num-workers", "2")):
        assert prepare("--npz", tmp_path / "a.npz", *flags)[0] == 0
        written.append(rows(tmp_path, "image", "label"))
    assert written[0] == written[1] == written[3] != written[2] and sorted(written[0]) == sorted(written[2])
    labels = pair(tmp_path, "label").tokens.tolist()
    assert labels != sorted(labels)


def test_endings_of_other_tools_are_read_or_told(tmp_path: Path, prepare: Prepare) -> None:
    kinds = {"tif": "TIFF", "TIFF": "TIFF", "ppm": "PPM", "pgm": "PPM", "bmp": "BMP"}
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
    for number, (ending, kind) in enumerate(kinds.items()):
        (tmp_path / "in/a" / f"{number}.{ending}").write_bytes(encoded(pixels(number), kind))
    for name in ("b/1.heic", "b/2.heic", "b/3.AVIF", "b/README", "list.csv"):
        (tmp_path / "in" / name).write_text("x")
    code, printed = prepare("--images", tmp_path / "in")
    assert code == 0 and "5 images of 2 classes" in printed
    told = "passed over 5 files that are no images by their endings: 2 .heic, 1 .avif, 1 .csv, 1 no ending"
    assert told in printed
    shard = write_tar(
        tmp_path / "s.tar", {"1.tif": encoded(pixels(1), "TIFF"), "1.cls": b"0", "2.heic": b"", "2.cls": b"1"}
    )
    code, printed = prepare("--shards", shard)
    assert code == 0 and "1 images of 1 classes" in printed and "passed over 2 files" in printed
    assert "1 .cls, 1 .heic" in printed


def test_arrays_are_kept_to_the_pixel(tmp_path: Path, prepare: Prepare) -> None:
    grey = pixels(1, 8, 8, 1)[None].repeat(2, 0)
    grey[1] += 1
    for images in (grey, grey[..., 0]):
        names = {"captions": np.array(["a dot", "a line"]), "classes": np.array(["dot", "line", "none"])}
        np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1]), **names)
        code, printed = prepare("--npz", tmp_path / "a.npz")
        assert code == 0 and "2 images of 3 classes" in printed
        for content, number, text in rows(tmp_path, "image", "label", "text"):
            index = number == label(1)
            assert np.array_equal(np.asarray(decode(content, 1)), grey[int(index), ..., 0])
            assert text == ids("a line" if index else "a dot")
        assert (tmp_path / "out/x/x_classes.txt").read_text() == "dot\nline\nnone\n"


@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((3, 0, 8), ["a", "b"], "`images` must be uint8 [n, H, W] or [n, H, W, 1 or 3], not uint8 [3, 0, 8]"),
        ((3, 8, 8), ["a", "a"], "`classes` must name each class once"),
        ((3, 8, 8), ["a", " "], "`classes` must name each class once"),
    ],
)
def test_arrays_that_make_no_set_are_refused(
    tmp_path: Path, prepare: Prepare, shape: tuple[int, ...], names: list[str], message: str
) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, np.uint8), labels=np.array([0, 1, 0]), classes=np.array(names))
    code, printed = prepare("--npz", tmp_path / "a.npz")
    assert code == 2 and message in printed and not list(tmp_path.glob("out/x/*"))


def test_shards_are_read_in_place(tmp_path: Path, prepare: Prepare) -> None:
    content = [encoded(pixels(number), "JPEG") for number in range(4)]
    members = [
        {"a/1.jpg": content[0], "a/1.cls": b"2\n", "a/1.txt": b"\xc3\xa9t\xc3\xa9", "a/1.json": b"{}",
         "b/1.jpg": content[1], "b/1.cls": b"0", "b/1.txt": b"two "},
        {"../../evil.jpg": content[2], "../../evil.cls": b"1", "../../evil.txt": b"x",
         "2.b.jpg": content[3], "2.cls": b"1", "2.txt": b"four"},
    ]  # fmt: skip
    shards = [write_tar(tmp_path / f"{number}.tar", each) for number, each in enumerate(members)]
    before = sorted(tmp_path.rglob("*"))
    code, printed = prepare("--shards", *shards)
    assert code == 0 and "4 images of 3 classes" in printed
    expected = [(0, 2, "été"), (1, 0, "two"), (2, 1, "x"), (3, 1, "four")]
    found = sorted(rows(tmp_path, "image", "label", "text"))
    assert found == sorted((content[i], label(number), ids(text)) for i, number, text in expected)
    assert not (tmp_path / "out/x/x_classes.txt").exists(), "a number is no name"
    assert [path for path in sorted(tmp_path.rglob("*")) if "out" not in path.parts] == before


def test_captions_lie_beside_images(tmp_path: Path, prepare: Prepare) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.png").write_bytes(encoded(pixels(len(name))))
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    code, printed = prepare("--images", tmp_path)
    assert code == 0 and "passed over" not in printed
    assert {text for _, text in rows(tmp_path, "image", "text")} == {ids("one"), ids("two")}
    assert not (tmp_path / "out/x/x_label_document.idx").exists()


def test_what_an_earlier_preparation_left_goes(folder: Path, tmp_path: Path, prepare: Prepare) -> None:
    assert prepare("--images", folder)[0] == 0
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/a.png").write_bytes(encoded(pixels(1)))
    (tmp_path / "plain/a.txt").write_text("a")
    assert prepare("--images", tmp_path / "plain")[0] == 0
    kinds = ("image", "text")
    names = {f"x_{kind}_document{ending}" for kind in kinds for ending in (".bin", ".idx", ".sha256")}
    assert {path.name for path in (tmp_path / "out/x").iterdir()} == names


def test_classes_can_be_given(folder: Path, tmp_path: Path, prepare: Prepare) -> None:
    (tmp_path / "names.txt").write_text("dog\nbird\ncat\n")
    code, printed = prepare("--images", folder, "--classes", tmp_path / "names.txt")
    assert code == 0 and "5 images of 3 classes" in printed
    assert sorted(pair(tmp_path, "label").tokens.tolist()) == [0, 0, 2, 2, 2]
    (tmp_path / "names.txt").write_text("dog\n")
    code, printed = prepare("--images", folder, "--classes", tmp_path / "names.txt")
    assert code == 2 and "--images: the folder cat is no class of --classes" in printed
    code, printed = prepare("--images", folder, "--num-workers", "-2")
    assert code == 2 and "--num-workers: -2 processes cannot be started" in printed


BROKEN = {
    "cut off": (encoded(pixels(1), "JPEG")[:500], "cannot be decoded"),
    "a PNG cut off": (encoded(pixels(1))[:-400], "cannot be decoded"),
    "text": (b"no image", "is no JPEG, PNG, WEBP, GIF, BMP, TIFF or PPM image"),
    "empty": (b"", "is no JPEG"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no JPEG"),
    "16 bits": (encoded(np.ones((4, 4), np.uint16)), "has more than 8 bits a channel"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_image_ends_it_or_is_left_out(
    folder: Path, tmp_path: Path, prepare: Prepare, content: bytes, reason: str
) -> None:
    (folder / "cat" / "odd.png").write_bytes(content)
    code, printed = prepare("--images", folder)
    [line] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert code == 2 and "cat/odd.png: " in line and reason in line and "--broken skip" in line
    assert not list(tmp_path.glob("out/x/*"))
    code, printed = prepare("--images", folder, "--broken", "skip")
    assert code == 0 and "odd.png: " in printed and "5 images of 2 classes" in printed and "1 broken images" in printed


def test_a_link_to_nothing_is_broken(folder: Path, tmp_path: Path, prepare: Prepare) -> None:
    (folder / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    code, printed = prepare("--images", folder)
    assert code == 2 and "cat/gone.jpg: is no file, or a link to one that is gone; mend or remove it" in printed
    code, printed = prepare("--images", folder, "--broken", "skip")
    assert code == 0 and "5 images of 2 classes" in printed and "1 broken images" in printed


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_bytes_are_changed_an_image_is_decoded_or_broken(kind: str) -> None:
    whole, random, broken = encoded(pixels(1, 24, 24), kind), np.random.default_rng(1), 0
    for number in range(100):
        content = bytearray(whole)
        for place in random.integers(min(len(content), 200) if number % 2 else len(content), size=5):
            content[place] = random.integers(256)
        try:
            assert decode(bytes(content)).mode == "RGB"
        except BrokenImageError as error:
            assert "\n" not in str(error)
            broken += 1
    assert broken > 10


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image = encoded(np.zeros((40, 40), np.uint8))
    assert decode(image, 1).size == (40, 40)
    for limit in (1000, 100):  # Pillow warns of more than the limit, and raises for twice as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(BrokenImageError, match=f"has more than {limit:,} pixels"):
            decode(image)


def test_every_mode_becomes_colour_or_grey() -> None:
    array = pixels(1, 8, 8)
    image = Image.fromarray(array)
    for mode in ("1", "L", "P", "RGBA", "LA", "CMYK", "YCbCr"):
        kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
        file = io.BytesIO()
        image.convert(mode).save(file, kind)
        content = file.getvalue()
        assert decode(content).mode == "RGB" and decode(content, 1).mode == "L"


def photograph(orientation: int) -> bytes:
    """A JPEG of 30 x 20 pixels, as they are stored, with what a camera says of it."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "a camera", orientation, 72.0
    exif[0x8769] = {0x829A: 0.01}
    return encoded(pixels(1, 20, 30), "JPEG", exif=exif)


@pytest.mark.parametrize("orientation", range(10))
def test_a_turned_photograph_stands_upright_as_pillow_turns_it(orientation: int) -> None:
    content = photograph(orientation)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    found = decode(content)
    assert found.size == ((20, 30) if 5 <= orientation <= 8 else (30, 20)) and found.tobytes() == expected.tobytes()


def test_an_image_is_whole_whatever_became_of_its_metadata() -> None:
    content = photograph(6)
    first = content.index(b"Exif") + 6
    length = int.from_bytes(content[first - 8 : first - 6], "big") - 8
    for place in range(first, first + length):
        for value in (0, 1, 2, 7, 255):
            damaged = content[:place] + bytes([value]) + content[place + 1 :]
            assert decode(damaged).size in ((20, 30), (30, 20)), (place - first, value)


def test_faults_of_shards(tmp_path: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(pixels(1))
    cases: list[tuple[dict[str, bytes], str]] = [
        ({"a_png": good, "a_cls": b"cat"}, "a.tar: a.png: its .cls is no class number: 'cat'"),
        ({"a_png": good, "a_cls": b"-1"}, "a.png: its .cls is no class number: '-1'"),
        ({"a_png": good, "a_cls": b"1" * 70}, "a.png: its .cls is no class number"),
        ({"a_png": good, "a_cls": b"99999999999"}, "a.png: has label 99999999999, and the classes are 0 to 2147483647"),
        ({"a_png": good, "a_cls": b"1", "b_png": good}, "b.png: has no label, as others have"),
        ({"a_png": good, "a_txt": b"1", "b_png": good}, "b.png: has no caption, as others have"),
        ({"a_png": good, "a_txt": b"\xff\xfe"}, "a.png: its caption is not UTF-8 text"),
        ({"a_png": good, "a_txt": b" \n"}, "a.png: has an empty caption"),
        ({"a_png": good}, "a.png and all other images have neither a label nor a caption"),
        ({"a_cls": b"1"}, "no images were found"),
    ]
    for members, message in cases:
        code, printed = prepare("--shards", tar_of(tmp_path, **members))
        assert code == 2 and message in printed, printed
    monkeypatch.setattr(image_sources, "MOST_IMAGE_BYTES", 10)
    code, printed = prepare("--shards", tar_of(tmp_path, a_png=good, a_cls=b"1"))
    assert code == 2 and "a.png: has more than 10 bytes" in printed


def test_damaged_shards(tmp_path: Path, prepare: Prepare) -> None:
    members = {"a_png": encoded(pixels(1)), "a_cls": b"1", "b_png": encoded(pixels(2)), "b_cls": b"0"}
    whole = Path(tar_of(tmp_path, **members)).read_bytes()
    second = whole.index(b"b.png")
    scrawled = whole[:second] + b"\1" * 512 + whole[second + 512 :]
    damaged = {"no tar": b"text" * 500, "cut off": whole[: second + 700], "scrawled over": scrawled}
    for name, content in damaged.items():
        (tmp_path / "bad.tar").write_bytes(content)
        code, printed = prepare("--shards", tmp_path / "bad.tar")
        assert code == 2 and "bad.tar cannot be read" in printed and printed.count("error:") == 1, name
    assert prepare("--shards", tmp_path / "none.tar")[0] == 2


def test_links_in_a_tar_are_not_followed(tmp_path: Path, prepare: Prepare) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.png", "a.cls"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
            archive.addfile(entry)
    code, printed = prepare("--shards", tmp_path / "a.tar")
    assert code == 2 and "no images were found" in printed


def test_faults_of_arrays(tmp_path: Path, prepare: Prepare) -> None:
    images = np.stack([pixels(i, 4, 4) for i in range(3)])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"labels": np.arange(3)}, "`images` must be uint8 [n, H, W]"),
        ({"images": images.astype(float), "labels": np.arange(3)}, "not float64 [3, 4, 4, 3]"),
        ({"images": images, "labels": np.arange(2)}, "2 labels for 3 images"),
        ({"images": images, "labels": np.ones(3)}, "`labels` must be a list of whole numbers, not float64 [3]"),
        ({"images": images, "labels": np.array([0, -1, 2])}, "image 1: has label -1, and the classes are 0 to"),
        ({"images": images, "labels": np.arange(3), "classes": np.array(["a", "b"])},
         "image 2: has label 2, and the classes are 0 to 1"),
        ({"images": images, "labels": np.array([{}, {}, {}])}, "cannot be read (Object arrays cannot be loaded"),
    ]  # fmt: skip
    for arrays, message in cases:
        np.savez(tmp_path / "a.npz", **arrays)
        code, printed = prepare("--npz", tmp_path / "a.npz")
        assert code == 2 and message in printed, printed
    (tmp_path / "a.npz").write_bytes(b"PK no zip")
    code, printed = prepare("--npz", tmp_path / "a.npz")
    assert code == 2 and "a.npz cannot be read (" in printed


def test_faults_of_flags(folder: Path, tmp_path: Path, prepare: Prepare) -> None:
    cases: list[tuple[list[str], str]] = [
        (["--images", str(folder), "--npz", "a.npz"], "--npz: --images is given too; keep one of them"),
        (["--images", str(folder), "--name", "a/b"], "the data set needs a name without slashes"),
        (["--images", str(tmp_path / "none")], "--images: no such folder"),
        (["--images", str(folder), "--order-seed", "-1"], "--order-seed: -1 is not from 0"),
        (["--images", str(folder), "--classes", str(folder / "cat/notes.md")], "the folder cat is no class"),
    ]
    for flags, message in cases:
        code, printed = prepare(*flags)
        assert code == 2 and message in printed, printed
    (folder / "loose.png").write_bytes(encoded(pixels(1)))
    code, printed = prepare("--images", folder)
    assert code == 2 and "loose.png lies beside the folders of classes" in printed


@pytest.mark.parametrize("name", [b"a\nb", b"\xff\xfe"])
def test_a_class_that_cannot_be_named_in_a_line(folder: Path, prepare: Prepare, name: bytes) -> None:
    (folder / "cat").rename(folder / os.fsdecode(name))
    code, printed = prepare("--images", folder)
    assert code == 2 and "cannot be a line of text; rename it" in printed and printed.count("error: ") == 1


def test_without_pillow_the_line_that_installs_it_is_told(
    folder: Path, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [
        name for name in sys.modules if name == "PIL" or name.startswith(("PIL.", "megatron.data.prepare_im"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "megatron.data.decode")
    monkeypatch.setitem(sys.modules, "PIL", None)
    code, printed = prepare("--images", folder)
    assert code == 2 and "pip install -r requirements/requirements-vision.txt" in printed
