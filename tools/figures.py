"""What tools that draw figures have in common."""

from __future__ import annotations

from typing import Any

from megatron.errors import UserError


def pyplot_for(flag: str) -> Any:
    """matplotlib.pyplot, drawing to files. Raises UserError, which begins with `flag`, without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError(f"{flag}: the figure needs matplotlib; pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
