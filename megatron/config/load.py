"""From YAML files and overrides to one validated, frozen RunConfig, with every mistake as one line.

Merging: the files in the order given, the includes of a file before its own keys, overrides last; the later value
wins. Tables (optimizer, optimizer.params, fp16, bf16, zero_optimization) are merged key by key, lists and plain
values are replaced, null takes an earlier value back. Paths inside a file stay as they are: they are relative to
the working directory, not to the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron.config import schema
from megatron.config.messages import describe_validation_error
from megatron.config.neox_keys import ALIASES, RULES, ZERO_KEYS, check_parallel
from megatron.config.schema import RunConfig
from megatron.config.yaml_file import (
    TABLES,
    Setting,
    find_file,
    flatten,
    missing_file,
    normalise,
    parse_scalar,
    read_with_includes,
)
from megatron.errors import UserError
from megatron.log import get_logger

Paths = str | Path | Sequence[str | Path]
Overrides = Mapping[str, Any] | Sequence["str | Setting"]

SECTION_OF: dict[str, str] = {
    key: name
    for name in schema.SECTIONS
    for key in RunConfig.model_fields[name].annotation.model_fields  # type: ignore[union-attr]
}
"""The section of each top-level key."""

_TABLE_MODELS: dict[str, type[schema.Section]] = {
    "optimizer": schema.OptimizerSpec,
    "optimizer.params": schema.OptimizerParams,
    "fp16": schema.Fp16,
    "bf16": schema.Bf16,
}


@dataclass(frozen=True)
class Resolved:
    """A config together with the history of its values."""

    config: RunConfig
    settings: dict[str, Setting]
    """The keys that were set and are used, by dotted name."""
    ignored: list[tuple[Setting, str]] = field(default_factory=list)
    """Keys that were set but have no effect, with the reason."""
    derived: dict[str, str] = field(default_factory=dict)
    """Keys changed while loading, with the reason."""

    @property
    def warnings(self) -> list[str]:
        """One line for each ignored key set to an effective value, and for each changed key."""
        lines = [
            f"{setting.source}: {setting.spelling} is ignored: {reason}"
            for setting, reason in self.ignored
            if not RULES[setting.key].is_harmless(setting.value)
        ]
        return lines + [f"{key}: {reason}" for key, reason in self.derived.items()]


def load_config(paths: Paths, overrides: Overrides | None = None, config_dir: str | Path | None = None) -> RunConfig:
    """The validated config of YAML files, later ones winning; see `resolve_config` for the arguments.

    Logs one warning line for each key that is ignored. Raises UserError with file, line, key and remedy.
    """
    resolved = resolve_config(paths, overrides, config_dir)
    for line in resolved.warnings:
        get_logger().warning(line)
    return resolved.config


def resolve_config(paths: Paths, overrides: Overrides | None = None, config_dir: str | Path | None = None) -> Resolved:
    """Like `load_config`, silent, with the source of every value.

    Args:
        paths: YAML files, `.yml` may be left off.
        overrides: {key: value}, or lines `key=value` whose value is YAML; keys may be dotted (optimizer.params.lr).
        config_dir: folder the files are looked up in first.
    """
    files = [paths] if isinstance(paths, (str, Path)) else list(paths)
    settings: dict[str, Setting] = {}
    for setting in (*_read_files(files, config_dir), *_read_overrides(overrides or {})):
        _merge(settings, setting)
    ignored = _apply_rules(settings)
    _refuse_unknown(settings)
    config = _build(settings, " ".join(str(name) for name in files) or "the command line")
    config, derived = _derive(config)
    return Resolved(config, settings, ignored, derived)


def _read_files(files: Iterable[str | Path], config_dir: str | Path | None) -> Iterable[Setting]:
    folders = [Path(config_dir), Path(".")] if config_dir is not None else [Path(".")]
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--conf_dir: '{config_dir}' is not a folder; give the folder of the YAML files")
    seen: set[Path] = set()
    for name in files:
        path = find_file(name, folders)
        if path is None:
            raise missing_file(name, folders)
        yield from read_with_includes(path, seen)


def _read_overrides(overrides: Overrides) -> Iterable[Setting]:
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            yield from flatten(key, value, "override")
        return
    for item in overrides:
        if isinstance(item, Setting):
            yield item
            continue
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {item}: expected KEY=VALUE, for example --set train_iters=1000")
        try:
            value = parse_scalar(text)
        except UserError as error:
            raise UserError(f"--set {item}: {error}") from None
        yield from flatten(key.strip(), value, "--set")


def _merge(settings: dict[str, Setting], setting: Setting) -> None:
    key = setting.key
    if setting.value is None:
        for name in [name for name in settings if name == key or name.startswith(f"{key}.")]:
            del settings[name]
        _refuse_unknown({key: setting})
    elif key in TABLES:
        raise UserError(
            f"{setting.source}: {setting.spelling}: expected a table such as {{enabled: true}} or "
            f"{{stage: 1}}, got '{setting.value}'"
        )
    else:
        settings[key] = setting


def _apply_rules(settings: dict[str, Setting]) -> list[tuple[Setting, str]]:
    """Take the keys of the rules out of `settings`; an error for a refused one, the others are returned."""
    ignored = []
    for key in [key for key in settings if key in RULES]:
        setting, rule = settings.pop(key), RULES[key]
        if rule.refused and not rule.is_harmless(setting.value):
            value = str(setting.value).lower() if isinstance(setting.value, bool) else setting.value
            raise UserError(f"{setting.source}: {setting.spelling}: {value} is refused: {rule.reason}")
        ignored.append((setting, "asks for nothing" if rule.refused else rule.reason))
    return ignored


def known_keys(table: str = "") -> list[str]:
    """Every accepted key of the top level, or of a table (dotted), with aliases and GPT-NeoX keys."""
    others = [key for key in (*ALIASES, *RULES)]
    if table == "zero_optimization":
        return [f"{table}.{key}" for key in ZERO_KEYS]
    if table:
        own = [f"{table}.{key}" for key in _TABLE_MODELS[table].model_fields]
        return own + [key for key in others if key.startswith(f"{table}.")]
    return [*SECTION_OF, *(key for key in others if "." not in key)]


def _refuse_unknown(settings: Mapping[str, Setting]) -> None:
    for key, setting in settings.items():
        table = key.rpartition(".")[0]
        if table.startswith("zero_optimization."):
            continue
        known = known_keys(table if table in TABLES else "")
        if key in known:
            continue
        near = difflib.get_close_matches(key, known, 1, 0.6)
        advice = f"did you mean {near[0]}?" if near else "`python train.py --help` lists all keys"
        raise UserError(f"{setting.source}: unknown key '{setting.spelling}'; {advice}")


def _build(settings: dict[str, Setting], files: str) -> RunConfig:
    values: dict[str, dict[str, Any]] = {name: {} for name in schema.SECTIONS}
    for key, setting in settings.items():
        *tables, name = key.split(".")
        target = values[SECTION_OF[(tables or [name])[0]]]
        for table in tables:
            target = target.setdefault(table, {})
        target[name] = setting.value
    sections: dict[str, Any] = {}
    for name in schema.SECTIONS:
        section = RunConfig.model_fields[name].annotation
        try:
            sections[name] = section(**values[name])  # type: ignore[misc]
        except ValidationError as error:
            raise UserError(describe_validation_error(error, settings, files)) from None
    config = RunConfig(**sections)
    try:
        check_parallel(config)
    except ValueError as error:
        source = settings[normalise(str(error).partition(":")[0])].source
        raise UserError(f"{source}: {error}") from None
    return config


def _derive(config: RunConfig) -> tuple[RunConfig, dict[str, str]]:
    """The config with dependent values filled in, and the reasons."""
    if config.precision.dtype == "fp32" or config.parallel.zero_optimization.stage != 0:
        return config, {}
    zero = config.parallel.zero_optimization.model_copy(update={"stage": 1})
    parallel = config.parallel.model_copy(update={"zero_optimization": zero})
    reason = (
        f"stage 1 instead of 0: DeepSpeed's {config.precision.dtype} optimizer of stage 0 follows a different "
        "trajectory; set zero_optimization.stage to 1 to silence this line"
    )
    return config.model_copy(update={"parallel": parallel}), {"zero_optimization.stage": reason}
