"""What eval.py does with a model that speaks of images: how well it says what is on them, in the form of lm-eval."""

from __future__ import annotations

from typing import Any

from eval_tasks.caption_scores import CaptionScorer, summary
from megatron.config.schema import RunConfig
from megatron.inference.prepare import checkpoint_source, load_with_images
from megatron.mpu import Layout
from megatron.tasks import ImageToTextTask

_BATCH_SIZE = 8
"""Where eval_batch_size is auto."""


def evaluate_captions(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """Perplexity of the captions of each set that the configuration names, and the share of its images of which the
    model says one of them.

    Args:
        layout: of all processes, which call this together; the data axis shares the images, the tensor axis the model.

    Returns: `results[set]["perplexity,none"]`, `["exact_match,none"]` and so on, `configs[set]`, `checkpoint` and
        `tokenizer`.

    Raises: UserError when checkpoint, tokenizer or data are missing, or do not fit the configuration.
    """
    options, path, task = config.evaluation, checkpoint_source(config.checkpoint), ImageToTextTask(config)
    sets = task.evaluated_sets()
    model, tokenizer, reader = load_with_images(config, layout)
    size = options.eval_batch_size if isinstance(options.eval_batch_size, int) else _BATCH_SIZE
    results: dict[str, Any] = {"results": {}, "configs": {}, "checkpoint": str(path)}
    for name, dataset in sets.items():
        scorer = CaptionScorer(model, reader, tokenizer, task, dataset, size, config.generation.fast_decoding)
        found = summary(scorer.scores(name if layout.rank == 0 else ""))
        values = {key if key.startswith("num_") else f"{key},none": value for key, value in found.items()}
        results["results"][name] = {"alias": name, **values}
        results["configs"][name] = {"data": dataset.origins(0)[0]["set"], "limit": options.eval_limit}
    return results | {"tokenizer": f"{tokenizer.name}-{tokenizer.vocab_size}"}
