"""Join .bin/.idx pairs into one, document boundaries kept: `python tools/datasets/merge_datasets.py -h`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, that of GPT-NeoX's tool; `--input` may also name the pairs themselves, in their order."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="a folder of pairs, or prefixes of pairs, in order")
    add("--output-prefix", required=True, metavar="PREFIX", help="prefix of the pair to write")
    return parser.parse_args(arguments)


def find_prefixes(inputs: list[str]) -> list[str]:
    """The prefixes of the pairs that are named, those of a folder by name; raises UserError where a folder has none."""
    from megatron.errors import UserError

    found: list[str] = []
    for name in inputs:
        pairs = (
            sorted(str(path.with_suffix("")) for path in Path(name).glob("*.idx")) if Path(name).is_dir() else [name]
        )
        if not pairs:
            raise UserError(
                f"--input: {name} has no .idx file; name a folder with .bin/.idx pairs, or prefixes of pairs"
            )
        found += [pair.removesuffix(".bin").removesuffix(".idx") for pair in pairs]
    return found


def main(arguments: list[str] | None = None) -> None:
    """Parse and merge."""
    from megatron.data import IndexedDataset, IndexedDatasetBuilder

    args = parse_args(arguments)
    prefixes = find_prefixes(args.input)
    with IndexedDatasetBuilder(args.output_prefix, IndexedDataset(prefixes[0]).dtype) as builder:
        for prefix in prefixes:
            builder.add_index(prefix)
        documents = builder.num_documents
        builder.finalize()
    print(f"wrote {documents} documents of {len(prefixes)} pairs to {args.output_prefix}")


if __name__ == "__main__":
    if not __package__:  # run by its path: then this folder is on the import path, not the one that holds megatron
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from megatron.errors import run_command

    sys.exit(run_command(main))
