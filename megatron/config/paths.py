"""Keys that name files and folders: `~` and environment variables in them, and what no file system would take."""

from __future__ import annotations

import os
import re
from typing import Any

from megatron.text import shortened

PATH_KEYS = frozenset({
    "data_path", "train_data_paths", "valid_data_paths", "test_data_paths", "data_cache_dir", "vocab_file",
    "merge_file", "save", "load", "eval_ckpt", "pretrain_partial_init",
    "pretrain_image_tower", "pretrain_text_tower", "log_dir", "tensorboard_dir", "hostfile",
    "eval_results_prefix", "include_path", "perplexity_data", "eval_data_paths", "sample_input_file",
    "sample_output_file",
})  # fmt: skip
"""Keys whose value is a path, the prefix of one, or a list of such."""

MAY_BE_EMPTY = frozenset({"eval_results_prefix"})

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")
_NAME_MAX, _PATH_MAX = 255, 4095  # bytes, on Linux


def expand(value: Any, may_be_empty: bool = False) -> Any:
    """The value of a path key with a leading ~ or ~user and $NAME or ${NAME} replaced; also inside a list.

    Raises: ValueError when there is no such user or variable, or the path cannot be one.
    """
    if isinstance(value, list):
        return [expand(item) for item in value]
    if not isinstance(value, str) or (may_be_empty and not value):
        return value
    if not value:
        raise ValueError("'' is no path; give one, or null for none")
    path = _home(_VARIABLE.sub(_variable, value))
    _check(path)
    return path


def _home(path: str) -> str:
    if not path.startswith("~") or "\0" in path:
        return path
    found = os.path.expanduser(path)
    if found == path:
        user = path.partition("/")[0]
        raise ValueError(
            f"{user} in '{shortened(path)}' is no user's home folder here; write the whole path, or ./{user}"
        )
    return found


def _variable(match: re.Match[str]) -> str:
    name = match[1] or match[2]
    value = os.environ.get(name, "") if "\0" not in name else ""
    if not value:
        where = f"{shortened(match[0])} in '{shortened(match.string)}'"
        raise ValueError(f"{where} is not set in the environment; export it, or write the path")
    return value


def _check(path: str) -> None:
    if "\0" in path:
        raise ValueError("the path has a NUL in it; give another one")
    encoded = path.encode("utf-8", errors="replace")
    longest = max(map(len, encoded.split(b"/")))
    if longest > _NAME_MAX:
        raise ValueError(f"'{shortened(path)}' has a name of {longest} bytes; file systems take at most {_NAME_MAX}")
    if len(encoded) > _PATH_MAX:
        raise ValueError(f"'{shortened(path)}' has {len(encoded)} bytes; paths have at most {_PATH_MAX}")
