"""Text files to .bin/.idx pairs."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data.byte_split import check_sizes, split_by_bytes
from megatron.data.corpora import CORPORA, DEFAULT_CORPUS, CorpusFile, fetch_corpus
from megatron.data.indexed import IndexedDatasetBuilder, best_dtype, output_files
from megatron.data.text import SUFFIXES, RawDocument, TxtDocuments, check_inputs, read_documents, texts
from megatron.errors import UserError
from megatron.files import refuse_inputs
from megatron.log import get_logger
from megatron.tokenizer import Tokenizer, build_tokenizer

_CHUNK_DOCUMENTS, _CHUNK_BYTES = 64, 1 << 18
"""A worker is given documents until they are so many, or so long."""
_CHUNKS_AHEAD = 4
"""Chunks that are read for each worker before it asks; they bound the memory, and no worker waits."""
_WORTH_A_POOL = 1 << 20
"""Bytes of input below which one process is done before others have started."""

Encoded = list[npt.NDArray[np.integer]]


class Sized(Protocol):
    """What is encoded. num_bytes: how long that will take, roughly."""

    @property
    def num_bytes(self) -> int: ...


Item = TypeVar("Item", bound=Sized)
Result = TypeVar("Result")
EncodeChunk = Callable[[Sequence[Item]], list[Result]]


@dataclass(frozen=True)
class Preprocessed:
    """What was written: the prefix of each key's pair, and totals over all keys."""

    prefixes: dict[str, str]
    num_documents: int
    num_tokens: int
    num_empty: int
    """Documents without text under one of the keys."""

    def __str__(self) -> str:
        skipped = f"; {self.num_empty} empty documents skipped" if self.num_empty else ""
        pairs = ", ".join(self.prefixes.values())
        return f"{self.num_documents} documents, {self.num_tokens} tokens to {pairs}.bin/.idx{skipped}"


class Encoder:
    """Documents to the token ids of each key: [ids of key 0, ids of key 1, ...] each; empty where there is no text."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self._tokenizer, self._keys = tokenizer, list(keys)
        self._dtype = best_dtype(tokenizer.vocab_size)
        self._suffix = [tokenizer.eod_id] if append_eod else []

    def __call__(self, documents: Sequence[RawDocument]) -> list[Encoded]:
        every_text = [text for document in documents for text in texts(document, self._keys)]
        encoded = (ids + self._suffix if ids else ids for ids in self._tokenizer.encode_all(every_text))
        arrays = [np.array(ids, dtype=self._dtype) for ids in encoded]
        return [arrays[start : start + len(self._keys)] for start in range(0, len(arrays), len(self._keys))]


def default_workers(inputs: Sequence[str]) -> int:
    """As many as this process may use cores; one where the input is so small that others would start too late."""
    small = sum(os.path.getsize(path) for path in inputs) < _WORTH_A_POOL
    return 1 if small else len(os.sched_getaffinity(0))


def preprocess(
    inputs: Sequence[str],
    output_prefix: str | Path,
    tokenizer_config: TokenizerConfig,
    keys: Sequence[str] = ("text",),
    append_eod: bool = True,
    num_workers: int | None = None,
    txt_documents: TxtDocuments = "file",
    num_documents: int | None = None,
    log_interval: int = 100,
) -> Preprocessed:
    """Write `{output_prefix}_{key}_document.{bin,idx}` for every key; an existing pair is replaced at the end.

    A document without text under a key is left out of that key's pair, and counted. num_workers: processes that encode,
    `default_workers` unless it is given; the files are the same for any number. num_documents only scales the
    progress bar, which moves every log_interval documents. Raises UserError for anything wrong with the input;
    nothing is written then.
    """
    check_inputs(inputs)
    prefixes = _prefixes(output_prefix, keys, inputs)
    tokenizer = build_tokenizer(tokenizer_config)
    encoder, dtype = Encoder(tokenizer, keys, append_eod), best_dtype(tokenizer.vocab_size)
    num_tokens = num_empty = 0
    with ExitStack() as stack:
        builders = [stack.enter_context(IndexedDatasetBuilder(prefix, dtype)) for prefix in prefixes.values()]
        workers = default_workers(inputs) if num_workers is None else num_workers
        documents = encode_all(encoder, read_documents(inputs, txt_documents), workers)
        for encoded in tqdm(documents, total=num_documents, unit="doc", miniters=log_interval):
            for builder, ids in zip(builders, encoded, strict=True):
                num_tokens += len(ids)
                num_empty += not len(ids)
                if len(ids):
                    builder.add_document(ids)
        for key, builder in zip(keys, builders, strict=True):
            if not builder.num_documents:
                raise UserError(f"--input: no text under '{key}' in {', '.join(inputs)}; nothing was written")
        for builder in builders:
            builder.finalize()
    written = sum(builder.num_documents for builder in builders)
    result = Preprocessed(prefixes, written, num_tokens, num_empty)
    get_logger().info("wrote %s", result)
    return result


def _prefixes(output_prefix: str | Path, keys: Sequence[str], inputs: Sequence[str]) -> dict[str, str]:
    """The prefix of each key's pair, none of whose files is an input, perhaps through a link."""
    if repeated := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--jsonl-keys: '{repeated[0]}' is given twice; give each key once")
    prefixes = {key: f"{output_prefix}_{key}_document" for key in keys}
    for path in itertools.chain.from_iterable(map(output_files, prefixes.values())):
        refuse_inputs(path, "--input", inputs)
    return prefixes


