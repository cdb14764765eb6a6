"""Token files that are published in parts: fetched one after the other, checked, and joined into one .bin/.idx pair.

A part is appended to `{prefix}.joining.bin` and then let go of, so that the disk holds the data once and one part
beside it. `{prefix}.joining.json` says what has been joined: an interrupted call goes on from there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.data.checksum import checksum_path, file_checksum, write_checksums
from megatron.data.download import Patience
from megatron.data.hub import HUB, download_from_hub
from megatron.data.indexed import IndexedDataset
from megatron.errors import UserError
from megatron.files import read_errors, replaced_file, write_errors
from megatron.log import get_logger

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<last>\d{5})\.bin")
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class ShardedPair:
    """A .bin/.idx pair of which the .bin is published in `count` parts, `{stem}-00000-of-{count - 1}.bin` and so on."""

    folder: str
    """Address of the folder: hf://datasets/OWNER/NAME."""
    stem: str
    count: int
    sha256: str = ""
    """Of the whole .bin, where it is published."""

    @property
    def parts(self) -> list[str]:
        """Names of the parts, in order."""
        return [f"{self.stem}-{number:05}-of-{self.count - 1:05}.bin" for number in range(self.count)]

    @property
    def index(self) -> str:
        """Name of the .idx."""
        return f"{self.stem}.idx"


SHARDED: Mapping[str, ShardedPair] = {
    # Pythia's deduplicated Pile as it was trained on, 412 GB of uint16 ids of the GPT-NeoX-20B tokenizer.
    "pile_deduped_pythia": ShardedPair(
        f"{HUB}EleutherAI/pythia_deduped_pile_idxmaps",
        "pile_0.87_deduped_text_document",
        83,
        "0cd548efd15974d5cca78f9baddbd59220ca675535dcfc0c350087c79f504693",
    ),
}

Fetch = Callable[[str], Path]
"""From the name of a file to where it is now."""


def fetch_and_join(
    dataset: str,
    data_dir: str | Path,
    force: bool = False,
    sharded: Mapping[str, ShardedPair] = SHARDED,
    patience: Patience | None = None,
    name: str | None = None,
) -> str:
    """Download the parts of a published pair, and join them to `{data_dir}/{name}/{name}_text_document`.

    The Hub announces each file's checksum. A pair that is there is left alone unless `force`. Parts are downloaded to
    `{data_dir}/{dataset}/raw`; `name` is `dataset` unless it is given.

    Raises: UserError that names the part which cannot be had, is damaged, or is of another size than the others.
    """
    pair, raw, name = sharded[dataset], Path(data_dir) / dataset / "raw", name or dataset

    def fetch(file: str) -> Path:
        return download_from_hub(f"{pair.folder}/{file}", raw / file, patience=patience, flag="--join")

    return _Joining(Path(data_dir) / name / f"{name}_text_document", pair, fetch, are_ours=True)(force)


def join_local(
    files: Sequence[str],
    prefix: str | Path,
    force: bool = False,
    sharded: Mapping[str, ShardedPair] = SHARDED,
) -> str:
    """Join parts that are on this disk already, with their .idx among them; they stay.

    Args:
        files: `STEM-00000-of-00082.bin` and so on, in any order, and `STEM.idx`.
        prefix: of the pair to write.
        sharded: published pairs; what has the name of one must have its checksum too.

    Raises: UserError that names parts which are missing, or are of another size than the others.
    """
    found = {path.name: path for path in map(Path, files)}
    matches = [match for name in found if (match := _PART.fullmatch(name))]
    if not matches:
        raise UserError("--join: no parts of a .bin, which are called STEM-00000-of-00082.bin and so on")
    stem, count = matches[0]["stem"], int(matches[0]["last"]) + 1
    published = next((pair for pair in sharded.values() if (pair.stem, pair.count) == (stem, count)), None)
    pair = published or ShardedPair("", stem, count)
    wanted = [*pair.parts, pair.index]
    if others := [name for name in found if name not in wanted]:
        raise UserError(f"--join: {found[others[0]]} is no part of {pair.stem}; join one pair at a time")
    if missing := [name for name in wanted if name not in found]:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise UserError(f"--join: {listed} missing of {len(wanted)} files; pass all of them")
    for path in found.values():
        with read_errors(f"--join: {path}"):
            path.open("rb").close()
    return _Joining(Path(prefix), pair, lambda name: found[name], are_ours=False)(force)


