"""Growth: more parameter tokens in a trained model, without changing what it computes (paper, section 3.4)."""

from megatron.growth.grow import grow
from megatron.growth.plan import TokenCounts, grown_config

__all__ = ["TokenCounts", "grow", "grown_config"]
