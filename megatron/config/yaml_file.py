"""Reads one YAML file and what it includes into flat settings that remember their file and line.

JSON-style YAML with # comments is YAML. Two departures from yaml.safe_load: 6e-4 is a number (PyYAML takes it
for text), and a key given twice in one file is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.config.neox_keys import ALIASES, VALUE_SPELLINGS
from megatron.errors import UserError

TABLES = ("optimizer", "optimizer.params", "fp16", "bf16", "zero_optimization")
"""Keys whose value is a table; tables of several files are merged key by key, everything else is replaced."""

_SUFFIXES = ("", ".yml", ".yaml")
_CONFIG_SUFFIXES = (".yml", ".yaml")


@dataclass(frozen=True)
class Setting:
    """One value and where it was given."""

    key: str
    """Dotted name, aliases resolved: optimizer.params.lr."""
    value: Any
    source: str
    """`file:line`, `--set` or the name of a flag."""
    spelling: str
    """The key as the user wrote it."""


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that reads 6e-4, 1e3 and 1.e5 as numbers."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$|^[-+]?\.[0-9_]+[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_scalar(text: str) -> Any:
    """The YAML value of `text`, as written after `--set KEY=`; raises UserError when it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"'{text}' is not a YAML value: {_problem(error)}") from None


def normalise(key: str) -> str:
    """The dotted key with underscores and without aliases: `vocab-file` -> vocab_file, lr -> optimizer.params.lr."""
    key = key.replace("-", "_")
    return ALIASES.get(key, key)


def flatten(key: str, value: Any, source: str) -> Iterator[Setting]:
    """The settings of `key: value`, a plain value or a table; null stays as one setting."""
    name = normalise(key)
    if _is_table(name) and isinstance(value, dict):
        for inner, item in value.items():
            yield from flatten(f"{name}.{inner}", item, source)
    else:
        spellings = VALUE_SPELLINGS.get(name, {})
        value = spellings.get(value, value) if isinstance(value, str) else value
        yield Setting(name, value, source, key)


def _is_table(name: str) -> bool:
    return name in TABLES or name.startswith("zero_optimization.")


def find_file(name: str | Path, folders: Sequence[Path]) -> Path | None:
    """The first existing file called `name`, with or without .yml, in one of the folders."""
    for folder in folders:
        for suffix in _SUFFIXES:
            path = folder / f"{name}{suffix}"
            if path.is_file():
                return path
    return None


def missing_file(name: str | Path, folders: Sequence[Path], where: str = "") -> UserError:
    """The error for a file that find_file does not find, with the nearest existing name."""
    text = f"{where}config file '{name}' not found"
    if len(folders) > 1 or str(folders[0]) != ".":
        text += f" in {', '.join(str(folder) for folder in folders)}"
    near: list[str] = []
    for folder in folders:
        target = folder / name
        if target.parent.is_dir():
            found = [path.name for path in target.parent.iterdir() if path.suffix in _CONFIG_SUFFIXES]
            near += [str(target.parent / match) for match in difflib.get_close_matches(target.name, found, 1, 0.5)]
    return UserError(f"{text}; did you mean {near[0]}?" if near else f"{text}; give the path of a YAML file")


def read_with_includes(path: Path, seen: set[Path], stack: tuple[Path, ...] = ()) -> Iterator[Setting]:
    """The settings of `path` in the order of merging: those of its includes first, then its own.

    `seen` collects the files read so far; an included file that was read before is not read again, so that an
    overlay and a config may share a base. Raises UserError for cycles, missing files and bad YAML.
    """
    real = path.resolve()
    if real in stack:
        chain = " -> ".join(item.name for item in (*stack[stack.index(real) :], real))
        raise UserError(f"{path}: include cycle {chain}; remove one of these includes")
    seen.add(real)
    includes, settings = _read_file(path)
    for name, line in includes:
        found = find_file(name, [path.parent])
        if found is None:
            raise missing_file(name, [path.parent], f"{path}:{line}: include: ")
        if found.resolve() not in seen or found.resolve() in (*stack, real):
            yield from read_with_includes(found, seen, (*stack, real))
    yield from settings


def _read_file(path: Path) -> tuple[list[tuple[str, int]], list[Setting]]:
    """(included names with their lines, own settings) of one file."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise UserError(f"{path}:{_line_of(error)}: not valid YAML: {_problem(error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if node is None:
        return [], []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:{node.start_mark.line + 1}: expected `key: value` lines")
    try:
        return _walk_root(loader, node, path)
    except yaml.YAMLError as error:
        raise UserError(f"{path}:{_line_of(error)}: not valid YAML: {_problem(error)}") from None


def _walk_root(loader: _Loader, node: yaml.MappingNode, path: Path) -> tuple[list[tuple[str, int]], list[Setting]]:
    includes: list[tuple[str, int]] = []
    settings: list[Setting] = []
    for key, value_node, line in _pairs(loader, node, path):
        if key == "include" and (names := _config_includes(loader, value_node, path)) is not None:
            includes += [(name, line) for name in names]
        else:
            settings += _settings_of(loader, key, value_node, path, line)
    _refuse_repeats(settings)
    return includes, settings


def _pairs(loader: _Loader, node: yaml.MappingNode, path: Path) -> Iterator[tuple[str, yaml.Node, int]]:
    """(key, value node, line) of a mapping; a key given twice is an error, `<<` merges are resolved."""
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value).replace("-", "_"), key_node.start_mark.line + 1
        if key in lines and key != "<<":
            raise UserError(f"{path}:{line}: '{key}' is given twice, on lines {lines[key]} and {line}; keep one")
        lines[key] = line
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        yield str(key_node.value), value_node, key_node.start_mark.line + 1


def _settings_of(loader: _Loader, key: str, node: yaml.Node, path: Path, line: int) -> Iterator[Setting]:
    """Like `flatten`, with the line of each key of a table."""
    name = normalise(key)
    if _is_table(name) and isinstance(node, yaml.MappingNode):
        for inner, inner_node, inner_line in _pairs(loader, node, path):
            yield from _settings_of(loader, f"{name}.{inner}", inner_node, path, inner_line)
    else:
        yield from flatten(key, loader.construct_object(node, deep=True), f"{path}:{line}")


def _refuse_repeats(settings: list[Setting]) -> None:
    """Error when one file gives a key under two of its names, such as lr and optimizer.params.lr."""
    first: dict[str, Setting] = {}
    for setting in settings:
        other = first.setdefault(setting.key, setting)
        if other is not setting and other.spelling != setting.spelling:
            raise UserError(
                f"{setting.source}: '{setting.spelling}' and '{other.spelling}' ({other.source}) are the same key; "
                "keep one"
            )


def _config_includes(loader: _Loader, node: yaml.Node, path: Path) -> list[str] | None:
    """The files that `include:` names, or None when it is the launcher's include (nodes to use)."""
    value = loader.construct_object(node, deep=True)
    if isinstance(value, list):
        return [str(item) for item in value]
    if not isinstance(value, str):
        return None
    is_file = value.endswith(_CONFIG_SUFFIXES) or find_file(value, [path.parent]) is not None
    return [value] if is_file and value else None


def _line_of(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark is not None else 1


def _problem(error: yaml.YAMLError) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]
