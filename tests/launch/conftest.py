"""A machine without devices, a hostfile of two nodes, launchers that count as installed."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _machine_without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.mpu.environment._DEVICE_FILES", ())
    monkeypatch.setattr("megatron.config.hostfile.CLUSTER_HOSTFILE", "/nonexistent/hostfile")


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# nodes\nnode1 slots=2\nnode2 slots=2\n")
    return str(path)


@pytest.fixture
def all_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.launch.command.shutil.which", lambda name: f"/usr/bin/{name}")
