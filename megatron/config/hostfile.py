"""Which hostfile a launch reads, and what it means when that is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from megatron.config.sections.launch import LaunchConfig
from megatron.errors import ConfigError
from megatron.text import shortened

CLUSTER_HOSTFILE = "/job/hostfile"
"""Where DeepSpeed looks for one that nobody names."""


def given_hostfile(config: LaunchConfig, env: Mapping[str, str]) -> str | None:
    """The hostfile that the configuration names, or else the environment; it need not be there."""
    return config.hostfile or env.get("DLTS_HOSTFILE") or None


def found_hostfile(config: LaunchConfig, env: Mapping[str, str]) -> str | None:
    """The hostfile that the launch reads; None where there is none."""
    given = given_hostfile(config, env)
    if given:
        return given if missing_hostfile(config, env) is None else None
    return CLUSTER_HOSTFILE if os.path.isfile(CLUSTER_HOSTFILE) else None


def missing_hostfile(config: LaunchConfig, env: Mapping[str, str]) -> str | None:
    """The line that says that a hostfile is not there, so that this machine is used, as DeepSpeed does; else None.

    Published configurations name hostfiles of other clusters, such as /mock_path.
    """
    path = given_hostfile(config, env)
    if path is None or os.path.lexists(path):
        return None
    return f"hostfile: {path} does not exist: the run is on this machine alone"


def find_host_mistakes(config: LaunchConfig, env: Mapping[str, str]) -> Iterator[ConfigError]:
    """Hosts that are named where there are none to choose from: a mistyped `include: FILE`, most often."""
    is_alone = int(env.get("WORLD_SIZE", "1")) == 1
    if config.deepspeed_slurm or given_hostfile(config, env) or os.path.isfile(CLUSTER_HOSTFILE) or not is_alone:
        return
    for key in ("include", "exclude"):
        names = (item.partition(":")[0] for item in (getattr(config, key) or "").split("@"))
        if wrong := next((name for name in names if name not in ("", "localhost")), None):
            yield not_a_host(key, wrong)


def not_a_host(key: str, name: str) -> ConfigError:
    """The mistake of a name that is none."""
    reason = f"'{shortened(name)}' is neither a YAML file nor a host, for there is no hostfile"
    return ConfigError(key, reason, "correct it, or give --hostfile FILE")


def refuse_missing_hostfile(config: LaunchConfig, env: Mapping[str, str]) -> None:
    """Raise ConfigError where a hostfile is not there and other keys say that this machine is not what is meant."""
    if missing_hostfile(config, env) is None:
        return
    missing, advice = f"{given_hostfile(config, env)} does not exist", "give an existing file"
    if config.num_nodes > 1:
        raise ConfigError("hostfile", f"{missing}, and num_nodes: {config.num_nodes} needs one", advice)
    if config.deepspeed_slurm:
        advice += ", or hostfile: null for the nodes of the allocation"
        raise ConfigError("hostfile", f"{missing}, and deepspeed_slurm: true starts what it names", advice)
    if config.force_multi:
        raise ConfigError("hostfile", f"{missing}, and force_multi: true needs one", advice)
