"""The paper's tables with this program's own figures beside the published ones.

    python -m tools.paper zero_shot [PATH ...]      growth, images, ablations, enwik8, or all
    python -m tools.paper growth work_dirs/paper/tokenformer_124M_to_1-4B_30B/checkpoints
    python -m tools.paper cost --png cost.png       work among tokens and with parameters (Figure 5)

PATH is a run's folder, a checkpoint of any form, or a results file of eval.py. Results files of a run are found in its
folder and the one above; validation losses are those of its metrics.jsonl. A figure that is not there is a dash, and
the command that would fill it is named.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from megatron.config import load_config
from megatron.errors import UserError, run_command
from megatron.files import write_output
from tools.paper import cost
from tools.paper.found import find
from tools.paper.tables import TABLES


def main(arguments: list[str] | None = None) -> int:
    """Read what there is, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=[*TABLES, "all", "cost"])
    parser.add_argument("paths", nargs="*", metavar="PATH", help="runs, checkpoints or results files")
    parser.add_argument("--config", nargs="+", metavar="YAML", help="of an official pytorch_model.bin among them")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file too")
    parser.add_argument("--png", metavar="FILE", help="cost: draw the figure")
    options = parser.parse_args(arguments)
    if options.png and options.table != "cost":
        raise UserError("--png: only cost has a figure; leave it off")
    if options.table == "cost":
        if options.paths:
            raise UserError(f"PATH: cost is computed from sizes alone; leave {options.paths[0]} off")
        if options.png:
            cost.draw(options.png)
        print(cost.as_text())
        if options.json:
            write_output(options.json, json.dumps(cost.rows(), indent=1) + "\n", "--json")
        return 0
    config = load_config(options.config) if options.config else None
    found = [find(path, config) for path in options.paths]
    tables = [make(found) for name, make in TABLES.items() if options.table in (name, "all")]
    print("\n\n".join(table.as_text() for table in tables))
    if options.json:
        text = json.dumps([asdict(table) for table in tables], indent=1)
        write_output(options.json, text + "\n", "--json")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
