"""Public text corpora that are downloaded by name."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.data.download import Patience, download, verify
from megatron.data.hub import HUB, download_from_hub
from megatron.errors import UserError
from megatron.files import find_regular_output, part_file


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus.

    url: on the web, or hf://datasets/OWNER/NAME/FILE on the Hugging Face Hub, which knows the checksum. checksum:
    "algorithm:HEX" of the download. unpacked: for a zip of one file, the name that file gets, with
    unpacked_checksum; the zip is removed then.
    """

    url: str
    checksum: str | None = None
    unpacked: str | None = None
    unpacked_checksum: str | None = None

    @property
    def file_name(self) -> str:
        """The downloaded file's name: the last part of the address."""
        return self.url.rpartition("/")[2]


def _pile(num_shards: int) -> tuple[CorpusFile, ...]:
    base = f"{HUB}monology/pile-uncopyrighted/train"
    return tuple(CorpusFile(f"{base}/{shard:02}.jsonl.zst") for shard in range(num_shards))


CORPORA: Mapping[str, tuple[CorpusFile, ...]] = {
    "enwik8": (
        CorpusFile(
            "https://mattmahoney.net/dc/enwik8.zip",
            checksum="sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            unpacked="enwik8.txt",
            unpacked_checksum="md5:a1fa5ffddb56f4953e226637dabbb36a",
        ),
    ),
    # 8,013,769 documents, those that the `datasets` library calls openwebtext.
    "openwebtext": tuple(CorpusFile(f"{HUB}Skylion007/openwebtext/subsets/urlsf_subset{n:02}.tar") for n in range(21)),
    "openwebtext2": (CorpusFile(f"{HUB}segyges/OpenWebText2/openwebtext2.jsonl.zst.tar"),),
    # Without the parts of the Pile that are under copyright, so another corpus than that of the published models.
    "pile": _pile(30),
    "pile_subset": _pile(1),
}


DEFAULT_CORPUS = "enwik8"
"""What GPT-NeoX prepares where no name is given."""


def fetch_corpus(
    name: str,
    folder: Path,
    force: bool = False,
    corpora: Mapping[str, tuple[CorpusFile, ...]] = CORPORA,
    patience: Patience | None = None,
) -> list[str]:
    """Download the corpus into `folder` and return its text files, for read_documents().

    Complete files are kept unless `force`. Raises UserError for what cannot be had or fails its checksum.
    """
    return [str(_fetched(wanted, folder, force, patience)) for wanted in corpora[name]]


def _fetched(wanted: CorpusFile, folder: Path, force: bool, patience: Patience | None) -> Path:
    archive = folder / wanted.file_name
    if wanted.url.startswith(HUB):
        return download_from_hub(wanted.url, archive, force, patience)
    if wanted.unpacked is None:
        return download(wanted.url, archive, wanted.checksum, force, patience)
    text = folder / wanted.unpacked
    if force or not text.is_file():
        download(wanted.url, archive, wanted.checksum, force, patience)
        try:
            _unpack(archive, text, wanted.unpacked_checksum)
        finally:
            archive.unlink()
    return text


def _unpack(archive: Path, target: Path, checksum: str | None) -> None:
    """The only file of a zip to `target`; names inside the zip are never used as paths."""
    target = find_regular_output(target, "--data-dir")
    file, part = part_file(target)
    try:
        with file, zipfile.ZipFile(archive) as unzipped:
            members = [member for member in unzipped.infolist() if not member.is_dir()]
            if len(members) != 1:
                raise UserError(f"{archive}: holds {len(members)} files instead of one; it was removed, try again")
            with unzipped.open(members[0]) as packed:
                shutil.copyfileobj(packed, file, 1 << 20)
        verify(part, checksum, str(archive))
        os.replace(part, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive}: not a valid zip file ({error}); it was removed, try again") from error
    finally:
        part.unlink(missing_ok=True)
