"""Building DeepSpeed's compiled optimizers (CPU_Adam, FusedAdam) when they are first used.

torch builds into TORCH_EXTENSIONS_DIR, by default below the home folder. On a cluster that is one folder for all nodes:
they would build into it at the same time, and load code that another node compiled for its own processor. A build that
is killed leaves a file behind for which every later one waits for ever.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megatron.errors import UserError
from megatron.files import lock

_VARIABLE = "TORCH_EXTENSIONS_DIR"


def build_folder() -> Path:
    """Where extensions are built: TORCH_EXTENSIONS_DIR, else a folder of this user on this node's own disk.

    Raises: UserError for a folder that others could put code into.
    """
    given = os.environ.get(_VARIABLE)
    if given:
        folder = Path(given)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    version = f"{torch.__version__}-py{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
    private = Path(tempfile.gettempdir()) / f"torch_extensions_{os.getuid()}"
    private.mkdir(mode=0o700, exist_ok=True)
    status = private.lstat()
    if private.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{_VARIABLE}: {private} is not this user's alone; set {_VARIABLE} to a private folder")
    folder = private / version
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def one_build_at_a_time() -> Iterator[None]:
    """Inside, this process alone on its node builds extensions; the next one finds them built."""
    folder = build_folder()
    os.environ[_VARIABLE] = str(folder)
    with (folder / "building.lock").open("w") as file:
        lock(file, wait=True)  # given free by the kernel when a process is killed
        for left_behind in folder.glob("*/lock"):
            left_behind.unlink(missing_ok=True)  # torch's own mark of a build in progress: there is none now
        yield
