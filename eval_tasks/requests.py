"""Context and continuation of a request as token ids, so that every score is that of the continuation alone."""

from __future__ import annotations

from typing import NamedTuple

from megatron.errors import UserError
from megatron.tokenizer import Tokenizer


class Pair(NamedTuple):
    """Token ids of a request; neither list is empty."""

    context: list[int]
    continuation: list[int]
    is_split: bool = False
    """Whether one token of the whole text spans both, so that each was encoded by itself."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The ids of both texts. White space at the end of the context belongs to the continuation, as in lm-eval.

    A context without tokens is the end-of-document token; a continuation that begins with that token brings it along.
    Where the tokens of the whole text do not begin with those of the context, the two are encoded separately.

    Raises: UserError for an empty continuation, whose score would be that of nothing.
    """
    text = context.rstrip()
    moved = context[len(text) :] + continuation
    before = tokenizer.encode(text) if text else []
    whole = tokenizer.encode(text + moved)
    is_split = whole[: len(before)] != before or len(whole) == len(before)
    after = tokenizer.encode(moved) if is_split and before else whole[len(before) :]
    if not continuation or not after:
        raise UserError(f"an empty continuation cannot be scored{_place(context)}; correct the task or its documents")
    if before:
        return Pair(before, after, is_split)
    if not context and after[0] == tokenizer.eod_id and len(after) > 1:
        return Pair(after[:1], after[1:])
    return Pair([tokenizer.eod_id], after)


def _place(context: str) -> str:
    shown = " ".join(context.split())[-40:]
    return f" (it follows the context '{shown}')" if shown else " (its context is empty)"
