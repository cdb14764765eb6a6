"""Section `training`: length and batches of a run."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron.config.sections.base import MAX_SIZE, Section
from megatron.config.update_size import UpdateSize


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
    seed: int = Field(default=1234, ge=0, lt=2**32)
    """Seed of initialisation, data order and dropout, below 2^32."""
    eval_interval: int = Field(default=1000, gt=0)
    """Iterations between validations."""
    eval_iters: int = Field(default=100, ge=0)
    """Batches of a validation, the same ones every time; 0 turns validation off."""
    exit_interval: int | None = Field(default=None, gt=0)
    """Save and stop after this many iterations of the run; resuming continues."""
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
    allow_nonfinite_loss: bool = False
    """false: a loss or a gradient norm that is not finite stops the run, and nothing of that update is saved."""

    def update_size(self, data_ranks: int, length: int) -> UpdateSize:
        """What an update of so many data ranks reads, `length` tokens a sample; UserError when the keys do not fit."""
        keys = self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps, self.train_batch_size
        return UpdateSize.of(*keys, data_ranks, length)
