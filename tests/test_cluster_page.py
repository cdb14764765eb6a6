"""docs/cluster.md is followed: its marked blocks run as they stand, at toy size on a CPU.

Substitutions, and nothing else: local_cpu.yml and a YAML file of a tiny model after each configuration of a run (token
counts stay); numbers of nodes, processes and GPUs; a small vocabulary; the tokenizer's text, the downloaded corpus and
lm-eval's tasks by local ones. Where Slurm is not installed, the jobs' runs are started without it. `install` is not
run: its packages are compared with requirements/.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
import zstandard

from tests.launched import ROOT, environment, wait_until
from tests.tools.slurm.cluster import Cluster, missing_programs

PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"<!-- run: (\w+) -->\n\n((?:    .*\n)+)")
BLOCKS = {name: re.sub(r"^    ", "", text, flags=re.MULTILINE) for name, text in BLOCK.findall(PAGE)}
WORK = {
    "base": "354M_TokenFormer_Openwebtext2_basemodel",
    "grown": "354M_to_757M_TokenFormer_Openwebtext2_60k",
    "largest": "757M_to_1-5B_TokenFormer_Openwebtext2_60k",
}
TINY = {
    "num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "attention_config": [[["tokenformer"], 1]],
    "seq_length": 64, "max_position_embeddings": 64, "train_iters": 3, "lr_decay_iters": 3, "eval_iters": 1,
    "extra_save_iters": [], "split": "80,20,0", "master_addr": "127.0.0.1", "maximum_tokens": 4, "log_interval": 1,
}  # fmt: skip
SUBSTITUTIONS = {
    r"--vocab-size \d+": "--vocab-size 300",
    r"--num-workers \d+": "--num-workers 1",
    r"--nodes=8": "--nodes=1",
    r"--ntasks-per-node=\d+ --gpus-per-node=\d+ --cpus-per-task=\d+": "--ntasks-per-node=1",
    r"--gpus=1 ": "",
    r"(-d configs \S+)": r"\1 local_cpu.yml {tiny}",
    r"(pretrain\.sbatch \S+\.yml)": r"\1 local_cpu.yml {tiny}",
    r"lambada_openai piqa arc_easy": "harbor_choice --include_path tasks",
}
WITHOUT_SLURM = {
    r"srun --ntasks=1 ": "",
    r"(\w+=\$\()?sbatch .*pretrain\.sbatch ([^)\n]*)\)?": r"python deepy.py train.py -d configs \2",
}


class Site:
    """A folder that looks like the repository's root, with a cluster or without."""

    def __init__(self, folder: Path, cluster: Cluster | None) -> None:
        self.folder, self.cluster = folder, cluster
        for name in (path for path in ROOT.iterdir() if not path.name.startswith(".") and path.name != "data"):
            (folder / name.name).symlink_to(name)
        (folder / "tiny.yml").write_text(yaml.safe_dump(TINY))
        self.environment = dict(cluster.environment if cluster else environment())
        path = f"{Path(sys.executable).parent}{os.pathsep}{self.environment['PATH']}"
        own = {"PATH": path, "PYTHON": sys.executable, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        self.environment |= own

    def follow(self, name: str) -> str:
        """Run the block, every command of it, and give back what it printed."""
        commands = self.commands(name)
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], cwd=self.folder, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180,
        )  # fmt: skip
        assert result.returncode == 0, f"{commands}\n{result.stdout}"
        return result.stdout

    def commands(self, name: str) -> str:
        text = BLOCKS[name]
        for pattern, new in {**SUBSTITUTIONS, **({} if self.cluster else WITHOUT_SLURM)}.items():
            text = re.sub(pattern, new.replace("{tiny}", str(self.folder / "tiny.yml")), text)
        return text

    def latest(self, run: str) -> str:
        file = self.folder / "work_dirs" / WORK[run] / "checkpoints/latest"
        return file.read_text().strip() if file.exists() else "none"


def _put_texts(folder: Path) -> None:
    texts = [f"the people of the united states and the congress of state {n} " * 8 for n in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    packed = zstandard.compress(lines.encode())
    (folder / "data/openwebtext2/raw").mkdir(parents=True)
    with tarfile.open(folder / "data/openwebtext2/raw/openwebtext2.jsonl.zst.tar", "w") as archive:
        member = tarfile.TarInfo("2005-06.jsonl.zst")
        member.size = len(packed)
        archive.addfile(member, io.BytesIO(packed))
    (folder / "prompts.txt").write_text("the people of the\n")
    (folder / "tasks").mkdir()
    for name in ("harbor_choice.yaml", "harbor_choice.jsonl"):
        text = (ROOT / "tests/fixtures/eval" / name).read_text()
        (folder / "tasks" / name).write_text(text)
    (folder / "harbor_choice.jsonl").symlink_to("tasks/harbor_choice.jsonl")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Where the page was followed up to its jobs, which have ended."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="page")))
        cluster = None if missing_programs() else stack.enter_context(Cluster(folder / "slurm"))
        root = folder / "root"
        root.mkdir()
        place = Site(root, cluster)
        _put_texts(root)
        for name in ("tokenizer", "data", "jobs"):
            place.follow(name)
        if cluster:
            done = wait_until(lambda: not cluster.run("squeue", "-h", check=False), 150)
            logs = "\n".join(path.read_text()[-3000:] for path in root.glob("tokenformer-*.out"))
            assert done, f"{cluster.run('squeue')}\n{logs}"
        yield place


@pytest.mark.launches
def test_the_plan_names_layouts(site: Site) -> None:
    assert "GiB" in site.follow("plan")


@pytest.mark.launches
def test_every_growth_of_the_page_starts_from_the_run_before(site: Site) -> None:
    assert {run: site.latest(run) for run in WORK} == dict.fromkeys(WORK, "global_step3"), [
        path.read_text()[-3000:] for path in site.folder.glob("tokenformer-*.out")
    ]


@pytest.mark.launches
def test_the_jobs_ran_on_slurm(site: Site) -> None:
    if site.cluster is None:
        pytest.skip(f"Slurm is not installed: {', '.join(missing_programs())} not found")
    logs = [path.read_text() for path in sorted(site.folder.glob("tokenformer-*.out"))]
    assert len(logs) == 3 and "start 1 on node[1-2]" in logs[0]


@pytest.mark.launches
def test_the_grown_model_is_evaluated_generates_and_is_exported(site: Site) -> None:
    output = site.follow("use")
    assert "harbor_choice" in output and list(site.folder.glob("results/757M*.json"))
    assert len((site.folder / "samples.jsonl").read_text().splitlines()) >= 1
    config = json.loads((site.folder / "export/757M/config.json").read_text())
    assert config["hidden_size"] == TINY["hidden_size"]
    assert (site.folder / "export/757M/model.safetensors").is_file()


def test_the_install_block_names_the_pinned_torch_and_files_that_exist() -> None:
    lines = BLOCKS["install"].splitlines()
    pinned = re.search(r"^torch==\S+$", (ROOT / "requirements/requirements.txt").read_text(), re.MULTILINE)
    assert pinned and lines[1].endswith(f"pip install {pinned[0]}"), "torch first, by itself"
    files = re.findall(r"-r (\S+)", lines[2])
    assert files[0] == "requirements/requirements.txt" and all((ROOT / file).is_file() for file in files)
    assert f"torch {pinned[0].removeprefix('torch==')} built for" in PAGE


def test_every_marked_block_is_followed() -> None:
    assert sorted(BLOCKS) == sorted(["install", "tokenizer", "data", "plan", "jobs", "use"])
    assert PAGE.count("<!-- run:") == len(BLOCKS)
