"""Real launches of a tiny run: its YAML file, its environment, what it left behind."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
_OF_A_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def write_config(file: Path, tokenizer_file: Path, corpus_prefix: str, **keys: Any) -> Path:
    """A YAML file of a tiny run without evaluation; None removes a key."""
    base = {**TINY, "vocab_file": str(tokenizer_file), "data_path": corpus_prefix, "eval_iters": 0}
    merged = {key: value for key, value in {**base, **keys}.items() if value is not None}
    file.write_text(yaml.safe_dump(merged), encoding="utf-8")
    return file


def environment(**variables: str) -> dict[str, str]:
    """This environment without the rank that another test gave this process."""
    return {**{key: value for key, value in os.environ.items() if key not in _OF_A_PROCESS}, **variables}


def deepy(*arguments: str | Path) -> list[str]:
    """The command `python deepy.py train.py arguments`."""
    return [sys.executable, "deepy.py", "train.py", *map(str, arguments)]


# A process that kills itself before an iteration of the list, once for each.
_STRUCK = """\
import os, runpy, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from megatron.training.loop import Trainer
iterate = Trainer._iterate

def struck(trainer, batches):
    marker = Path({markers!r}) / f"struck{{trainer.state.iteration}}"
    is_meant = os.environ.get("SLURMD_NODENAME") == {node!r} and trainer.state.iteration in {iterations!r}
    if is_meant and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return iterate(trainer, batches)

Trainer._iterate = struck
runpy.run_path({script!r}, run_name="__main__")
"""


def write_struck_script(file: Path, iterations: Sequence[int], node: str | None = None) -> Path:
    """A train.py that kills itself once after each of these iterations; in a job of Slurm, on that node only."""
    words = {"root": str(ROOT), "script": str(ROOT / "train.py"), "markers": str(file.parent)}
    file.write_text(_STRUCK.format(**words, iterations=[*iterations], node=node))
    return file


def training_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl with a training loss; an unfinished last one is left out."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [line for line in map(json.loads, lines) if "lm_loss" in line]


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether `condition` became true within this time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
