"""Completions on disk: the output file, and the unfinished one that a run which was interrupted goes on with.

`{output}.unfinished` has a line with a fingerprint of all that decides the texts, and one JSON line a completion with
its index. It grows by whole batches; a line cut off by a crash is dropped. The output file appears complete, by rename.
An output that is a stream (a FIFO, /dev/stdout) is written at the end, and leaves nothing to go on with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from megatron.errors import UserError
from megatron.files import find_output, lock, open_own, write_errors
from megatron.inference.decoding import Decoder, Text
from megatron.inference.generate import Completion
from megatron.inference.sparse import sparse_layers
from megatron.log import get_logger

_KEY = "sample_output_file"
_HEADER_START = b'{"fingerprint": '


class Answers:
    """The completions of one run, by index; those of an interrupted run with the same fingerprint are there at once.

    Args:
        output: the file to be written; `output`.unfinished is locked until finish() or close().
        fingerprint: what the completions depend on, see fingerprint().
        inputs: files that must not be lost by the output.

    Raises: UserError when another process is writing them, or the output cannot be written or is one of the inputs.
    """

    def __init__(self, output: str, fingerprint: str, inputs: Sequence[str | None] = ()) -> None:
        self.found = dict[int, dict[str, Any]]()
        self._output, self._path = find_output(output, _KEY, inputs), Path(f"{output}.unfinished")
        self._file: BinaryIO | None = None
        if not self._output.is_stream:
            self._open(json.dumps({"fingerprint": fingerprint}).encode() + b"\n")

    def _open(self, header: bytes) -> None:
        """Read and lock the unfinished file, or make it; without one where something else has its name."""
        with self._explained():
            self._file = open_own(self._path)
        if self._file is None:
            get_logger().warning("%s is no regular file: an interrupted run will have to start anew", self._path)
            return
        try:
            if not lock(self._file):
                get_logger().warning("%s cannot be locked; make sure that only one process writes it", self._path)
        except BlockingIOError:
            self.close()
            raise UserError(
                f"{_KEY}: another process is writing {self._path}; wait for it or name another file"
            ) from None
        self._file.seek(self._read(self._file.read(), header))
        self._file.truncate()
        if self._file.tell() == 0:
            self._write(header)

    def _read(self, content: bytes, header: bytes) -> int:
        """Collect the completions; the size of what is whole and belongs to this run."""
        if content.strip(b"\0") and not content.startswith(_HEADER_START) and not _HEADER_START.startswith(content):
            self.close()
            raise UserError(f"{_KEY}: {self._path} is a file of something else; move it away or name another output")
        lines = content.splitlines(keepends=True)
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
        """Keep a batch of completions, safe on disk before this returns; `logprobs` and `image` where there are any."""
        entries = {i: asdict(completion) for i, completion in completions.items()}
        for entry in entries.values():
            for name in ("logprobs", "image"):
                if entry[name] is None:
                    del entry[name]
        self._write(b"".join(_line({"index": i, **entry}) for i, entry in entries.items()))
        self.found.update(entries)

    def finish(self, count: int) -> None:
        """Write completions 0..count-1 to the output file and remove the unfinished one."""
        with self._output.open() as file:
            file.writelines(_line(self.found[i]) for i in range(count))
        if self._file is not None:
            self._path.unlink(missing_ok=True)
        self.close()
        get_logger().info("%d texts written to %s", count, self._output.path)

    def close(self) -> None:
        """Let another run go on."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write(self, content: bytes) -> None:
        if self._file is not None:
            with self._explained():
                self._file.write(content)
                self._file.flush()
                os.fsync(self._file.fileno())

    def _explained(self) -> AbstractContextManager[None]:
        advice = "free space or name another file; the same command goes on where this one stopped"
        return write_errors(f"{_KEY}: {self._path}", advice)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"


def fingerprint(decoder: Decoder, texts: Sequence[Text]) -> str:
    """SHA-256 of the texts' prompts, images and settings, the tokenizer's name and ids, and the model with all its
    tensors."""
    digest = hashlib.sha256()
    common = [decoder.seq_length, decoder.recompute, decoder.logprobs, decoder.stop_at_eod, decoder.tokenizer.name]
    if not decoder.fast:  # the last bits of logits differ
        common.append("plain")
    digest.update(json.dumps([*common, decoder.model.config.model_dump(mode="json")]).encode())
    for name, layer in sparse_layers(decoder.model):
        digest.update(f"{name} {layer.selection}".encode())
    for text in texts:
        image = [decoder.images.digest(text.image)] if decoder.images and text.image else []
        digest.update(json.dumps([text.context, text.prompt, asdict(text.sampling), text.seed, *image]).encode())
    add_tensors(digest, decoder.model)
    return digest.hexdigest()


def add_tensors(digest: hashlib._Hash, model: nn.Module) -> None:
    """Add names, kinds and values of a model's tensors to a digest."""
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(content.numpy()))
