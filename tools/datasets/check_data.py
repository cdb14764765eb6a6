"""Read .bin/.idx pairs from end to end and compare their checksums: `python tools/datasets/check_data.py -h`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="common part of a pair's names, without suffix")
    parser.add_argument("--write", action="store_true", help="record checksums of pairs that have none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, and print a line a pair; 2 when one of them is damaged, after all were read."""
    from megatron.data.check import check_pair
    from megatron.errors import run_command

    args = parse_args(arguments)

    def check(prefix: str) -> None:
        print(check_pair(prefix, args.write))

    return max(run_command(partial(check, prefix)) for prefix in args.prefix)


if __name__ == "__main__":
    if not __package__:  # run by its path: then this folder is on the import path, not the one that holds megatron
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(main())
