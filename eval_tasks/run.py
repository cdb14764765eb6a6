"""What eval.py does: what a checkpoint's model is evaluated by, tables, and a results file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from eval_tasks.faults import explained
from eval_tasks.results import flat_metrics, log_to_boards, results_path, write_results
from eval_tasks.tables import format_classes, format_summary, format_table, paper_summary
from megatron.config.schema import RunConfig
from megatron.config.sections.clip import ClipConfig
from megatron.config.sections.evaluation import EvaluationConfig
from megatron.config.sections.image_text import ImageTextConfig
from megatron.config.sections.vision import ImageConfig
from megatron.data.pillow import pillow_needed
from megatron.errors import UserError
from megatron.evaluation.batching import Batches
from megatron.evaluation.corpus import corpus_documents, find_corpus
from megatron.evaluation.perplexity import check_stride, corpus_perplexity
from megatron.files import find_output
from megatron.inference.prepare import checkpoint_source, load_for_inference
from megatron.inference.sparse import shares_used
from megatron.model import LanguageModel
from megatron.mpu import SINGLE, Layout
from megatron.text import suggestion
from megatron.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

# Standard errors without a closed form (perplexities) come from this many resamples.
BOOTSTRAP_ITERS = 100


def run_evaluation(config: RunConfig, layout: Layout = SINGLE) -> dict[str, Any]:
    """Evaluate the checkpoint of `config`: a language model on eval_tasks and perplexity_data, a model of images on
    sets of them, with their texts where it learns these. Rank 0 prints tables, writes the results file and logs to
    TensorBoard and Weights & Biases where configured.

    Args:
        layout: of all processes, which call this together; the data axis shares the work, the tensor axis the model.

    Returns: lm-eval's results, `results[task]["acc,none"]` and so on, with `checkpoint` and `tokenizer`; the
        perplexities are those of the task `perplexity`; `summary` is the paper's table if all its tasks were run;
        `tokens_used` has the share of the parameter tokens that sparse inference used, by projection. Of images: see
        evaluate_images, evaluate_pairs and evaluate_captions.

    Raises: UserError when tasks, checkpoint, tokenizer, data or the lm_eval package are missing.
    """
    reports = layout.rank == 0
    results_file = results_path(config.evaluation.eval_results_prefix)
    if reports:
        find_output(results_file, "eval_results_prefix")
    if isinstance(config.model, ImageConfig):
        with pillow_needed():
            from eval_tasks.images import evaluate_images
        results = evaluate_images(config, layout, results_file)
    elif isinstance(config.model, ClipConfig):
        with pillow_needed():
            from eval_tasks.pairs import evaluate_pairs
        results = evaluate_pairs(config, layout, results_file)
    elif isinstance(config.model, ImageTextConfig):
        with pillow_needed():
            from eval_tasks.captions import evaluate_captions
        results = evaluate_captions(config, layout)
    else:
        results = _evaluate_language(config, layout)
    if reports:
        print("\n\n".join(_tables(results)), flush=True)
        write_results(results, results_file)
        log_to_boards(config, flat_metrics(results))
    return results


def _tables(results: Mapping[str, Any]) -> Iterator[str]:
    yield format_table(results["results"])
    if "summary" in results:
        yield format_summary(results["summary"])
    if used := results.get("tokens_used"):
        yield "parameter tokens used: " + ", ".join(f"{kind} {used[kind]:.2%}" for kind in used)
    yield from (format_classes(classes) for classes in results.get("classes", {}).values())


def _evaluate_language(config: RunConfig, layout: Layout) -> dict[str, Any]:
    options, seq_length = config.evaluation, config.language.seq_length
    with_tasks = bool(options.eval_tasks or not options.perplexity_data)
    _check_options(options, with_tasks, seq_length)
    path = checkpoint_source(config.checkpoint)
    # After all that is quickly said: lm-eval's index of tasks takes seconds.
    evaluate_tasks = partial(_evaluate, *find_tasks(options)) if with_tasks else None
    model, tokenizer = load_for_inference(config, layout)
    results: dict[str, Any] = {"results": {}}
    if evaluate_tasks:
        results = evaluate_tasks(model, tokenizer, options, seq_length)
    if options.perplexity_data:
        results["results"]["perplexity"] = _perplexity(model, tokenizer, options, seq_length)
        results.setdefault("configs", {})["perplexity"] = {"limit": options.eval_limit}
    results.update(checkpoint=str(path), tokenizer=f"{tokenizer.name}-{tokenizer.vocab_size}")
    summary = paper_summary(results["results"], model.config)
    results.update({"summary": summary} if summary else {})
    used = shares_used(model, layout)
    results.update({"tokens_used": used} if used else {})
    return results


def _perplexity(
    model: LanguageModel, tokenizer: Tokenizer, options: EvaluationConfig, seq_length: int
) -> dict[str, Any]:
    """Perplexity of perplexity_data, in the form of a task's results."""
    assert options.perplexity_data is not None, "asked for"
    found = corpus_perplexity(
        model,
        corpus_documents(options.perplexity_data, tokenizer, options.eval_limit),
        tokenizer.eod_id,
        seq_length,
        options.perplexity_stride,
        Batches(options.eval_batch_size, next(model.parameters()).device.type, model.layout.tensor.size == 1),
        model.layout.data,
        progress=model.layout.rank == 0,
    )
    stride = options.perplexity_stride or max(1, seq_length // 2)
    values = {name if name.startswith("num_") else f"{name},none": value for name, value in found.items()}
    return {"alias": options.perplexity_data, **values, "seq_length": seq_length, "stride": stride}


def _check_options(options: EvaluationConfig, with_tasks: bool, seq_length: int) -> None:
    """Raise a UserError for what is wrong and quickly seen, before task names are looked up and a model is loaded."""
    if options.perplexity_data:
        find_corpus(options.perplexity_data)
        check_stride(options.perplexity_stride or 1, seq_length)
    if not with_tasks:
        return
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            "eval_tasks: the lm_eval package is not installed; pip install -r requirements/requirements-eval.txt"
        ) from error
    if not options.eval_tasks:
        raise UserError("eval_tasks: missing; name lm-eval tasks, for example --eval_tasks lambada_openai piqa")
    if options.include_path is not None and not os.path.isdir(options.include_path):
        raise UserError(f"include_path: {options.include_path} is not a folder; name the one with the task YAMLs")


