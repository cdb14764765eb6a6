"""Is a checkpoint whole, and does it agree with itself? Asked before anything is built from it.

The reader knows the form; what is checked here takes the model, the optimizer and the generators of a run.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.checkpoint.reader import CheckpointReader, DamagedCheckpoint
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.config.sections.optimization import OptimizationConfig, OptimizerSpec
from megatron.config.sections.parallel import ParallelConfig
from megatron.errors import UserError
from megatron.exchange.canonical import model_config_of
from megatron.mpu import Layout
from megatron.mpu.collectives import gather_objects
from megatron.training.generators import check_saved_states


def require_sound(reader: CheckpointReader) -> None:
    """Look at all that a run takes from a checkpoint. Raises DamagedCheckpoint, which says what is wrong."""
    reader.verify()
    require_consistent(reader)


def require_consistent(reader: CheckpointReader) -> None:
    """Look at the records of a checkpoint, but not at its files of tensors. Raises DamagedCheckpoint.

    Checksums cannot tell of everything: contents may have been changed together with them.
    """
    model_config_of(reader)
    reader.section(ParallelConfig)
    if reader.iteration and "iteration" not in reader.train_state:
        raise reader.damaged("train_state.json", "is empty")
    if fault := _optimizer_fault(reader) or check_saved_states(reader):
        raise reader.damaged("manifest.json", fault)


def verify_together(opened: Callable[[], CheckpointReader], layout: Layout) -> None:
    """Compare the files of a checkpoint with its manifest, each rank some of them. Collective.

    Args:
        opened: gives the checkpoint; one rank alone may find that it cannot be.

    Raises: on all ranks, what the first of those that found something found: DamagedCheckpoint before any other error.
    """
    found: UserError | None = None
    try:
        opened().verify(share=(layout.rank, layout.world_size))
    except UserError as error:
        found = error
    errors = [fault for fault in gather_objects(found, layout.world) if fault is not None]
    if errors:
        raise next((fault for fault in errors if isinstance(fault, DamagedCheckpoint)), errors[0])


def _optimizer_fault(reader: CheckpointReader) -> str | None:
    """Does every parameter have what its optimizer keeps for it?"""
    spec, state = reader.section(OptimizationConfig).optimizer, reader.train_state
    moments: dict[str, set[str]] = {}
    for full_name in reader.names("optimizer"):
        moment, _, name = full_name.partition("/")
        moments.setdefault(name, set()).add(moment)
    if reader.section(CheckpointConfig).no_save_optim and not moments:
        return None
    known = _moments_of(spec)
    for name, found in moments.items():
        if found - {"step"} not in known:
            return f"lists {', '.join(sorted(found))} of {name[:80]}, which is not what {spec.type} keeps"
    skipped = state.get("skipped_iterations", 0) + state.get("left_out_iterations", 0)
    updates = state.get("iteration", 0) - skipped
    if not updates or set() in known:
        return None
    # What is frozen, and tokens that were added since the last update, have none.
    missing = [name for name in reader.names("model") if not name.endswith(".tau_tokens") and name not in moments]
    if missing and (not state["lineage"] or not moments):
        return f"lists no optimizer state of {missing[0][:80]}"
    return None


def _moments_of(spec: OptimizerSpec) -> tuple[set[str], ...]:
    """What an optimizer keeps for a parameter besides a count of steps, in each of the ways it has."""
    adam, momentum = {"exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
    if spec.type == "Muon":
        return momentum, adam
    if spec.type == "Lion":
        return ({"exp_avg"},)
    if spec.type == "SGD":
        return (momentum,) if spec.params.momentum else (set(), momentum)
    return (adam,)
