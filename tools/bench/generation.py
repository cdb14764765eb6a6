"""Speed of batch generation: ours, ours without prepared matrices, and transformers' generate on an export.

    python -m tools.bench.generation [--export FOLDER] [--batch 1 8 64] [--context 512] [--steps 4] [--rounds 8]

All complete the same prompts of `context` tokens, greedily, with one model: that of the folder in Hugging Face's form,
or one of the configuration with random weights, which is exported for transformers. Each fills its cache once and then
takes turns of a few steps, of one token for every text each; turns are short, so that a machine that slows down slows
all. Ratios below 1 are faster than transformers, or without it than ours as the model is (plain). The texts are
compared token by token. Without transformers it is left out; --recomputed adds generation without a cache. On a machine
that others load, --cpu-seconds counts what one thread works instead of the time that passes.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron.config import load_config
from megatron.errors import run_command
from megatron.exchange.convert import export_huggingface
from megatron.inference import load_model
from megatron.inference.decoding import Decoder
from megatron.inference.sampling import Sampling
from megatron.model import LanguageModel
from megatron.model.forward_only import evaluating
from megatron.tokenizer import CharLevelTokenizer
from tools.bench import measure

VOCABULARY = 50304
Clock = Callable[[], float]


class WholeVocabulary(CharLevelTokenizer):
    """Takes every id, as transformers does; what ids mean is of no matter here."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size

    def decode_after(self, context: Any, ids: Any) -> str:
        """Nothing."""
        return ""


class Ours:
    """Completes prompts with a Decoder; the first step, which fills the cache, is not in a turn."""

    def __init__(self, model: LanguageModel, prompts: list[list[int]], total: int, **options: Any) -> None:
        rows = model.config.padded_vocab_size
        assert rows is not None
        decoder = Decoder(model, WholeVocabulary(rows), model.config.seq_length, stop_at_eod=False, **options)
        self.texts = [decoder.start(prompt, Sampling(maximum_tokens=total)) for prompt in prompts]
        self._steps = decoder.steps(self.texts)

    def start(self) -> None:
        """Fill the cache and choose the first token."""
        next(self._steps)

    def take(self, steps: int) -> None:
        """One turn."""
        for _ in range(steps):
            next(self._steps)

    def tokens(self) -> list[list[int]]:
        """What was generated so far."""
        return [text.tokens for text in self.texts]


class Theirs:
    """transformers' generate, which goes on with its own cache in every turn."""

    def __init__(self, model: Any, prompts: list[list[int]], clock: Clock) -> None:
        self.model, self.clock, self.ids = model, clock, torch.tensor(prompts, device=model.device)
        self.context, self.cache = self.ids.shape[1], None
        self.seconds = 0.0

    def start(self) -> None:
        """Fill the cache and choose the first token."""
        self.take(1)

    def take(self, steps: int) -> None:
        """One turn. `seconds` are those of its steps: what generate does before them is not in."""
        ends = _Ends(self.clock)
        extra = 0 if self.cache is None else 1  # the first step of a call is there to start the clock
        found = self.model.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), past_key_values=self.cache, do_sample=False,
            max_new_tokens=steps + extra, stopping_criteria=[ends], return_dict_in_generate=True, pad_token_id=0,
        )  # fmt: skip
        self.ids, self.cache = found.sequences, found.past_key_values
        self.seconds = ends.times[-1] - ends.times[0]

    def tokens(self) -> list[list[int]]:
        """What was generated so far."""
        return self.ids[:, self.context :].tolist()


class _Ends:
    """A stopping criterion that stops nothing and notes when steps end."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.times = clock, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        measure.synchronize(input_ids.device)
        self.times.append(self.clock())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed(work: Callable[[], object], clock: Clock, device: torch.device) -> float:
    """What the clock says that work takes."""
    measure.synchronize(device)
    start = clock()
    work()
    measure.synchronize(device)
    return clock() - start


def turn(contestant: Ours | Theirs, steps: int, clock: Clock, device: torch.device) -> float:
    """Seconds a step of a contestant's turn."""
    elapsed = timed(lambda: contestant.take(steps), clock, device)
    return (contestant.seconds if isinstance(contestant, Theirs) else elapsed) / steps


