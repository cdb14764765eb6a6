"""What generate.py does: from a file of prompts, from nothing, or from the keyboard."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from megatron.config.schema import GenerationConfig, RunConfig
from megatron.errors import UserError
from megatron.inference.generate import Completion, generate
from megatron.inference.prepare import load_for_inference
from megatron.log import get_logger

_PROMPT = "Context prompt >>> "
_Completer = Callable[..., list[Completion]]


def run_generation(config: RunConfig) -> None:
    """Generate text as `config.generation` says, with the checkpoint and tokenizer of `config`.

    input-file and unconditional write one JSON object a line to sample_output_file; interactive prints. The seed is
    `seed`.

    Raises: UserError when text_gen_type, the checkpoint or the prompts are missing, or a file cannot be written.
    """
    options = config.generation
    prompts = _prompts(options)
    model, tokenizer = load_for_inference(config)
    if prompts is not None:
        _check_writable(options.sample_output_file)
    complete = partial(
        generate,
        model,
        tokenizer,
        maximum_tokens=options.maximum_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=config.training.seed,
        recompute=options.recompute,
        batch_size=config.evaluation.eval_batch_size,
        seq_length=config.model.seq_length,
    )
    if prompts is None:
        _converse(complete, options)
    else:
        completions = complete(prompts, num_samples=options.num_samples, progress=True)
        write_completions(completions, options.sample_output_file)


def _prompts(options: GenerationConfig) -> list[str] | None:
    """The prompts of the mode; None where they come from the keyboard."""
    if options.text_gen_type is None:
        raise UserError("text_gen_type: missing; set it to input-file, unconditional or interactive")
    if options.text_gen_type == "interactive":
        return None
    if options.text_gen_type == "unconditional":
        if options.num_samples > 1 and options.temperature == 0:
            get_logger().info("temperature 0 is greedy: all %d samples will be the same", options.num_samples)
        return [""]
    if not options.sample_input_file:
        raise UserError("sample_input_file: missing; text_gen_type input-file needs a file of prompts, one a line")
    return read_prompts(options.sample_input_file)


def read_prompts(path: str) -> list[str]:
    """The lines of a UTF-8 file, without surrounding white space and empty ones. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"sample_input_file: {path} cannot be read: {reason}; give a text file") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"sample_input_file: {path} holds no prompts; write one a line")
    return prompts


def _check_writable(path: str) -> None:
    """Find out that the output cannot be written before the model has worked for it; an old output stays."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise UserError(f"sample_output_file: {path} cannot be written: {error.strerror}; name another file") from None


def write_completions(completions: list[Completion], path: str) -> None:
    """One JSON object a line: context, text, length, finished, message, duration_seconds."""
    unfinished = Path(f"{path}.part")
    with unfinished.open("w", encoding="utf-8") as file:
        for completion in completions:
            file.write(json.dumps(asdict(completion), ensure_ascii=False) + "\n")
    os.replace(unfinished, path)
    get_logger().info("%d texts written to %s", len(completions), path)


def _converse(complete: _Completer, options: GenerationConfig) -> None:
    """Complete what is typed, until the end of input (Ctrl-D) or Ctrl-C."""
    for prompt in _typed_prompts(options.prompt_end):
        for completion in complete([prompt], num_samples=options.num_samples):
            print(completion.text + (f"\n[{completion.message}]" if completion.message else ""), flush=True)


def _typed_prompts(prompt_end: str) -> Iterator[str]:
    """Texts from the keyboard, each up to `prompt_end`, empty ones left out; the last may end with the input."""
    typed = ""
    while True:
        try:
            typed += input("" if typed else _PROMPT) + "\n"
        except (EOFError, KeyboardInterrupt):
            print()
            if typed.strip():
                yield typed.removesuffix("\n")
            return
        if prompt_end in typed:
            prompt, typed = typed.partition(prompt_end)[0], ""
            if prompt.strip():
                yield prompt
