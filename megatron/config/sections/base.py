"""What all sections share: frozen, with no unknown keys and no value converted in silence; and the largest sizes."""

from __future__ import annotations

import re
import types
import typing
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron.errors import ConfigError

MAX_SIZE = 2**24
"""Largest width, length or number of tokens that a key takes: a mistyped size ends in a line, not in all memory."""
MAX_FACTOR = 1e6
"""Largest factor, rate or norm: far above what is of use, far below what fp32 holds."""

ListedNumber = Annotated[float, Field(strict=False)]
"""A number in a list, which may stand in quotes there."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no value converted in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, values: Any) -> Any:
        """Whole numbers written 5e8 and numbers in quotes, as files have them, become what the fields take."""
        if not isinstance(values, dict):
            return values
        for key in cls.model_fields.keys() & values.keys():
            if isinstance(values[key], int) and abs(values[key]) >= 2**63:
                raise ConfigError(key, f"expected a number of at most 64 bits, got {hex(values[key])[:20]}...")
        types = {key: _plain_types(field.annotation) for key, field in cls.model_fields.items() if key in values}
        return {key: _number(value, types.get(key, set())) for key, value in values.items()}

    def replaced(self, **values: Any) -> Self:
        """The same with these values, checked like any others; a dotted key is one of a section or table in this one.

        `config.replaced(model=grown, **{"checkpoint.load": folder})` changes the model and one key of another section.
        """
        own, inner = dict[str, Any](), dict[str, dict[str, Any]]()
        for key, value in values.items():
            table, dot, name = key.partition(".")
            if dot:
                inner.setdefault(table, {})[name] = value
            else:
                own[key] = value
        own |= {table: getattr(self, table).replaced(**entries) for table, entries in inner.items()}
        # Defaults are left out, so that they stay what they are: checking would make 10000.0 of 10000 in a saved file.
        return type(self)(**{key: value for key, value in self if key in self.model_fields_set} | own)


def _number(value: Any, accepted: set[Any]) -> Any:
    if str in accepted:
        return value
    if isinstance(value, str) and float in accepted and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, float) and int in accepted and value.is_integer() and abs(value) < 2**63:
        return int(value)
    return value


def _plain_types(annotation: Any) -> set[Any]:
    """The scalar types inside an annotation: `int | None` -> {int}; a Literal counts as its values' types."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_plain_types(item) for item in typing.get_args(annotation)))
    if annotation in (int, float, bool, str):
        return {annotation}
    return set() if annotation is type(None) else {annotation}
