"""What eval.py does with an image classifier: the accuracy of sets of images, in the form of lm-eval's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_tasks.confusion import check_drawable, draw_confusion
from megatron.config.schema import RunConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.vision import ImageConfig, ImageTowerSection
from megatron.data.evaluated_images import EvaluatedSet, evaluated_sets
from megatron.data.image_batch import ImageShape
from megatron.evaluation.batching import Batches
from megatron.evaluation.images import Predictions, classify
from megatron.evaluation.zero_shot import ZeroShotClassifier
from megatron.exchange import open_checkpoint
from megatron.files import write_output
from megatron.inference.prepare import checkpoint_source, load_image_model
from megatron.log import get_logger
from megatron.model.vision_model import VisionModel
from megatron.mpu import Layout
from megatron.tasks import ImageClassificationTask


def evaluate_images(config: RunConfig, layout: Layout, results_file: Path) -> dict[str, Any]:
    """Loss, top-1 and top-5 of each set that the configuration names; rank 0 draws what is asked for.

    Args:
        layout: of all processes, which call this together; the data axis shares the images, the tensor axis the model.
        results_file: beside it go the pictures.

    Returns: `results[set]["acc,none"]` and so on, `configs[set]`, and on request `classes[set]`, a dictionary for each
        class (see Predictions.of_classes) with its name, and `pictures[set]`, a path.

    Raises: UserError when checkpoint or data are missing, or do not fit the configuration, or number classes in
        different ways.
    """
    model, images, options = config.model, config.images, config.evaluation
    assert isinstance(model, ImageConfig) and isinstance(images, ImagesConfig)
    results = ImageResults(config, layout, results_file)
    if options.confusion:
        check_drawable(model.num_classes)
    shape = ImageShape(model.in_channels, model.image_size, model.num_classes)
    learned = open_checkpoint(results.values["checkpoint"], config).class_names
    sets = evaluated_sets(config.data, images, shape, options, learned)
    classifier, task = load_image_model(config, layout), ImageClassificationTask(config)
    for evaluated in sets:
        results.classify(classifier, task, evaluated)
    return results.values


class ImageResults:
    """Results of sets of images, in the form of evaluate_images, by processes that share them.

    Raises: UserError when there is no checkpoint.
    """

    values: dict[str, Any]

    def __init__(self, config: RunConfig, layout: Layout, results_file: Path) -> None:
        self._config, self._layout, self._file = config, layout, results_file
        self.values = {"results": {}, "configs": {}, "checkpoint": str(checkpoint_source(config.checkpoint))}

    def classify(
        self,
        model: VisionModel | ZeroShotClassifier,
        task: ImageClassificationTask,
        evaluated: EvaluatedSet,
        **how: Any,
    ) -> None:
        """Add what a model takes the images of a set for, and how that was found out. Collective."""
        config, name, reports = self._config, evaluated.name, self._layout.rank == 0
        device, alone = next(model.parameters()).device.type, self._layout.tensor.size == 1
        batches = Batches(config.evaluation.eval_batch_size, device, alone, what="images")
        workers, bar = config.data.num_workers, name if reports else ""
        found = classify(model, task, evaluated.images, batches, self._layout.data, workers, bar)
        self.add(name, evaluated.prefix, found.metrics(), {"num_images": len(found.labels)}, how)
        if config.evaluation.per_class:
            self.values.setdefault("classes", {})[name] = _of_classes(found, evaluated.class_names)
        if config.evaluation.confusion:
            picture = self._file.with_name(f"{self._file.stem}_{name}_confusion.png")
            self.values.setdefault("pictures", {})[name] = str(picture)
            if reports:
                _draw(found, evaluated, picture)

    def add(
        self, name: str, prefix: str, metrics: Mapping[str, float], counts: Mapping[str, int], how: Mapping[str, Any]
    ) -> None:
        """Add the metrics of a set whose image pair has this prefix, and how they were found out."""
        model, images, options = self._config.model, self._config.images, self._config.evaluation
        assert isinstance(model, ImageTowerSection) and isinstance(images, ImagesConfig)
        of_filter = {f"{metric},none": value for metric, value in metrics.items()}
        self.values["results"][name] = {"alias": name, **of_filter, **counts}
        sizes = {"image_size": model.image_size, "crop_pct": images.crop_pct, "limit": options.eval_limit}
        self.values["configs"][name] = {"data": prefix, **sizes, **how}


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
