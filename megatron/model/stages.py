"""Cutting a list of layers into pipeline stages; needs no DeepSpeed, so that plans can be made without it."""

from __future__ import annotations

from collections.abc import Sequence


def partition(weights: Sequence[int], stages: int) -> list[int]:
    """Cut a list of layers into `stages` runs of even weight.

    Layers of weight 0 stay with the first or last weighty one. Of equally even cuts the one with more layers in early
    stages is taken, since the last stage has the head.

    Returns: bounds [0, .., len(weights)]; stage i holds layers bounds[i] to bounds[i + 1] - 1.
    Raises: ValueError when there are fewer weighty layers than stages.
    """
    blocks = [i for i, weight in enumerate(weights) if weight]
    if stages > len(blocks):
        raise ValueError(f"{stages} pipeline stages for {len(blocks)} blocks; each stage needs a block")
    sums = [0]
    for i in blocks:
        sums.append(sums[-1] + weights[i])
    # best[n]: the cuts of the first n blocks with the least sum of squared stage weights, and that sum.
    best: dict[int, tuple[int, list[int]]] = {0: (0, [0])}
    for stage in range(stages):
        last = stage == stages - 1
        ends = [len(blocks)] if last else range(stage + 1, len(blocks) - (stages - stage - 1) + 1)
        best = {end: _best_cut(best, sums, end) for end in ends}
    cuts = best[len(blocks)][1]
    return [0, *(blocks[cut] for cut in cuts[1:-1]), len(weights)]


def _best_cut(best: dict[int, tuple[int, list[int]]], sums: Sequence[int], end: int) -> tuple[int, list[int]]:
    # Among equals the latest start wins: the last stage is then the shorter one.
    options = [
        (cost + (sums[end] - sums[start]) ** 2, -start, [*cuts, end])
        for start, (cost, cuts) in best.items()
        if start < end
    ]
    cost, _, cuts = min(options)
    return cost, cuts
