"""Predicts memory and time of a layout from a configuration and a machine; starts no process, allocates nothing.

    from megatron.planner import Workload, find_machine, plan
    best = plan(Workload.of(config), find_machine("H200-141GB"), gpus=64)[0]

Three things make a prediction: a Workload (what is trained), a Choice (how it is laid out) and a Machine. The formulas
are in docs/parallelism.md.
"""

from megatron.planner.choice import Choice
from megatron.planner.machine import DEFAULT_MACHINE, MACHINES, Machine, find_machine, read_machine
from megatron.planner.memory import Memory
from megatron.planner.plan import Candidate, candidates, plan, predict
from megatron.planner.report import assumed_batch, report, world
from megatron.planner.step_time import StepTime
from megatron.planner.workload import Workload

__all__ = [
    "DEFAULT_MACHINE",
    "MACHINES",
    "Candidate",
    "Choice",
    "Machine",
    "Memory",
    "StepTime",
    "Workload",
    "assumed_batch",
    "candidates",
    "find_machine",
    "plan",
    "predict",
    "read_machine",
    "report",
    "world",
]
