"""Adam's state of new tokens, made from that of the old ones (`new_moments: mean`).

A new token starts with the second moment of an average old token of the same layer and role, column by column, and with
a first moment of zero. So that Adam's bias correction fits, it takes over the count of updates t of the old tokens:

- The second moment then counts as what it is, an average over many updates: v / (1 - beta2^t) is that of the old
  tokens. With a count of its own the first update would divide v by 1 - beta2, and come out sqrt(1 / (1 - beta2)) times
  too small.
- The first moment starts from rest: 1 - beta1^t is 1, so that the first update is (1 - beta1) of a whole one and the
  momentum builds up over some 1 / (1 - beta1) updates.

Where old tokens have seen unlike numbers of updates t_i, their v_i / (1 - beta2^(t_i)) are averaged, and the mean
counts as one of the largest t. All new tokens have that count: ZeRO keeps one for a parameter group.
"""

from __future__ import annotations

from torch import Tensor, cat, zeros

from megatron.checkpoint.tensors import Tensors, TensorView


class MeanMoments(TensorView):
    """Tensors of a model that has just grown, with an optimizer state of the new tokens beside that of the old ones.

    New tokens start without, as they do in `grown`, unless all of them have old ones with second moments beside them:
    those of tokens that were frozen are gone, and other optimizers have none.

    Args:
        grown: the tensors after the growth.
        before: those before.
        beta2: decay rate of the second moments.
    """

    def __init__(self, grown: Tensors, before: Tensors, beta2: float) -> None:
        super().__init__(grown)
        self._beta2, states = beta2, set(before.names("optimizer"))
        new = [name for name in grown.names("model") if name not in set(before.names("model"))]
        self._old = {
            name: [old for old in _older(name) if {f"exp_avg_sq/{old}", f"step/{old}"} <= states] for name in new
        }
        if not all(self._old.values()):
            self._old = {}
        olds = {old for found in self._old.values() for old in found}
        self._steps = {name: before.tensor("optimizer", f"step/{name}") for name in sorted(olds)}
        self._largest = max(self._steps.values(), key=Tensor.item, default=None)
        self._new = {f"{moment}/{name}": name for name in self._old for moment in ("exp_avg", "exp_avg_sq", "step")}

    def names(self, kind: str) -> list[str]:
        """Names of a kind."""
        return [*self.source.names(kind), *(self._new if kind == "optimizer" else ())]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if kind != "optimizer" or name not in self._new:
            return self.source.shape(kind, name)
        return () if name.startswith("step/") else self.source.shape("model", self._new[name])

    def tensor(self, kind: str, name: str) -> Tensor:
        """A tensor, on the CPU."""
        if kind != "optimizer" or name not in self._new:
            return self.source.tensor(kind, name)
        if name.startswith("step/"):
            assert self._largest is not None, "there are old tokens, or there is no state of new ones"
            return self._largest.clone()  # an optimizer counts in what it gets
        return self.part(kind, name).contiguous()

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor; of one that was there, it is read alone."""
        if kind != "optimizer" or name not in self._new:
            return self.source.part(kind, name, *ranges)
        shape = self.shape(kind, name)
        row = zeros(shape[1:]) if name.startswith("exp_avg/") else self._mean(self._old[self._new[name]])
        return row.expand(shape)[ranges]

    def _mean(self, olds: list[str]) -> Tensor:
        """Second moment of an average token of these, [width]."""
        moments = [self.source.tensor("optimizer", f"exp_avg_sq/{old}") for old in olds]
        whole = [m.double() / self._part(self._steps[old]) for m, old in zip(moments, olds, strict=True)]
        assert self._largest is not None
        return (cat(whole).mean(0) * self._part(self._largest)).float()

    def _part(self, step: Tensor) -> float:
        """What Adam divides a second moment by after so many updates."""
        return 1.0 - self._beta2 ** int(step)


def _older(name: str) -> list[str]:
    """The names that such tokens of earlier growths have: x.key_tokens_0 and x.key_tokens_1 for x.key_tokens_2."""
    prefix, _, segment = name.rpartition("_")
    return [f"{prefix}_{i}" for i in range(int(segment))]
