"""From YAML files and overrides to one validated, frozen RunConfig, or all mistakes in them, each as one line.

Merging: the files in the order given, the includes of a file before its own keys, overrides last; the later value
wins. Tables (optimizer, optimizer.params, fp16, bf16, zero_optimization, spikes, text_tower, image_tower) are merged
key by key, lists and plain values are replaced, null takes an earlier value back. Paths inside a file are relative
to the working directory, not to the file; `~` and environment variables in them are replaced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.config.build import Builder, Check, keys_of
from megatron.config.findings import Findings
from megatron.config.neox_keys import ALIASES, RULES
from megatron.config.neox_rules import apply_rules
from megatron.config.paths import MAY_BE_EMPTY, PATH_KEYS, expand
from megatron.config.schema import RunConfig
from megatron.config.sections.base import Section
from megatron.config.sections.clip import TextTower
from megatron.config.sections.image_text import ImageTower
from megatron.config.sections.model import MODEL_SECTIONS, ModelConfig, ModelSection, model_section
from megatron.config.sections.optimization import OptimizerParams, OptimizerSpec
from megatron.config.sections.precision import Bf16, Fp16
from megatron.config.sections.training import SpikesConfig
from megatron.config.sections.watchdog import WatchdogConfig, WatchdogLimits
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
from megatron.config.zero_keys import ZERO_KEYS
from megatron.errors import ConfigError, UserError
from megatron.log import get_logger
from megatron.text import nearest, shortened

Paths = str | Path | Sequence[str | Path]
Overrides = Mapping[str, Any] | Sequence["str | Setting"]

_MOST_SUGGESTIONS = 50  # each takes milliseconds

_TABLE_MODELS: dict[str, type[Section]] = {
    "optimizer": OptimizerSpec,
    "optimizer.params": OptimizerParams,
    "fp16": Fp16,
    "bf16": Bf16,
    "spikes": SpikesConfig,
    "watchdog": WatchdogConfig,
    "watchdog.limits": WatchdogLimits,
    "text_tower": TextTower,
    "image_tower": ImageTower,
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
            if not RULES[setting.key].refused and not RULES[setting.key].is_harmless(setting.value)
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


def resolve_config(
    paths: Paths,
    overrides: Overrides | None = None,
    config_dir: str | Path | None = None,
    checks: Sequence[Check] = (),
) -> Resolved:
    """Like `load_config`, silent, with the source of every value.

    Args:
        paths: YAML files, `.yml` may be left off.
        overrides: {key: value}, or lines `key=value` whose value is YAML; keys may be dotted (optimizer.params.lr).
        config_dir: folder the files are looked up in first.
        checks: what a command needs besides; each gives its mistakes.
    """
    files = [paths] if isinstance(paths, (str, Path)) else list(paths)
    findings, settings = Findings(), dict[str, Setting]()
    for setting in (*_read_files(files, config_dir, findings), *_read_overrides(overrides or {}, findings)):
        _merge(settings, setting, findings)
    model = _model_section(settings, findings)
    _find_unknown(settings, findings, [model])
    _expand_paths(settings, findings)
    ruled = [settings.pop(key) for key in list(settings) if key in RULES]
    where = " ".join(str(name) for name in files) or "the command line"
    config = Builder(settings, where, findings, model).build(checks)
    ignored = apply_rules(ruled, config.model, config.parallel, findings)
    findings.raise_any()
    config, derived = _derive(config)
    return Resolved(config, settings, ignored, derived)


def _read_files(files: Iterable[str | Path], config_dir: str | Path | None, findings: Findings) -> Iterable[Setting]:
    folders = [Path(config_dir), Path(".")] if config_dir is not None else [Path(".")]
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--conf_dir: '{config_dir}' is not a folder; give the folder of the YAML files")
    seen: set[Path] = set()
    for name in files:
        path = find_file(name, folders)
        if path is None:
            findings.add_unread(missing_file(name, folders))
        else:
            yield from read_with_includes(path, seen, findings)


def _read_overrides(overrides: Overrides, findings: Findings) -> Iterable[Setting]:
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
            text = "expected KEY=VALUE, for example --set train_iters=1000"
            findings.add(ConfigError("", text, where=f"--set {shortened(item)}"))
            continue
        try:
            value = parse_scalar(text)
        except UserError as error:
            findings.add(ConfigError("", str(error), where=f"--set {shortened(item)}"))
            findings.bad.add(normalise(key.strip()))
        else:
            yield from flatten(key.strip(), value, "--set")


def _merge(settings: dict[str, Setting], setting: Setting, findings: Findings) -> None:
    key = setting.key
    if setting.value is None:
        for name in [name for name in settings if name == key or name.startswith(f"{key}.")]:
            del settings[name]
        _find_unknown({key: setting}, findings, MODEL_SECTIONS.values())  # which task it is may be said later
    elif key in TABLES:
        got = shortened(setting.value)
        findings.add(setting.mistake(f"expected a table such as {{enabled: true}} or {{stage: 1}}, got '{got}'"))
    else:
        settings[key] = setting


def _expand_paths(settings: dict[str, Setting], findings: Findings) -> None:
    for key in PATH_KEYS & set(settings):
        setting = settings[key]
        try:
            settings[key] = replace(setting, value=expand(setting.value, key in MAY_BE_EMPTY))
        except ValueError as error:
            findings.add(setting.mistake(str(error)))
            findings.bad.add(key)
            del settings[key]


def _model_section(settings: dict[str, Setting], findings: Findings) -> type[ModelSection]:
    """The model section that the key `task` asks for; language is what a run learns that does not say."""
    setting = settings.pop("task", None)
    if setting is None:
        return ModelConfig
    try:
        return model_section(setting.value)
    except ValueError as error:
        findings.add(setting.mistake(str(error)))
        findings.raise_any()  # what other keys may say depends on it
        raise


def known_keys(table: str = "", models: Iterable[type[ModelSection]] = (ModelConfig,)) -> list[str]:
    """Every accepted key of the top level, or of a table (dotted), with aliases and GPT-NeoX keys.

    models: the model sections that a run may have.
    """
    others = [key for key in (*ALIASES, *RULES)]
    keys = dict.fromkeys(key for model in models for key in keys_of(model))
    if table and table.partition(".")[0] not in keys:  # of another model
        return []
    if table == "zero_optimization":
        return [f"{table}.{key}" for key in ZERO_KEYS]
    if table:
        own = [f"{table}.{key}" for key in _TABLE_MODELS[table].model_fields]
        return own + [key for key in others if key.startswith(f"{table}.")]
    return ["task", *keys, *(key for key in others if "." not in key)]


def _find_unknown(settings: dict[str, Setting], findings: Findings, models: Collection[type[ModelSection]]) -> None:
    """Take keys that runs with none of these model sections have out of `settings`, to the findings."""
    own = {key for model in models for key in keys_of(model)}
    for key in list(settings):
        setting, table = settings[key], key.rpartition(".")[0]
        if table.startswith("zero_optimization."):
            continue
        known = known_keys(table if table in TABLES else "", models)
        if key in known:
            continue
        del settings[key]
        near = nearest(key, known) if len(findings.errors) < _MOST_SUGGESTIONS else []
        top = key.partition(".")[0]
        owners = [task for task, section in MODEL_SECTIONS.items() if top in keys_of(section) and top not in own]
        advice = f"did you mean {near[0]}?" if near else "`python train.py --help` lists all keys"
        findings.add(setting.mistake("unknown key", f"it is of task {owners[0]}" if owners else advice))
        findings.bad.update(() if owners else near)


def _derive(config: RunConfig) -> tuple[RunConfig, dict[str, str]]:
    """The config with dependent values filled in, and the reasons; also what has not the effect that it seems to."""
    dtype, notes = config.precision.dtype, dict[str, str]()
    for name in ("fp16", "bf16"):
        table = getattr(config.precision, name)
        if getattr(table, name) and "enabled" not in table.model_fields_set and dtype != name:
            notes[f"{name}.{name}"] = f"true changes nothing by itself, training is in {dtype}; set {name}.enabled"
    if dtype == "fp32" or config.parallel.zero_optimization.stage != 0:
        return config, notes
    reason = (
        f"stage 1 instead of 0: DeepSpeed's {config.precision.dtype} optimizer of stage 0 follows a different "
        "trajectory; set zero_optimization.stage to 1 to silence this line"
    )
    config = config.replaced(**{"parallel.zero_optimization.stage": 1})
    return config, notes | {"zero_optimization.stage": reason}
