"""Where images to prepare come from: folders of classes, webdataset tars, arrays. Nothing is unpacked or unpickled."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from megatron.data.captions import (
    Caption,
    Fault,
    caption_file,
    captions_by_image,
    captions_of,
    json_object,
    plain_caption,
)
from megatron.data.classes import are_class_names
from megatron.errors import UserError
from megatron.text import shortened

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")
"""Of files that `megatron.data.decode` reads; those of torchvision's ImageFolder are among them."""
MOST_IMAGE_BYTES, MOST_CAPTION_BYTES, _MOST_LABEL_BYTES = 1 << 26, 1 << 20, 1 << 6
_ARRAYS = {"labels": ("iu", 1), "text": ("U", 2), "prompt": ("U", 2), "classes": ("U", 1)}
"""Of an .npz, besides images: kinds of each array's dtype, and its most dimensions."""


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a file."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Those bytes. Raises OSError."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image that is to be prepared, with its class and its captions, as far as it has them."""

    name: str
    image: Place | npt.NDArray[np.uint8]
    """An encoded image, or pixels [H, W] or [H, W, c]."""
    label: int | None = None
    captions: Place | Sequence[Caption] | None = None
    """In place of a caption, the text file that it is."""

    @property
    def num_bytes(self) -> int:
        """Size of the image."""
        return self.image.size

    def content(self) -> bytes:
        """The encoded image: its file as it is, or pixels as PNG. Raises OSError."""
        if isinstance(self.image, Place):
            return self.image.read()
        from PIL import Image  # of those who need it only

        encoded = io.BytesIO()
        Image.fromarray(self.image[..., 0] if self.image.shape[2:] == (1,) else self.image).save(encoded, "PNG")
        return encoded.getvalue()

    def texts(self) -> list[Caption]:
        """The captions that are not empty. Raises OSError, and UnicodeDecodeError for a file that is not UTF-8."""
        captions = self.captions
        if isinstance(captions, Place):
            captions = [plain_caption(captions.read().decode("utf-8-sig"))]
        return [caption for caption in captions or () if caption.text]


@dataclass(frozen=True)
class Listing:
    """What a source holds."""

    records: list[ImageRecord] = field(default_factory=list)
    classes: list[str] | None = None
    """Names, where they are known."""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    """How many files are neither images nor captions, by ending; of shards, those of samples without an image."""


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].lower() if "." in name else ""


# ---- folders ----


def list_folder(folder: str, classes: Sequence[str] | None, fault: Fault) -> Listing:
    """Images of a folder: FOLDER/CLASS/.../image.jpg, classes in the order of their names or of `classes`.

    A folder without folders has images without classes. An image's caption is the .txt of its name beside it. Where
    the folder has a file of captions, its images are those that the file names, in folders or not, without classes.
    """
    passed = Counter[str]()
    if not os.path.isdir(folder):
        raise UserError(f"--images: no such folder: {folder}")
    try:
        if path := caption_file(folder):
            return Listing(list(_captioned_images(folder, path, fault)))
        entries = sorted(os.listdir(folder))
        names = [name for name in entries if os.path.isdir(os.path.join(folder, name)) and not name.startswith(".")]
        loose = list(_images_in(folder, entries, None, fault, passed))
        if not names:
            return Listing(loose, None, passed)
        if loose:
            raise UserError(f"--images: {loose[0].name} lies beside the folders of classes; move it into one of them")
        known = list(classes) if classes is not None else names
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--images: the folder {shortened(unknown[0])} is no class of --classes; add it there")
        numbers = {name: number for number, name in enumerate(known)}
        records = [record for name in names for record in _class_images(folder, name, numbers, fault, passed)]
        return Listing(records, known, passed)
    except OSError as error:
        raise UserError(f"--images: {error.filename or folder} cannot be read: {error.strerror}") from None


def _class_images(
    folder: str, name: str, numbers: dict[str, int], fault: Fault, passed: Counter[str]
) -> Iterator[ImageRecord]:
    for place, folders, files in os.walk(os.path.join(folder, name), onerror=_raise):
        folders.sort()
        yield from _images_in(place, sorted(files), numbers[name], fault, passed)


def _captioned_images(folder: str, captions: str, fault: Fault) -> Iterator[ImageRecord]:
    for name, texts in captions_by_image(captions, fault).items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            fault(path, f"is named in {captions}, and is not there")
        elif image := _file(path, MOST_IMAGE_BYTES, fault):
            yield ImageRecord(path, image, None, tuple(texts))


def _raise(error: OSError) -> None:
    raise error


def _images_in(
    folder: str, names: Sequence[str], label: int | None, fault: Fault, passed: Counter[str]
) -> Iterator[ImageRecord]:
    known = set(names)
    captions = {_caption_name(name) for name in names if _suffix(name) in IMAGE_SUFFIXES}
    for name in names:
        path = os.path.join(folder, name)
        if name.startswith(".") or os.path.isdir(path):
            continue
        if _suffix(name) not in IMAGE_SUFFIXES:
            if name not in captions:
                passed[_ending(name)] += 1
            continue
        if not os.path.isfile(path):
            fault(path, "is no file, or a link to one that is gone")
            continue
        text = _caption_name(name)
        caption = _file(os.path.join(folder, text), MOST_CAPTION_BYTES, fault) if text in known else None
        if image := _file(path, MOST_IMAGE_BYTES, fault):
            yield ImageRecord(path, image, label, caption)


def _caption_name(image: str) -> str:
    return f"{image.rpartition('.')[0]}.txt"


def _ending(name: str) -> str:
    return f".{_suffix(name)}" if _suffix(name) else "no ending"


def _file(path: str, most: int, fault: Fault) -> Place | None:
    size = os.path.getsize(path)
    if size <= most:
        return Place(path, 0, size)
    fault(path, f"has more than {most:,} bytes")
    return None


# ---- webdataset ----


def list_shards(paths: Sequence[str], fault: Fault) -> Listing:
    """Images of tars in webdataset's form: `key.jpg`, with `key.cls` (a number) and `key.txt` (a caption).

    Without a .txt, captions are those of `key.json`, if it has any (megatron.data.captions). Other members are left
    alone. The tars stay where they are: images are read from them in place.
    """
    records, passed = list[ImageRecord](), Counter[str]()
    for path in paths:
        try:
            with tarfile.open(path, "r:") as archive:
                for name, members in _samples(path, archive):
                    records += _record(name, members, fault, passed)
                if Place(path, archive.offset, tarfile.BLOCKSIZE).read().strip(b"\0"):
                    raise tarfile.ReadError(f"damaged at byte {archive.offset:,}")  # where tarfile stops in silence
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            if isinstance(error, UserError):
                raise
            advice = "give complete, uncompressed .tar files"
            raise UserError(f"--shards: {path} cannot be read ({shortened(error, 120)}); {advice}") from None
    return Listing(records, None, passed)


def _samples(path: str, archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, Place]]]:
    """(name, place of each suffix) of members that follow each other and have the same name up to a first dot."""
    key, members = "", dict[str, Place]()
    for member in archive:
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not member.isreg() or member.issparse() or not stem:
            continue
        if (name := f"{folder}/{stem}") != key or suffix.lower() in members:
            yield f"{path}: {key.removeprefix('/')}", members
            key, members = name, {}
        members[suffix.lower()] = Place(path, member.offset_data, member.size)
        archive.members = []  # type: ignore[attr-defined]  # a list of millions otherwise
    yield f"{path}: {key.removeprefix('/')}", members


def _record(name: str, members: dict[str, Place], fault: Fault, passed: Counter[str]) -> Iterator[ImageRecord]:
    suffix = next((suffix for suffix in members if _suffix(suffix) in IMAGE_SUFFIXES or suffix in IMAGE_SUFFIXES), None)
    if suffix is None:
        passed.update(f".{suffix}" for suffix in members)
        return
    image, text, label = members[suffix], members.get("txt", members.get("json")), None
    name = f"{name}.{suffix}"
    if image.size > MOST_IMAGE_BYTES or (text and text.size > MOST_CAPTION_BYTES):
        fault(name, f"has more than {MOST_IMAGE_BYTES:,} bytes, or its caption more than {MOST_CAPTION_BYTES:,}")
        return
    if "cls" in members:
        content = members["cls"].read() if members["cls"].size <= _MOST_LABEL_BYTES else b""
        if not content.strip().isdigit():
            fault(name, f"its .cls is no class number: '{shortened(content.decode('utf-8', 'replace'))}'")
            return
        label = int(content)
    captions: Place | tuple[Caption, ...] | None = text
    if text and "txt" not in members:
        try:
            captions = captions_of(json_object(text.read())) or None
        except ValueError as error:
            fault(name, f"its .json cannot be used: {error}")
            return
    yield ImageRecord(name, image, label, captions)


# ---- arrays ----


def list_arrays(path: str) -> Listing:
    """Images of an .npz: `images` uint8 [n, H, W] or [n, H, W, c], and perhaps `labels` [n] of whole numbers, `text`
    [n] or [n, k], also called `captions`, `prompt` of its shape or [n], and `classes` [number of classes] of text."""
    arrays = _arrays(path)
    images = arrays.get("images")
    if (
        images is None
        or images.dtype != np.uint8
        or images.ndim not in (3, 4)
        or images.shape[3:] not in ((), (1,), (3,))
        or 0 in images.shape[1:]
    ):
        found = "none" if images is None else f"{images.dtype} {list(images.shape)}"
        raise UserError(f"--npz: {path}: `images` must be uint8 [n, H, W] or [n, H, W, 1 or 3], not {found}")
    for name, (kind, most) in _ARRAYS.items():
        array = arrays.get(name)
        if array is not None and (array.dtype.kind not in kind or not 0 < array.ndim <= most):
            what = "whole numbers" if name == "labels" else "text"
            raise UserError(f"--npz: {path}: `{name}` must be a list of {what}, not {array.dtype} {list(array.shape)}")
        if array is not None and name != "classes" and len(array) != len(images):
            raise UserError(f"--npz: {path}: {len(array)} {name} for {len(images)} images")
    if "classes" in arrays and not are_class_names(arrays["classes"].tolist()):
        raise UserError(f"--npz: {path}: `classes` must name each class once, on one line each, and none with nothing")
    labels, classes, captions = arrays.get("labels"), arrays.get("classes"), _captions(path, arrays)
    records = [
        ImageRecord(
            f"{path}: image {number}", image, None if labels is None else int(labels[number]),
            captions[number] if captions else None,
        )
        for number, image in enumerate(images)
    ]  # fmt: skip
    return Listing(records, None if classes is None else [str(name) for name in classes])


def _captions(path: str, arrays: dict[str, npt.NDArray[Any]]) -> list[tuple[Caption, ...]]:
    """The captions of each image; an empty list where there are none."""
    texts, prompts = (arrays[name].tolist() if name in arrays else None for name in ("text", "prompt"))
    if texts is None:
        if prompts is not None:
            raise UserError(f"--npz: {path}: `prompt` needs a `text` that answers it")
        return []
    try:
        return [captions_of({"text": t, "prompt": p}) for t, p in zip(texts, prompts or [""] * len(texts), strict=True)]
    except ValueError as error:
        raise UserError(f"--npz: {path}: an image {error}") from None


def _arrays(path: str) -> dict[str, npt.NDArray[Any]]:
    wanted = ("images", "captions", *_ARRAYS)
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist() if Path(entry.filename).stem in wanted)
        if size > psutil.virtual_memory().available:
            raise UserError(f"--npz: {path} unpacks to {size:,} bytes, more than the free memory; use --images")
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in wanted if name in file}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or shortened(error, 120)
        raise UserError(f"--npz: {path} cannot be read ({reason}); write it with numpy.savez") from None
    if "captions" in found:
        found.setdefault("text", found.pop("captions"))
    return found
