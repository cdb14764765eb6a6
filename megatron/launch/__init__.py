"""Starting a run: the launcher's command, the hosts it runs on, and watching over it until it ends."""

from megatron.launch.start import launch

__all__ = ["launch"]
