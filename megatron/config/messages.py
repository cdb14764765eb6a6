"""Turns pydantic's validation errors into one line: file, line, key, value, what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron.config.yaml_file import Setting

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
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def describe_validation_error(error: ValidationError, settings: Mapping[str, Setting], files: str) -> str:
    """One line for the first mistake (or all missing keys); `files` names where keys can be added."""
    details = error.errors(include_url=False)
    missing = [str(item["loc"][0]) for item in details if item["type"] == "missing" and len(item["loc"]) == 1]
    if missing:
        names = ", ".join(missing)
        return f"{files}: missing {names}: add to a YAML file, or give --set {missing[0]}=VALUE"
    detail = details[0]
    if detail["type"] == "value_error":
        text = str(detail["ctx"]["error"])
        return _with_source(*_split_key(text, detail["loc"]), settings, files)
    return _with_source(_dotted(detail["loc"]), _entry(detail["loc"]) + _describe(dict(detail)), settings, files)


def _split_key(text: str, loc: tuple[int | str, ...]) -> tuple[str, str]:
    """(dotted key, rest) of a validator's message `key: rest`; `loc` is the table it was raised in."""
    key, colon, rest = text.partition(": ")
    if not colon or " " in key:
        return _dotted(loc), text
    table = _dotted(loc)
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


def _with_source(key: str, text: str, settings: Mapping[str, Setting], files: str) -> str:
    setting = settings.get(key) or next((item for name, item in settings.items() if name.startswith(f"{key}.")), None)
    if setting is None:
        return f"{files}: {key}: {text}"
    spelling = setting.spelling if setting.key == key else key
    return f"{setting.source}: {spelling}: {text}"


def _describe(detail: dict[str, Any]) -> str:
    kind, context, value = str(detail["type"]), detail.get("ctx", {}), _yaml_form(detail["input"])
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"{value} is not supported; choose one of {choices}"
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        return f"must be {words} {context[name]:g}, got {value}"
    expected = _EXPECTED.get(kind.partition("_")[0])
    if kind == "extra_forbidden":
        return "unknown key; `python train.py --help` lists all keys"
    if kind == "missing":
        return "the list is too short"
    return f"expected {expected}, got {value}" if expected else f"{detail['msg']}, got {value}"


def _yaml_form(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{value}'" if isinstance(value, str) else str(value)
