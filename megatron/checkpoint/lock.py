"""One run at a time in a folder of checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron.errors import UserError
from megatron.files import lock, open_own
from megatron.log import get_logger


class FolderLock:
    """Keeps a second run from writing into the same folder; released by `close` or by the end of the process.

    Raises: UserError when another process holds it or the folder cannot be written.
    """

    def __init__(self, root: str | Path) -> None:
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            self._path = Path(root) / ".lock"
            self._file = open_own(self._path)
        except OSError as error:
            raise UserError(f"save: {root} cannot be written: {error.strerror}; choose another folder") from error
        if self._file is None:
            get_logger().warning("%s is no regular file; make sure that only one run saves there", self._path)
            return
        try:
            if not lock(self._file):
                get_logger().warning("%s does not support file locks; make sure that only one run saves there", root)
        except BlockingIOError as error:
            raise UserError(
                f"save: another run is writing to {root}; stop it first, or save to another folder"
            ) from error

    def close(self) -> None:
        """Release the folder, and remove it if nothing was saved in it."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
        with contextlib.suppress(OSError):
            self._path.parent.rmdir()
