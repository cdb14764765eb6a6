"""Predicts memory and time of a layout from a configuration and a machine; starts no process, allocates nothing.

    from megatron.planner import find_machine, plan
    best = plan(config, find_machine("H200-141GB"), gpus=64)[0]

The formulas are in docs/parallelism.md.
"""

from megatron.planner.choice import Choice
from megatron.planner.machine import DEFAULT_MACHINE, MACHINES, Machine, find_machine, read_machine
from megatron.planner.memory import Memory
from megatron.planner.plan import Candidate, candidates, configured, plan, predict
from megatron.planner.report import assumed_batch, report, with_vocabulary, world
from megatron.planner.step_time import StepTime

__all__ = [
    "DEFAULT_MACHINE",
    "MACHINES",
    "Candidate",
    "Choice",
    "Machine",
    "Memory",
    "StepTime",
    "assumed_batch",
    "candidates",
    "configured",
    "find_machine",
    "plan",
    "predict",
    "read_machine",
    "report",
    "with_vocabulary",
    "world",
]
