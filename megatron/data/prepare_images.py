"""Images to .bin/.idx pairs: X_image_document, X_label_document, X_text_document and X_classes.txt.

The captions of an image are a document of X_text_document, each a sequence that ends with the end-of-document token.
Where captions answer prompts, each begins with its prompt, and X_prompt_length_document has the prompts' lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data.captions import Caption, Fault
from megatron.data.classes import classes_file
from megatron.data.decode import BrokenImageError, decode
from megatron.data.image_sources import ImageRecord, Listing, Place
from megatron.data.indexed import IndexedDatasetBuilder, best_dtype, output_files
from megatron.data.preprocess import encode_all
from megatron.errors import UserError
from megatron.files import find_regular_output, replaced_file, write_errors
from megatron.log import get_logger
from megatron.text import shortened
from megatron.tokenizer import Tokenizer, build_tokenizer

KINDS = ("image", "label", "text", "prompt_length")
"""What there are pairs of."""

_MOST_LABEL = 2**31 - 1
_MOST_WARNINGS = 100


class Faults:
    """Images that cannot be used, by name: the first ends the preparation, or each is left out with a line."""

    def __init__(self, skip: bool) -> None:
        self._skip, self.count = skip, 0

    def __call__(self, name: str, reason: str) -> None:
        """Raises UserError unless it is to be left out."""
        if not self._skip:
            advice = "mend or remove it, or leave such images out with --broken skip"
            raise UserError(f"{name}: {reason}; {advice}")
        self.count += 1
        if self.count <= _MOST_WARNINGS:
            end = "; further ones are only counted" if self.count == _MOST_WARNINGS else ""
            get_logger().warning("left out %s: %s%s", shortened(name, 200), reason, end)


@dataclass(frozen=True)
class PreparedImages:
    """What was written: the prefixes of pairs by what they hold (see KINDS), and counts."""

    prefixes: dict[str, str]
    num_images: int
    num_broken: int
    num_classes: int | None
    """None where the images have no labels."""

    def __str__(self) -> str:
        classes = f" of {self.num_classes} classes" if self.num_classes is not None else ""
        broken = f"; {self.num_broken} broken images left out" if self.num_broken else ""
        return f"{self.num_images} images{classes} to {', '.join(self.prefixes.values())}.bin/.idx{broken}"


@dataclass(frozen=True)
class _Checked:
    """An image as it is written: its bytes, ids of its captions with lengths of prompts, or what is wrong with it."""

    content: bytes = b""
    ids: Sequence[npt.NDArray[np.integer]] = ()
    prompt_lengths: Sequence[int] = ()
    fault: str = ""


class _Checker:
    """Reads and decodes images, in workers, and encodes their captions."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def __call__(self, records: Sequence[ImageRecord]) -> list[_Checked]:
        return [self._check(record) for record in records]

    def _check(self, record: ImageRecord) -> _Checked:
        try:
            content = record.content()
            decode(content)
            captions = record.texts()
        except BrokenImageError as error:
            return _Checked(fault=str(error))
        except OSError as error:
            return _Checked(fault=f"cannot be read ({error.strerror or error})")
        except UnicodeDecodeError:
            return _Checked(fault="its caption is not UTF-8 text")
        if self._tokenizer is None:
            return _Checked(content)
        if not captions:
            return _Checked(fault="has an empty caption")
        found = [self._ids(caption, self._tokenizer) for caption in captions]
        return _Checked(content, [ids for ids, _ in found], [length for _, length in found])

    @staticmethod
    def _ids(caption: Caption, tokenizer: Tokenizer) -> tuple[npt.NDArray[np.integer], int]:
        """(ids of prompt, text and end, length of the prompt). It is encoded alone, as when a text is generated."""
        prompt, text = tokenizer.encode_all([caption.prompt, caption.text])
        return np.array([*prompt, *text, tokenizer.eod_id], best_dtype(tokenizer.vocab_size)), len(prompt)


