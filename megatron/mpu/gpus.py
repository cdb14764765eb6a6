"""What NVIDIA's GPUs can do at most: the denominator of model FLOPs utilisation (MFU).

Rates are dense 16-bit tensor-core TFLOP/s with fp32 accumulation, from the data sheets (where these give only the rate
with 2:4 sparsity, half of it) and, for GeForce cards, from NVIDIA's architecture white papers.
"""

from __future__ import annotations

import re

_SOURCES = {
    "V100": "NVIDIA V100 data sheet (fp16)",
    "A100": "NVIDIA A100 data sheet",
    "H100": "NVIDIA H100 data sheet",
    "H200": "NVIDIA H200 data sheet",
    "Blackwell": "NVIDIA HGX and GB200 NVL72 data sheets",
}

# (pattern that the whole device name matches, TFLOP/s, source). Names are those of torch.cuda.get_device_name.
_PEAKS: tuple[tuple[str, float, str], ...] = (
    (r"(Tesla )?V100-SXM[23].*", 125.0, _SOURCES["V100"]),
    (r"(Tesla )?V100-PCIE.*", 112.0, _SOURCES["V100"]),
    (r"(A100|A800)([- X].*)?", 312.0, _SOURCES["A100"]),
    (r"A10", 125.0, "NVIDIA A10 data sheet"),
    (r"A10G", 70.0, "AWS A10G data sheet"),
    (r"A40", 149.7, "NVIDIA A40 data sheet"),
    (r"L4", 121.0, "NVIDIA L4 data sheet"),
    (r"L40", 181.0, "NVIDIA L40 data sheet"),
    (r"L40S", 362.0, "NVIDIA L40S data sheet"),
    (r"H100 PCIe|H800 PCIe", 756.5, _SOURCES["H100"]),
    (r"H100 NVL", 835.5, _SOURCES["H100"]),
    (r"(H100|H800)( SXM5)?( \d+GB)?( HBM[23]e?)?", 989.5, _SOURCES["H100"]),
    (r"H20(-\d+GB)?(-3e)?", 148.0, "NVIDIA H20 data sheet"),
    (r"H200 NVL", 835.5, _SOURCES["H200"]),
    (r"H200( SXM)?( \d+GB)?( HBM3e)?", 989.5, _SOURCES["H200"]),
    (r"GH200( \d+GB)?( HBM3e?)?", 989.5, "NVIDIA GH200 data sheet"),
    (r"B200( .*)?", 2250.0, _SOURCES["Blackwell"]),
    (r"B300( .*)?", 2250.0, _SOURCES["Blackwell"]),
    (r"GB200( .*)?", 2500.0, _SOURCES["Blackwell"]),
    (r"GB300( .*)?", 2500.0, _SOURCES["Blackwell"]),
    (r"GeForce RTX 3090", 71.0, "NVIDIA Ampere GA102 white paper"),
    (r"GeForce RTX 4090", 165.2, "NVIDIA Ada white paper"),
    (r"GeForce RTX 5090", 209.5, "NVIDIA RTX Blackwell white paper"),
)


def peak_tflops(name: str) -> tuple[float, str] | None:
    """(dense 16-bit TFLOP/s, source) of the GPU that torch calls `name`; None for an unknown one.

    The name has to match as a whole, so that a laptop's chip or a cut-down relative does not pass for the known card.
    A MIG slice (`NVIDIA A100-SXM4-40GB MIG 1g.5gb`) has a part of its card's rate, so it counts as unknown.
    """
    model = re.sub(r"^NVIDIA\s+|\s+$", "", name)
    if is_mig_slice(name):
        return None
    return next(((rate, source) for pattern, rate, source in _PEAKS if re.fullmatch(pattern, model)), None)


def is_mig_slice(name: str) -> bool:
    """Is this a part of a GPU (multi-instance GPU)?"""
    return re.search(r"\bMIG\b", name) is not None
