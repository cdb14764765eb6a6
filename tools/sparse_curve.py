"""Loss of a checkpoint against the share of its parameter tokens that each row uses: a table and a figure.

    python -m tools.sparse_curve configs/demo.yml --perplexity heldout.jsonl [--limit 2] [--output sparse_curve.png]

The checkpoint, tokenizer and batch size are those of the configuration, as for eval.py. Tokens of the largest weights
are kept in all Pattentions, or in those of one kind while the others stay whole; "threshold" keeps weights by their
size. "masked scores" has the same tokens as "all", with the row norm of the kept ones alone: what a mask does in the
official code. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron.config import RunConfig, load_config
from megatron.errors import UserError, run_command
from megatron.evaluation.batching import Batches
from megatron.evaluation.corpus import Document, corpus_documents
from megatron.evaluation.perplexity import corpus_perplexity
from megatron.files import find_output, write_output
from megatron.inference.prepare import load_for_inference
from megatron.inference.sparse import Select, heaviest, require_tokens, sparse, sparse_layers
from megatron.inference.twins import is_plain, twin
from megatron.model import LanguageModel, Pattention
from megatron.ops.pattention_backends import select_backend, weights_function
from megatron.ops.pattention_sparse import Selection, kept
from megatron.text import align
from tools.figures import pyplot_for

SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75)
THRESHOLDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
KINDS = ("qkv", "proj", "ffn")
MASKED = "masked scores"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Point(NamedTuple):
    """What leaving tokens out costs."""

    curve: str
    setting: float
    """The share or the threshold."""
    share: float
    """Part of the weights that were used, in the layers that leave some out."""
    loss: float
    """Nats per token."""


class MaskedPattention(nn.Module):
    """A Pattention that is given its heaviest tokens as a mask, so that the others leave the row norm too."""

    def __init__(self, layer: Pattention, selection: Selection) -> None:
        super().__init__()
        self.layer, self.selection = layer, selection

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in_features] -> [.., out_features]."""
        layer = self.layer
        backend, _ = select_backend(layer.backend, x.device.type)
        weights = weights_function(backend)(x, [layer.read_parameters()], layer.activation, layer.axis)
        made: Tensor = layer(x, kept(weights, [self.selection])[0])
        return made


def masked(model: LanguageModel, share: float) -> LanguageModel:
    """A model of the same tensors whose Pattentions are masked."""

    def replaced(layer: Any) -> Any:
        if not is_plain(layer, Pattention):
            return twin(layer, replaced)
        selection = heaviest(layer, share)
        return layer if selection is None else MaskedPattention(layer, selection)

    made: LanguageModel = twin(model, replaced)
    return made


def _of_kind(layer: Pattention, kind: str | None, share: float) -> Selection | None:
    return heaviest(layer, share if kind in (None, layer.projection) else None)


def _of_size(layer: Pattention, threshold: float) -> Selection:
    return Selection(threshold=threshold)


def points(
    model: LanguageModel, loss: Callable[[LanguageModel], float], shares: Sequence[float], thresholds: Sequence[float]
) -> list[Point]:
    """All points of all curves; that of the model as it is comes first, with a share of 1."""
    found = [Point("all", 1.0, 1.0, loss(model))]
    choices: list[tuple[str, float, Select]] = []
    for name, kind in (("all", None), *((kind, kind) for kind in KINDS)):
        choices += [(name, share, partial(_of_kind, kind=kind, share=share)) for share in shares]
    choices += [("threshold", value, partial(_of_size, threshold=value)) for value in thresholds]
    for name, setting, select in choices:
        network = sparse(model, select)
        value = loss(network)
        layers = [layer for _, layer in sparse_layers(network)]
        total = sum(layer.num_weights for layer in layers)
        used = sum(int(layer.num_kept) for layer in layers) / total if total else 1.0
        found.append(_told(Point(name, setting, used, value)))
    found += [_told(Point(MASKED, share, share, loss(masked(model, share)))) for share in shares]
    return found


