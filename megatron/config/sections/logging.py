"""Section `logging`: what a run reports, and where."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from megatron.config.sections.base import Section
from megatron.errors import ConfigError


class ProfileConfig(Section):
    """The iterations that are profiled."""

    start: int = Field(gt=0)
    """First iteration."""
    stop: int = Field(gt=0)
    """Last iteration."""

    @model_validator(mode="after")
    def _check(self) -> ProfileConfig:
        if self.stop < self.start:
            raise ConfigError("", f"stop {self.stop} is before start {self.start}", "give a later one")
        return self


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
    profile: ProfileConfig | None = None
    """{start: N, stop: M} writes a trace of iterations N to M, and on a GPU a snapshot of its memory, to log_dir, else
    save; true is 10 to 12. docs/performance.md says how to read them."""

    @field_validator("profile", mode="before")
    @classmethod
    def _as_in_gpt_neox(cls, value: Any) -> Any:
        """true or false; its further keys for the first and the last iteration have these defaults."""
        return ({"start": 10, "stop": 12} if value else None) if isinstance(value, bool) else value
