"""Checks that tokenizers share: their files and their optional packages."""

from __future__ import annotations

import importlib
import os
from typing import Any

from megatron.errors import UserError


def existing(key: str, value: str | None, name: str, content: str) -> str:
    """`value` if it is a file; else a UserError naming the config key, the tokenizer and the content it needs."""
    if not value:
        raise UserError(f"{key}: missing; {name} needs the path of {content}")
    if not os.path.isfile(value):
        raise UserError(f"{key}: no such file: {value}; give the path of {content} for {name}")
    return value


def optional_package(package: str, name: str) -> Any:
    """The imported package, or a UserError with the line that installs it for the tokenizer `name`."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{name}: the {package} package is not installed; pip install -r requirements/requirements-tokenizers.txt"
        ) from error