def _told(point: Point) -> Point:
    print(f"{point.curve} {point.setting:g}: {point.share:.1%} used, loss {point.loss:.4f}", file=sys.stderr)
    return point


def draw(found: Sequence[Point], path: str) -> None:
    """Loss over the share of tokens used, a line a curve. Raises UserError without matplotlib."""
    pyplot = pyplot_for("--output")
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    whole = found[0]
    axes.axhline(whole.loss, color="0.7", linewidth=1, label="all tokens")
    for name in dict.fromkeys(point.curve for point in found):
        own = sorted((p for p in [whole, *found[1:]] if p.curve == name or p is whole), key=lambda p: p.share)
        style = {"all": "k-o", "threshold": "k:", MASKED: "--"}.get(name, "-")
        axes.plot([p.share for p in own], [p.loss for p in own], style, markersize=3, linewidth=1.3, label=name)
    ordinary = [p.loss for p in found if p.curve != MASKED]
    axes.set_ylim(whole.loss - 0.05 * (max(ordinary) - whole.loss), max(ordinary) + 0.1)
    axes.set(xscale="log", xlabel="share of the parameter tokens used", ylabel="loss (nats per token)")
    ticks = [tick for tick in _TICKS if tick >= 0.9 * min(p.share for p in found)]
    axes.set_xticks(ticks, [f"{tick:.0%}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def measured(config: RunConfig, shares: Sequence[float], thresholds: Sequence[float]) -> list[Point]:
    """The points of the configuration's checkpoint on its perplexity_data."""
    options = config.evaluation
    if not options.perplexity_data:
        raise UserError("perplexity_data: missing; name a text with --perplexity")
    model, tokenizer = load_for_inference(config)
    require_tokens(model, "load", "name a TokenFormer's")
    documents = list(corpus_documents(options.perplexity_data, tokenizer, options.eval_limit))
    loss = partial(_loss, config, documents, tokenizer.eod_id)
    with torch.no_grad():
        return points(model, loss, shares, thresholds)


def _loss(config: RunConfig, documents: list[Document], prefix_id: int, model: LanguageModel) -> float:
    length, options = config.language.seq_length, config.evaluation
    batches = Batches(options.eval_batch_size, next(model.parameters()).device.type)
    stride = options.perplexity_stride or length
    found = corpus_perplexity(model, documents, prefix_id, length, stride, batches)["loss"]
    assert found is not None
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conf_file", nargs="+", help="YAML files, merged in this order")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--perplexity", metavar="DATA", help="text or .bin/.idx prefix whose loss is measured")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of it")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="shares of the tokens")
    parser.add_argument("--thresholds", type=float, nargs="*", default=THRESHOLDS, help="sizes of weights")
    parser.add_argument("--output", default="sparse_curve.png", metavar="PNG", help="the figure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all points to this file too")
    args = parser.parse_args(argv)
    if wrong := [share for share in args.shares if not 0 < share <= 1]:
        raise UserError(f"--shares: {wrong[0]:g} is no share of the tokens; give numbers above 0 and at most 1")
    if wrong := [size for size in args.thresholds if not 0 < size < math.inf]:
        raise UserError(f"--thresholds: {wrong[0]:g} is no size of a weight; give numbers above 0")
    pyplot_for("--output")  # what is missing is found before the work
    find_output(args.output, "--output")
    if args.json:
        find_output(args.json, "--json")
    given = {"perplexity_data": args.perplexity, "eval_limit": args.limit}
    overrides = [*args.set, *(f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None)]
    found = measured(load_config(args.conf_file, overrides), args.shares, args.thresholds)
    rows = [
        (p.curve, f"{p.setting:g}", f"{p.share:.1%}", f"{p.loss:.4f}", f"{p.loss - found[0].loss:+.4f}") for p in found
    ]
    print("\n".join(align([("curve", "setting", "used", "loss", "more"), *rows], [0])))
    draw(found, args.output)
    if args.json:
        write_output(args.json, json.dumps([point._asdict() for point in found], indent=1) + "\n", "--json")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
