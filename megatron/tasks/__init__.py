"""What a model learns. A task is known by the value of the key `task`; language is what a run learns that does not say.

`register` makes a further one known: its model section to the configuration, its architecture to whatever builds a
model (training, growth, exchange), itself to training.
"""

from __future__ import annotations

from typing import Any

from megatron.config.schema import RunConfig
from megatron.config.sections.model import MODEL_SECTIONS, ModelSection
from megatron.model.build import ARCHITECTURES
from megatron.tasks.clip import ClipTask
from megatron.tasks.image_to_text import ImageToTextTask
from megatron.tasks.images import ImageClassificationTask
from megatron.tasks.language import LanguageTask
from megatron.tasks.task import Task

__all__ = [
    "ClipTask", "ImageClassificationTask", "ImageToTextTask", "LanguageTask", "Task", "build_task", "register",
    "task_of",
]  # fmt: skip

_TASKS: dict[str, type[Task[Any]]] = {}


def register(task: type[Task[Any]]) -> type[Task[Any]]:
    """Make a task known; can be used as a decorator. Raises ValueError for a name that another one has."""
    if _TASKS.setdefault(task.name, task) is not task:
        raise ValueError(f"there is a task '{task.name}' already")
    MODEL_SECTIONS[task.name], ARCHITECTURES[task.section] = task.section, task.architecture
    return task


register(LanguageTask)
register(ImageClassificationTask)
register(ClipTask)
register(ImageToTextTask)


def task_of(model: ModelSection) -> type[Task[Any]]:
    """What a model of this section learns."""
    return _TASKS[model.task]


def build_task(config: RunConfig) -> Task[Any]:
    """What the run of `config` learns. Raises UserError for what the task needs and does not find."""
    return task_of(config.model)(config)
