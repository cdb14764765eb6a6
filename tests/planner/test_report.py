"""What the planner says of a configuration."""

from __future__ import annotations

from pathlib import Path

from megatron.planner import Workload, plan, read_machine, report
from megatron.planner.networks import num_parameters
from tests.planner.workloads import H200, published


def test_advice_can_be_given_back_as_keys() -> None:
    config = published("tokenformer/450M")
    choice = plan(Workload.of(config), H200, 16)[0].choice
    again = published("tokenformer/450M", **choice.overrides())
    assert Workload.of(again).configured(16) == choice


def test_report_says_by_how_much_nothing_fits(tmp_path: Path) -> None:
    machine = tmp_path / "toy.yml"
    machine.write_text("base: A100-40GB\nmemory_bytes: 4e9\n")
    text = report(published("tokenformer/1-5B"), read_machine(str(machine)), 8)
    assert "does not fit" in next(line for line in text.splitlines() if line.startswith("configured"))
    assert text.splitlines()[-1].startswith("nothing fits 8 x toy: the smallest layout")
    assert plan(Workload.of(published("tokenformer/1-5B")), read_machine(str(machine)), 8) == []


def test_a_run_that_grows_is_planned_at_its_largest() -> None:
    counts = {"qkv_slot_num": 2140, "proj_slot_num": 2140, "ffn_slot_num": 8560}
    text = report(
        published("tokenformer/150M", growth=[{"at_iteration": 10, "row_norm": "segment", **counts}]), H200, 8
    )
    grown, before = published("tokenformer/150M", **counts).model, published("tokenformer/150M").model
    assert f"model: {num_parameters(grown):,} parameters" in text
    assert f"after the last growth (1 in all); at first it has {num_parameters(before):,} parameters" in text
    assert "row norms: up to 2 in a layer (row_norm: segment)" in text
    assert text.splitlines()[-1] == report(published("tokenformer/150M", **counts), H200, 8).splitlines()[-1]


def test_report_names_what_the_configured_layout_lacks() -> None:
    text = report(published("tokenformer/150M", model_parallel_size=4), H200, 6)
    assert "configured: cannot run on 6 GPUs: 6 processes cannot hold" in text
