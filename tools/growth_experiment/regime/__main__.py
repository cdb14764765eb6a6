"""Does growth save training in the regime of the published models? At CPU size, unattended.

    python -m tools.growth_experiment.regime prepare --output DIR [--text FILE] [--plan check]
    python -m tools.growth_experiment.regime plan --output DIR
    OMP_NUM_THREADS=1 python -m tools.growth_experiment.regime run --output DIR &     # one for each core
    python -m tools.growth_experiment.regime report --output DIR [--publish]

`plan` prints every trial in the order in which they run, with estimated core-hours and what is done. `run` goes through
them: several may run at once and share the work. A process that was stopped or killed loses what came after its last
checkpoint, at most a minute or two, and the same command goes on. While DIR/pause exists no trial is started. `--only`
picks trials by name; `--together` says how many of one shape take their updates in one computation, two to three times
as fast as one by one. A trial that fails leaves DIR/TRIAL/failed.txt and is passed over; remove the file to try it
again.

A result is written to --results as soon as it is there. With another text (--text, a file of prose such as enwik8) or
other --updates, give another --results too. A new DIR beside old results runs again only what is needed for its
checkpoints. `--plan check` has eleven trials of one seed, an hour of a core, which try on another text, and by another
factor, what was chosen on the first: rates and recipes are those of the results in the repository. `report --publish`
also writes what the documentation and `--dry-run` say of growth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron.errors import run_command

COMMANDS = ("prepare", "plan", "run", "report")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tools.growth_experiment.regime",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--output", type=Path, required=True, help="folder of data, checkpoints and the report")
    parser.add_argument("--results", type=Path, help="folder of results; default beside this tool, in the repository")
    parser.add_argument("--text", type=Path, help="prepare: text file; default the State of the Union addresses")
    parser.add_argument("--updates", type=int, help="prepare: updates of the base; default 890 tokens a parameter")
    parser.add_argument("--plan", choices=("full", "check"), default="full", help="prepare: which trials; default all")
    parser.add_argument("--sequences", type=int, help="prepare: held-out sequences of each text")
    parser.add_argument("--limit", type=int, help="run: end after so many trials")
    parser.add_argument("--only", default="", help="plan, run: pattern of trials' names, as in re.search; default all")
    parser.add_argument("--together", type=int, default=4, help="run: most trials in one computation; default 4")
    parser.add_argument("--publish", action="store_true", help="report: write docs/ and measured.json as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks for."""
    from megatron.mpu.environment import ensure_process_environment

    options = parse_args(arguments)
    ensure_process_environment()
    from tools.growth_experiment.regime.data import prepare
    from tools.growth_experiment.regime.publish import publish
    from tools.growth_experiment.regime.queue import plan, run_all
    from tools.growth_experiment.regime.report import write_report
    from tools.growth_experiment.regime.runs import Experiment
    from tools.growth_experiment.regime.sizes import HELD_OUT_SEQUENCES, base_updates

    if options.command == "prepare":
        updates = options.updates or base_updates()
        prepare(options.output, updates, options.text, options.sequences or HELD_OUT_SEQUENCES, options.plan)
        return 0
    results = options.results and options.results.resolve()
    experiment = Experiment(options.output.resolve(), results, options.only)
    if options.command == "run":
        run_all(experiment, options.limit, options.together)
    elif options.command == "plan":
        print(plan(experiment))
    else:
        print(publish(experiment) if options.publish else write_report(experiment))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
