"""Say what is in a training checkpoint: progress, sizes, parameter tokens and where they came from, optimizer, files.

FOLDER is a run's folder (its latest checkpoint) or one of its global_step folders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint to read")
    parser.add_argument("--verify", action="store_true", help="compare the checksums of all files, too")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Parse, read and print."""
    args = parse_args(arguments)

    import json

    from megatron.growth.describe import as_text, describe_checkpoint

    facts = describe_checkpoint(args.folder, args.verify)
    print(json.dumps(facts, indent=1) if args.json else as_text(facts))


if __name__ == "__main__":
    if not __package__:  # run by its path: then this folder is on the import path, not the one that holds megatron
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    from megatron.errors import run_command

    sys.exit(run_command(main))
