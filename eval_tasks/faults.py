"""What lm-eval and its libraries raise over a task or an option that somebody wrote, in one line."""

from __future__ import annotations

from traceback import walk_tb
from types import FrameType
from typing import Any

from megatron.errors import UserError

_LONGEST = 200


def explained(error: Exception, tasks: str) -> Exception:
    """The UserError that names the task, and the document where one was looked at; `error` itself where it is no
    mistake of a task: it came out of this program's own code.

    Args:
        tasks: names of all tasks, for errors that do not tell which one it was.
    """
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    if isinstance(error, UserError) or any(map(_is_ours, frames)):
        return error
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:_LONGEST]}".removesuffix(": ")
    names = [name for frame in frames if (name := _task_of(frame.f_locals.get("self")))]
    found = [frame.f_locals.get(name) for frame in frames for name in ("doc", "test_doc")]
    documents = [str(value)[:_LONGEST] for value in found if isinstance(value, dict)]
    document = f" (document {documents[-1]})" if documents else ""
    name = names[-1] if names else tasks
    return UserError(
        f"eval_tasks: {name} cannot be evaluated: {reason}{document}; check the task's YAML and its documents"
    )


def is_of_options(error: Exception) -> bool:
    """Was it raised where lm-eval checks the options of its command?"""
    return any(_module(frame).startswith("lm_eval.config") for frame, _ in walk_tb(error.__traceback__))


def _is_ours(frame: FrameType) -> bool:
    """Is it of the code that computes, rather than of that which called lm-eval?"""
    return _module(frame).startswith(("megatron.", "eval_tasks.")) and _module(frame) != "eval_tasks.run"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _task_of(value: Any) -> str | None:
    """The name of an lm-eval task, which may not yet be made completely."""
    for attribute in ("config", "_config"):
        name = getattr(getattr(value, attribute, None), "task", None)
        if isinstance(name, str):
            return name
    return None
