"""The folders that a run writes to, claimed before it trains."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

from megatron.checkpoint.store import FolderLock, RunFolder
from megatron.config.schema import RunConfig
from megatron.errors import UserError
from megatron.log import log_to_file

_BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


def claim_folders(config: RunConfig) -> FolderLock | None:
    """Find out now, not at the first checkpoint, that a folder cannot be written or another run is writing to it.

    For the first rank. From here on what is logged goes to log_dir too.
    """
    for key in ("log_dir", "tensorboard_dir"):
        folder = getattr(config.logging, key)
        try:
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            # A disk that breaks later costs a warning, and so it does on the run's next start.
            if error.errno not in _BROKEN_DISK:
                reason = error.strerror
                raise UserError(f"{key}: {folder} cannot be written: {reason}; choose another folder") from error
    lock = FolderLock(config.checkpoint.save) if config.checkpoint.save else None
    if config.checkpoint.save:
        RunFolder(config.checkpoint.save).remove_leftovers()
    if config.logging.log_dir:
        log_to_file(Path(config.logging.log_dir) / "train.log")
    return lock
