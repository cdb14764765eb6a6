"""Turns pydantic's validation errors into lines: file, line, key, value, what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megatron.config.findings import WrongTypes
from megatron.config.paths import PATH_KEYS
from megatron.config.yaml_file import Setting, normalise
from megatron.errors import UserError, UserErrors
from megatron.text import shortened

_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text (in quotes)",
    "list": "a list, for example [a, b]",
    "tuple": "a list of numbers",
    "model": "a table {key: value}",
    "dict": "a table {key: value}",
    "too": "a list of another length",
}
_KEYS = re.compile(r"([a-z][\w.]*)(?:, [a-z][\w.]*)*: ")
_NAMES = re.compile(r"(?<![\w/.])[a-z]+(?:_[a-z]+)+(?![\w/])")
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


@dataclass(frozen=True)
class Mistake:
    """What is wrong with one value."""

    key: str
    """Dotted."""
    text: str
    """The key's value, and what to do."""
    is_missing: bool = False
    """Whether it is a key of the top level that is not there."""
    is_conflict: bool = False
    """Whether the value is wrong beside those of other keys."""


def mistakes(error: ValidationError) -> list[Mistake]:
    """All that pydantic has found wrong, in the order of the fields."""
    return [found for detail in error.errors(include_url=False) for found in _mistakes_of(dict(detail))]


def _mistakes_of(detail: dict[str, Any]) -> Iterator[Mistake]:
    loc = detail["loc"]
    if detail["type"] == "missing" and len(loc) == 1:
        yield Mistake(str(loc[0]), "missing", is_missing=True)
    elif detail["type"] == "value_error":
        raised = detail["ctx"]["error"]
        for text in getattr(raised, "lines", [str(raised)]):
            key, rest = _split_key(text, loc)
            yield Mistake(key, rest, is_conflict=not isinstance(raised, WrongTypes))
    else:
        yield Mistake(_dotted(loc), _entry(loc) + _describe(detail))


def describe_validation_error(error: ValidationError, where: str) -> str:
    """One line for the first mistake (or all missing keys) of a table that `where` names."""
    found = mistakes(error)
    missing = [mistake.key for mistake in found if mistake.is_missing]
    if missing:
        return f"{where}: missing {', '.join(missing)}"
    return f"{where}: {found[0].key}: {found[0].text}"


def with_source(key: str, text: str, settings: Mapping[str, Setting], files: str) -> str:
    """`key: text`, with the place where the key was given before it, or `files` where it was not."""
    setting = find_setting(key, settings)
    if setting is None:
        return f"{files}: {key}: {text}"
    spelling = setting.spelling if setting.key == key else key
    written = setting.written
    if written not in (None, "true", "false") and text.endswith((", got true", ", got false")):
        text += f" ('{written}', which YAML 1.1 reads so and YAML 1.2 as text; quote it for text)"
    return f"{setting.source}: {spelling}: {text}"


def located(text: str, settings: Mapping[str, Setting]) -> str:
    """A message that begins with a key, with the place where that key was given before it; any other as it is."""
    setting = _setting_of(text, settings)
    return text if setting is None else f"{setting.source}: {text}"


def _setting_of(text: str, settings: Mapping[str, Setting], anywhere: bool = False) -> Setting | None:
    """The setting of the key that a message begins with, or else of the first one that is named `anywhere` in it."""
    found = _KEYS.match(text)
    names = [normalise(found[1])] if found else []
    names += _NAMES.findall(text) if anywhere else []
    return next((settings[name] for name in names if name in settings), None)


@contextmanager
def places_named(settings: Mapping[str, Setting]) -> Iterator[None]:
    """Adds to a UserError of the block, which knows a key only, in which file and line the key was given."""
    try:
        yield
    except UserError as error:
        if not isinstance(error, UserErrors):
            error.args = (_placed(str(error), settings),)
        raise


def _placed(text: str, settings: Mapping[str, Setting]) -> str:
    if (setting := _setting_of(text, settings, anywhere=True)) is not None:
        return f"{text} ({setting.source})"
    for key in sorted(PATH_KEYS & set(settings)):
        value = settings[key].value
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and len(path) > 1 and re.match(re.escape(path) + r"[:. ]", text):
                return f"{key}: {text} ({settings[key].source})"
    return text


def find_setting(key: str, settings: Mapping[str, Setting]) -> Setting | None:
    """The setting of a dotted key, else of one of its entries, else of the table that it belongs to."""
    name = key
    while name:
        if name in settings:
            return settings[name]
        inner = next((item for other, item in settings.items() if other.startswith(f"{name}.")), None)
        if inner is not None and name == key:
            return inner
        name = name.rpartition(".")[0]
    return None


def _split_key(text: str, loc: tuple[int | str, ...]) -> tuple[str, str]:
    """(dotted key, rest) of a validator's message `key: rest`; `loc` is the table it was raised in."""
    key, colon, rest = text.partition(": ")
    if not colon or " " in key:
        return _dotted(loc), text
    table = _dotted(loc)
    if table.endswith(f".{key}"):  # the validator of this very field
        return table, rest
    if table and key != table and not key.startswith(f"{table}."):
        key = f"{table}.{key}"
    return key, rest


def _dotted(loc: tuple[int | str, ...]) -> str:
    names: list[str] = []
    for part in loc:
        if isinstance(part, int):
            break
        names.append(part)
    return ".".join(names)


def _entry(loc: tuple[int | str, ...]) -> str:
    """Which key of which entry, for a mistake in a list of tables (growth); nothing elsewhere."""
    number = next((part for part in loc if isinstance(part, int)), None)
    if number is None or not isinstance(loc[-1], str):
        return ""
    return f"entry {number + 1}: {loc[-1]}: "


def _describe(detail: dict[str, Any]) -> str:
    kind, context, value = str(detail["type"]), detail.get("ctx", {}), _yaml_form(detail["input"])
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"{value} is not supported; choose one of {choices}"
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        limit = context[name]
        return f"must be {words} {limit if isinstance(limit, int) else f'{limit:g}'}, got {value}"
    expected = _EXPECTED.get(kind.partition("_")[0])
    if kind == "extra_forbidden":
        return "unknown key; `python train.py --help` lists all keys"
    if kind == "missing":
        return "the list is too short"
    return f"expected {expected}, got {value}" if expected else f"{detail['msg']}, got {value}"


def _yaml_form(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{shortened(value)}'" if isinstance(value, str) else shortened(value)
