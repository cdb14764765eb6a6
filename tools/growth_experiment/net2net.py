"""Net2Net width expansion of a Transformer (Chen, Goodfellow and Shlens, Net2Net, 2016), exact for pre-norm blocks.

A wider layer computes copies of the narrow one's channels, and what reads a channel divides its weight among the
copies. The residual stream is copied a whole number of times, each channel equally often: LayerNorm then sees the same
mean and variance. Heads are copied with it. The feed-forward's inner channels need no such evenness, so further ones
copy channels drawn at random. Logits through the tied embedding would be multiplied by the number of copies: the final
norm's weight and bias are divided by it.

Copies that are read alike would stay alike for ever. So the weights of the copies get noise that sums to zero over the
copies of each channel: it changes no output and breaks the symmetry.

    python -m tools.growth_experiment.net2net        expands a random model and prints the difference of its logits
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from megatron.config.sections.model import ModelConfig
from megatron.errors import UserError, run_command
from megatron.model import LanguageModel

NOISE = 0.5
"""Standard deviation of the noise, as a part of that of the weights it is added to."""


def widen(weight: Tensor, rows: Tensor, columns: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """A matrix [out, in] whose outputs are copies `rows` and whose inputs are copies `columns` of the old channels."""
    copies = torch.bincount(columns, minlength=weight.shape[1])
    wide = weight[rows][:, columns] / copies[columns]
    if not noise:
        return wide
    extra = torch.randn(wide.shape, generator=generator) * noise * wide.std()
    sums = torch.zeros(len(rows), weight.shape[1]).index_add_(1, columns, extra)
    return wide + extra - (sums / copies)[:, columns]


def expand(
    tensors: dict[str, Tensor], before: ModelConfig, after: ModelConfig, seed: int, noise: float = NOISE
) -> dict[str, Tensor]:
    """The parameters of the wider model, by canonical name.

    Args:
        tensors: parameters of a model of `before`.
        before, after: Transformers with a tied embedding and blocks without norm parameters; heads of one size.
        seed: of the inner channels that are copied, and of the noise.
        noise: 0 keeps copies alike, in training too.

    Raises: UserError for models this cannot lead to each other.
    """
    stream, inner = _channels(before, after, seed)
    everything = {"embedding.word_embeddings.weight": torch.arange(before.padded_vocab_size or 0)}
    generator = torch.Generator().manual_seed(seed)
    copies = after.hidden_size // before.hidden_size
    result = {}
    for name, tensor in tensors.items():
        if name in everything:
            result[name] = tensor[:, stream]
        elif name.startswith("final_norm."):
            result[name] = tensor[stream] / copies
        else:
            rows = inner if "fc_in" in name else stream
            columns = inner if "fc_out" in name else stream
            result[name] = tensor[rows] if tensor.dim() == 1 else widen(tensor, rows, columns, noise, generator)
    return result


def _channels(before: ModelConfig, after: ModelConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Which old channel each new one copies, of the stream and of the feed-forward."""
    copies, rest = divmod(after.hidden_size, before.hidden_size)
    inner = [config.intermediate_size or 4 * config.hidden_size for config in (before, after)]
    if rest or after.head_dim != before.head_dim or inner[1] < inner[0] or before.no_weight_tying:
        raise UserError("net2net: the width must grow a whole number of times, with heads of one size and a tied head")
    if before.norm != "layernorm_nonparam" or before.final_norm_kind != "layernorm":
        raise UserError("net2net: needs norm layernorm_nonparam and final_norm layernorm")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(inner[0], (inner[1] - inner[0],), generator=generator)
    return torch.arange(before.hidden_size).repeat(copies), torch.cat([torch.arange(inner[0]), drawn])


@torch.no_grad()
def expanded_model(model: LanguageModel, after: ModelConfig, seed: int, noise: float = NOISE) -> LanguageModel:
    """A wider model that computes what `model` does."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    wide = LanguageModel(after)
    expanded = expand(tensors, model.config, after, seed, noise)
    for name, parameter in wide.named_parameters():
        parameter.copy_(expanded[name])
    return wide


@torch.no_grad()
def logit_difference(before: LanguageModel, after: LanguageModel, ids: Tensor) -> tuple[float, float]:
    """Largest difference of the logits of ids [b, s], and the largest logit."""
    old, new = before.eval()(ids), after.eval()(ids)
    return (old - new).abs().max().item(), old.abs().max().item()


def main() -> int:
    """Expand a random model of part c twice, and print what that changes."""
    from tools.growth_experiment.trials import SIZES, Trial

    sizes = [Trial("c", "", 1, size, 1, kind="transformer").model_config() for size in SIZES]
    model = LanguageModel(sizes[0], seed=1)
    ids = torch.randint(sizes[0].vocab_size or 0, (4, 128), generator=torch.Generator().manual_seed(1))
    for number, after in enumerate(sizes[1:]):
        wide = expanded_model(model, after, seed=number)
        difference, scale = logit_difference(model, wide, ids)
        print(
            f"{SIZES[number].name} -> {SIZES[number + 1].name}: logits differ by {difference:.1e} (largest {scale:.2f})"
        )
        model = wide
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
