"""What pydantic finds wrong with the values of a section, as ConfigErrors."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from megatron.errors import ConfigError
from megatron.text import yaml_form

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


def config_error(error: ValidationError, where: str) -> ConfigError:
    """The first of the mistakes that pydantic has found in what `where` gave, or all keys that are missing there."""
    missing = [str(detail["loc"][0]) for detail in error.errors() if detail["type"] == "missing"]
    if missing:
        return ConfigError("", f"missing {', '.join(missing)}", where=where)
    first = mistakes(error)[0]
    first.where = where
    return first


def mistakes(error: ValidationError) -> list[ConfigError]:
    """All that pydantic has found wrong, in the order of the fields."""
    return [_mistake(dict(detail)) for detail in error.errors(include_url=False)]


def _mistake(detail: dict[str, Any]) -> ConfigError:
    """One mistake, whose key is that of the whole section, `optimizer.params.lr` or `growth`."""
    loc = detail["loc"]
    number = next((i for i, part in enumerate(loc) if isinstance(part, int)), len(loc))
    table = ".".join(loc[:number])
    raised = detail.get("ctx", {}).get("error")
    if isinstance(raised, ConfigError):
        key, found = raised.key, raised
    else:
        key = ".".join(str(part) for part in loc[number + 1 :] if not isinstance(part, int))
        found = ConfigError(key, str(raised)) if raised is not None else _described(key, detail)
    if number < len(loc) and (key or found is raised):  # a list of tables
        found.reason = ": ".join(part for part in (f"entry {loc[number] + 1}", key, found.reason) if part)
        key = ""
    found.key = found.spelling = ".".join(part for part in (table, key) if part)
    found.beside = frozenset(f"{table}.{other}" if table else other for other in found.beside)
    return found


def _described(key: str, detail: dict[str, Any]) -> ConfigError:
    kind, context, value = str(detail["type"]), detail.get("ctx", {}), detail["input"]
    if kind == "literal_error":
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return ConfigError(key, f"{yaml_form(value)} is not supported", f"choose one of {choices}")
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        limit = context[name]
        return ConfigError(key, f"must be {words} {limit if isinstance(limit, int) else f'{limit:g}'}", value=value)
    if kind == "extra_forbidden":
        return ConfigError(key, "unknown key", "`python train.py --help` lists all keys")
    if kind == "missing":
        return ConfigError(key, "the list is too short")
    expected = _EXPECTED.get(kind.partition("_")[0])
    return ConfigError(key, f"expected {expected}" if expected else str(detail["msg"]), value=value)
