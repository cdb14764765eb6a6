"""Net2Net for a Transformer checkpoint: a wider feed-forward that computes the same (section 4.3's comparison).

    python -m tools.paper.widen IN OUT --intermediate-size 12288

Further inner channels copy ones drawn at random, and what reads a channel divides its weight among the copies; noise
that sums to zero over the copies lets them differ (tools.growth_experiment.net2net). Widening the feed-forward is exact
at any size; the paper's widening of the stream is so only by whole numbers of copies. IN is a checkpoint of any form;
OUT, a run's folder at iteration 0, has weights and no optimizer state.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch
from torch import Tensor

from megatron.checkpoint.tensors import Tensors, TensorView
from megatron.config.sections.base import MAX_SIZE
from megatron.config.sections.model import TOKENFORMER
from megatron.errors import UserError, run_command
from megatron.exchange import canonical, open_checkpoint
from tools.growth_experiment.net2net import NOISE, widen


class WiderFeedForward(TensorView):
    """The model tensors of a Transformer with `size` inner channels in each feed-forward.

    Args:
        source: of a model with fewer.
        before, size: inner channels.
        seed: of the channels that are copied, and of the noise.
    """

    def __init__(self, source: Tensors, before: int, size: int, seed: int) -> None:
        super().__init__(source)
        self._generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(before, (size - before,), generator=self._generator)
        self._inner = torch.cat([torch.arange(before), drawn])

    def names(self, kind: str) -> list[str]:
        """Names of the model's tensors; there are no others."""
        return self.source.names(kind) if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Full shape of a tensor."""
        shape = self.source.shape(kind, name)
        if ".fc_in." in name:
            return (len(self._inner), *shape[1:])
        return (shape[0], len(self._inner)) if name.endswith(".fc_out.weight") else shape

    def tensor(self, kind: str, name: str) -> Tensor:
        """A whole tensor."""
        tensor = self.source.tensor(kind, name)
        if ".fc_in." in name:
            return tensor[self._inner]
        if name.endswith(".fc_out.weight"):
            return widen(tensor, torch.arange(len(tensor)), self._inner, NOISE, self._generator)
        return tensor


def main(arguments: list[str] | None = None) -> int:
    """Widen a checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.paper.widen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN", help="checkpoint to read")
    parser.add_argument("output", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("--intermediate-size", type=int, required=True, help="inner channels afterwards")
    parser.add_argument("--seed", type=int, default=1234, help="of what is drawn (default 1234)")
    options = parser.parse_args(arguments)
    checkpoint = open_checkpoint(options.input, key="IN")
    model = checkpoint.language
    if TOKENFORMER in model.layer_kinds:
        raise UserError(f"IN: {checkpoint.folder} has tokenformer blocks; grow it with tools/ckpts/grow.py")
    before, size = model.intermediate_size or 4 * model.hidden_size, options.intermediate_size
    if size <= before:
        raise UserError(f"--intermediate-size: {size} is not more than the {before} of {checkpoint.folder}")
    if size > MAX_SIZE:
        raise UserError(f"--intermediate-size: {size} is more than {MAX_SIZE:,}; give a smaller number")
    wide = model.replaced(intermediate_size=size)
    settings = {**checkpoint.resolved(), "intermediate_size": size, "save": options.output, "load": options.output}
    made = replace(
        checkpoint, model_config=wide, tensors=WiderFeedForward(checkpoint.tensors, before, size, options.seed),
        settings=settings, iteration=None, train_state={},
    )  # fmt: skip
    print(
        f"{canonical.write(options.output, made)}: {checkpoint.num_parameters:,} to {made.num_parameters:,} parameters"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
