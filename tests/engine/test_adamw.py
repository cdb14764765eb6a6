"""AdamW without torch's compiler computes what torch's does."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.engine.adamw import AdamW


def test_updates_and_state_are_those_of_torch() -> None:
    def trained(kind: type[torch.optim.AdamW]) -> tuple[list[Tensor], dict[str, object]]:
        generator = torch.Generator().manual_seed(1)
        made = [torch.randn(5, 3, generator=generator).requires_grad_() for _ in range(2)]
        groups = [{"params": made[:1], "weight_decay": 0.1}, {"params": made[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
        for _ in range(3):
            for parameter in made:
                parameter.grad = torch.randn(5, 3, generator=generator)
            optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in made)
        return made, optimizer.state_dict()

    ours, state = trained(AdamW)
    theirs, expected = trained(torch.optim.AdamW)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert state["param_groups"] == expected["param_groups"]
    assert repr(state["state"]) == repr(expected["state"])
