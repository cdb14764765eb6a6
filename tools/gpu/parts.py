"""The parts of the check, in the order in which they run."""

from __future__ import annotations

from tools.gpu.running import Part

_TRAINING, _MODEL, _SPEED = "tools.gpu.training_parts", "tools.gpu.model_parts", "tools.gpu.speed_parts"
PARTS = (
    Part("versions", _MODEL, 60),
    Part("reference", _TRAINING, 180, on_cpu=True),
    Part("precision", _TRAINING, 240),
    Part("resume", _TRAINING, 180),
    Part("growth", _TRAINING, 120),
    Part("recomputation", _TRAINING, 120),
    Part("optimizers", _TRAINING, 120),
    Part("flash_attention", _TRAINING, 120),
    Part("decoding", _MODEL, 120),
    Part("evaluation", _MODEL, 120),
    Part("two_ranks", _TRAINING, 240, world=2),
    Part("memory", _SPEED, 180),
    Part("speed_150m", _SPEED, 240),
    Part("speed_1_5b", _SPEED, 300),
)


def select(names: str | None) -> tuple[Part, ...]:
    """The parts that are named, joined by commas; all without names. ValueError for one that there is not."""
    if not names:
        return PARTS
    known = {part.name: part for part in PARTS}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise ValueError(f"--parts: unknown '{unknown[0]}'; choose from {', '.join(known)}")
    return tuple(known[name] for name in names.split(","))
