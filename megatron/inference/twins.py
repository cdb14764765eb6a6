"""Copies of a model that share its tensors and have other layers in the place of some."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn


def twin(module: Any, replaced: Callable[[Any], Any]) -> Any:
    """A copy of a module with the same tensors, whose children are what `replaced` makes of the module's own."""
    made = copy.copy(module)
    children = module._modules.items()
    made.__dict__["_modules"] = {name: None if child is None else replaced(child) for name, child in children}
    return made


def is_plain(layer: Any, kind: type[nn.Module]) -> bool:
    """Is it of this very class, and does nothing happen around its forward?"""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return type(layer) is kind and "forward" not in vars(layer) and not any(getattr(layer, name) for name in hooks)
