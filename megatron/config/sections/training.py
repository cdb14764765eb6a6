"""Section `training`: length and batches of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from megatron.config.sections.base import MAX_FACTOR, MAX_SIZE, Section
from megatron.config.sections.watchdog import WatchdogConfig
from megatron.config.update_size import UpdateSize
from megatron.errors import ConfigError


class SpikesConfig(Section):
    """Losses and gradient norms that stand out, and what is done about them."""

    action: Literal["none", "log", "skip_update", "rewind"] = "none"
    """none: nothing stands out, and what is not finite stops the run. log: a line in the log and in spikes.jsonl, and
    what is not finite stops the run. skip_update: the weights stay as they are; every update waits until its numbers
    are known. rewind: the run goes back to its last checkpoint, and skips the iterations from the spike to where it was
    noticed."""
    window: int = Field(default=128, ge=8, le=1024)
    """Good updates before it that an update is measured by: the medians of their losses and norms, and how far these
    are from them. Nothing but what is not finite stands out before there are so many."""
    threshold: float = Field(default=6.0, gt=0, le=MAX_FACTOR)
    """Standard deviations above the median from which on a loss or a norm is a spike."""
    limit: int = Field(default=10, gt=0, le=100_000)
    """Updates in a row that are skipped (skip_update), or times that a run goes back (rewind), before it stops."""

    @model_validator(mode="after")
    def _check(self) -> SpikesConfig:
        if self.action == "none" and (self.window, self.threshold, self.limit) != (128, 6.0, 10):
            reason = "is not given, so that the other keys have no effect"
            raise ConfigError("action", reason, "give log, skip_update or rewind")
        return self


class TrainingConfig(Section):
    """Length and batches of a run."""

    train_iters: int | None = Field(default=None, gt=0)
    """Optimizer updates of the whole run, including those before a resume."""
    train_micro_batch_size_per_gpu: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Samples that a process takes through one forward and backward pass."""
    gradient_accumulation_steps: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Micro-batches accumulated for one update. Default: from train_batch_size, else 1."""
    train_batch_size: int | None = Field(default=None, gt=0, le=MAX_SIZE)
    """Samples of one update over all data-parallel processes; follows from the other two if it is not given."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average (EMA) of the weights, which validation, evaluation and generation use: after
    every update it becomes ema_decay of itself and 1 - ema_decay of the weights, for example 0.9999. Default: none."""
    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seed of initialisation, data order and dropout, below 2^32."""
    eval_interval: int = Field(default=1000, gt=0)
    """Iterations between validations."""
    eval_iters: int = Field(default=100, ge=0)
    """Batches of a validation, the same ones every time; 0 turns validation off."""
    exit_interval: int | None = Field(default=None, gt=0)
    """Save and stop after this many iterations of the run; resuming continues."""
    exit_duration_in_mins: float | None = Field(default=None, gt=0, le=5_256_000)
    """Save and stop once the first process has run this long, in minutes that need not be whole, but not before an
    iteration; resuming continues."""
    checkpoint_activations: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    checkpoint_num_layers: int = Field(default=1, gt=0, le=10_000)
    """Number of blocks that are recomputed together."""
    eod_mask_loss: bool = False
    """Leave predictions made from an end-of-document token out of the loss."""
    pattention_backend: Literal["auto", "reference", "fused", "compiled", "triton"] = "auto"
    """Implementation of Pattention; auto picks the fastest one for the device and what is installed."""
    recompute_scores: bool = False
    """Keep a Pattention's input for the backward pass instead of its scores: a quarter more multiplications of it,
    and almost no memory. Not of the reference backend."""
    attention_backend: Literal["sdpa", "flash_attn"] = "sdpa"
    """Causal attention: torch's scaled_dot_product_attention or the flash-attn package."""
    cross_entropy: Literal["auto", "eager", "chunked", "liger", "quack"] = "auto"
    """The head and its loss in training. chunked: rows become losses and gradients a chunk at a time, and the logits of
    all tokens never exist at once; eager: they do; liger, quack: the packages liger-kernel and quack-kernels do what
    chunked does, on a GPU without tensor parallelism. auto is chunked."""
    compile: Literal["none", "blocks"] = "none"
    """blocks: compile each block with torch.compile, which takes a minute at the start and fuses norms, residuals and
    activations; with ZeRO 0 to 2, pipelines, growth and recomputation. Needs a C++ compiler, on a GPU triton too."""
    deterministic: bool = False
    """true: only kernels that give the same bits every time, so that a resumed run on the same GPUs equals an
    uninterrupted one bit for bit. Attention and its backward pass become slower."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """Ends a run in which a process hangs, is stopped or killed, with a line that names it. false: does not."""
    allow_nonfinite_loss: bool = False
    """false: a loss or a gradient norm that is not finite stops the run, and nothing of that update is saved."""
    coord_check: bool = False
    """true: instead of training the model, train models of three widths, numbers of tokens and depths for a few
    updates, print how large their activations are, write that to log_dir (else save), and end. With use_mup the
    smallest is the base model (docs/mup.md)."""
    mup_width_scale: int = Field(default=2, ge=2, le=64)
    """Factor from one size of the coordinate check to the next."""

    spikes: SpikesConfig = SpikesConfig()
    """What is done about losses and gradient norms that stand out or are not finite, for example {window: 128,
    threshold: 6, action: rewind, limit: 10}."""
    skip_iterations: list[list[int]] | None = None
    """Spans [first, last] of iterations that read no data and make no update, for example [[1200, 1210]]; what they
    would have read is skipped, and the learning rate goes on by iteration."""
    check_replicas_interval: int | None = Field(default=None, gt=0)
    """Iterations between checks that all data ranks hold the same weights, and with ZeRO 0 the same moments and average
    of the weights, bit for bit; also before every checkpoint. Default: no checks."""

    @field_validator("skip_iterations")
    @classmethod
    def _check_spans(cls, spans: list[list[int]] | None) -> list[list[int]] | None:
        for span in spans or ():
            if len(span) != 2 or not 1 <= span[0] <= span[1]:
                raise ConfigError("", f"{span} is no span [first, last] of iterations, which are counted from 1")
        return spans

    def update_size(self, data_ranks: int, length: int) -> UpdateSize:
        """What an update of so many data ranks reads, `length` tokens a sample; UserError when the keys do not fit."""
        keys = self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps, self.train_batch_size
        return UpdateSize.of(*keys, data_ranks, length)