def find_tasks(options: EvaluationConfig) -> tuple[list[str], TaskManager]:
    """The names that eval_tasks means (patterns like arc_* too), and the task manager that knows them.

    lm-eval's own tasks are read (4 s) only when include_path does not have all names. Raises UserError for a name
    that nothing matches.
    """
    from lm_eval.tasks import TaskManager

    assert options.eval_tasks, "checked before"
    folder = options.include_path
    if folder is not None:
        manager = TaskManager(include_path=folder, include_defaults=False)
        if all(manager.match_tasks([name]) for name in options.eval_tasks):
            return manager.match_tasks(options.eval_tasks), manager
    manager = TaskManager(include_path=folder)
    for name in options.eval_tasks:
        if not manager.match_tasks([name]):
            meant = suggestion(name, manager.all_tasks, "`lm_eval ls tasks` lists all names", 0.5, most=3)
            raise UserError(f"eval_tasks: unknown task '{name}'; {meant}")
    return manager.match_tasks(options.eval_tasks), manager


def _evaluate(
    tasks: list[str],
    manager: TaskManager,
    model: LanguageModel,
    tokenizer: Tokenizer,
    options: EvaluationConfig,
    seq_length: int,
) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    from eval_tasks.adapter import TokenFormerLM

    layout = model.layout
    lm = TokenFormerLM(model, tokenizer, options.eval_batch_size, seq_length, layout.rank == 0, layout.data)
    # Resampling is a short loop; worker processes forked beside a CUDA context or torch's threads are a risk.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        results: Mapping[str, Any] | None = simple_evaluate(
            model=lm,
            tasks=tasks,
            num_fewshot=options.num_fewshot,
            batch_size=options.eval_batch_size,
            limit=options.eval_limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
            task_manager=manager,
        )
    except (OSError, ImportError) as error:
        names = ", ".join(tasks)
        raise UserError(
            f"eval_tasks: the data of {names} cannot be loaded: {error}; check the network or the task's data_files"
        ) from error
    except Exception as error:  # tasks are programs: anything may come out of one
        raise explained(error, ", ".join(tasks)) from error
    # lm-eval has results for the first process of a node only.
    return dict(results or {"results": {}})
