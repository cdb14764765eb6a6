"""The trials of the growth experiment: which model is trained from what, for how many updates, in which folder.

Sizes have the same number of non-embedding matrix entries as TokenFormer and as Transformer (biases apart): 1, 2, 5 and
10 times the first. The Transformer's width only doubles, because LayerNorm survives an expansion exactly only if every
channel is copied equally often. Each growth adds at least as many tokens as there are, which rotated keys need.

Text is read as bytes: with few merges to learn, models of this size come as far on a tenth of the tokens as a smaller
one does on all, which is where the paper's models are and where growth can pay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron.config.sections.model import ModelConfig
from megatron.config.sections.scaling import NewKeys

LAYERS, WIDTH, HEAD_DIM, SEQUENCE, BATCH, VOCABULARY = 2, 64, 32, 128, 4, 258
"""The vocabulary is the bytes, the end of a document, and one merge."""
TOKENS_PER_UPDATE = SEQUENCE * BATCH
HELD_OUT_SEQUENCES = 192
TOKENS = 3_584_000
"""Training tokens of a model from scratch."""
INIT_STD = {"tokenformer": 0.1, "transformer": 0.02}
"""The published 0.02 belongs to a TokenFormer of width 768; here it trains slower than 0.1."""
PEAK_LR = {
    "tokenformer": {"S1": 4e-3, "S2": 4e-3, "S3": 2e-3, "S4": 4e-3},
    "transformer": {"S1": 8e-3, "S2": 1.6e-2, "S3": 8e-3, "S4": 8e-3},
}
"""Of a model from scratch, the best of RATES in part r."""
GROWTH_LR = {"grow": 1e-3, "rotate": 4e-3, "official": 2e-3, "repeat": 4e-3, "net2net": 4e-3}
"""Of the training after a growth, the best of GROWTH_RATES in part r."""
FINAL_LR = 0.1
"""At the end of a schedule, as a part of its peak."""
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
RATES_OF: dict[str, dict[str, Sequence[float]]] = {
    "tokenformer": {"S1": RATES[1:5], "S2": RATES[1:5], "S3": RATES[:4], "S4": RATES[:4]},
    "transformer": {"S1": RATES[2:5], "S2": RATES[2:6], "S3": RATES[1:5], "S4": RATES[1:5]},
}
GROWTH_RATES = (1e-3, 2e-3, 4e-3)
GROWTH_RATES_OF = {
    "rotate": GROWTH_RATES, "grow": GROWTH_RATES[:2], "official": GROWTH_RATES[1:], "net2net": GROWTH_RATES,
}  # fmt: skip
SHORT = 1 / 8
"""Part r's training tokens of a model from scratch, as a part of those of the other parts."""
FRACTIONS = {"tenth": 0.1, "quarter": 0.25, "half": 0.5}
"""Training tokens after each growth, as a part of those of a model trained from scratch."""

Start = Literal["scratch", "grow", "rotate", "official", "repeat", "net2net"]
PARTS = ("r", "a", "h", "b", "e", "c", "d", "s", "f")
"""In the order in which they run."""
Kind = Literal["tokenformer", "transformer"]


@dataclass(frozen=True)
class Size:
    """One size of both kinds of model."""

    name: str
    slots: int
    """TokenFormer's tokens of each projection; its feed-forward has four times as many."""
    width: int
    """The Transformer's hidden width."""
    inner: int
    """The inner width of the Transformer's feed-forward."""


SIZES = (
    Size("S1", 12, 32, 128),
    Size("S2", 24, 32, 320),
    Size("S3", 60, 64, 352),
    Size("S4", 120, 64, 832),
)

# Part f: one growth, S1 -> S4 with a tenth of the tokens, as in part b and with what is said here.
VARIANTS: dict[str, dict[str, Any]] = {
    "zero keys": {},
    "no growth, trained on": {"slots": SIZES[0].slots},
    "warm-up 50 %": {"warmup": 0.5},
    "new tokens lr x 4": {"new_tokens_lr_scale": 4.0},
    "old tokens lr x 0.25": {"old_tokens_lr_scale": 0.25},
    "old tokens frozen": {"freeze_old_tokens": True},
    "optimizer anew": {"no_load_optim": True},
    "rotated keys": {"start": "rotate"},
    "rotated keys, new tokens lr x 4": {"start": "rotate", "new_tokens_lr_scale": 4.0},
    "rotated keys, old tokens frozen": {"start": "rotate", "freeze_old_tokens": True},
    "keys repeated, new values 0, optimizer and data anew": {"start": "repeat"},
    "as official": {"start": "official"},
    "rotated keys, old tokens lr x 0.1": {"start": "rotate", "old_tokens_lr_scale": 0.1},
}


