"""Pillow is installed where there are images, and says so where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron.errors import UserError


@contextmanager
def pillow_needed() -> Iterator[None]:
    """Around imports of what reads images: a UserError with the line that installs Pillow, where it is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        line = "pip install -r requirements/requirements-vision.txt"
        raise UserError(f"images need the Pillow package, which is not installed; {line}") from None
