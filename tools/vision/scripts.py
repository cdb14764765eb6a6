"""The programs of this framework, called as a user calls them, and what they say of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.errors import UserError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class ScriptFolder:
    """Where one run has its files. `name` is what errors call the run."""

    path: Path
    name: str

    def call(self, script: str, *words: str | Path, keys: Mapping[str, Any] | None = None) -> None:
        """Run a script of the repository on one thread, with `keys` of the configuration set; log.txt has its output.

        Raises: UserError where it fails.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        settings = [f"--set={key}={value}" for key, value in (keys or {}).items()]
        log, environment = self.path / "log.txt", {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            command = [sys.executable, str(ROOT / script), *map(str, words), *settings]
            code = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
        if code:
            raise UserError(f"{self.name}: {script} ended with exit code {code}; {log} says why")

    def last_metric(self, name: str) -> float:
        """What train.py last wrote down of a metric."""
        lines = map(json.loads, (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return float([line[name] for line in lines if name in line][-1])

    def evaluate(self, config: Path, task: str, keys: Mapping[str, Any]) -> dict[str, float]:
        """What eval.py finds of a task, under the names of its metrics."""
        folder = self.path / task
        for old in folder.glob("*.json"):
            old.unlink()
        self.call("eval.py", config, keys={**keys, "eval_results_prefix": f"{folder}/"})
        [file] = folder.glob("*.json")
        return dict(json.loads(file.read_text(encoding="utf-8"))["results"][task])
