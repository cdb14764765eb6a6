"""A picture of which classes are taken for which."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence

import numpy as np

from megatron.errors import ConfigError, UserError
from megatron.evaluation.images import Integers
from megatron.text import shortened

_MOST_CLASSES, _MOST_NAMED, _MOST_NUMBERED = 2000, 60, 20
"""Classes that a picture has, those it has room to name, and to write numbers of images for."""
_LONGEST_NAME = 24


def check_drawable(num_classes: int) -> None:
    """Raise a UserError where no picture of so many classes can be drawn here."""
    if num_classes > _MOST_CLASSES:
        reason = f"a picture of {num_classes} classes would be too large, at most {_MOST_CLASSES} are drawn"
        raise ConfigError("confusion", reason, "set false; per_class tells what each class is taken for")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("confusion: the matplotlib package is not installed; pip install matplotlib") from error


def draw_confusion(counts: Integers, names: Sequence[str], title: str) -> bytes:
    """A PNG of counts [classes, classes]: a row for each true class, its images divided over what they are taken for.

    The colour is the share of the row; its scale is the square root, so that rare mistakes are seen too.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import PowerNorm

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 3 + 0.28 * min(len(names), _MOST_NAMED)
    figure, axes = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the class's images", shrink=0.8)
    axes.set(xlabel="taken for", ylabel="class")
    axes.set_title(title, parse_math=False)
    if len(names) <= _MOST_NAMED:
        labels = [shortened(name, _LONGEST_NAME) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(names)), labels, fontsize=8, parse_math=False)
    if len(names) <= _MOST_NUMBERED:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.4 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font lacks become boxes
        figure.savefig(content, dpi=100, format="png")
    pyplot.close(figure)
    return content.getvalue()
