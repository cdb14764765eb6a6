"""Section `logging`: what a run reports, and where."""

from __future__ import annotations

from pydantic import Field

from megatron.config.sections.base import Section


class LoggingConfig(Section):
    """What a run reports, and where."""

    log_interval: int = Field(default=100, gt=0)
    """Iterations between log lines."""
    steps_per_print: int = Field(default=10, gt=0)
    """Passed to DeepSpeed, whose own progress lines are off; log_interval decides."""
    log_dir: str | None = None
    """Folder for metrics.jsonl (default: `save`) and for train.log, a copy of the console log (default: none)."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard event files; without it none are written."""
    use_wandb: bool = False
    """Log to Weights & Biases (pip install wandb); WANDB_MODE=offline works too."""
    wandb_project: str = "neox"
    """Weights & Biases project."""
    wandb_group: str | None = None
    """Weights & Biases group of the run."""
    wandb_team: str | None = None
    """Weights & Biases team."""
    wandb_host: str = "https://api.wandb.ai"
    """Weights & Biases server."""
    wall_clock_breakdown: bool = False
    """DeepSpeed's timers of forward, backward and step."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak TFLOP/s of one device, which MFU is measured against. Default: the data sheet's dense 16-bit rate of a
    known GPU; elsewhere (CPUs, fp32, MIG slices, unknown GPUs) MFU is left out."""
