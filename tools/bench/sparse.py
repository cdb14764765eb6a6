"""Time of sparse inference beside that of all tokens: one Pattention, and one more token of every text.

    python -m tools.bench.sparse [--shares 0.5 0.25 0.1] [--rows 1 8 64 512] [--batch 1 8] [--rounds 15] [--json FILE]

Ratios below 1 are faster than all tokens in the same round. The layers are those of a decoder, which chooses one of
three forms of the product with the values: "summed" adds up those of each row's tokens, "gathered" multiplies by a copy
of those that some row of the batch uses, whose share is the union, "zeros" multiplies by all. Weights and inputs are
random, or with --load those of a checkpoint. On a machine that others load, --cpu-seconds counts what one thread works
instead of the time that passes.
"""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.config import load_config
from megatron.errors import UserError, run_command
from megatron.inference import load_model
from megatron.inference.prepared import prepared
from megatron.inference.sparse import heaviest, sparse
from megatron.model import LanguageModel
from megatron.model.forward_only import evaluating
from megatron.model.pattention import Pattention
from megatron.ops import pattention_sparse
from megatron.ops.pattention import theta
from megatron.ops.pattention_sparse import LIMITS, Limits, kept
from tools.bench import measure
from tools.bench.generation import VOCABULARY, Clock, Ours, timed

ALL = "all tokens"
WAYS = {
    "": LIMITS,
    ", summed": Limits(math.inf, 0.0),
    ", gathered": Limits(-1.0, 1.0),
    ", zeros": Limits(-1.0, -1.0),
}
"""What decides between the forms of the product."""


def of_share(model: LanguageModel, share: float) -> LanguageModel:
    """The model as a decoder has it, with a share of the tokens."""
    return prepared(sparse(model, partial(heaviest, share=share)))


def _feed_forward(model: LanguageModel) -> Any:
    block: Any = model.layers[0]
    return block.mlp


def layer_inputs(model: LanguageModel, rows: int) -> Tensor:
    """What the first feed-forward reads for a random text, [rows, d]."""
    seen: list[Tensor] = []
    hook = _feed_forward(model).register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    ids = torch.randint(1, model.config.padded_vocab_size or 2, (1, rows), generator=torch.Generator().manual_seed(0))
    model.hidden(ids.to(next(model.parameters()).device))
    hook.remove()
    return seen[0][0]


def one_layer(model: LanguageModel, rows: int, options: Any, device: torch.device) -> dict[str, measure.Result]:
    """Results of the first feed-forward for so many rows."""
    layer, x = _feed_forward(model), layer_inputs(model, rows)

    def run(ready: Any, limits: Limits) -> None:
        pattention_sparse.LIMITS = limits
        ready(x)

    clock = partial(timed, clock=_clock(options), device=device)
    contestants = {ALL: partial(clock, partial(run, _feed_forward(prepared(model)), LIMITS))}
    unions = {ALL: ""}
    weights = theta(x @ layer.key_param_tokens.T, layer.tau_tokens, layer.activation)
    for share in options.shares:
        ready, selection = _feed_forward(of_share(model, share)), heaviest(layer, share)
        assert selection is not None, "less than all"
        for way, limits in WAYS.items():
            contestants[f"{share:g}{way}"] = partial(clock, partial(run, ready, limits))
            unions[f"{share:g}{way}"] = f"{kept([weights], [selection])[0].any(0).float().mean():.0%}"
    results = measure.compare(measure.take_turns(contestants, options.rounds, warmup=3), ALL)
    for name, result in results.items():
        result.facts["union"] = unions[name]
    pattention_sparse.LIMITS = LIMITS
    return results


def decoding(model: LanguageModel, batch: int, options: Any, device: torch.device) -> dict[str, measure.Result]:
    """Results of a token more of `batch` texts."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, model.config.padded_vocab_size or 2, (batch, options.context), generator=generator)
    networks = {ALL: model} | {f"{s:g}": sparse(model, partial(heaviest, share=s)) for s in options.shares}
    contestants = {name: Ours(one, prompts.tolist(), options.rounds + 20) for name, one in networks.items()}
    for one in contestants.values():
        one.start()
    clock = partial(timed, clock=_clock(options), device=device)
    turns = {name: partial(clock, partial(one.take, 1)) for name, one in contestants.items()}
    return measure.compare(measure.take_turns(turns, options.rounds, warmup=3), ALL)


def _clock(options: Any) -> Clock:
    return time.process_time if options.cpu_seconds else time.perf_counter


def main() -> int:
    """Measure and print."""
    parser = measure.parser(__doc__, rounds=15)
    parser.add_argument("--load", help="a checkpoint; default random weights")
    parser.add_argument("--config", default="configs/tokenformer/150M_eval.yml", help="of the random weights")
    parser.add_argument("--layers", type=int, help="of the random weights; default as the configuration says")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.1], help="of the tokens, below 1")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64, 512], help="rows of input of one layer")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="texts generated together")
    parser.add_argument("--context", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--cpu-seconds", action="store_true", help="one thread, timed by the CPU seconds it takes")
    options = parser.parse_args()
    if wrong := [share for share in options.shares if not 0 < share < 1]:
        raise UserError(f"--shares: {wrong[0]:g} is no part of the tokens; give numbers above 0 and below 1")
    if options.cpu_seconds:
        torch.set_num_threads(1)
    device, tables = measure.default_device(), dict[str, dict[str, measure.Result]]()
    if options.load:
        model = load_model(options.load, device=device)
    else:
        config = load_config([options.config]).language.replaced(padded_vocab_size=VOCABULARY)
        if options.layers:
            layers = [[["tokenformer"], options.layers]]
            config = config.replaced(num_layers=options.layers, attention_config=layers)
        model = LanguageModel(config, seed=0, device=device)
    if not isinstance(_feed_forward(model), Pattention):
        raise UserError("--load: the model has no Pattention in its first block; name a TokenFormer's checkpoint")
    print(f"{model.num_parameters():,} parameters, {measure.where(device)}")
    with evaluating(model):
        for rows in options.rows:
            tables[f"ffn, {rows} rows"] = one_layer(model, rows, options, device)
            print(f"\nffn, {rows} rows\n{measure.table(tables[f'ffn, {rows} rows'], ['union'])}", flush=True)
        for batch in options.batch:
            tables[f"decoding, batch {batch}"] = decoding(model, batch, options, device)
            print(f"\na token of {batch} texts\n{measure.table(tables[f'decoding, batch {batch}'])}", flush=True)
    measure.write_json(options.json, measure.as_document("sparse", tables, vars(options), device))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
