"""Make a zero-shot task from held-out text: `python tools/datasets/make_demo_task.py -h`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="text or JSONL files the model has not seen")
    add("--jsonl-key", default="text", help="key of the text in JSONL files")
    add("--output", required=True, metavar="DIR", help="folder of the task, for include_path")
    add("--name", default="sotu_continuation", help="name of the task, for eval_tasks")
    add("--num-documents", type=int, default=200, help="questions in the task")
    add("--distractors", choices=("sentences", "word_order"), default="sentences", help="what the wrong choices are")
    add("--seed", type=int, default=1234, help="seed of the choice of sentences and distractors")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Parse and write the task."""
    from eval_tasks.local import read_texts, write_continuation_task
    from megatron.log import get_logger

    args = parse_args(arguments)
    texts = [text for path in args.input for text in read_texts(path, args.jsonl_key)]
    task_file = write_continuation_task(
        texts, args.output, args.name, args.num_documents, args.seed, args.distractors, args.input
    )
    get_logger().info("task %s written to %s", args.name, task_file)


if __name__ == "__main__":
    if not __package__:  # run by its path: then this folder is on the import path, not the one that holds megatron
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from megatron.errors import run_command

    sys.exit(run_command(main))
