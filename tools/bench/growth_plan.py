"""The trials of the growth experiment: which model is trained from what, for how many updates, in which folder.

Sizes have the same number of non-embedding matrix entries as TokenFormer and as Transformer (biases apart): 1, 4, 6.7
and 16 times the first; the paper's chain of token counts is 1, 3.7, 8.4 and 15. The Transformer's width only doubles,
because LayerNorm survives an expansion exactly only if every channel is copied equally often.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron.config.schema import ModelConfig
from megatron.growth.plan import KINDS, TokenCounts, grown_config

LAYERS, WIDTH, HEAD_DIM, SEQUENCE, BATCH, VOCABULARY = 2, 64, 16, 128, 4, 1024
TOKENS_PER_UPDATE = SEQUENCE * BATCH
HELD_OUT_SEQUENCES = 96
INIT_STD = 0.1
"""The published 0.02 and wang_init belong to a width of 768 and 12 layers; here the larger sizes stall with them."""
PEAK_LR, GROWTH_LR, FINAL_LR = 3e-3, 1e-3, 0.1
"""Peak learning rate from scratch and of a growth stage; the final one as a part of the peak."""
FRACTIONS = {"tenth": 0.1, "quarter": 0.25}
"""Training tokens of each growth stage, as a part of those of a model trained from scratch."""

OTHER_RATES = {"S4, lr / 3": 1 / 3, "S4, lr / 10": 0.1}
"""Part h: the largest size from scratch at other peak rates."""

GROWTHS_IN_ONE_RUN = (0.375, 0.5625, 0.75)
"""Part g: when the three growths come, as parts of the run."""

Start = Literal["scratch", "grow", "official", "repeat", "net2net"]
PARTS = ("a", "b", "e", "h", "g", "c", "d", "f")
"""In the order of their importance."""


@dataclass(frozen=True)
class Size:
    """One size of both kinds of model.

    Attributes:
        slots: TokenFormer's tokens of each projection; its feed-forward has four times as many.
        width, inner: the Transformer's hidden and feed-forward widths.
    """

    name: str
    slots: int
    width: int
    inner: int


SIZES = (
    Size("S1", 24, 64, 64),
    Size("S2", 96, 128, 128),
    Size("S3", 160, 128, 384),
    Size("S4", 384, 128, 1280),
)

# Part f: one growth, S1 -> S2 with a quarter of the tokens, and what changes against part b.
VARIANTS: dict[str, dict[str, Any]] = {
    "no growth, trained on": {"slots": SIZES[0].slots},
    "lr x 2": {"lr": 2.0},
    "lr x 0.5": {"lr": 0.5},
    "no warm-up": {"warmup": 0.0},
    "warm-up 50 %": {"warmup": 0.5},
    "new tokens lr x 0.25": {"new_tokens_lr_scale": 0.25},
    "new tokens lr x 4": {"new_tokens_lr_scale": 4.0},
    "old tokens lr x 0.25": {"old_tokens_lr_scale": 0.25},
    "old tokens frozen": {"freeze_old_tokens": True},
    "optimizer anew": {"no_load_optim": True},
    "keys repeated, new values 0, tau follows, optimizer and data anew": {"start": "repeat"},
}


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
        part: of the experiment, a to h.
        folder: below the output folder.
        seed: of initialisation and data order.
        size: of the trained model.
        updates: length of the run.
        start: what it starts from; all but `scratch` need `parent`.
        parent: folder of the trial whose last checkpoint it starts from.
        label: budget of a growth stage, or variant of part f.
        options: what differs from the other trials: lr (a factor), slots, start, and configuration keys.
    """

    part: str
    folder: str
    seed: int
    size: Size
    updates: int
    start: Start = "scratch"
    parent: str | None = None
    label: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def is_transformer(self) -> bool:
        """Transformer or TokenFormer?"""
        return self.part in ("c", "d")

    def model(self) -> dict[str, Any]:
        """The model's configuration keys."""
        keys: dict[str, Any] = {
            "num_layers": LAYERS, "seq_length": SEQUENCE, "rotary_pct": 0.25, "norm": "layernorm_nonparam",
            "final_norm": "layernorm", "init_method_std": INIT_STD, "make_vocab_size_divisible_by": 64,
        }  # fmt: skip
        if self.is_transformer:
            width = self.size.width
            return {**keys, "hidden_size": width, "num_attention_heads": width // HEAD_DIM,
                    "intermediate_size": self.size.inner}  # fmt: skip
        slots = SIZES[0].slots if "growth" in self.options else self.options.get("slots", self.size.slots)
        return {**keys, "hidden_size": WIDTH, "num_attention_heads": WIDTH // HEAD_DIM, "qkv_slot_num": slots,
                "proj_slot_num": slots, "ffn_slot_num": 4 * slots}  # fmt: skip

    def model_config(self) -> ModelConfig:
        """The model, vocabulary included."""
        return ModelConfig(**self.model()).with_vocabulary(VOCABULARY)

    def stages(self) -> list[tuple[int, ModelConfig]]:
        """From which update on which model is trained: more than one if the run grows by itself."""
        found = [(0, self.model_config())]
        for stage in self.options.get("growth", ()):
            counts = TokenCounts(*(stage[f"{kind}_slot_num"] for kind in KINDS))
            found.append((stage["at_iteration"], grown_config(found[-1][1], counts)))
        return found

    def config(self, output: Path, documents: int) -> dict[str, Any]:
        """The run's YAML. `documents`: those of the training data; the one after them is held out."""
        folder, options = output / self.folder, dict(self.options)
        lr = options.pop("lr", 1.0) * (PEAK_LR if self.start == "scratch" else GROWTH_LR)
        for key in ("slots", "start"):
            options.pop(key, None)
        keys = {
            **self.model(),
            "tokenizer_type": "HFTokenizer", "vocab_file": str(output / "data/tokenizer.json"),
            "data_path": str(output / "data/text"), "split": f"{documents}, 1, 0", "num_workers": 0,
            "train_iters": self.updates, "train_micro_batch_size_per_gpu": BATCH, "seed": self.seed,
            "optimizer": {"type": "Adam", "params": {"lr": lr, "betas": [0.9, 0.95], "eps": 1e-8}},
            "min_lr": FINAL_LR * lr, "lr_decay_style": "cosine", "warmup": 0.05 if self.start == "scratch" else 0.1,
            "weight_decay": 0.1, "gradient_clipping": 1.0, "precision": "fp32",
            "save": str(folder / "checkpoints"), "load": str(folder / "checkpoints"), "checkpoint_factor": 500,
            "keep_last_n_checkpoints": 1, "eval_interval": 100 if self.start == "scratch" else 50,
            "eval_iters": HELD_OUT_SEQUENCES // BATCH, "log_dir": str(folder), "log_interval": 50, "peak_tflops": 1.0,
        }  # fmt: skip
        if self.start == "grow":
            keys["pretrain_partial_init"] = str(output / str(self.parent) / "checkpoints")
        return {**keys, **options}


