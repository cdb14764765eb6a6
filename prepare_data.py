"""Encode text, a public corpus or images into {data_dir}/{name}/{name}_text_document (or _image_) .bin and .idx."""

from __future__ import annotations

import argparse
import sys

from megatron.data.corpus_flags import add_corpus_flags, join_from_flags, split_from_flags
from megatron.data.image_flags import add_image_flags, prepare_from_flags
from megatron.data.preprocess import prepare_dataset
from megatron.errors import run_command
from megatron.tokenizer import TOKENIZER_TYPES, tokenizer_of_flags


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, GPT-NeoX's flags and those for local text."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add_corpus_flags(parser)
    add("--name", help="name of the output. Default: dataset, else the first file's name")
    add("--jsonl-keys", nargs="+", default=["text"], help="keys to encode, each into files of its own")
    add("--txt-documents", choices=["file", "lines"], default="file", help="a .txt file is one document, or one a line")
    add("-t", "--tokenizer", metavar="TYPE", default="GPT2BPETokenizer", help=", ".join(TOKENIZER_TYPES))
    add("-v", "--vocab-file", help="tokenizer.json, GPT-2's vocab.json, a .model, a .tiktoken or an encoding's name")
    add("-m", "--merge-file", help="merges.txt of GPT-2")
    add("-d", "--data-dir", default="data", help="folder for the output. Default: data")
    add("-f", "--force-redownload", action="store_true", help="download again what is there already")
    add(
        "--index-for",
        nargs="+",
        metavar="CONFIG",
        help="build the sample orders of a run with these YAML files instead",
    )
    of_runs = "with --index-for: override a key, as in train.py"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=of_runs)
    add("--processes", type=int, metavar="N", help="with --index-for: processes of the run. Default: its launch keys'")
    add("--num-workers", type=int, help="processes that encode. Default: one a core, or one for less than a MiB")
    add_image_flags(parser)
    return parser.parse_args(arguments)


def build_index(files: list[str], overrides: list[str], processes: int | None) -> None:
    """What a run would build at its start, built now."""
    from megatron.config.cli import parse_run  # with what it needs, torch among it, for this only
    from megatron.training.orders import build_orders

    flags = [word for override in overrides for word in ("--set", override)]
    build_orders(parse_run([*files, *flags], "train.py")[0], processes)


def main(arguments: list[str] | None = None) -> None:
    """Parse and prepare."""
    args = parse_args(arguments)
    if args.index_for:
        return build_index(args.index_for, args.set, args.processes)
    if join_from_flags(args):
        return None
    tokenizer = tokenizer_of_flags("--tokenizer", args.tokenizer, args.vocab_file, args.merge_file)
    if prepare_from_flags(args, tokenizer) or split_from_flags(args, tokenizer):
        return None
    prepare_dataset(
        args.dataset,
        args.input,
        args.data_dir,
        tokenizer,
        name=args.name,
        keys=args.jsonl_keys,
        num_workers=args.num_workers,
        txt_documents=args.txt_documents,
        force_redownload=args.force_redownload,
    )
    return None


if __name__ == "__main__":
    sys.exit(run_command(main))
