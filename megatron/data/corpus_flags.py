"""The flags of prepare_data.py that say where text comes from, and what they ask for besides encoding it."""

from __future__ import annotations

import argparse

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data.corpora import CORPORA
from megatron.data.preprocess import output_name, prepare_split
from megatron.data.shards import SHARDED, fetch_and_join, join_local
from megatron.errors import UserError

_NAMES = ", ".join([*CORPORA, *SHARDED])
_DATASET = f"""name of the data set; without --input one of {_NAMES} (default enwik8), downloaded. pile is the Pile
without what is under copyright; pile_deduped_pythia is what Pythia and the published TokenFormers were trained on,
tokens in their order"""


def add_corpus_flags(parser: argparse.ArgumentParser) -> None:
    """The name, --input, --join and --split-bytes."""
    add = parser.add_argument
    add("dataset", nargs="?", help=_DATASET)
    add("--input", nargs="+", metavar="FILE", help="local .txt, .jsonl, .jsonl.gz, .jsonl.zst or .tar files")
    add("--join", nargs="+", metavar="FILE", help="parts of a .bin (STEM-00000-of-00082.bin ...) and its .idx, to join")
    parts = "divide the text by bytes into NAME_train, NAME_valid and NAME_test, as in 90000000 5000000 5000000"
    add("--split-bytes", nargs="+", type=int, metavar="BYTES", help=parts)


def join_from_flags(args: argparse.Namespace) -> bool:
    """Join the parts that the flags name; false where they name none. Raises UserError."""
    is_published = args.dataset in SHARDED and not args.input
    if not args.join and not is_published:
        return False
    for flag in ("input", "split_bytes", "images", "shards", "npz"):
        if getattr(args, flag):
            what = "--join" if args.join else args.dataset
            raise UserError(f"--{flag.replace('_', '-')}: {what} has tokens already and no text; leave it off")
    name = output_name(args.dataset or "joined", None, args.name)
    if args.join:
        join_local(args.join, f"{args.data_dir}/{name}/{name}_text_document", args.force_redownload)
    else:
        fetch_and_join(args.dataset, args.data_dir, args.force_redownload, name=name)
    return True


def split_from_flags(args: argparse.Namespace, tokenizer: TokenizerConfig) -> bool:
    """Prepare the parts of a text that --split-bytes asks for; false where it does not. Raises UserError."""
    if not args.split_bytes:
        return False
    prepare_split(
        args.split_bytes, args.dataset, args.input, args.data_dir, tokenizer, name=args.name, keys=args.jsonl_keys,
        num_workers=args.num_workers, txt_documents=args.txt_documents, force_redownload=args.force_redownload,
    )  # fmt: skip
    return True
