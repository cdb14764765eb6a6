"""Train a tokenizer on text files: `python tools/datasets/train_tokenizer.py -h`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    files = ".txt, .jsonl, .jsonl.gz, .jsonl.zst or .jsonl.zst.tar files"
    add("--input", nargs="+", required=True, metavar="FILE", help=files)
    add("--jsonl-keys", nargs="+", default=["text"], help="keys to learn from")
    add("--txt-documents", choices=["file", "lines"], default="file", help="a .txt file is one document, or one a line")
    add("--vocab-size", type=int, required=True, help="number of entries, <|endoftext|> among them")
    add("--output", required=True, metavar="FILE", help="tokenizer.json (bpe) or NAME.model (spm) to write")
    add("--type", choices=["bpe", "spm"], default="bpe", help="bpe: for HFTokenizer; spm: for SPMTokenizer")
    return parser.parse_args(arguments)


def read_texts(args: argparse.Namespace) -> Iterator[str]:
    """The texts of all documents and keys, with a progress bar."""
    from tqdm import tqdm

    from megatron.data.text import read_documents, texts
    from megatron.errors import UserError

    seen = False
    for document in tqdm(read_documents(args.input, args.txt_documents), unit="doc"):
        for text in filter(None, texts(document, args.jsonl_keys)):
            seen = True
            yield text
    if not seen:
        raise UserError(f"--input: no text in {', '.join(args.input)}; nothing was written")


def main(arguments: list[str] | None = None) -> None:
    """Parse and train."""
    from megatron.data.text import check_inputs
    from megatron.files import find_output
    from megatron.log import get_logger
    from megatron.tokenizer.training import train_sentencepiece, train_tokenizer

    args = parse_args(arguments)
    check_inputs(args.input)
    find_output(args.output, "--output", args.input)
    train = train_tokenizer if args.type == "bpe" else train_sentencepiece
    train(read_texts(args), args.vocab_size, args.output)
    get_logger().info(f"wrote {args.output}")


if __name__ == "__main__":
    if not __package__:  # run by its path: then this folder is on the import path, not the one that holds megatron
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from megatron.errors import run_command

    sys.exit(run_command(main))
