"""What generate.py does: from a file of prompts, from nothing, or from the keyboard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from megatron.config.schema import RunConfig
from megatron.config.sections.generation import GenerationConfig
from megatron.config.sections.image_text import ImageTextConfig
from megatron.errors import UserError
from megatron.files import find_output, refuse_inputs
from megatron.inference.answers import Answers, fingerprint
from megatron.inference.decoding import Decoder, Text
from megatron.inference.generate import completion_of, length_batches, start_texts
from megatron.inference.interactive import converse
from megatron.inference.prepare import checkpoint_source, load_for_inference, load_with_images
from megatron.inference.prompts import Request, read_requests, sampling_of
from megatron.log import get_logger
from megatron.model.forward_only import evaluating
from megatron.mpu import SINGLE, Layout
from megatron.mpu.collectives import object_from_first_rank

_BATCH_SIZE = 8
"""Where eval_batch_size is auto."""


def run_generation(config: RunConfig, layout: Layout = SINGLE) -> None:
    """Generate text as `config.generation` says, with the checkpoint and tokenizer of `config`.

    input-file and unconditional write one JSON object a line to sample_output_file, and go on where an interrupted run
    stopped; interactive prints. The seed is `seed`.

    Args:
        layout: the processes of its tensor axis hold the model together, and the first reads and writes.

    Raises: UserError when text_gen_type, the checkpoint or the prompts are missing, or a file cannot be written.
    """
    options, seed = config.generation, config.training.seed
    requests = _requests(options)
    _check_images(options, requests, isinstance(config.model, ImageTextConfig))
    # What is read must not be lost by the output.
    inputs = [options.sample_input_file, config.tokenizer.vocab_file, config.tokenizer.merge_file]
    if requests is not None:
        find_output(options.sample_output_file, "sample_output_file", inputs)
        inputs += _files_of(checkpoint_source(config.checkpoint))
        refuse_inputs(options.sample_output_file, "sample_output_file", inputs)
    decoder = _decoder(config, layout)
    if requests is None:
        converse(decoder, sampling_of(options), options.prompt_end, seed, options.interactive_history)
        return
    prompts, samplings = [r.prompt for r in requests], [r.sampling for r in requests]
    texts = start_texts(decoder, prompts, samplings, seed, [r.image for r in requests])
    size = config.evaluation.eval_batch_size
    batch_size = size if isinstance(size, int) else _BATCH_SIZE
    if layout.tensor.rank != 0:
        complete_missing(decoder, texts, None, batch_size)
        return
    with closing(Answers(options.sample_output_file, fingerprint(decoder, texts), inputs)) as answers:
        complete_missing(decoder, texts, answers, batch_size)
        answers.finish(len(texts))


def _decoder(config: RunConfig, layout: Layout) -> Decoder:
    options, images = config.generation, None
    if isinstance(config.model, ImageTextConfig):
        model, tokenizer, images = load_with_images(config, layout)
        length = config.model.seq_length
    else:
        model, tokenizer = load_for_inference(config, layout)
        length = config.language.seq_length
    how = {"recompute": options.recompute, "logprobs": options.logprobs, "fast": options.fast_decoding}
    return Decoder(model, tokenizer, length, images=images, **how)


def _files_of(checkpoint: Path) -> list[str]:
    return [str(checkpoint)] if checkpoint.is_file() else [str(path) for path in sorted(checkpoint.iterdir())]


def complete_missing(decoder: Decoder, texts: Sequence[Text], answers: Answers | None, batch_size: int) -> None:
    """Generate the texts that `answers` lacks, batch by batch; the first tensor rank has them, the others have None.

    Batches are the same however often the run was interrupted, and one that was cut off is computed anew as a whole:
    the texts are to the last bit those of a run that was not.
    """
    here = set(answers.found) if answers is not None else set[int]()
    found = object_from_first_rank(here, decoder.model.layout.tensor)
    missing = [batch for batch in length_batches(texts, batch_size) if not all(index in found for index in batch)]
    done = len(texts) - sum(map(len, missing))
    if done:
        get_logger().info("going on: %d of %d texts are there", done, len(texts))
    bar_options = {"total": len(texts), "initial": done, "desc": "generating", "disable": answers is None}
    with evaluating(decoder.model), tqdm(**bar_options) as bar:
        for batch in missing:
            decoder.complete([texts[i] for i in batch])
            if answers is not None:
                answers.add({i: completion_of(texts[i], decoder.logprobs) for i in batch})
            bar.update(len(batch))


def _requests(options: GenerationConfig) -> list[Request] | None:
    """The prompts of the mode; None where they come from the keyboard."""
    if options.text_gen_type is None:
        raise UserError("text_gen_type: missing; set it to input-file, unconditional or interactive")
    _explain_settings(options)
    if options.text_gen_type == "interactive":
        return None
    if options.text_gen_type == "unconditional":
        if options.num_samples > 1 and options.temperature == 0:
            get_logger().info("temperature 0 is greedy: all %d samples will be the same", options.num_samples)
        return [Request("", sampling_of(options, options.num_samples))]
    if not options.sample_input_file:
        raise UserError("sample_input_file: missing; text_gen_type input-file needs a file of prompts")
    return read_requests(options.sample_input_file, options)


def _check_images(options: GenerationConfig, requests: Sequence[Request] | None, reads_images: bool) -> None:
    """Raise a UserError unless there is an image for each text of a model that reads images, and none for others."""
    if reads_images and options.text_gen_type != "input-file":
        raise UserError(
            f"text_gen_type: {options.text_gen_type} has no images, and this model reads one before each text; set "
            "input-file"
        )
    for number, request in enumerate(requests or [], 1):
        if reads_images and request.image is None:
            line = '{"image": "FILE", "prompt": "..."}'
            raise UserError(f"sample_input_file: prompt {number} has no image; write lines {line} into a .jsonl file")
        if request.image is not None and not reads_images:
            raise UserError(f"sample_input_file: prompt {number} has an image, and this model reads none; remove it")


def _explain_settings(options: GenerationConfig) -> None:
    """A line for each setting that has no effect, though one may expect it."""
    filters = [name for name in ("top_k", "top_p", "min_p") if getattr(options, name)]
    if options.temperature == 0 and filters:
        get_logger().info("temperature 0 is greedy: %s has no effect; GPT-NeoX samples there", ", ".join(filters))
    if options.text_gen_type == "input-file" and options.num_samples > 1:
        count = options.samples_per_prompt
        get_logger().info("num_samples is for unconditional texts: samples_per_prompt is %d", count)