@dataclass(frozen=True)
class _Joining:
    prefix: Path
    pair: ShardedPair
    fetch: Fetch
    are_ours: bool
    """The files that `fetch` gives are let go of once they are joined."""

    @property
    def parts(self) -> list[str]:
        return self.pair.parts

    def __call__(self, force: bool) -> str:
        final = [Path(f"{self.prefix}{suffix}") for suffix in (".bin", ".idx")]
        if all(path.is_file() for path in final) and not force:
            get_logger().info("%s.bin/.idx are there; --force-redownload makes them again", self.prefix)
            return str(self.prefix)
        with write_errors(str(self.prefix), "free some space, or name another place with -d"):
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
        sizes = self._joined()
        for number in range(len(sizes), len(self.parts)):
            sizes.append(self._append(number, sizes))
            get_logger().info("joined %s, %d of %d", self.parts[number], number + 1, len(self.parts))
        with write_errors(str(self.prefix), "free some space, or name another place with -d"):
            self._publish()
        return str(self.prefix)

    def _temporary(self, suffix: str) -> Path:
        return Path(f"{self.prefix}.joining{suffix}")

    def _joined(self) -> list[int]:
        """Bytes of the parts that an earlier call has joined; what came behind them is cut off."""
        try:
            recorded = json.loads(self._temporary(".json").read_bytes())
            sizes = [int(size) for name, size in zip(self.parts, recorded["bytes"], strict=False)]
            is_ours = recorded["parts"] == list(self.parts)
            have = self._temporary(".bin").stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            sizes, is_ours, have = [], False, 0
        while sizes and (not is_ours or sum(sizes) > have):
            sizes.pop()
        with write_errors(str(self._temporary(".bin"))):
            if self._temporary(".bin").is_file():
                os.truncate(self._temporary(".bin"), sum(sizes))
        return sizes

    def _append(self, number: int, sizes: Sequence[int]) -> int:
        """Fetch part `number` and append it; its bytes."""
        name = self.parts[number]
        path = self.fetch(name)
        with read_errors(f"{path}"):
            size = path.stat().st_size
        self._check_size(path, number, size, sizes)
        with write_errors(str(self._temporary(".bin")), "free some space; the same command goes on"):
            with path.open("rb") as part, self._temporary(".bin").open("ab") as whole:
                shutil.copyfileobj(part, whole, _COPY_BYTES)
                whole.flush()
                os.fsync(whole.fileno())
            with replaced_file(self._temporary(".json")) as file:
                file.write(json.dumps({"parts": list(self.parts), "bytes": [*sizes, size]}).encode())
        if self.are_ours:
            path.unlink()
        return size

    def _check_size(self, path: Path, number: int, size: int, sizes: Sequence[int]) -> None:
        """All parts but the last are of one size."""
        is_last = number == len(self.parts) - 1
        if sizes and (size > sizes[0] if is_last else size != sizes[0]):
            raise UserError(
                f"{path}: {size:,} bytes, where the parts before have {sizes[0]:,}; it is damaged or no part of this "
                "pair: remove it and get it again"
            )

    def _publish(self) -> None:
        shutil.copyfile(self.fetch(self.pair.index), self._temporary(".idx"))
        temporary = f"{self.prefix}.joining"
        try:
            IndexedDataset(temporary)
        except UserError as error:
            advice = f"a part or the .idx is not of this pair: remove {temporary}.* and join again"
            raise UserError(f"{error}; {advice}") from None
        checksums = {suffix: file_checksum(self._temporary(suffix)) for suffix in (".bin", ".idx")}
        if self.pair.sha256 not in ("", checksums[".bin"]):
            raise UserError(
                f"{temporary}.bin: its sha256 is {checksums['.bin']}, the published one {self.pair.sha256}; a part is "
                f"damaged or of another pair: remove {temporary}.* and join again"
            )
        checksum_path(str(self.prefix)).unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(self._temporary(suffix), f"{self.prefix}{suffix}")
        write_checksums(checksum_path(str(self.prefix)), str(self.prefix), checksums)
        self._temporary(".json").unlink()
        get_logger().info("wrote %s.bin/.idx", self.prefix)
