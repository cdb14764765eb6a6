"""What all sections share: frozen, with no unknown keys and no value converted in silence; and the largest sizes."""

from __future__ import annotations

import re
import types
import typing
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from megatron.config.findings import WrongTypes
from megatron.text import shortened

MAX_SIZE = 2**24
"""Largest width, length or number of tokens that a key takes: a mistyped size ends in a line, not in all memory."""
MAX_FACTOR = 1e6
"""Largest factor, rate or norm: far above what is of use, far below what fp32 holds."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no silent bool-to-number conversion."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_silent_conversion(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        found = {key: _type_mistake(fields[key].annotation, value) for key, value in values.items() if key in fields}
        lines = [f"{key}: {mistake}" for key, mistake in found.items() if mistake]
        if lines:
            raise WrongTypes(lines)
        return values

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


def _type_mistake(annotation: Any, value: Any) -> str | None:
    """What pydantic would convert in silence: true to a number, a number to true, text to a number."""
    accepted = _plain_types(annotation)
    if isinstance(value, bool) and bool not in accepted and accepted & {int, float}:
        return f"expected a number, got {str(value).lower()}"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and accepted == {bool}:
        return f"expected true or false, got {shortened(value)}"
    if isinstance(value, str) and value and accepted and accepted <= {int, bool}:
        return f"expected {'a whole number' if int in accepted else 'true or false'}, got '{shortened(value)}'"
    if isinstance(value, str) and float in accepted and str not in accepted and not _NUMBER.fullmatch(value):
        return f"expected a number, got '{shortened(value)}'"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"expected a number of at most 64 bits, got {hex(value)[:20]}..."
    return None


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
