"""What eval.py does with an image classifier: the accuracy of sets of images, in the form of lm-eval's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_tasks.confusion import check_drawable, draw_confusion
from megatron.config.schema import RunConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.vision import ImageConfig
from megatron.data.evaluated_images import EvaluatedSet, evaluated_sets
from megatron.data.image_batch import ImageShape
from megatron.evaluation.batching import Batches
from megatron.evaluation.images import Predictions, classify
from megatron.files import write_output
from megatron.inference.prepare import checkpoint_source, load_image_model
from megatron.log import get_logger
from megatron.mpu import Layout
from megatron.tasks import ImageClassificationTask


def evaluate_images(config: RunConfig, layout: Layout, results_file: Path) -> dict[str, Any]:
    """Loss, top-1 and top-5 of each set that the configuration names; rank 0 draws what is asked for.

    Args:
        layout: of all processes, which call this together; the data axis shares the images, the tensor axis the model.
        results_file: beside it go the pictures.

    Returns: `results[set]["acc,none"]` and so on, `configs[set]`, and on request `classes[set]`, a dictionary for each
        class (see Predictions.of_classes) with its name, and `pictures[set]`, a path.

    Raises: UserError when checkpoint or data are missing, or do not fit the configuration.
    """
    model, images, options = config.model, config.images, config.evaluation
    assert isinstance(model, ImageConfig) and isinstance(images, ImagesConfig)
    if options.confusion:
        check_drawable(model.num_classes)
    path = checkpoint_source(config.checkpoint)
    shape = ImageShape(model.in_channels, model.image_size, model.num_classes)
    sets = evaluated_sets(config.data, images, shape, options)
    results: dict[str, Any] = {"results": {}, "configs": {}, "checkpoint": str(path)}
    for evaluated, found in zip(sets, _classified(config, layout, sets), strict=True):
        name = evaluated.name
        means = {f"{metric},none": value for metric, value in found.metrics().items()}
        results["results"][name] = {"alias": name, **means, "num_images": len(found.labels)}
        how = {"image_size": model.image_size, "crop_pct": images.crop_pct, "limit": options.eval_limit}
        results["configs"][name] = {"data": evaluated.prefix, **how}
        if options.per_class:
            results.setdefault("classes", {})[name] = _of_classes(found, evaluated.class_names)
        if options.confusion:
            picture = results_file.with_name(f"{results_file.stem}_{name}_confusion.png")
            results.setdefault("pictures", {})[name] = str(picture)
            if layout.rank == 0:
                _draw(found, evaluated, picture)
    return results


def _classified(config: RunConfig, layout: Layout, sets: Sequence[EvaluatedSet]) -> list[Predictions]:
    model, task = load_image_model(config, layout), ImageClassificationTask(config)
    device = next(model.parameters()).device.type
    batches = Batches(config.evaluation.eval_batch_size, device, layout.tensor.size == 1, what="images")
    workers, reports = config.data.num_workers, layout.rank == 0
    return [
        classify(model, task, each.images, batches, layout.data, workers, each.name if reports else "") for each in sets
    ]


def _of_classes(found: Predictions, names: Sequence[str]) -> list[dict[str, Any]]:
    classes = []
    for values in found.of_classes(len(names)):
        named: Mapping[str, Any] = {"name": names[int(values["class"])]}
        if "taken_for" in values:
            named = {**named, "taken_for_name": names[int(values["taken_for"])]}
        classes.append({**values, **named})
    return classes


def _draw(found: Predictions, evaluated: EvaluatedSet, picture: Path) -> None:
    names = evaluated.class_names
    title = f"{evaluated.name}: {len(found.labels):,} images, top-1 {found.metrics()['acc']:.1%}"
    write_output(picture, draw_confusion(found.confusion(len(names)), names, title), "eval_results_prefix")
    get_logger().info("confusion of %s drawn in %s", evaluated.name, picture)
