"""Reads one YAML file and what it includes into flat settings that remember their file and line.

JSON-style YAML with # comments is YAML. A key given twice in one file is a mistake, and so is a value with two
readings; megatron.config.yaml_loader says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron.config.findings import Findings
from megatron.config.neox_keys import ALIASES, VALUE_SPELLINGS
from megatron.config.paths import expand
from megatron.config.yaml_loader import MAX_BYTES, Loader, ambiguities, compose, line_of, problem_of
from megatron.errors import ConfigError, UserError
from megatron.files import read_text
from megatron.text import nearest, shortened

TABLES = (
    "optimizer", "optimizer.params", "fp16", "bf16", "zero_optimization", "spikes", "watchdog", "watchdog.limits",
    "text_tower", "image_tower",
)  # fmt: skip
"""Keys whose value is a table; tables of several files are merged key by key, everything else is replaced."""

_SWITCHES = ("watchdog",)  # tables that true and false may stand for
_SUFFIXES = ("", ".yml", ".yaml")
_CONFIG_SUFFIXES = (".yml", ".yaml")
_NODES = re.compile(r"[\w.-]+(:[\d,]+)?(@[\w.-]+(:[\d,]+)?)*")


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
    written: str | None = None
    """The value as the user wrote it, where that tells more: `no` is read as false."""

    def mistake(self, reason: str, advice: str = "") -> ConfigError:
        """A mistake in this value."""
        return ConfigError(self.key, reason, advice, where=self.source, spelling=shortened(self.spelling))


def parse_scalar(text: str) -> Any:
    """The YAML value of `text`, as written after `--set KEY=`; raises UserError when it is not YAML."""
    try:
        loader, node = compose(text)
        if node is None:
            return None
        for _, fault in ambiguities(node):
            raise UserError(fault)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"'{shortened(text)}' is not a YAML value: {problem_of(error)}") from None


def normalise(key: str) -> str:
    """The dotted key with underscores and without aliases: `vocab-file` -> vocab_file, lr -> optimizer.params.lr."""
    key = key.replace("-", "_")
    return ALIASES.get(key, key)


def flatten(key: str, value: Any, source: str) -> Iterator[Setting]:
    """The settings of `key: value`, a plain value or a table; null stays as one setting."""
    name = normalise(key)
    if name in _SWITCHES and isinstance(value, bool):
        yield Setting(f"{name}.enabled", value, source, key)
    elif _is_table(name) and isinstance(value, dict):
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
            if _is_file(path):
                return path
    return None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def missing_file(name: str | Path, folders: Sequence[Path], key: str = "", where: str = "") -> ConfigError:
    """The error for a file that find_file does not find, with the nearest existing name."""
    text = f"config file '{shortened(str(name))}' not found"
    if len(folders) > 1 or str(folders[0]) != ".":
        text += f" in {', '.join(str(folder) for folder in folders)}"
    near = [match for folder in folders for match in _near_files(name, folder)]
    advice = f"did you mean {near[0]}?" if near else "give the path of a YAML file"
    return ConfigError(key, text, advice, where=where)


def _near_files(name: str | Path, folder: Path, likeness: float = 0.5) -> list[str]:
    """YAML files of a folder that are called much like `name`, the nearest one at most."""
    target = folder / name
    try:
        found = {path.stem: path for path in target.parent.iterdir() if path.suffix in _CONFIG_SUFFIXES}
    except (OSError, ValueError):
        return []
    spelled = target.stem if target.suffix in _CONFIG_SUFFIXES else target.name
    return [str(found[match]) for match in nearest(spelled, found, likeness)]


def read_with_includes(
    path: Path, seen: set[Path], findings: Findings, stack: tuple[Path, ...] = ()
) -> Iterator[Setting]:
    """The settings of `path` in the order of merging: those of its includes first, then its own.

    `seen` collects the files read so far; an included file that was read before is not read again, so that an
    overlay and a config may share a base. Cycles, missing files and mistakes in the YAML go to `findings`.
    """
    real = path.resolve()
    if real in stack:
        chain = " -> ".join(item.name for item in (*stack[stack.index(real) :], real))
        findings.add(ConfigError("", f"include cycle {chain}", "remove one of these includes", where=str(path)))
        return
    seen.add(real)
    includes, settings = _read_file(path, findings)
    for name, line in includes:
        found = find_file(name, [path.parent])
        if found is None:
            findings.add_unread(missing_file(name, [path.parent], "include", f"{path}:{line}"))
        elif found.resolve() not in seen or found.resolve() in (*stack, real):
            yield from read_with_includes(found, seen, findings, (*stack, real))
    yield from settings


def _read_file(path: Path, findings: Findings) -> tuple[list[tuple[str, int]], list[Setting]]:
    """(included names with their lines, own settings) of one file; nothing where it cannot be read."""
    place = _Place(path, findings)
    try:
        loader, node = compose(read_text(path, advice="give a YAML file", limit=MAX_BYTES))
        if node is None:
            return [], []
        if isinstance(node, yaml.MappingNode):
            return _walk_root(loader, node, place)
        place.add_unread(node.start_mark.line + 1, "expected `key: value` lines")
    except yaml.YAMLError as error:
        place.add_unread(line_of(error), f"not valid YAML: {problem_of(error)}")
    except UserError as error:
        findings.add_unread(ConfigError("", str(error)))
    return [], []


@dataclass(frozen=True)
class _Place:
    """The file that is being read, and where its mistakes go."""

    path: Path
    findings: Findings

    def add(self, line: int, reason: str, key: str = "") -> None:
        self.findings.add(self._mistake(line, reason, key))

    def add_unread(self, line: int, reason: str, key: str = "") -> None:
        self.findings.add_unread(self._mistake(line, reason, key))

    def _mistake(self, line: int, reason: str, key: str) -> ConfigError:
        return ConfigError(normalise(key), reason, where=f"{self.path}:{line}", spelling=shortened(key))


def _walk_root(loader: Loader, node: yaml.MappingNode, place: _Place) -> tuple[list[tuple[str, int]], list[Setting]]:
    includes: list[tuple[str, int]] = []
    settings: list[Setting] = []
    for key, value_node, line in _pairs(loader, node, place):
        if key == "include" and (names := _config_includes(loader, value_node, place, line)) is not None:
            includes += [(name, line) for name in names]
        else:
            settings += _settings_of(loader, key, value_node, place, line)
    _find_repeats(settings, place.findings)
    return includes, settings


def _pairs(loader: Loader, node: yaml.MappingNode, place: _Place) -> Iterator[tuple[str, yaml.Node, int]]:
    """(key, value node, line) of a mapping; a key given twice is a mistake, `<<` merges are resolved."""
    lines: dict[str, int] = {}
    for key_node, _ in node.value:
        key, line = str(key_node.value).replace("-", "_"), key_node.start_mark.line + 1
        if key in lines and key != "<<":
            place.add(line, f"'{shortened(key)}' is given twice, on lines {lines[key]} and {line}; keep one")
        lines[key] = line
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        if isinstance(key_node, yaml.ScalarNode):
            yield key_node.value, value_node, key_node.start_mark.line + 1
        else:
            place.add(key_node.start_mark.line + 1, "a list or a table stands where a key should; write `key: value`")


def _settings_of(loader: Loader, key: str, node: yaml.Node, place: _Place, line: int) -> Iterator[Setting]:
    """Like `flatten`, with the line of each key of a table."""
    name = normalise(key)
    if _is_table(name) and isinstance(node, yaml.MappingNode):
        for inner, inner_node, inner_line in _pairs(loader, node, place):
            yield from _settings_of(loader, f"{name}.{inner}", inner_node, place, inner_line)
        return
    faults = list(ambiguities(node))
    for fault_line, fault in faults:
        place.add(fault_line, fault, key)
    if faults:
        place.findings.bad.add(name)
        return
    written = node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None
    for setting in flatten(key, loader.construct_object(node, deep=True), f"{place.path}:{line}"):
        yield replace(setting, written=written) if isinstance(setting.value, bool) else setting


def _find_repeats(settings: list[Setting], findings: Findings) -> None:
    """Note where one file gives a key under two of its names, such as lr and optimizer.params.lr."""
    first: dict[str, Setting] = {}
    for setting in settings:
        other = first.setdefault(setting.key, setting)
        if other.spelling.replace("-", "_") != setting.spelling.replace("-", "_"):
            text = f"'{setting.spelling}' and '{other.spelling}' ({other.source}) are the same key"
            findings.add(ConfigError("", text, "keep one", where=setting.source))


def _config_includes(loader: Loader, node: yaml.Node, place: _Place, line: int) -> list[str] | None:
    """The files that `include:` names, or None when it is the launcher's include (nodes to use)."""
    value = loader.construct_object(node, deep=True)
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        return None if not isinstance(value, list) else _refused(place, line, "expected names of YAML files", value)
    try:
        names = [expand(name) for name in names]
    except ValueError as error:
        return _refused(place, line, str(error))
    if isinstance(value, list) or _names_file(names[0], place.path.parent):
        return names
    near = _near_files(names[0], place.path.parent, 0.75)
    if near:
        advice = f"did you mean {near[0]}? (nodes of that name: give them with --set include={value})"
        return _refused(place, line, f"'{shortened(value)}' is no file in {place.path.parent}; {advice}")
    return None


def _names_file(name: str, folder: Path) -> bool:
    """Whether an include names a YAML file, found or not, rather than nodes such as `host-1:0,1@host-2`."""
    return name.endswith(_CONFIG_SUFFIXES) or not _NODES.fullmatch(name) or find_file(name, [folder]) is not None


def _refused(place: _Place, line: int, text: str, value: Any = None) -> list[str]:
    got = "" if value is None else f", got {shortened(value)}"
    place.add_unread(line, f"{text}{got}", "include")
    return []
