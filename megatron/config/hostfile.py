"""Which hostfile a launch reads, and what it means when that is not there."""

from __future__ import annotations

import os
from collections.abc import Mapping

from megatron.config.schema import LaunchConfig
from megatron.errors import UserError


def given_hostfile(config: LaunchConfig, env: Mapping[str, str]) -> str | None:
    """The hostfile that the configuration names, or else the environment; it need not be there."""
    return config.hostfile or env.get("DLTS_HOSTFILE") or None


def missing_hostfile(config: LaunchConfig, env: Mapping[str, str]) -> str | None:
    """The line that says that a hostfile is not there, so that this machine is used, as DeepSpeed does; else None.

    Published configurations name hostfiles of other clusters, such as /mock_path.
    """
    path = given_hostfile(config, env)
    if path is None or os.path.lexists(path):
        return None
    return f"hostfile: {path} does not exist: the run is on this machine alone"


def refuse_missing_hostfile(config: LaunchConfig, env: Mapping[str, str]) -> None:
    """Raise UserError where a hostfile is not there and other keys say that this machine is not what is meant."""
    if missing_hostfile(config, env) is None:
        return
    path, advice = given_hostfile(config, env), "give an existing file"
    if config.num_nodes > 1:
        raise UserError(f"hostfile: {path} does not exist, and num_nodes: {config.num_nodes} needs one; {advice}")
    if config.deepspeed_slurm:
        raise UserError(
            f"hostfile: {path} does not exist, and deepspeed_slurm: true starts what it names; {advice}, or hostfile: "
            "null for the nodes of the allocation"
        )
    if config.force_multi:
        raise UserError(f"hostfile: {path} does not exist, and force_multi: true needs one; {advice}")
