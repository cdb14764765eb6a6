"""Machines: their links and rates, and files that describe them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.errors import UserError
from megatron.mpu.gpus import peak_tflops
from megatron.planner import MACHINES, find_machine
from tests.planner.workloads import H200


def test_groups_that_leave_a_node_are_slower() -> None:
    inside, across = H200.link(8, 1), H200.link(8, 8)
    assert inside[0] == H200.intra_node_bandwidth * H200.link_fraction
    assert across[0] == H200.inter_node_bandwidth * H200.link_fraction
    assert H200.link(16, 1)[0] == 8 * across[0]  # eight members of the group in each node


def test_peaks_are_those_of_the_metrics() -> None:
    for name, machine in MACHINES.items():
        found = peak_tflops(f"NVIDIA {name.partition('-')[0]}")
        assert found is not None and machine.peak_flops == found[0] * 1e12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: B300\n", "base: unknown 'B300'; choose one of H200-141GB"),
        ("base: H100-80GB\nmemory: 3\n", "memory: unknown field; known are base, name, memory_bytes"),
        ("base: H100-80GB\ngpus_per_node: 2.5\n", "gpus_per_node: expected a positive whole number, got 2.5"),
        ("base: H100-80GB\nlink_fraction: 2\n", "link_fraction: expected a number above 0, at most 1, got 2"),
        ("peak_flops: 1e15\n", "memory_bytes: missing; give it, or start from a known machine"),
        ("- 1\n", "expected `field: value` lines"),
        ("a: [\n", "cannot be read as YAML"),
    ],
)
def test_mistakes_in_a_machine_file_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "machine.yml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"machine\.yml") as error:
        find_machine(str(path))
    assert message in str(error.value)
