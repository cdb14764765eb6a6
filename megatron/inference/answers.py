"""Completions on disk: the output file, and the unfinished one that a run which was interrupted goes on with.

`{output}.unfinished` has a line with a fingerprint of all that decides the texts, and one JSON line a completion with
its index. It grows by whole batches; a line cut off by a crash is dropped. The output file appears complete, by rename.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron.errors import UserError
from megatron.inference.decoding import Decoder, Text
from megatron.inference.generate import Completion
from megatron.log import get_logger


def check_writable(path: str) -> None:
    """Find out that the output cannot be written before the model has worked for it; an old output stays."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise UserError(f"sample_output_file: {path} cannot be written: {error.strerror}; name another file") from None


class Answers:
    """The completions of one run, by index; those of an interrupted run with the same fingerprint are there at once.

    Args:
        output: the file to be written; `output`.unfinished is locked until finish() or close().
        fingerprint: what the completions depend on, see fingerprint().

    Raises: UserError when another process is writing them.
    """

    def __init__(self, output: str, fingerprint: str) -> None:
        self.output, self.found = Path(output), dict[int, dict[str, Any]]()
        self._path = Path(f"{output}.unfinished")
        self._file = open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115 (kept open)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"sample_output_file: another process is writing {self._path}; wait for it or name another file"
            ) from None
        header = json.dumps({"fingerprint": fingerprint}).encode() + b"\n"
        self._file.seek(self._read(header))
        self._file.truncate()
        if self._file.tell() == 0:
            self._write(header)

    def _read(self, header: bytes) -> int:
        """Collect the completions; the size of what is whole and belongs to this run."""
        lines = self._file.read().splitlines(keepends=True)
        if not lines or lines[0] != header:
            if len(lines) > 1:
                get_logger().info("%s: prompts, settings or model have changed; starting anew", self._path)
            return 0
        size = len(header)
        for line in lines[1:]:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else {}
                self.found[entry.pop("index")] = entry
            except (ValueError, KeyError, TypeError, AttributeError):
                break
            size += len(line)
        return size

    def add(self, completions: Mapping[int, Completion]) -> None:
        """Keep a batch of completions, safe on disk before this returns."""
        entries = {i: _fields(completion) for i, completion in completions.items()}
        self._write(b"".join(_line({"index": i, **entry}) for i, entry in entries.items()))
        self.found.update(entries)

    def finish(self, count: int) -> None:
        """Write completions 0..count-1 to the output file and remove the unfinished one."""
        complete = Path(f"{self.output}.part")
        with complete.open("wb") as file:
            file.writelines(_line(self.found[i]) for i in range(count))
            file.flush()
            os.fsync(file.fileno())
        os.replace(complete, self.output)
        self._path.unlink()
        self.close()
        get_logger().info("%d texts written to %s", count, self.output)

    def close(self) -> None:
        """Let another run go on."""
        self._file.close()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())


def _fields(completion: Completion) -> dict[str, Any]:
    """context, text, length, finished, message, duration_seconds; logprobs only where asked for."""
    return {k: v for k, v in asdict(completion).items() if k != "logprobs" or v is not None}


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"


def fingerprint(decoder: Decoder, texts: Sequence[Text]) -> str:
    """SHA-256 of the texts' prompts and settings, the tokenizer's name and ids, and the model with all its tensors."""
    digest = hashlib.sha256()
    common = [decoder.seq_length, decoder.recompute, decoder.logprobs, decoder.stop_at_eod, decoder.tokenizer.name]
    digest.update(json.dumps([*common, decoder.model.config.model_dump(mode="json")]).encode())
    for text in texts:
        digest.update(json.dumps([text.context, text.prompt, asdict(text.sampling), text.seed]).encode())
    for name, tensor in decoder.model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(content.numpy()))
    return digest.hexdigest()