def prepare_images(
    listing: Listing,
    output_prefix: str | Path,
    tokenizer: TokenizerConfig,
    faults: Faults,
    seed: int = 1234,
    num_workers: int = 1,
) -> PreparedImages:
    """Write `{output_prefix}_image_document` and what goes with it, in a random order that the seed decides.

    Every image is decoded once, by one of `num_workers` processes; the files are the same for any number. They appear
    once all are complete. Labels, captions and names of classes of an earlier preparation under this name go where
    the images have none now.

    Raises: UserError for an image that is broken, without a label or caption where others have one, or of a class
        that does not exist, unless `faults` leaves it out; and where no image is left.
    """
    _check_names(listing.classes or ())
    kinds = _kinds(listing.records)
    records = [record for record in listing.records if _is_whole(record, kinds, listing.classes, faults)]
    encoder = build_tokenizer(tokenizer) if "text" in kinds else None
    prefixes = {kind: f"{output_prefix}_{kind}_document" for kind in KINDS}
    order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(records))
    with ExitStack() as stack:
        ids = best_dtype(encoder.vocab_size if encoder else 0)
        types: dict[str, type[np.integer]] = dict(zip(KINDS, (np.uint8, np.int32, ids, np.int32), strict=True))
        builders = {kind: stack.enter_context(IndexedDatasetBuilder(prefixes[kind], types[kind])) for kind in kinds}
        _write([records[number] for number in order], builders, _Checker(encoder), faults, num_workers)
        count = builders["image"].num_documents
        if not count:
            raise UserError("no images were found that can be used; nothing was written")
        _settle(builders, prefixes, classes_file(output_prefix), listing.classes)
    highest = max((record.label for record in records if record.label is not None), default=None)
    classes = len(listing.classes) if listing.classes else highest + 1 if highest is not None else None
    result = PreparedImages({kind: prefixes[kind] for kind in kinds}, count, faults.count, classes)
    get_logger().info("wrote %s", result)
    return result


def _check_names(classes: Sequence[str]) -> None:
    for name in classes:
        # Names of files may hold bytes that are no text; Python shows them as surrogates.
        if len(name.splitlines()) != 1 or any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"the name of class {shortened(name)} cannot be a line of text; rename it")


def _kinds(records: Sequence[ImageRecord]) -> list[str]:
    labels = any(record.label is not None for record in records)
    captions = [record.captions for record in records if record.captions is not None]
    prompts = any(not isinstance(found, Place) and any(caption.prompt for caption in found) for found in captions)
    if records and not labels and not captions:
        raise UserError(
            f"{records[0].name} and all other images have neither a label nor a caption; put them into folders of "
            "classes, or texts (.txt) or class numbers (.cls) beside them"
        )
    is_there = dict(zip(KINDS, (True, labels, bool(captions), prompts), strict=True))
    return [kind for kind in KINDS if is_there[kind]]


def _is_whole(record: ImageRecord, kinds: Sequence[str], classes: Sequence[str] | None, fault: Fault) -> bool:
    """Has an image what the others have, and a class that exists?"""
    reason, label = "", record.label
    if "text" in kinds and record.captions is None:
        reason = "has no caption, as others have"
    if "label" in kinds:
        most = len(classes) - 1 if classes else _MOST_LABEL
        if label is None:
            reason = "has no label, as others have"
        elif not 0 <= label <= most:
            reason = f"has label {label}, and the classes are 0 to {most}"
    if reason:
        fault(record.name, reason)
    return not reason


def _write(
    records: Sequence[ImageRecord],
    builders: dict[str, IndexedDatasetBuilder],
    checker: _Checker,
    fault: Fault,
    num_workers: int,
) -> None:
    found = encode_all(checker, records, num_workers)
    for record, checked in zip(records, tqdm(found, total=len(records), unit="image"), strict=True):
        if checked.fault:
            fault(record.name, checked.fault)
            continue
        builders["image"].add_document(np.frombuffer(checked.content, np.uint8))
        if record.label is not None and "label" in builders:
            builders["label"].add_document([record.label])
        if "text" in builders:
            builders["text"].add_sequences(checked.ids)
        if "prompt_length" in builders:
            builders["prompt_length"].add_document(checked.prompt_lengths)


def _settle(
    builders: dict[str, IndexedDatasetBuilder], prefixes: dict[str, str], names: Path, classes: Sequence[str] | None
) -> None:
    """Move everything to its place, and away what other images had there."""
    target = find_regular_output(names, "output")
    for builder in builders.values():
        builder.finalize()
    gone = [path for kind, prefix in prefixes.items() if kind not in builders for path in output_files(prefix)]
    with write_errors(str(names)):
        for path in gone if classes else [*gone, target]:
            path.unlink(missing_ok=True)
        if classes:
            with replaced_file(target) as file:
                file.write("".join(f"{name}\n" for name in classes).encode("utf-8"))
