"""lm-eval's own six tasks over local files, and both kinds of model that the benchmarks compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron.errors import UserError

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

# Task: lm-eval's file, and the split it is evaluated on.
_STOCK = {
    "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "winogrande": ("winogrande/default.yaml", "validation"),
}


def write_tasks(sets: Path, folder: Path) -> list[str]:
    """Write a YAML for each set `{task}*.jsonl` of `sets` into `folder`; the names of the tasks come back.

    A task is lm-eval's own but for its data: the same prompts, choices and metrics. Raises UserError without a set.
    """
    import lm_eval.tasks

    stock = Path(lm_eval.tasks.__file__).parent
    found = {task: files[0] for task in _STOCK if (files := sorted(sets.glob(f"{task}*.jsonl")))}
    if not found:
        raise UserError(f"{sets}: there is no set in it; name files {', '.join(f'{task}*.jsonl' for task in _STOCK)}")
    for task, file in found.items():
        source, split = _STOCK[task]
        own: dict[str, Any] = {
            "include": str(stock / source), "task": task, "dataset_path": "json", "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(file.resolve())}},
            "training_split": None, "validation_split": None, "test_split": None, f"{split}_split": split,
        }  # fmt: skip
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    return list(found)


def task_manager(folder: Path) -> TaskManager:
    """Knows the tasks of `folder` alone."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def build_models(folder: str, batch_size: int, softmax_dtype: str = "float32") -> dict[str, LM]:
    """lm-eval's model for transformers, and ours, of a folder in Hugging Face's form, in fp32 on the CPU.

    softmax_dtype: what HFLM takes its softmax and its sums in (ours sums in fp64).
    """
    from lm_eval.models.huggingface import HFLM

    from eval_tasks.adapter import TokenFormerLM

    ours = TokenFormerLM.create_from_arg_obj({"pretrained": folder, "batch_size": batch_size, "device": "cpu"})
    theirs = HFLM(
        pretrained=folder, dtype="float32", softmax_dtype=softmax_dtype, device="cpu", batch_size=batch_size,
        trust_remote_code=True,
    )  # fmt: skip
    return {"HFLM": theirs, "ours": ours}