def plan(tokens: int, parts: Iterable[str], seeds: Iterable[int]) -> list[Trial]:
    """Trials in the order in which they run: parents first, all parts of the first seed before the second.

    Args:
        tokens: training tokens of a model trained from scratch.
        parts: of PARTS; what they need of other parts is added.
        seeds: from 1. Parts c, d, f, g and h have the first only.
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
    """All trials of a seed, the most informative first."""
    scratch = [Trial("a", f"a/seed{seed}/{size.name}", seed, size, updates) for size in SIZES]
    transformers = [Trial("c", f"c/seed{seed}/{size.name}", seed, size, updates) for size in SIZES]
    yield scratch[0]
    for label, fraction in FRACTIONS.items():
        yield from _chain("b", "grow", scratch[0], label, round(fraction * updates))
        yield from _chain("e", "official", scratch[0], label, round(fraction * updates))
    yield from scratch[1:]
    if seed == 1:
        for number, (label, factor) in enumerate(OTHER_RATES.items()):
            rate = {"lr": factor}
            yield Trial("h", f"h/seed{seed}/{number}", seed, SIZES[-1], updates, label=label, options=rate)
    if seed == 1:
        for number, (label, options) in enumerate(VARIANTS.items()):
            short = round(FRACTIONS["quarter"] * updates)
            folder = f"f/seed{seed}/{number}"
            start: Start = options.get("start", "grow")
            yield Trial("f", folder, seed, SIZES[1], short, start, scratch[0].folder, label, options)
        yield Trial("g", "g/seed1/S4", seed, SIZES[-1], updates, options={"growth": _schedule(updates)})
        yield from transformers
        for label, fraction in FRACTIONS.items():
            yield from _chain("d", "net2net", transformers[0], label, round(fraction * updates))


def _schedule(updates: int) -> list[dict[str, Any]]:
    """Three growths inside one run, whose learning rate goes on as if there were none."""
    return [
        {"at_iteration": round(part * updates), "qkv_slot_num": size.slots, "proj_slot_num": size.slots,
         "ffn_slot_num": 4 * size.slots, "lr_policy": "continue"}
        for part, size in zip(GROWTHS_IN_ONE_RUN, SIZES[1:], strict=True)
    ]  # fmt: skip


def _chain(part: str, start: Start, base: Trial, label: str, updates: int) -> Iterator[Trial]:
    parent = base.folder
    for size in SIZES[1:]:
        trial = Trial(
            part, f"{part}/seed{base.seed}/{label}/{size.name}", base.seed, size, updates, start, parent, label
        )
        yield trial
        parent = trial.folder