@dataclass(frozen=True)
class Trial:
    """One training run."""

    part: str
    """Part of the experiment, one of PARTS."""
    folder: str
    """Its folder below the output folder."""
    seed: int
    """Seed of initialisation and data order."""
    size: Size
    """Size of the trained model."""
    updates: int
    """Length of the run."""
    start: Start = "scratch"
    """What it starts from; all but `scratch` need `parent`."""
    parent: str | None = None
    """Folder of the trial whose last checkpoint it starts from."""
    label: str = ""
    """How long it trains after a growth (FRACTIONS), or variant of part f."""
    options: dict[str, Any] = field(default_factory=dict)
    """What differs from the other trials: lr (peak rate), slots, start, and configuration keys."""
    kind: Kind = "tokenformer"
    """Kind of the model."""

    @property
    def validation(self) -> str:
        """The token file it is trained and validated on: rates are not chosen on the text that results come from."""
        return "tuning" if self.part == "r" else "text"

    @property
    def new_keys(self) -> NewKeys | None:
        """What new keys start as if the product grows the model; None for the other starts."""
        kinds: dict[Start, NewKeys] = {"grow": "zero", "rotate": "rotated"}
        return kinds.get(self.start)

    @property
    def peak_lr(self) -> float:
        """Its highest learning rate."""
        from_scratch = PEAK_LR[self.kind][self.size.name]
        return self.options.get("lr", GROWTH_LR.get(self.start, from_scratch))

    def model(self) -> dict[str, Any]:
        """The model's configuration keys."""
        keys: dict[str, Any] = {
            "num_layers": LAYERS, "seq_length": SEQUENCE, "rotary_pct": 0.25, "norm": "layernorm_nonparam",
            "final_norm": "layernorm", "init_method_std": INIT_STD[self.kind], "make_vocab_size_divisible_by": 64,
        }  # fmt: skip
        if self.kind == "transformer":
            width = self.size.width
            return {**keys, "hidden_size": width, "num_attention_heads": width // HEAD_DIM,
                    "intermediate_size": self.size.inner}  # fmt: skip
        slots = self.options.get("slots", self.size.slots)
        return {**keys, "hidden_size": WIDTH, "num_attention_heads": WIDTH // HEAD_DIM, "qkv_slot_num": slots,
                "proj_slot_num": slots, "ffn_slot_num": 4 * slots}  # fmt: skip

    def model_config(self) -> ModelConfig:
        """The model, vocabulary included."""
        return ModelConfig(**self.model()).with_vocabulary(VOCABULARY)

    def config(self, output: Path, documents: int) -> dict[str, Any]:
        """The run's YAML. `documents`: those of the training data; the one after them is held out."""
        folder, options = output / self.folder, dict(self.options)
        lr = self.peak_lr
        for key in ("lr", "slots", "start"):
            options.pop(key, None)
        keys = {
            **self.model(),
            "tokenizer_type": "HFTokenizer", "vocab_file": str(output / "data/tokenizer.json"),
            "data_path": str(output / "data" / self.validation), "split": f"{documents}, 1, 0", "num_workers": 0,
            "train_iters": self.updates, "train_micro_batch_size_per_gpu": BATCH, "seed": self.seed,
            "optimizer": {"type": "Adam", "params": {"lr": lr, "betas": [0.9, 0.95], "eps": 1e-8}},
            "min_lr": FINAL_LR * lr, "lr_decay_style": "cosine", "warmup": 0.05 if self.start == "scratch" else 0.1,
            "weight_decay": 0.1, "gradient_clipping": 1.0, "precision": "fp32",
            "save": str(folder / "checkpoints"), "load": str(folder / "checkpoints"), "checkpoint_factor": 1000,
            "keep_last_n_checkpoints": 1, "eval_interval": max(50, self.updates // 14),
            "eval_iters": HELD_OUT_SEQUENCES // BATCH, "log_dir": str(folder), "log_interval": 50, "peak_tflops": 1.0,
        }  # fmt: skip
        if self.new_keys:
            keys["pretrain_partial_init"] = str(output / str(self.parent) / "checkpoints")
            keys["new_keys"] = self.new_keys
        return {**keys, **options}


def trials_of(tokens: int, parts: Iterable[str], seeds: Iterable[int]) -> list[Trial]:
    """Trials in the order in which they run: parents first, all parts of the first seed before the second.

    Args:
        tokens: training tokens of a model trained from scratch.
        parts: of PARTS; what they need of other parts is added.
        seeds: from 1. Parts r, c, d, s and f have the first only; so has part h with half of the tokens.
    """
    updates, wanted = round(tokens / TOKENS_PER_UPDATE), set(parts)
    found: dict[str, Trial] = {}
    for seed in seeds:
        for trial in _of_seed(updates, seed):
            if trial.part in wanted:
                _add_with_parents(trial, {t.folder: t for t in _of_seed(updates, seed)}, found)
    return list(found.values())


def _add_with_parents(trial: Trial, known: dict[str, Trial], found: dict[str, Trial]) -> None:
    if trial.parent:
        _add_with_parents(known[trial.parent], known, found)
    found.setdefault(trial.folder, trial)


def _of_seed(updates: int, seed: int) -> Iterator[Trial]:
    """All trials of a seed, in the order of PARTS."""
    scratch = [Trial("a", f"a/seed{seed}/{size.name}", seed, size, updates) for size in SIZES]
    transformers = [Trial("c", f"c/seed1/{size.name}", 1, size, updates, kind="transformer") for size in SIZES]
    if seed == 1:
        yield from _rates(updates, scratch[0], transformers[0])
    yield from scratch
    grown: tuple[tuple[str, Start], ...] = (("h", "rotate"), ("b", "grow"), ("e", "official"))
    for part, start in grown:
        for label, fraction in FRACTIONS.items():
            if label != "half" or (part == "h" and seed == 1):
                yield from _chain(part, start, scratch[0], label, round(fraction * updates))
    if seed == 1:
        yield from _of_first_seed(updates, scratch[0], transformers)


def _of_first_seed(updates: int, base: Trial, transformers: list[Trial]) -> Iterator[Trial]:
    """Parts c, d, s and f."""
    yield from transformers
    for label, fraction in list(FRACTIONS.items())[:2]:
        yield from _chain("d", "net2net", transformers[0], label, round(fraction * updates))
    for label, fraction in FRACTIONS.items():
        folder = f"s/seed1/{label}/{SIZES[-1].name}"
        yield Trial("s", folder, 1, SIZES[-1], round(fraction * updates), label=label)
    short = round(FRACTIONS["tenth"] * updates)
    for number, (label, options) in enumerate(VARIANTS.items()):
        begin: Start = options.get("start", "grow")
        yield Trial("f", f"f/seed1/{number}", 1, SIZES[-1], short, begin, base.folder, label, options)


def _rates(updates: int, base: Trial, transformer: Trial) -> Iterator[Trial]:
    """Peak rates of each kind and size from scratch, and of one growth to S4 with a quarter of the tokens."""
    kinds: tuple[Kind, ...] = ("tokenformer", "transformer")
    for kind in kinds:
        for size in SIZES:
            for rate in RATES_OF[kind][size.name]:
                folder = f"r/{kind}/{size.name}/{rate:g}"
                yield Trial("r", folder, 1, size, round(SHORT * updates), label=f"{kind} {rate:g}",
                            options={"lr": rate}, kind=kind)  # fmt: skip
    starts: tuple[Start, ...] = ("rotate", "grow", "official", "net2net")
    for start in starts:
        parent = transformer if start == "net2net" else base
        for rate in GROWTH_RATES_OF[start]:
            yield Trial("r", f"r/{start}/S4/{rate:g}", 1, SIZES[-1], round(FRACTIONS["quarter"] * updates), start,
                        parent.folder, f"{start} {rate:g}", {"lr": rate}, parent.kind)  # fmt: skip


def _chain(part: str, start: Start, base: Trial, label: str, updates: int) -> Iterator[Trial]:
    parent = base.folder
    for size in SIZES[1:]:
        trial = Trial(
            part, f"{part}/seed{base.seed}/{label}/{size.name}", base.seed, size, updates, start, parent, label,
            kind=base.kind,
        )  # fmt: skip
        yield trial
        parent = trial.folder
