"""Figure 5: what tokens cost each other, and what they cost with the parameters, over the length of a text.

Training FLOPs of a text of T tokens (Table 3), forward and backward: 6 N T with the N parameters of the layers, and
12 L d T^2 among the tokens (the paper's 2 N T and 4 L d T^2 are the forward pass; a causal mask halves the latter and
is left out there as here). A Transformer grows by its width d, with N = 12 L d^2; a TokenFormer's d stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.files import find_output
from megatron.text import align
from tools.figures import pyplot_for

LENGTHS = tuple(2**power for power in range(10, 18))


@dataclass(frozen=True)
class Model:
    """A model of the figure."""

    name: str
    layers: int
    width: int
    parameters: int
    """Those of the layers."""

    def with_parameters(self, length: int) -> float:
        """Training FLOPs of a text between its tokens and the parameters."""
        return 6.0 * self.parameters * length

    def among_tokens(self, length: int) -> float:
        """Training FLOPs of a text among its tokens."""
        return 12.0 * self.layers * self.width * length**2


def _tokenformer(name: str, attention: int, ffn: int) -> Model:
    return Model(f"TokenFormer {name}", 12, 768, 12 * 2 * 768 * (4 * attention + ffn))


def _transformer(name: str, layers: int, width: int) -> Model:
    return Model(f"Transformer {name}", layers, width, 12 * layers * width**2)


MODELS = (
    _tokenformer("124M", 576, 2304), _tokenformer("354M", 2140, 8560), _tokenformer("757M", 4850, 19400),
    _tokenformer("1.4B", 8620, 34480),
    _transformer("124M", 12, 768), _transformer("354M", 24, 1024), _transformer("757M", 24, 1536),
    _transformer("1.4B", 24, 2048),
)  # fmt: skip
"""The sizes of the chain, and Transformers with as many parameters."""


def as_text() -> str:
    """Training PFLOPs of one text, and the part of them among tokens."""
    rows = [("training PFLOP of a text (part among tokens)", *(f"{length:,}" for length in LENGTHS))]
    for model in MODELS:
        cells = []
        for length in LENGTHS:
            among, total = model.among_tokens(length), model.among_tokens(length) + model.with_parameters(length)
            cells.append(f"{total / 1e15:.3g} ({among / total:.0%})")
        rows.append((model.name, *cells))
    head, *body = align(rows, [0])
    return "\n".join([head, "-" * len(head), *body])


def rows() -> list[dict[str, Any]]:
    """Each model at each length: training FLOPs of a text among its tokens and with the parameters."""
    return [
        {"model": model.name, "tokens": length, "among_tokens": model.among_tokens(length),
         "with_parameters": model.with_parameters(length)}
        for model in MODELS for length in LENGTHS
    ]  # fmt: skip


def draw(path: str | Path) -> None:
    """Write the figure as PNG. Raises UserError where it cannot be written, and without matplotlib."""
    find_output(path, "--png")
    pyplot = pyplot_for("--png")
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for model in MODELS:
        kind, size = model.name.split()
        style = {"color": f"C{[m.name.split()[1] for m in MODELS].index(size)}", "label": model.name}
        style["linestyle"] = "-" if kind == "TokenFormer" else "--"
        panels[0].loglog(LENGTHS, [model.among_tokens(length) for length in LENGTHS], **style)
        total = [model.among_tokens(length) + model.with_parameters(length) for length in LENGTHS]
        panels[1].loglog(LENGTHS, total, **style)
    for axes, title in zip(panels, ("among tokens", "in all"), strict=True):
        axes.set(title=title, xlabel="tokens of a text", ylabel="training FLOPs")
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
