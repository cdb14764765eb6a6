"""The first time of new tokens: how old they are, and when their keys begin to decay."""

from __future__ import annotations

import math
from typing import Any

from megatron.engine.base import Engine
from megatron.growth.plan import KINDS
from megatron.log import get_logger
from megatron.training.state import TrainState

LOOK_EVERY = 10
"""Updates since the growth between two looks at the size of the new keys, for which the host waits for the device."""
_AS_LARGE = 0.999
"""Part of the old keys' root mean square that is as large: rotated keys start there, give or take rounding."""


class NewTokens:
    """What is to be known of the tokens of a run's latest growth before each update.

    What is found out about them goes to the growth's entry in the lineage, which every checkpoint has: a run that
    resumes does as one that was not stopped.

    Args:
        state: of the run; `decays_since` of the last entry of its lineage is written.
        engine: trains them. Nothing of it is held beside it: a closed engine is to leave nothing.
    """

    def __init__(self, state: TrainState, engine: Engine) -> None:
        self._state, self._engine = state, engine
        self._entry: dict[str, Any] | None = state.lineage[-1] if state.lineage else None
        self._looks = engine.new_keys.wait and self._entry is not None
        engine.new_keys.decay(KINDS if self._entry is None else self._decaying())

    def before_update(self) -> float:
        """Let keys decay that are large enough by now; updates since the growth, for the warm-up. Collective."""
        if self._entry is None:
            return math.inf
        age = self._state.updates - self._entry["updates"]
        if self._looks and age % LOOK_EVERY == 0:
            self._look(self._entry)
        # A model taken over with `finetune` may have grown in updates that this run has not.
        return age if age >= 0 else math.inf

    def _decaying(self) -> dict[str, int]:
        return {} if self._entry is None else self._entry.get("decays_since", {})

    def _look(self, entry: dict[str, Any]) -> None:
        sizes = self._engine.new_keys.root_mean_squares()
        grown = {
            kind: self._state.updates
            for kind, (new, old) in sizes.items()
            if kind not in self._decaying() and new >= _AS_LARGE * old
        }
        if grown:
            self._engine.new_keys.decay(grown)
            entry["decays_since"] = {**self._decaying(), **grown}
            get_logger().info("new keys of %s are as large as the old ones: they decay from now on", ", ".join(grown))
        self._looks = sizes.keys() > self._decaying().keys()
