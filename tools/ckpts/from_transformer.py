"""`convert.py from-transformer`: a TokenFormer that starts near a trained Transformer; see docs/exchange.md."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megatron.model import LanguageModel
    from megatron.tokenizer import Tokenizer


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Tokens, the text, and how much of it."""
    for kind, what in (("qkv", "each query, key and value"), ("proj", "proj"), ("ffn", "the feed-forward")):
        parser.add_argument(f"--{kind}", type=int, required=True, metavar="N", help=f"tokens of {what}")
    parser.add_argument(
        "--text", required=True, metavar="FILE", help="text, or the prefix of a .bin/.idx pair, to fit on"
    )
    parser.add_argument("--samples", type=int, default=64, help="samples of seq_length to fit on (default 64)")
    parser.add_argument("--seed", type=int, default=1234, help="of what is drawn (default 1234)")


def convert(args: argparse.Namespace) -> None:
    """Fit, print how near each layer comes and the losses on samples that follow, and write. Raises UserError."""
    import os
    from dataclasses import replace
    from pathlib import Path

    import torch

    from megatron.checkpoint.new_folder import require_new
    from megatron.config.sections.base import MAX_SIZE
    from megatron.errors import UserError
    from megatron.exchange import canonical, open_checkpoint
    from megatron.exchange.checkpoint import of_model
    from megatron.growth.from_transformer import fit_tokens, tokenformer_config
    from megatron.inference import load_model
    from megatron.model import LanguageModel
    from megatron.tokenizer import build_tokenizer

    counts = (args.qkv, args.proj, args.ffn, args.samples)
    if min(counts) < 1 or max(counts) > MAX_SIZE:
        raise UserError(f"--qkv, --proj, --ffn, --samples: give numbers from 1 to {MAX_SIZE:,}")
    require_new(Path(os.path.realpath(args.output)))  # before the work of fitting
    checkpoint = open_checkpoint(args.input, key="IN")
    config = tokenformer_config(checkpoint.language, args.qkv, args.proj, args.ffn)
    if checkpoint.tokenizer is None:
        raise UserError(f"IN: {checkpoint.folder} does not say what its tokenizer is; text cannot be read for it")
    tokenizer = build_tokenizer(checkpoint.tokenizer)
    held_out = max(1, args.samples // 4)
    ids = torch.tensor(list(_samples(args.text, tokenizer, config.seq_length, args.samples + held_out)))
    if len(ids) < args.samples + held_out:
        raise UserError(
            f"--text: {args.text} has {len(ids)} samples of {config.seq_length} tokens, {args.samples + held_out} are "
            "needed to fit and to check; give a longer text, or lower --samples"
        )
    teacher = load_model(args.input)
    student, fits = fit_tokens(teacher, config, ids[: args.samples], args.seed)
    for fit in fits:
        print(f"{fit.name:<28} outputs differ by {fit.error:.1%} of their spread")
    rest = ids[args.samples :]
    named = {
        "the Transformer": teacher,
        "this TokenFormer": student,
        "a random start": LanguageModel(config, seed=args.seed),
    }
    for name, model in named.items():
        print(f"loss of {name}: {_loss(model.eval(), rest):.4f} nats a token, on {rest.numel():,} tokens that follow")
    settings = {**checkpoint.resolved(), **config.model_dump(mode="json"), "save": args.output, "load": args.output}
    made = replace(of_model(student, checkpoint.tokenizer), settings=settings)
    canonical.write(args.output, made)


def _samples(path: str, tokenizer: Tokenizer, length: int, count: int) -> Iterator[list[int]]:
    """The first samples of a text, documents one after the other with the end-of-document token between them."""
    from megatron.evaluation.corpus import corpus_documents

    pending: list[int] = []
    for document in corpus_documents(path, tokenizer, key="--text"):
        pending += [*document.ids, tokenizer.eod_id]
        while len(pending) >= length:
            yield pending[:length]
            pending, count = pending[length:], count - 1
            if not count:
                return


def _loss(model: LanguageModel, ids: Tensor) -> float:
    """Mean cross entropy of samples [b, s], each token but the first of a sample."""
    import torch

    from megatron.ops.cross_entropy import token_losses

    with torch.no_grad():
        losses = [token_losses(model(part)[:, :-1], part[:, 1:]) for part in ids.split(8)]
    return torch.cat(losses).double().mean().item()
