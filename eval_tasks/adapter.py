"""A LanguageModel behind lm-eval's model interface. Imports lm_eval: import this where it is used.

Log-likelihoods are those of the model as it was trained: the softmax runs over all rows of its vocabulary, the padded
ones included.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from megatron.errors import UserError
from megatron.inference.generate import evaluating, generate
from megatron.model import LanguageModel
from megatron.tokenizer import Tokenizer

# (context, continuation), context ids, continuation ids
Request = tuple[tuple[str, str], list[int], list[int]]


class TokenFormerLM(TemplateLM):
    """Scores and generates text for lm-eval.

    Args:
        model: in any dtype, on any device.
        tokenizer: its end-of-document token stands before a text without context.
        batch_size: requests computed together; results do not depend on it.
        max_length: context length in tokens; longer inputs lose their first tokens. Default: the model's seq_length.
        progress: show progress bars.
    """

    max_gen_toks = 256

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        max_length: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.text_tokenizer = model, tokenizer
        self.batch_size, self.progress = batch_size, progress
        self.max_length = max_length or model.config.seq_length
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self.text_tokenizer.eod_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return f"{self.text_tokenizer.name}-{self.text_tokenizer.vocab_size}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; no special tokens are ever added."""
        return list(self.text_tokenizer.encode(string))

    # ---- scoring ----

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding would give it) for each request.

        Raises: UserError for a continuation longer than the context length.
        """
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        hidden = disable_tqdm or not self.progress
        with evaluating(self.model), tqdm(total=len(order), desc="scoring", disable=hidden) as bar:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                scores = self._score_batch([(requests[i][1], requests[i][2]) for i in chosen])
                for i, score in zip(chosen, scores, strict=True):
                    results[i] = score
                bar.update(len(chosen))
        return results

    def _score_batch(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Padding goes to the right, where causal attention never sees it."""
        inputs = [self._model_input(context, continuation) for context, continuation in pairs]
        longest = max(map(len, inputs))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in inputs], device=self._device)
        logits = self.model(ids)  # [b, s, V_pad]
        return [
            _score(row[len(input_ids) - len(continuation) : len(input_ids)], continuation)
            for row, input_ids, (_, continuation) in zip(logits, inputs, pairs, strict=True)
        ]

    def _model_input(self, context: list[int], continuation: list[int]) -> list[int]:
        """All but the last token, cut from the left: the logits at i are those of token i + 1."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"seq_length: a continuation of {len(continuation)} tokens does not fit the context length of "
                f"{self.max_length}; use a task with shorter ones"
            )
        return (context + continuation)[-(self.max_length + 1) :][:-1]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each predicted token once, in windows of the context length."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            (text,) = request.args
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            pairs = [make_disjoint_window(window) for window in rolling]
            windows += [(("", ""), list(context), list(predicted)) for context, predicted in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    # ---- generation ----

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts generated until a stop string, the end of document or max_gen_toks, as each request says."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        texts = [""] * len(requests)
        for members in groups.values():
            options = generation_options(requests[members[0]].args[1], self.max_gen_toks)
            contexts = [self._generation_context(requests[i].args[0], options["maximum_tokens"]) for i in members]
            completions = generate(
                self.model,
                self.text_tokenizer,
                contexts,
                batch_size=self.batch_size,
                seq_length=self.max_length,
                progress=self.progress and not disable_tqdm,
                **options,
            )
            for i, completion in zip(members, completions, strict=True):
                texts[i] = completion.text
        return texts

    def _generation_context(self, text: str, maximum_tokens: int) -> list[int]:
        """The last tokens of a text, so many that max_gen_toks fit behind them."""
        return self.tok_encode(text)[-max(1, self.max_length - maximum_tokens) :]


def _score(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Sum of the log-probabilities of the continuation [n] under logits [n, V_pad], in fp32 at least."""
    if not continuation:
        return 0.0, True
    wide = logits if logits.dtype == torch.float64 else logits.float()
    target = torch.tensor(continuation, device=logits.device)
    chosen = wide.log_softmax(dim=-1).gather(-1, target[:, None])
    return chosen.sum().item(), bool((wide.argmax(dim=-1) == target).all())


def generation_options(gen_kwargs: dict[str, Any], default_maximum: int) -> dict[str, Any]:
    """lm-eval's generation arguments as arguments of `generate`; greedy unless do_sample is true."""
    until = gen_kwargs.get("until") or []
    limits = (gen_kwargs.get(name) for name in ("max_gen_toks", "max_new_tokens", "max_tokens"))
    temperature = float(gen_kwargs.get("temperature") or 1.0) if gen_kwargs.get("do_sample") else 0.0
    return {
        "maximum_tokens": next((int(limit) for limit in limits if limit), default_maximum),
        "temperature": temperature,
        "top_k": int(gen_kwargs.get("top_k") or 0),
        "top_p": float(gen_kwargs.get("top_p") or 0.0),
        "stop": [until] if isinstance(until, str) else list(until),
        "seed": gen_kwargs.get("seed", 1234),
    }
