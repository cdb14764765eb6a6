"""What a cluster can do: a few known GPUs, or a description in a YAML file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config.yaml_file import parse_scalar
from megatron.config.yaml_loader import MAX_BYTES
from megatron.errors import UserError
from megatron.files import read_text
from megatron.mpu.gpus import peak_tflops

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """A cluster of equal nodes."""

    name: str
    """What reports call it."""
    memory_bytes: float
    """Memory of one GPU."""
    peak_flops: float
    """Dense 16-bit FLOP/s of one GPU."""
    memory_bandwidth: float
    """Bytes/s of one GPU's memory."""
    gpus_per_node: int = 8
    """GPUs joined by the fast links."""
    intra_node_bandwidth: float = 450e9
    """Bytes/s that one GPU sends within its node, one direction."""
    inter_node_bandwidth: float = 50e9
    """Bytes/s that one GPU sends out of its node, one direction; GPUs of a node add up."""
    intra_node_latency: float = 5e-6
    """Seconds of one step of a collective within a node."""
    inter_node_latency: float = 15e-6
    """Seconds of one step of a collective between nodes."""
    compute_fraction: float = 0.75
    """Part of peak_flops that long kernels reach."""
    bandwidth_fraction: float = 0.85
    """Part of memory_bandwidth that long kernels reach."""
    link_fraction: float = 0.8
    """Part of the links' bandwidths that long messages reach."""
    kernel_seconds: float = 2e-6
    """Time that a kernel loses while it starts and ends."""
    launch_seconds: float = 8e-6
    """Host time of one operation; kernels that are shorter wait for it."""
    memory_fraction: float = 0.92
    """Part of memory_bytes that tensors can use; the rest is the CUDA context, NCCL and fragments."""

    @property
    def usable_bytes(self) -> float:
        """Bytes of one GPU that tensors can use."""
        return self.memory_bytes * self.memory_fraction

    def link(self, size: int, stride: int) -> tuple[float, float]:
        """(bytes/s of one GPU, seconds of latency) of a group of `size` ranks that lie `stride` ranks apart.

        A group that crosses nodes leaves each node through the links of all its members there.
        """
        if size * stride <= self.gpus_per_node:
            return self.intra_node_bandwidth * self.link_fraction, self.intra_node_latency
        members = max(1, min(size, self.gpus_per_node // stride))
        bandwidth = min(self.intra_node_bandwidth, members * self.inter_node_bandwidth)
        return bandwidth * self.link_fraction, self.inter_node_latency


def _known(name: str, memory_bytes: float, memory_bandwidth: float, **network: float) -> Machine:
    """A machine of SXM modules, whose peak rate is in the table of all GPUs."""
    found = peak_tflops(name.partition("-")[0])
    assert found is not None, name
    return Machine(name, memory_bytes, found[0] * 1e12, memory_bandwidth, **network)  # type: ignore[arg-type]


# Data sheets of the SXM modules (NVLink: one direction, half of the total they name) and of the DGX systems' network,
# one InfiniBand adapter a GPU: 400 Gbit/s (H100, H200) and 200 Gbit/s (A100). Fractions and latencies are assumptions.
MACHINES = {
    machine.name: machine
    for machine in (
        _known("H200-141GB", 141e9, 4.8e12),
        _known("H100-80GB", 80e9, 3.35e12),
        _known("A100-80GB", 80e9, 2.039e12, intra_node_bandwidth=300e9, inter_node_bandwidth=25e9),
        _known("A100-40GB", 40e9, 1.555e12, intra_node_bandwidth=300e9, inter_node_bandwidth=25e9),
    )
}
DEFAULT_MACHINE = "H200-141GB"


def find_machine(name: str) -> Machine:
    """A known machine by its name, or the one that a YAML file describes; UserError when it is neither."""
    known = {key.lower(): machine for key, machine in MACHINES.items()}
    if name.lower() in known:
        return known[name.lower()]
    if Path(name).is_file():
        return read_machine(name)
    raise UserError(f"--machine: '{name}' is neither a file nor one of {', '.join(MACHINES)}")


def read_machine(path: str) -> Machine:
    """The machine of a YAML file: the fields of `Machine`, those of `base` (a known machine) where not given.

    Raises: UserError naming the file and the field.
    """
    try:
        fields = parse_scalar(read_text(path, "--machine", "give a YAML file", MAX_BYTES))
    except UserError as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path}: expected `field: value` lines such as `memory_bytes: 80.0e+9`")
    base = fields.pop("base", None)
    if base is not None and (not isinstance(base, str) or base not in MACHINES):
        raise UserError(f"{path}: base: unknown '{base}'; choose one of {', '.join(MACHINES)}")
    known = {field.name: field for field in dataclasses.fields(Machine)}
    values = {name: _checked(path, name, value, known) for name, value in fields.items()}
    if base is not None:
        return dataclasses.replace(MACHINES[base], **{"name": Path(path).stem, **values})
    missing = [name for name in ("memory_bytes", "peak_flops", "memory_bandwidth") if name not in values]
    if missing:
        raise UserError(f"{path}: {missing[0]}: missing; give it, or start from a known machine with `base`")
    return Machine(**{"name": Path(path).stem, **values})


def _checked(path: str, name: Any, value: Any, known: dict[str, Any]) -> Any:
    if name not in known:
        raise UserError(f"{path}: {name}: unknown field; known are base, {', '.join(known)}")
    if name == "name":
        return str(value)
    try:
        number = float(value)  # YAML reads 80e9 as text
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    valid = not isinstance(value, bool) and 0 < number < float("inf")
    if name == "gpus_per_node":
        if not valid or number != int(number):
            raise UserError(f"{path}: {name}: expected a positive whole number, got {value!r}")
        return int(number)
    if not valid or (name.endswith("_fraction") and number > 1):
        unit = "a number above 0, at most 1" if name.endswith("_fraction") else "a positive number"
        raise UserError(f"{path}: {name}: expected {unit}, got {value!r}")
    return number
