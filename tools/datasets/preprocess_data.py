"""Encode text files into a .bin/.idx pair, with GPT-NeoX's flags: `python tools/datasets/preprocess_data.py -h`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; --input takes files separated by commas, by spaces, or both."""
    from megatron.tokenizer import TOKENIZER_TYPES

    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, help=".txt, .jsonl, .jsonl.gz, .jsonl.zst or .jsonl.zst.tar files")
    add("--jsonl-keys", nargs="+", default=["text"], help="keys to encode, each into files of its own")
    add("--num-docs", type=int, help="number of documents, for the progress bar")
    add("--txt-documents", choices=["file", "lines"], default="file", help="a .txt file is one document, or one a line")
    add("--tokenizer-type", metavar="TYPE", required=True, help=", ".join(TOKENIZER_TYPES))
    add("--vocab-file", help="tokenizer.json, GPT-2's vocab.json, a .model, a .tiktoken or an encoding's name")
    add("--merge-file", help="merges.txt of GPT-2")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--ftfy", action="store_true", help="not supported; clean the text beforehand")
    add("--output-prefix", required=True, help="path of the files up to _{key}_document.bin")
    add("--dataset-impl", choices=["mmap"], default="mmap", help="format of the files")
    add("--workers", type=int, help="processes that encode. Default: one a core, or one for less than a MiB")
    add("--log-interval", type=int, default=100, help="documents between updates of the progress bar")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Parse and preprocess."""
    from megatron.data.preprocess import preprocess
    from megatron.errors import UserError
    from megatron.tokenizer import tokenizer_of_flags

    args = parse_args(arguments)
    if args.ftfy:
        raise UserError("--ftfy: not supported; clean the text beforehand and leave the flag off")
    preprocess(
        [path for group in args.input for path in group.split(",") if path],
        args.output_prefix,
        tokenizer_of_flags("--tokenizer-type", args.tokenizer_type, args.vocab_file, args.merge_file),
        keys=args.jsonl_keys,
        append_eod=args.append_eod,
        num_workers=args.workers,
        txt_documents=args.txt_documents,
        num_documents=args.num_docs,
        log_interval=args.log_interval,
    )


if __name__ == "__main__":
    if not __package__:  # run by its path: then this folder is on the import path, not the one that holds megatron
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from megatron.errors import run_command

    sys.exit(run_command(main))
