"""What deepy.py would start for configs/demo.yml."""

from __future__ import annotations

from pathlib import Path

from megatron.config import resolve_config
from megatron.launch.command import make_call
from megatron.launch.supervise import LauncherCall

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/demo.yml"


def call_of(overrides: list[str], env: dict[str, str] | None = None) -> LauncherCall:
    return make_call(resolve_config(DEMO, overrides), "train.py", ["a.yml", "--set", "x=1"], env or {})


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]
