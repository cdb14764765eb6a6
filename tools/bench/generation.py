"""Speed of batch generation with the key-value cache beside recomputing every text for each token, in one run.

    python -m tools.bench.generation [--context 512] [--batch 8] [--tokens 32] [--rounds 2]

Both complete the same prompts of `context` tokens, greedily, with a model of the 150M configuration and random weights.
Rounds alternate. Printed are the median seconds that one more token of every text takes (with the cache, of `tokens`
behind the first; recomputed, of one), their ratio, and the time of the first token with the cache, which fills it.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time

import torch

from megatron.config import load_config
from megatron.errors import run_command
from megatron.inference.decoding import Decoder
from megatron.inference.sampling import Sampling
from megatron.model import LanguageModel
from megatron.model.forward_only import evaluating
from megatron.tokenizer import CharLevelTokenizer

VOCABULARY = 50304


def step_seconds(decoder: Decoder, prompts: list[list[int]], num_tokens: int) -> list[float]:
    """Time of each step of one batch that generates `num_tokens`."""
    texts = [decoder.start(prompt, Sampling(maximum_tokens=num_tokens)) for prompt in prompts]
    times, before = [], time.perf_counter()
    for _ in decoder.steps(texts):
        times.append(time.perf_counter() - before)
        before = time.perf_counter()
    return times


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tokenformer/150M_eval.yml")
    defaults = {"context": 512, "batch": 8, "tokens": 32, "rounds": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    config = load_config([options.config]).language.replaced(padded_vocab_size=VOCABULARY)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LanguageModel(config, seed=0, device=device)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 256, (options.batch, options.context), generator=generator).tolist()
    with_cache = Decoder(model, CharLevelTokenizer(), config.seq_length, stop_at_eod=False)
    without = dataclasses.replace(with_cache, recompute=True)
    filling, steps, anew = list[float](), list[float](), list[float]()
    with evaluating(model):
        for _ in range(options.rounds):
            first, *more = step_seconds(with_cache, prompts, options.tokens + 1)
            filling.append(first)
            steps += more
            anew += step_seconds(without, prompts, 1)
    prefill, cached, recomputed = (statistics.median(times) for times in (filling, steps, anew))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{model.num_parameters():,} parameters, {options.batch} texts, {options.context} tokens of context, {where}")
    print(f"prefill     {prefill:8.3f} s")
    print(f"recomputed  {recomputed:8.3f} s a token of every text")
    print(f"cached      {cached:8.3f} s a token of every text: {recomputed / cached:.1f} times faster")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
