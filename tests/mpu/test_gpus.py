"""The table of peak rates: whole names of devices, no relative passes for the known card."""

from __future__ import annotations

import pytest

from megatron.mpu.gpus import is_mig_slice, peak_tflops

KNOWN = {
    "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756.5, "NVIDIA H100 NVL": 835.5, "NVIDIA H200": 989.5, "NVIDIA H200 NVL": 835.5,
    "NVIDIA H20": 148.0, "NVIDIA GH200 480GB": 989.5, "NVIDIA GH200 120GB": 989.5, "NVIDIA B200": 2250.0,
    "NVIDIA B300 SXM6 AC": 2250.0, "NVIDIA GB200": 2500.0, "NVIDIA L4": 121.0, "NVIDIA L40": 181.0,
    "NVIDIA L40S": 362.0, "NVIDIA A10": 125.0, "NVIDIA A10G": 70.0, "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 5090": 209.5, "Tesla V100-SXM2-32GB": 125.0, "H100 80GB HBM3": 989.5,
}  # fmt: skip
UNKNOWN = [
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 5090 Laptop GPU",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "NVIDIA A1000", "NVIDIA L400", "Radeon",
]  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_gpu_has_the_rate_of_its_data_sheet(name: str) -> None:
    found = peak_tflops(name)
    assert found is not None and found[0] == KNOWN[name] and found[1]


@pytest.mark.parametrize("name", UNKNOWN)
def test_another_gpu_has_no_rate(name: str) -> None:
    assert peak_tflops(name) is None
    assert is_mig_slice(name) == ("MIG" in name)
