"""Each table of the paper: a published row, and below it this program's own, or the command that would make it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from eval_tasks.published import COLUMNS, ZERO_SHOT
from eval_tasks.tables import paper_row
from megatron.config import load_config
from megatron.config.sections.model import ModelSection
from megatron.config.sections.vision import ImageConfig
from megatron.text import align
from tools.paper.found import Found, Stage, of_size
from tools.paper.published import ABLATIONS, COLUMN_TOKENS, GROWTH, GROWTH_COLUMNS, IMAGES, Image

_TASKS = "lambada_openai hellaswag piqa arc_easy arc_challenge winogrande"
_NEAR = 0.1
"""How far the tokens of a stage may be from those of a column, as a part of them."""


@dataclass
class Row:
    """A line of a table."""

    name: str
    figures: Mapping[str, float | None]
    command: str = ""
    """What would make a line that has no figures."""


@dataclass
class Table:
    """A table with its rows."""

    title: str
    columns: Sequence[str]
    rows: list[Row]
    notes: str
    """What the figures are."""
    digits: Mapping[str, int] = field(default_factory=dict)
    """Behind the point; default 2."""

    def as_text(self) -> str:
        """The title, the rows, the commands of those without figures, and what the figures are."""
        commands = list(dict.fromkeys(row.command for row in self.rows if row.command))
        marks = {command: f" [{number}]" for number, command in enumerate(commands, 1)}
        lines = [(self.title, *self.columns)]
        for row in self.rows:
            cells = (_cell(row.figures.get(column), self.digits.get(column, 2)) for column in self.columns)
            lines.append((f"{row.name}{marks.get(row.command, '')}", *cells))
        head, *body = align(lines, [0])
        fill = [f"{mark.strip()} {command}" for command, mark in marks.items()]
        return "\n".join([head, "-" * len(head), *body, "", *fill, *([""] if fill else []), self.notes])


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def zero_shot(found: Sequence[Found]) -> Table:
    """Tables 1 and 10."""
    rows, shown = [], []
    for published in ZERO_SHOT:
        rows.append(Row(published.name, dict(zip(COLUMNS, published.figures, strict=True))))
        if published.size is None:
            continue
        own = [item for item in of_size(found, published.size) if paper_row(item.results)]
        shown += own
        rows += [Row(f"  {item.name}", paper_row(item.results)) for item in own]
        if not own:
            config = f"tokenformer/{published.name.removeprefix('TokenFormer-').replace('.', '-')}_eval.yml"
            command = f"python deepy.py eval.py -d configs {config} --eval_tasks {_TASKS} --perplexity pile_valid.jsonl"
            rows.append(Row("  this program", {}, command))
    rows += [Row(item.name, paper_row(item.results)) for item in found if item not in shown and paper_row(item.results)]
    return Table("zero-shot", COLUMNS, rows, _ZERO_SHOT_NOTES, {column: 1 for column in COLUMNS if "ppl" not in column})


_ZERO_SHOT_NOTES = """\
Accuracies in percent: acc_norm of HellaSwag and ARC-C, acc of the others; lm-eval without examples in the prompt.
LAMBADA ppl: exp of the mean negative log-likelihood of a passage's last word (lm-eval's lambada_openai).
Pile ppl: exp of nats a token with the GPT-NeoX-20B tokenizer over documents of the Pile's validation set, each behind
an end-of-document token; windows of seq_length tokens that move on by half of it (--perplexity_stride). The paper says
neither window nor stride. A file counts as the Pile's where its name has the word.
Other families: python -m eval_tasks --model hf --model_args pretrained=EleutherAI/pythia-410m --tasks piqa,arc_easy"""


def growth(found: Sequence[Found]) -> Table:
    """Tables 6 and 7: validation perplexity on OpenWebText against tokens after the growth."""
    stages = [(item, stage) for item in found for stage in item.stages]
    rows, shown = [], []
    for published in GROWTH:
        rows.append(Row(published.name, dict(zip(GROWTH_COLUMNS, published.figures, strict=True))))
        own = [pair for pair in stages if pair[1].size == published.size and _column(pair[1]) is not None]
        shown += own
        rows += [Row(f"  {item.name}", {str(_column(stage)): stage.perplexity}) for item, stage in own]
        if not own:
            rows.append(Row("  this program", {}, f"python deepy.py train.py -d configs {published.config}"))
    for item, stage in stages:
        if (item, stage) not in shown:
            what = f"{item.name}: {_size_text(stage)}, {stage.tokens / 1e9:.3g} billion tokens"
            rows.append(Row(what, {"other": stage.perplexity}))
    columns = (*GROWTH_COLUMNS, *(["other"] if len(shown) < len(stages) else []))
    return Table("growth, OpenWebText perplexity", columns, rows, _GROWTH_NOTES)


_GROWTH_NOTES = """\
Columns are tokens since the growth, or since the start; a run that is within a tenth of them counts. Perplexity is exp
of the validation loss of train.py, nats a token with the GPT-NeoX-20B tokenizer, at the last validation of a stage.
Sizes are those of parameters and tokens; the paper does not say layers and widths of its Transformers."""


def _column(stage: Stage) -> str | None:
    """The column of a stage, by the tokens that it has had."""
    near = (
        name
        for name, tokens in zip(GROWTH_COLUMNS, COLUMN_TOKENS, strict=True)
        if abs(stage.tokens / tokens - 1) <= _NEAR
    )
    return next(near, None)


def _size_text(stage: Stage) -> str:
    layers, width, *tokens = stage.size
    return f"{layers} x {width}" + (f", tokens {'/'.join(map(str, tokens))}" if tokens[0] else "")


def images(found: Sequence[Found]) -> Table:
    """Table 2: ImageNet-1K."""
    return _image_table("ImageNet-1K", IMAGES, found, _IMAGE_NOTES)


def ablations(found: Sequence[Found]) -> Table:
    """Tables 4 and 5: theta and norms of B/16."""
    notes = f"{_IMAGE_NOTES}\nGELU with an L1 norm, and norms with a bias only, are not among this program's choices."
    return _image_table("ablations of B/16", ABLATIONS, found, notes)


_IMAGE_NOTES = (
    "Top-1 accuracy in percent on the 50,000 validation images, by eval.py. No figure of this program is claimed here."
)
_SAME = ("num_layers", "hidden_size", "qkv_slot_num", "proj_slot_num", "ffn_slot_num", "image_size", "patch_size",
         "num_classes", "norm", "norm_activation_type")  # fmt: skip


def _image_table(title: str, published: Sequence[Image], found: Sequence[Found], notes: str) -> Table:
    rows, shown = [], []
    for row in published:
        rows.append(Row(row.name, {"top-1": row.accuracy}))
        if row.config is None:
            continue
        model = load_config(f"configs/{row.config}").model
        own = [item for item in found if _is_same(item.config, model) and _accuracy(item) is not None]
        shown += own
        rows += [Row(f"  {item.name}", {"top-1": _accuracy(item)}) for item in own]
        if not own:
            rows.append(Row("  this program", {}, f"python deepy.py train.py -d configs {row.config}, then eval.py"))
    others = (item for item in found if item not in shown and isinstance(item.config, ImageConfig))
    rows += [Row(item.name, {"top-1": _accuracy(item)}) for item in others if _accuracy(item) is not None]
    return Table(title, ("top-1",), rows, notes, {"top-1": 1})


def _is_same(config: ModelSection, model: ModelSection) -> bool:
    return type(config) is type(model) and all(getattr(config, key) == getattr(model, key) for key in _SAME)


def _accuracy(item: Found) -> float | None:
    """Top-1 in percent."""
    values = (task.get("acc,none") for task in item.results.values())
    return next((100 * value for value in values if value is not None), None)


def enwik8(found: Sequence[Found]) -> Table:
    """Section 4.3, which has a figure and no numbers."""
    train = "python deepy.py train.py -d configs paper/enwik8_{}.yml"
    rows = [
        Row("TokenFormer 354M to 757M, zero keys", {}, train.format("tokenformer")),
        Row("Transformer 354M to 757M, Net2Net", {}, train.format("transformer")),
    ]
    rows += [Row(f"{i.name}: {_size_text(s)}", {"perplexity": s.perplexity}) for i in found for s in i.stages[-1:]]
    return Table("enwik8, validation perplexity", ("perplexity",), rows, _ENWIK8_NOTES)


_ENWIK8_NOTES = """\
exp of nats a token with the GPT-NeoX-20B tokenizer, at the last validation. The paper shows curves (Figure 6) without
numbers: TokenFormer is to converge faster and end lower than the Transformer."""

TABLES: Mapping[str, Callable[[Sequence[Found]], Table]] = {
    "zero_shot": zero_shot, "growth": growth, "images": images, "ablations": ablations, "enwik8": enwik8,
}  # fmt: skip


def all_tables(found: Sequence[Found]) -> Iterator[Table]:
    """Every one."""
    return (make(found) for make in TABLES.values())
