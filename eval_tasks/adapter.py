"""A LanguageModel behind lm-eval's model interface. Imports lm_eval: import this where it is used.

Log-likelihoods are those of the model as it was trained: the softmax runs over all rows of its vocabulary, the padded
ones included.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from eval_tasks.generation import generation_options
from eval_tasks.pretrained import load_pretrained
from eval_tasks.requests import Pair, encode_pair
from megatron.errors import UserError
from megatron.evaluation.batching import Batches, BatchSize
from megatron.evaluation.perplexity import sliding_windows
from megatron.evaluation.scoring import Score, Window, score_windows
from megatron.evaluation.sharing import shared
from megatron.inference.decoding import cut_message
from megatron.inference.generate import generate
from megatron.log import get_logger
from megatron.model import LanguageModel
from megatron.model.forward_only import evaluating
from megatron.mpu import ALONE, Axis
from megatron.tokenizer import Tokenizer

# (context, continuation), context ids, continuation ids
Request = tuple[tuple[str, str], list[int], list[int]]
# generated text, why it is not what was asked for
_Answer = tuple[str, str]
_SAMPLED_TOGETHER = 8


@register_model("tokenformer")
class TokenFormerLM(TemplateLM):
    """Scores and generates text for lm-eval; once this module is imported, also by its name `tokenformer`.

    Args:
        model: in any dtype, on any device, shared by tensor ranks or not.
        tokenizer: its end-of-document token stands before a text without context.
        batch_size: requests computed together, or `auto`; results do not depend on it.
        max_length: context length in tokens; longer inputs lose their first tokens. Default: the model's seq_length.
        progress: show progress bars.
        axis: processes that share the requests; each of them gets all results.
    """

    max_gen_toks = 256

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        batch_size: BatchSize = 8,
        max_length: int | None = None,
        progress: bool = True,
        axis: Axis = ALONE,
    ) -> None:
        super().__init__()
        self.model, self.text_tokenizer = model, tokenizer
        self._has_warned = False
        self.axis, self.progress = axis, progress
        self.max_length = max_length or model.config.seq_length
        self._device = next(model.parameters()).device
        self.batches = Batches(batch_size, self._device.type, recover=model.layout.tensor.size == 1)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> TokenFormerLM:
        """The model that `--model_args` describe (see eval_tasks.pretrained.load_pretrained)."""
        additional = {key: value for key, value in (additional_config or {}).items() if value is not None}
        found = load_pretrained(**{**additional, **arg_dict})
        axis = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD) if dist.is_initialized() else ALONE
        return cls(found.model, found.tokenizer, found.batch_size, found.max_length, axis.rank == 0, axis)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> TokenFormerLM:
        """The same for `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        """The end-of-document token."""
        return self.text_tokenizer.eod_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's caches."""
        return f"{self.text_tokenizer.name}-{self.text_tokenizer.vocab_size}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """No template; UserError when one is asked for."""
        if chat_template:
            raise UserError(
                "apply_chat_template: prompts are plain text here, as in training; leave the option off, or evaluate "
                "an export with lm-eval's `hf` model, which applies the template of its folder"
            )
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refused, as by chat_template."""
        return self.chat_template(True)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; no special tokens are ever added."""
        return list(self.text_tokenizer.encode(string))

    # ---- scoring ----

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding would give it) for each request.

        Raises: UserError for a continuation that is empty or longer than the context length.
        """
        pairs = []
        for request in tqdm(requests, desc="tokenizing", disable=disable_tqdm or not self.progress):
            pairs.append(encode_pair(self.text_tokenizer, *request.args))
        self._warn_of_split(pairs, requests)
        rows = [(request.args, pair.context, pair.continuation) for request, pair in zip(requests, pairs, strict=True)]
        return self._loglikelihood_tokens(rows, disable_tqdm)

    def _warn_of_split(self, pairs: list[Pair], requests: list[Instance]) -> None:
        """Say once that some requests have a token across their border."""
        split = [i for i, pair in enumerate(pairs) if pair.is_split]
        if split and not self._has_warned:
            self._has_warned = True
            context, continuation = requests[split[0]].args
            get_logger().warning(
                "%d of %d requests have a token that spans context and continuation, which are encoded separately; "
                "the first: %r, %r", len(split), len(pairs), context[-40:], continuation[:40],
            )  # fmt: skip

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The same of token ids; an empty context is the end-of-document token."""
        # All ranks look at all requests: a mistake ends every one of them alike.
        windows = [self._window(context, continuation) for _, context, continuation in requests]
        return [(score.log_likelihood, score.greedy) for score in self._scores(windows, disable_tqdm)]

    def _scores(self, windows: list[Window], disable_tqdm: bool) -> list[Score]:
        return shared(windows, lambda window: len(window.ids), partial(self._share, disable_tqdm), self.axis)

    def _share(self, disable_tqdm: bool, windows: list[Window]) -> list[Score]:
        hidden = disable_tqdm or not self.progress
        with evaluating(self.model), tqdm(total=len(windows), desc="scoring", disable=hidden) as bar:
            return self.batches.run(
                windows, lambda window: len(window.ids), partial(score_windows, self.model), bar.update
            )

    def _window(self, context: list[int], continuation: list[int]) -> Window:
        """Context and continuation, cut from the left."""
        if not continuation:
            raise UserError("an empty continuation cannot be scored; correct the task or its documents")
        if len(continuation) > self.max_length:
            raise UserError(
                f"seq_length: a continuation of {len(continuation)} tokens does not fit the context length of "
                f"{self.max_length}; use a task with shorter ones"
            )
        return Window(((context or [self.prefix_token_id]) + continuation)[-(self.max_length + 1) :], len(continuation))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each predicted token once, in windows of the context length."""
        texts = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        windows = [list(sliding_windows(ids, self.max_length, self.max_length)) for ids in texts]
        scores = iter(self._scores([window for text in windows for window in text], disable_tqdm))
        return [sum((next(scores).log_likelihood for _ in text), 0.0) for text in windows]

    # ---- generation ----

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts generated until a stop string, the end of document or max_gen_toks, as each request says.

        One warning says of how many texts the prompt was cut or the context was full.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
        # All are looked at first: a mistake in the last must not end hours of work.
        options = [generation_options(requests[i].args[1], self.max_gen_toks) for i, *_ in groups.values()]
        found = [("", "")] * len(requests)
        for members, chosen in zip(groups.values(), options, strict=True):
            contexts = [self.tok_encode(requests[i].args[0]) for i in members]
            for i, answer in zip(members, self._complete(contexts, chosen, disable_tqdm), strict=True):
                found[i] = answer
        messages = [message for _, message in found if message]
        if messages:
            get_logger().warning("%d of %d texts: %s", len(messages), len(found), max(messages, key=len))
        return [text for text, _ in found]

    def _complete(self, prompts: list[list[int]], options: dict[str, Any], disable_tqdm: bool) -> list[_Answer]:
        def completed(batch: list[list[int]], batch_size: int) -> list[_Answer]:
            arguments = {**options, "batch_size": batch_size, "seq_length": self.max_length}
            found = generate(self.model, self.text_tokenizer, batch, **arguments)
            return [(completion.text, completion.message or "") for completion in found]

        def share(mine: list[list[int]]) -> list[_Answer]:
            with tqdm(total=len(mine), desc="generating", disable=disable_tqdm or not self.progress) as bar:
                return self.batches.run(mine, length, lambda batch: completed(batch, len(batch)), bar.update)

        def length(ids: list[int]) -> int:
            return min(len(ids) + options["maximum_tokens"], self.max_length)

        contexts = [self._generation_context(ids, options["maximum_tokens"]) for ids in prompts]
        if options["temperature"] > 0:
            # What is drawn for a text depends on its place among all texts: every rank computes all of them.
            found = completed(contexts, self.batches.size or _SAMPLED_TOGETHER)
        else:
            found = shared(contexts, len, share, self.axis)
        return [
            (text, cut_message(len(kept), len(ids), self.max_length) if len(kept) < len(ids) else message)
            for (text, message), ids, kept in zip(found, prompts, contexts, strict=True)
        ]

    def _generation_context(self, ids: list[int], maximum_tokens: int) -> list[int]:
        """The last tokens of a prompt, so many that maximum_tokens fit behind them, as lm-eval has it.

        Where these would take more than half of the context, the rule of `generate` holds.
        """
        room = self.max_length - maximum_tokens
        return ids[-room:] if 2 * maximum_tokens <= self.max_length else ids
