"""Section `checkpoint`: saving and loading."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron.config.sections.base import Section

TOWER_KEYS = {"pretrain_image_tower": "image.", "pretrain_text_tower": "text."}
"""What the names of a tower's tensors begin with, by the key of the checkpoint that it comes from."""


class CheckpointConfig(Section):
    """Saving and loading."""

    save: str | None = None
    """Folder for checkpoints; without it none are saved."""
    load: str | None = None
    """Folder of checkpoints to resume from; if it is empty or missing, the run starts from scratch."""
    iteration: int | None = Field(default=None, ge=0)
    """Iteration to load instead of the latest one: the run is rolled back to it. Once the run has saved again, the
    same configuration goes on from what it saved."""
    strict_load: bool = False
    """true: stop where the latest checkpoint is missing or damaged, instead of going on from the newest whole one."""
    checkpoint_factor: int | None = Field(default=None, gt=0)
    """Iterations between checkpoints (checkpoint_scale linear), or the factor between them (log)."""
    checkpoint_scale: Literal["linear", "log"] = "linear"
    """Save at multiples of checkpoint_factor (linear), or at its powers (log)."""
    extra_save_iters: list[Annotated[int, Field(ge=0, strict=False)]] | None = None
    """Additional iterations to save at; these checkpoints are never removed."""
    keep_last_n_checkpoints: int | None = Field(default=None, gt=0)
    """Keep this many of the latest checkpoints and remove older ones; those of extra_save_iters stay."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in the host's memory. false: training waits for it."""
    on_save_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written, stop the run, or warn and go on until the next one is due. What is saved at
    the end, or when the run is asked to stop, has to succeed in any case."""
    non_persistent_save_interval: int | None = Field(default=None, gt=0)
    """Iterations between short-lived checkpoints: each is removed once a later one of either kind is saved, and
    keep_last_n_checkpoints does not count it."""
    finetune: bool = False
    """Take only the weights of the loaded checkpoint: iteration, optimizer and data start anew."""
    no_load_optim: bool = False
    """Do not load optimizer states."""
    no_load_rng: bool = False
    """Do not load random-number states."""
    no_save_optim: bool = False
    """Do not save optimizer states; such a checkpoint cannot resume exactly."""
    eval_ckpt: str | None = None
    """Checkpoint for eval.py and generate.py: an official pytorch_model.bin or a checkpoint folder; wins over load."""
    pretrain_partial_init: Annotated[str, Field(min_length=1)] | None = None
    """Checkpoint of a smaller model that training starts from, with parameter tokens added up to the token counts given
    here; a run's folder, or an official pytorch_model.bin or training folder. Ignored once `load` has a checkpoint."""
    pretrain_image_tower: Annotated[str, Field(min_length=1)] | None = None
    """Of a model with an image tower and a text tower or language model: checkpoint whose image tower is the one that
    training starts from, with parameter tokens added up to the token counts given here. Ignored once `load` has a
    checkpoint."""
    pretrain_text_tower: Annotated[str, Field(min_length=1)] | None = None
    """The same of its text tower, or the checkpoint of a language model."""