def prepare_dataset(
    dataset: str | None,
    inputs: Sequence[str] | None,
    data_dir: str | Path,
    tokenizer_config: TokenizerConfig,
    name: str | None = None,
    keys: Sequence[str] = ("text",),
    num_workers: int | None = None,
    txt_documents: TxtDocuments = "file",
    force_redownload: bool = False,
    corpora: Mapping[str, tuple[CorpusFile, ...]] = CORPORA,
) -> Preprocessed:
    """Write `{data_dir}/{name}/{name}_{key}_document.{bin,idx}`; name: `name`, else `dataset`, else the first file's.

    Without `inputs`, `dataset` names one of the `corpora`, enwik8 unless it is given: it is downloaded to
    `{data_dir}/{dataset}/raw`, where complete files are kept unless `force_redownload`. Raises UserError for other
    names, and before a download for a tokenizer that cannot be built.
    """
    name = output_name(dataset, inputs, name)
    inputs = inputs or _downloaded(dataset, Path(data_dir), tokenizer_config, force_redownload, corpora)
    prefix = Path(data_dir) / name / name
    return preprocess(inputs, prefix, tokenizer_config, keys, True, num_workers, txt_documents)


def prepare_split(
    split_bytes: Sequence[int],
    dataset: str | None,
    inputs: Sequence[str] | None,
    data_dir: str | Path,
    tokenizer_config: TokenizerConfig,
    *,
    name: str | None = None,
    force_redownload: bool = False,
    corpora: Mapping[str, tuple[CorpusFile, ...]] = CORPORA,
    **options: Any,
) -> list[Preprocessed]:
    """`prepare_dataset` of the parts of one text file, divided by bytes, as {name}_train, {name}_valid and {name}_test.

    Args:
        split_bytes: those of each part.

    Raises: UserError for more than one file, and for one that is no .txt or too short; before a download where it can
        be told.
    """
    name = output_name(dataset, inputs, name)
    check_sizes(split_bytes)
    files = inputs or [file.unpacked or file.file_name for file in corpora.get(dataset or DEFAULT_CORPUS, ())]
    if files and (len(files) != 1 or not files[0].endswith(".txt")):
        raise UserError("--split-bytes: divides one .txt file; pass one, or leave it off")
    build_tokenizer(tokenizer_config)  # one that cannot be built is found before anything is written
    inputs = inputs or _downloaded(dataset, Path(data_dir), tokenizer_config, force_redownload, corpora)
    parts = split_by_bytes(inputs[0], split_bytes, Path(data_dir) / name / "parts")
    return [
        prepare_dataset(None, [str(path)], data_dir, tokenizer_config, name=f"{name}_{part}", **options)
        for part, path in parts.items()
    ]


def output_name(dataset: str | None, inputs: Sequence[str] | None, name: str | None) -> str:
    """What the output is called. Raises UserError for what is no folder's name."""
    found = name or dataset or (Path(inputs[0]).name.split(".")[0] if inputs else DEFAULT_CORPUS)
    if Path(found).name != found:
        raise UserError(
            f"--name: '{found}' is not a plain folder name; choose one without slashes, and the place with -d"
        )
    return found


def _downloaded(
    dataset: str | None,
    data_dir: Path,
    tokenizer: TokenizerConfig,
    force: bool,
    corpora: Mapping[str, tuple[CorpusFile, ...]],
) -> list[str]:
    dataset = dataset or DEFAULT_CORPUS
    if dataset not in corpora:
        raise UserError(
            f"--input: '{dataset}' cannot be downloaded (known: {', '.join(corpora)}); pass the text files with "
            f"--input FILES ({', '.join(SUFFIXES)})"
        )
    build_tokenizer(tokenizer)
    return fetch_corpus(dataset, data_dir / dataset / "raw", force, corpora)


def encode_all(encoder: EncodeChunk[Item, Result], documents: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """Encode in order, in `num_workers` processes (0 and 1: in this one). Raises UserError when one of them dies."""
    if num_workers < 0:
        raise UserError(f"--num-workers: {num_workers} processes cannot be started; give 0 or more")
    chunks = _chunks(documents)
    if num_workers <= 1:
        for chunk in chunks:
            yield from encoder(chunk)
        return
    waiting: deque[Future[list[Result]]] = deque()
    try:
        with ProcessPoolExecutor(num_workers, initializer=_set_encoder, initargs=(encoder,)) as pool:
            try:
                for chunk in chunks:
                    waiting.append(pool.submit(_encode, chunk))
                    if len(waiting) > _CHUNKS_AHEAD * num_workers:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)  # nobody takes what is encoded after a mistake in the input
    except BrokenProcessPool:
        raise UserError("--num-workers: a worker process died, perhaps for lack of memory; use fewer workers") from None


def _chunks(documents: Iterable[Item]) -> Iterator[list[Item]]:
    chunk, size = list[Item](), 0
    for document in documents:
        chunk.append(document)
        size += document.num_bytes
        if len(chunk) >= _CHUNK_DOCUMENTS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_encoder: EncodeChunk[Any, Any] | None = None


def _set_encoder(encoder: EncodeChunk[Any, Any]) -> None:
    global _encoder
    _encoder = encoder


def _encode(documents: Sequence[Any]) -> list[Any]:
    assert _encoder is not None
    return _encoder(documents)
