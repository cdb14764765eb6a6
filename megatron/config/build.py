"""Settings become the frozen sections of a RunConfig; all their mistakes are found at once.

A section with a wrong value is built again without it, so that what else is wrong is found too; a mistake that only
follows from another one is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from pydantic import ValidationError

from megatron.config.checks import find_parallel_mistakes
from megatron.config.findings import Findings
from megatron.config.mistakes import mistakes
from megatron.config.places import locate
from megatron.config.schema import SECTIONS, RunConfig
from megatron.config.sections.base import Section
from megatron.config.sections.model import ModelConfig, ModelSection
from megatron.config.yaml_file import Setting
from megatron.errors import ConfigError

Check = Callable[[RunConfig], Iterable[ConfigError]]
"""Gives what is wrong with a whole configuration."""


def keys_of(model: type[ModelSection]) -> dict[str, str]:
    """The section of each top-level key of a run with such a model."""
    return {key: name for name in SECTIONS for key in section_class(name, model).model_fields}


def section_class(name: str, model: type[ModelSection] = ModelConfig) -> type[Section]:
    """The class of a section; of the model and its samples it is the one that belongs to what the run learns."""
    if name in ("model", "images"):
        return model if name == "model" else model.samples
    return RunConfig.model_fields[name].annotation  # type: ignore[return-value]


SECTION_OF = keys_of(ModelConfig)
"""The section of each top-level key of a language model's run."""

_PLACEHOLDERS = {
    "num_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "seq_length": 64, "train_iters": 1,
    "train_micro_batch_size_per_gpu": 1, "train_batch_size": 1, "data_path": "data", "train_data_paths": ["data"],
}  # fmt: skip
"""Values of needed keys that are missing or wrong, while other keys are looked at."""


class Builder:
    """Builds a RunConfig from settings.

    Args:
        settings: by dotted key, only known ones.
        files: where keys can be added, for messages.
        findings: takes the mistakes.
        model: the class of the model section.
    """

    def __init__(
        self, settings: Mapping[str, Setting], files: str, findings: Findings, model: type[ModelSection] = ModelConfig
    ) -> None:
        self._settings, self._files, self._findings, self._model = settings, files, findings, model
        self._section_of = keys_of(model)
        self._placeholders = {**_PLACEHOLDERS, **model.placeholders}
        self._missing: list[str] = []

    def build(self, checks: Iterable[Check] = ()) -> RunConfig:
        """The configuration; one with other values in place of those that are wrong, when there are findings."""
        values = self._by_section()
        for key in self._findings.bad & set(self._placeholders) & set(self._section_of):
            values[self._section_of[key]].setdefault(key, self._placeholders[key])
        sections = {name: self._section(name, values[name]) for name in SECTIONS}
        config = RunConfig(**sections)
        if self._findings.unread:
            return config
        if self._missing:
            advice = f"add to a YAML file, or give --set {self._missing[0]}=VALUE"
            self._findings.add(ConfigError("", f"missing {', '.join(self._missing)}: {advice}", where=self._files))
        of_axes = find_parallel_mistakes(config.model, config.parallel)
        for mistake in chain(of_axes, *(check(config) for check in checks)):
            if not self._findings.covers(mistake):
                self._findings.add(locate(mistake, self._settings))
        return config

    def _by_section(self) -> dict[str, dict[str, Any]]:
        values: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for key, setting in self._settings.items():
            *tables, name = key.split(".")
            target = values[self._section_of[(tables or [name])[0]]]
            for table in tables:
                target = target.setdefault(table, {})
                if not isinstance(target, dict):
                    break  # a key beside its own table: zero_optimization.x and zero_optimization.x.y
            else:
                target[name] = setting.value
        return values

    def _section(self, name: str, values: dict[str, Any]) -> Any:
        """A section of `values`, less those that are wrong."""
        model = section_class(name, self._model)
        required = [key for key, field in model.model_fields.items() if field.is_required()]
        missing = [key for key in required if key not in values]
        self._missing += missing
        self._findings.bad.update(missing)
        values |= {key: self._placeholders[key] for key in missing}
        while True:
            try:
                return model(**values)
            except ValidationError as error:
                found = mistakes(error)
            for mistake in [item for item in found if not self._findings.covers(item)]:
                self._findings.add(locate(mistake, self._settings, self._files))
            self._findings.bad.update(mistake.key for mistake in found)
            changed = [_replace(values, mistake.key, self._placeholders) for mistake in found]
            if not any(changed):  # what is wrong is a default beside the other values
                self._findings.bad.update(values)
                return model(**{key: self._placeholders[key] for key in required})


def _replace(values: dict[str, Any], key: str, placeholders: Mapping[str, Any]) -> bool:
    """Take a dotted key out of nested values, or its table where it is not there; false when there is neither.

    A key that has to be there, and a table that has to, becomes its placeholder.
    """
    if key in placeholders and values.get(key) is not placeholders[key]:
        values[key] = placeholders[key]
        return True
    *tables, name = key.split(".")
    target: Any = values
    for table in tables:
        if not isinstance(target, dict) or not isinstance(target.get(table), dict):
            break
        target = target[table]
    if isinstance(target, dict) and name in target:
        del target[name]
        return True
    table = key.partition(".")[0]
    if table in placeholders and values.get(table) is not placeholders[table]:
        values[table] = placeholders[table]
        return True
    return values.pop(table, None) is not None
