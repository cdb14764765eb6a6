"""Pattention as a layer: a drop-in for nn.Linear whose parameters are tokens.

Needs only torch: `Pattention(768, 768, num_tokens=3072)` works in a notebook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megatron.config.sections.model import RowNorm
from megatron.model.joint import JointCall, JointLayer
from megatron.mpu.collectives import Form, enter, leave, sum_scatter
from megatron.mpu.layout import ALONE, Axis
from megatron.mpu.roles import Feeds, Projection, Role, mark_role
from megatron.mpu.shard import mark_sharded, take_share, whole_shape
from megatron.ops.pattention import ParameterTokens
from megatron.ops.pattention_backends import select_backend

ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")


def norm_groups(sizes: Sequence[int], row_norms: Sequence[RowNorm] | None) -> list[list[int]]:
    """The segments that share a row norm, group by group, by their indices; those without tokens are in none.

    Args:
        sizes: tokens of each segment, oldest first.
        row_norms: `segment` for one that starts a group, `joint` for one in that of the tokens before it; None means
            that all are joint.
    """
    groups: list[list[int]] = []
    for i in (i for i, size in enumerate(sizes) if size):
        if not groups or (row_norms is not None and row_norms[i] == "segment"):
            groups.append([])
        groups[-1].append(i)
    return groups


def _count(taus: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """int64 []; of several norm groups [groups]."""
    return torch.tensor(taus[0] if len(taus) == 1 else list(taus), dtype=torch.int64, device=device)


class Pattention(JointLayer):
    """Input tokens attend to learnable key-value parameter tokens (paper, section 3.2).

    The tokens are held in segments, one at first and one more for each growth, so that old and new tokens can have
    optimizer settings and states of their own. Segment i has the parameters `key_tokens_i` [n_i, in_features] and
    `value_tokens_i` [n_i, out_features]; the tokens of the layer are their concatenation.

    With tensor parallelism each rank holds a share of the tokens of every segment. Tokens have no order, so any share
    is as good as another; the ranks sum the squares of their scores for the row norm, and their outputs.

    Args:
        in_features, out_features: widths of input and output.
        num_tokens: parameter tokens n, one number or one a segment. A later segment of 0 has no parameters: segment i
            of all layers came with the same growth, in which some layers may not have grown.
        activation: l2_norm_gelu, gelu_l2_norm or softmax (see `megatron.ops.pattention.theta`).
        backend: auto, reference, fused, compiled or triton (see `megatron.ops.pattention_backends`).
        recompute_scores: keep less for the backward pass, and multiply by the keys again there.
        projection, feeds: which of a block's projections this is, for the roles of its parameters.
        tau_tokens: tau^2 of the first norm group, or of each; the number of its tokens when not given. It stays what
            it was when tokens are appended.
        row_norms: for each segment `joint`, in one norm group with the tokens before it, or `segment`, the first of
            one of its own. Theta is taken over the scores of each group alone. Default: one group.
        axis: the tensor ranks, which share the tokens; row statistics and outputs are summed over them.
        inputs, outputs: form of x and of the result between tensor ranks: `whole` on each; `channels`, a share of the
            last dimension each; `tokens`, a share of the sequence each (sequence parallelism).
        device, dtype: as in nn.Linear; the meta device works.
    """

    tau_tokens: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tokens: int | list[int],
        activation: str = "l2_norm_gelu",
        *,
        backend: str = "auto",
        recompute_scores: bool = False,
        projection: Projection | None = None,
        feeds: Feeds | None = None,
        tau_tokens: int | Sequence[int] | None = None,
        row_norms: Sequence[RowNorm] | None = None,
        axis: Axis = ALONE,
        inputs: Form = "whole",
        outputs: Form = "whole",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        segments = [num_tokens] if isinstance(num_tokens, int) else list(num_tokens)
        if not segments or min(in_features, out_features, segments[0]) < 1 or min(segments) < 0:
            raise ValueError(f"Pattention({in_features}, {out_features}, {num_tokens}): sizes must be positive")
        self.row_norms: list[RowNorm] = list(row_norms or ["joint"] * len(segments))
        """Of each segment; see `norm_groups`."""
        if len(self.row_norms) != len(segments):
            raise ValueError(f"row_norms: {len(self.row_norms)} for {len(segments)} segments; give one for each")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: unknown '{activation}'; choose one of {', '.join(ACTIVATIONS)}")
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.segment_sizes, self.backend, self.recompute_scores = segments, backend, recompute_scores
        """Number of tokens of each segment, those of all tensor ranks, oldest first."""
        self.axis, self.inputs, self.outputs, self.projection, self.feeds = axis, inputs, outputs, projection, feeds
        for i in self.segments:
            self._register_segment(i, device, dtype)
        initial_tau = [tau_tokens] if isinstance(tau_tokens, int) else list(tau_tokens or self.norm_sizes)
        # The count is data, not weights: it is real even while the weights are on the meta device.
        self.register_buffer("tau_tokens", _count(initial_tau, device))
        self._initial_tau = initial_tau
        self._find_columns()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys N(0, 0.02), values N(0, 1/n): outputs of about the inputs' size. LanguageModel has its own."""
        for i in self.segments:
            if self.get_parameter(f"key_tokens_{i}").is_meta:
                continue  # nothing to fill, and torch takes longer to find out than to build all else
            for kind, std in (("key", 0.02), ("value", self.num_tokens**-0.5)):
                tokens = getattr(self, f"{kind}_tokens_{i}")
                whole = torch.empty(whole_shape(tokens), device=tokens.device, dtype=tokens.dtype).normal_(std=std)
                tokens.data.copy_(take_share(whole, tokens, self.axis))
        self.reset_tau()

    def reset_tau(self) -> None:
        """Write tau_tokens as given at construction (needed after moving off the meta device)."""
        self.tau_tokens.copy_(self.initial_tau)

    @property
    def initial_tau(self) -> Tensor:
        """What tau_tokens starts as; of several norm groups one number each."""
        return _count(self._initial_tau)

    def _find_columns(self) -> None:
        shares = [self.axis.share(size) for size in self.segment_sizes]
        columns = tuple(sum(shares[i][1] - shares[i][0] for i in group) for group in self.norm_groups)
        self.norm_columns = columns if len(columns) > 1 else ()
        """Tokens of each norm group on this rank; () stands for one group."""

    def _register_segment(self, i: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        size = self.segment_sizes[i]
        start, stop = self.axis.share(size)
        for kind, width in (("key", self.in_features), ("value", self.out_features)):
            tokens = nn.Parameter(torch.empty(stop - start, width, device=device, dtype=dtype))
            mark_sharded(tokens, 0, (size, width), self.axis)
            role = Role("key_tokens", self.projection, i)
            mark_role(tokens, role if kind == "key" else Role("value_tokens", self.projection, i, self.feeds))
            self.register_parameter(f"{kind}_tokens_{i}", tokens)

    @torch.no_grad()
    def append(
        self, size: int, values: Tensor | None = None, keys: Tensor | None = None, row_norm: RowNorm = "joint"
    ) -> None:
        """Add a segment of `size` tokens without changing what the layer computes (GELU activations).

        Keys of zero have no scores and no weights, and tau_tokens stays. With a row norm of their own tokens leave the
        others alone, whatever the activation: values of zero change nothing. A size of 0 only counts.

        Args:
            values: the new values [size, out_features], of which a tensor rank takes its share; default N(0, 1/n).
            keys: the new keys [size, in_features], likewise; default zero.
            row_norm: as in the constructor.
        """
        old, i = self.get_parameter("key_tokens_0"), len(self.segment_sizes)
        self.segment_sizes, self.row_norms = [*self.segment_sizes, size], [*self.row_norms, row_norm]
        if not size:
            return
        self._register_segment(i, old.device, old.dtype)
        if values is None:
            values = torch.empty(size, self.out_features).normal_(std=self.num_tokens**-0.5)
        if keys is None:
            keys = torch.zeros(size, self.in_features)
        for kind, whole in (("key", keys), ("value", values)):
            tokens = self.get_parameter(f"{kind}_tokens_{i}")
            tokens.copy_(take_share(whole, tokens, self.axis))
        if row_norm == "segment":
            self._initial_tau = [*self._initial_tau, size]
            self.tau_tokens = torch.cat([self.tau_tokens.view(-1), self.tau_tokens.new_tensor([size])])
        self._find_columns()

    @property
    def segments(self) -> list[int]:
        """Indices of the segments that have tokens."""
        return [i for i, size in enumerate(self.segment_sizes) if size]

    @property
    def num_tokens(self) -> int:
        """Parameter tokens n of the layer, those of all tensor ranks."""
        return sum(self.segment_sizes)

    @property
    def norm_groups(self) -> list[list[int]]:
        """Indices of the segments in each norm group."""
        return norm_groups(self.segment_sizes, self.row_norms)

    @property
    def norm_sizes(self) -> list[int]:
        """Tokens in each norm group, those of all tensor ranks."""
        return [sum(self.segment_sizes[i] for i in group) for group in self.norm_groups]

    @property
    def key_param_tokens(self) -> Tensor:
        """Keys of all segments, [n, in_features]; this rank's share."""
        return self._joined("key")

    @property
    def value_param_tokens(self) -> Tensor:
        """Values of all segments, [n, out_features]; this rank's share."""
        return self._joined("value")

    def _joined(self, kind: str) -> Tensor:
        segments = [getattr(self, f"{kind}_tokens_{i}") for i in self.segments]
        return segments[0] if len(segments) == 1 else torch.cat(segments)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, *, joint: JointCall | None = None) -> Tensor:
        """x [.., in_features] -> [.., out_features].

        Args:
            token_mask: which tokens there are, bool [num_tokens], or for each row of x a choice of its own,
                [.., num_tokens]; in the order of the segments, on every tensor rank that of all tokens. A token that
                is masked out is like one that the layer does not have: it has no part in the row norm, which is that
                of the others, while tau stays. A row without tokens gives zeros.
            joint: the call that this layer is a part of.

        Raises: ValueError for a mask that is not one.
        """
        parameters = self.read_parameters()
        if token_mask is not None:
            parameters = parameters._replace(mask=self._share_of(token_mask))
        return (joint or JointCall([self], x)).enter(self, x, parameters)

    def _share_of(self, mask: Tensor) -> Tensor:
        """This rank's columns of a mask, bool [.., n] -> [.., n_rank]."""
        if mask.dtype != torch.bool or mask.shape[-1:] != (self.num_tokens,):
            found = f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            raise ValueError(f"token_mask: expected bool [.., {self.num_tokens}], got {found}")
        if self.axis.size == 1:
            return mask
        parts = mask.split(self.segment_sizes, -1)
        return torch.cat([part[..., slice(*self.axis.share(part.shape[-1]))] for part in parts], -1)

    def read_parameters(self) -> ParameterTokens:
        """Keys, values, tau_tokens and norm groups; this rank's share."""
        return ParameterTokens(self.key_param_tokens, self.value_param_tokens, self.tau_tokens, self.norm_columns)

    @staticmethod
    def compute(layers: Sequence[Pattention], parameters: Sequence[ParameterTokens], x: Tensor) -> list[Tensor]:
        """x [.., in_features] -> [.., out_features] of each layer, in the forms `inputs` and `outputs`."""
        first = layers[0]
        _, function = select_backend(first.backend, x.device.type, first.recompute_scores)
        return first.given(function(first.taken(x), parameters, first.activation, first.axis))

    def taken(self, x: Tensor) -> Tensor:
        """The whole input from one in the form `inputs`."""
        return enter(x, self.inputs, self.axis)

    def given(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The ranks' partial outputs, of one or more layers like this, in the form `outputs`."""
        if self.outputs == "channels":
            return sum_scatter(outputs, -1, self.axis)
        return [leave(output, self.outputs, self.axis) for output in outputs]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_tokens={self.num_tokens}, "
            f"activation={self.activation}"
        )


def named_pattentions(model: nn.Module) -> Iterator[tuple[str, Pattention]]:
    """(name, layer) of every Pattention in a model."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, Pattention))
