"""Does everything run on this GPU? `python tools/gpu_check.py`: ten minutes, one table, exit code 0 when all is well.

See docs/gpu_check.md. Each part runs in processes of its own and survives another's failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # run by its path
    sys.path.insert(0, str(ROOT))

from tools.gpu.parts import PARTS, select  # noqa: E402
from tools.gpu.report import summary, table, write_json  # noqa: E402
from tools.gpu.running import Settings, choose_device, run_part  # noqa: E402
from tools.gpu.wheels import bring, missing  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="two minutes: fewer rounds, no 1-5B")
    parser.add_argument("--parts", help=f"only these, joined by commas: {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to this file too")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="cpu: toy sizes, no GPU")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install what is missing from these wheels")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the parts and print the table; 0 all well, 1 a check failed, 2 it cannot run."""
    options = parse(argv)
    # Processes that are ended leave a lock of their progress bars behind, which the tracker would warn of.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    begin, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        try:
            parts = select(options.parts)
            lacking = bring(options.wheels, Path(folder) / "site") if options.wheels else missing()
        except (ValueError, RuntimeError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if lacking:
            print(f"error: missing: {', '.join(lacking)}; pip install them, or give --wheels FOLDER", file=sys.stderr)
            return 2
        device = choose_device(options.device)
        settings = Settings(device, folder, options.quick, toy=device == "cpu")
        for part in parts:
            for row in run_part(part, settings):
                print(f"{row.status:8} {row.part}: {row.check} {row.figure}", flush=True)
                rows.append(row)
    print(f"\n{table(rows)}\n\n{summary(rows, time.monotonic() - begin)}")
    if options.json:
        write_json(options.json, rows, {"device": device, "quick": options.quick, "parts": [p.name for p in parts]})
    return int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