def compared(model: LanguageModel, theirs: Any, batch: int, options: Any) -> dict[str, measure.Result]:
    """The contestants' results for a batch of one size."""
    clock: Clock = time.process_time if options.cpu_seconds else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, VOCABULARY, (batch, options.context), generator=generator).tolist()
    device, total = next(model.parameters()).device, 2 + (options.rounds + 1) * (options.steps + 1)
    contestants: dict[str, Ours | Theirs] = {
        "ours": Ours(model, prompts, total),
        "ours, plain": Ours(model, prompts, total, fast=False),
    }
    if theirs is not None:
        contestants["transformers"] = Theirs(theirs, prompts, clock)
    if options.recomputed:
        contestants["ours, recomputed"] = Ours(model, prompts, total, recompute=True)
    filling = {name: timed(one.start, clock, device) for name, one in contestants.items()}
    turns = {name: partial(turn, one, options.steps, clock, device) for name, one in contestants.items()}
    baseline = "transformers" if theirs is not None else "ours, plain"
    results = measure.compare(measure.take_turns(turns, options.rounds), baseline)
    expected = contestants[baseline].tokens()
    for name, result in results.items():
        pairs = zip(contestants[name].tokens(), expected, strict=True)
        result.facts["texts equal"] = f"{sum(_same(own, other) for own, other in pairs)}/{batch}"
        result.facts["tokens/s"] = f"{batch / result.minimum:.1f}"
        result.facts["prefill"] = f"{filling[name]:.2f} s"
    return results


def _same(own: list[int], other: list[int]) -> bool:
    """Equal as far as both go."""
    shared = min(len(own), len(other))
    return own[:shared] == other[:shared]


def _models(options: Any, device: torch.device, folder: str) -> tuple[LanguageModel, Any]:
    """Ours, and that of transformers or None, from one folder of weights."""
    if options.export is None:
        config = load_config([options.config]).language.replaced(padded_vocab_size=VOCABULARY)
        export_huggingface(LanguageModel(config, seed=0), folder)
    path = options.export or folder
    model = load_model(path, device=device)
    if find_spec("transformers") is None:
        print("transformers is not installed: pip install transformers to compare with it")
        return model, None
    from transformers import AutoModelForCausalLM

    theirs: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
    return model, theirs.to(device).eval()


def main() -> int:
    """Measure and print."""
    parser = measure.parser(__doc__, rounds=8)
    parser.add_argument("--export", type=Path, help="folder in Hugging Face's form; default random weights")
    parser.add_argument("--config", default="configs/tokenformer/150M_eval.yml", help="of the random weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="texts generated together")
    parser.add_argument("--context", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=4, help="tokens of every text in a turn")
    parser.add_argument("--recomputed", action="store_true", help="also without a cache; slow")
    parser.add_argument("--cpu-seconds", action="store_true", help="one thread, timed by the CPU seconds it takes")
    options = parser.parse_args()
    if options.cpu_seconds:
        torch.set_num_threads(1)
    device, tables = measure.default_device(), {}
    with tempfile.TemporaryDirectory() as folder:
        model, theirs = _models(options, device, folder)
    print(f"{model.num_parameters():,} parameters, {options.context} tokens of context, {measure.where(device)}")
    with evaluating(model):
        for batch in options.batch:
            title = f"batch {batch}"
            tables[title] = compared(model, theirs, batch, options)
            print(f"\n{title}, a token of every text\n{measure.table(tables[title], _COLUMNS)}", flush=True)
    measure.write_json(options.json, measure.as_document("generation", tables, vars(options), device))
    return 0


_COLUMNS = ("tokens/s", "prefill", "texts equal")


if __name__ == "__main__":
    sys.exit(run_command(main))
