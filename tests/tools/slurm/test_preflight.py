"""tools/slurm/preflight.sbatch on a real Slurm whose two nodes are not alike."""

from __future__ import annotations

import contextlib
import json
import re
import sysconfig
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.launched import ROOT, wait_until, write_config
from tests.tools.slurm.cluster import Cluster, missing_programs
from tests.tools.slurm.slow_disk import slow_disk

pytestmark = pytest.mark.launches

SCRIPT = ROOT / "tools/slurm/preflight.sbatch"
RATE = 8e6
PROLOG = """\
#!/bin/bash
if [ "$SLURMD_NODENAME" = node2 ]; then echo "export TMPDIR={slow}"; echo "unset PYTHONPATH"
else echo "export PYTHONPATH={packages}"; fi
"""


class Answer(NamedTuple):
    why_not_slow: str | None
    report: dict[str, Any]
    log: str
    state: str


def _environment_without(package: str, folder: Path) -> tuple[Path, Path]:
    """(interpreter that sees all packages of this one but `package`, folder that has just that)."""
    site = Path(sysconfig.get_paths()["purelib"])
    venv.create(folder / "env", symlinks=True, with_pip=False)
    rest, apart = next((folder / "env").glob("lib/python*/site-packages")), folder / "packages"
    apart.mkdir()
    for path in site.iterdir():
        ((apart if path.name.startswith(package) else rest) / path.name).symlink_to(path)
    return folder / "env/bin/python", apart


@pytest.fixture(scope="module")
def answer(tokenizer_file: Path, corpus_prefix: str) -> Iterator[Answer]:
    """What the preflight said of two nodes, of which node2 has no zstandard and a slow temporary folder."""
    if missing_programs():
        pytest.skip(f"Slurm is not installed: {', '.join(missing_programs())} not found")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flight")))
        python, packages = _environment_without("zstandard", folder)
        slow, prolog = folder / "slow", folder / "prolog"
        slow.mkdir()
        why_not = None
        try:
            stack.enter_context(slow_disk(slow, RATE))
        except OSError as error:
            why_not = f"a slow disk cannot be made here, it needs FUSE and the right to mount: {error}"
        prolog.write_text(PROLOG.format(slow=slow, packages=packages))
        prolog.chmod(0o755)
        cluster = stack.enter_context(Cluster(folder / "c", f"TaskProlog={prolog}\n"))
        config = write_config(folder / "run.yml", tokenizer_file, corpus_prefix)
        yield Answer(why_not, *_run(cluster, folder, python, config))


def _run(cluster: Cluster, folder: Path, python: Path, config: Path) -> tuple[dict[str, Any], str, str]:
    """The report, the job's output and what Slurm says of the job."""
    cluster.environment |= {
        "PYTHON": str(python), "REPORT": str(folder / "report.json"), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={folder / 'log'}"]
    job = cluster.run("sbatch", "--parsable", *options, str(SCRIPT), str(config), cwd=ROOT)
    log = folder / "log"
    done = wait_until(lambda: not cluster.run("squeue", "-h", "-j", job, check=False), 150)
    assert done and (folder / "report.json").exists(), f"{log.read_text() if log.exists() else ''}{cluster.logs()}"
    state = cluster.run("scontrol", "show", "job", job)
    return json.loads((folder / "report.json").read_text()), log.read_text(), state


def _findings(answer: Answer, check: str) -> list[dict[str, Any]]:
    return [finding for finding in answer.report["findings"] if finding["check"] == check]


def test_a_missing_package_is_named_with_its_node(answer: Answer) -> None:
    (finding,) = _findings(answer, "packages")
    assert finding["nodes"] == ["node2"] and finding["level"] == "problem", answer.log
    assert finding["text"].startswith("zstandard is missing; pip install zstandard==")
    assert answer.report["nodes"]["node1"]["checks"]["packages"]["value"]["zstandard"]


def test_a_slow_disk_is_named_with_its_node(answer: Answer) -> None:
    if answer.why_not_slow:
        pytest.skip(answer.why_not_slow)
    (finding,) = _findings(answer, "temporary folder")
    assert finding["nodes"] == ["node2"] and "slow disk" in finding["text"], answer.log
    rate = answer.report["nodes"]["node2"]["checks"]["temporary folder"]["value"]["rate"]
    assert RATE / 20 < rate <= RATE, "it was measured"


def test_nothing_else_of_what_does_not_depend_on_the_load_is_found(answer: Answer) -> None:
    checks = {"answer", "python", "source", "environment", "limits", "gpus", "shared folder", "data files", "torch"}
    assert [finding for finding in answer.report["findings"] if finding["check"] in checks] == [], answer.log
    assert {name: report["ended"] for name, report in answer.report["nodes"].items()} == {"node1": True, "node2": True}


def test_the_axes_are_measured_over_both_nodes(answer: Answer) -> None:
    assert len(answer.report["axes"] or ()) == 1, answer.log
    (group,) = answer.report["axes"]
    assert (group["axis"], group["ranks"], group["hosts"]) == ("data", [0, 1], ["node1", "node2"])
    assert group["rate"] > 0


def test_the_job_fails_and_its_log_is_the_table(answer: Answer) -> None:
    assert "ExitCode=1:0" in answer.state
    assert "packages          PROBLEM node2" in answer.log, answer.log
    # Both nodes are this machine: under load one of them may be found slow as well.
    assert re.fullmatch(r"verdict: \d+ problems on .*\bnode2\b.*", answer.log.strip().splitlines()[-1]), answer.log
