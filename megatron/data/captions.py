"""Captions of images that are to be prepared: texts, or texts that answer a prompt."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FILE_NAMES = ("metadata.jsonl", "captions.jsonl")
"""A file of this name in a folder of images says what they show, as in Hugging Face's imagefolder."""
IMAGE_KEYS, TEXT_KEYS, PROMPT_KEY = ("file_name", "image"), ("text", "caption"), "prompt"

Fault = Callable[[str, str], None]
"""Takes the name and the fault of what cannot be used: it raises, or what is at fault is left out."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A text of an image, and the prompt that it answers; without one it describes the image."""

    text: str
    prompt: str = ""


def plain_caption(text: str) -> Caption:
    """A caption without a prompt, without blanks around it."""
    return Caption(text.strip())


def captions_of(fields: Mapping[str, Any]) -> tuple[Caption, ...]:
    """The captions of an object {text: one or a list of them, prompt: as many, or one for all}; none without a text.

    A text that answers a prompt is kept as it is, since both are joined as they are. Empty texts of a list are left
    out. Raises ValueError, with what is wrong, for values of other kinds.
    """
    key = next((key for key in TEXT_KEYS if key in fields), None)
    if key is None:
        return ()
    found, asked = _texts(fields[key], key), _texts(fields.get(PROMPT_KEY, ""), PROMPT_KEY)
    if len(asked) == 1:
        asked *= len(found)
    if len(asked) != len(found):
        raise ValueError(f"has {len(asked)} prompts for {len(found)} texts")
    pairs = zip(found, asked, strict=True)
    captions = [Caption(text, prompt) if prompt else plain_caption(text) for text, prompt in pairs]
    return tuple(caption for caption in captions if caption.text)


def _texts(value: Any, key: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"its {key} is neither text nor a list of texts")
    return list(texts)


def json_object(content: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError, with what is wrong, for anything else."""
    try:
        fields = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except (ValueError, RecursionError):  # ValueError: a number of too many digits, too
        raise ValueError("is not valid JSON") from None
    if not isinstance(fields, dict):
        raise ValueError(f"is not a JSON object but {type(fields).__name__}")
    return fields


def caption_file(folder: str) -> str | None:
    """The file of captions of a folder, if it has one."""
    paths = (os.path.join(folder, name) for name in FILE_NAMES)
    return next((path for path in paths if os.path.isfile(path)), None)


def captions_by_image(path: str, fault: Fault) -> dict[str, list[Caption]]:
    """What each line of a caption file says, by the name of the image; several lines of one image are added up.

    The names are paths inside of the file's folder. A line that cannot be used is a fault. Raises OSError.
    """
    found = dict[str, list[Caption]]()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                name, captions = _of_line(line)
            except ValueError as error:
                fault(f"{path}: line {number}", str(error))
                continue
            found.setdefault(name, []).extend(captions)
    return found


def _of_line(line: bytes) -> tuple[str, tuple[Caption, ...]]:
    fields = json_object(line)
    name, captions = _image_name(fields), captions_of(fields)
    if not captions:
        raise ValueError(f"has no {TEXT_KEYS[0]}")
    return name, captions


def _image_name(fields: Mapping[str, Any]) -> str:
    name = next((fields[key] for key in IMAGE_KEYS if key in fields), None)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"has no {IMAGE_KEYS[0]}")
    if os.path.isabs(name) or ".." in name.split("/"):
        raise ValueError(f"its {IMAGE_KEYS[0]} leads out of the folder")
    return os.path.normpath(name)
