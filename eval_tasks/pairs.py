"""What eval.py does with a model of images and texts: zero-shot classification and retrieval, in lm-eval's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_tasks.confusion import check_drawable
from eval_tasks.images import ImageResults
from megatron.config.schema import RunConfig
from megatron.config.sections.clip import ClipConfig
from megatron.config.sections.images import ImagesConfig
from megatron.config.sections.vision import ImageConfig, ImageTowerSection
from megatron.data.classes import class_names
from megatron.data.datasets import Part
from megatron.data.evaluated_images import evaluated_parts, has_document, labelled_set
from megatron.data.image_batch import ImageShape
from megatron.data.image_text import TEXT_SUFFIX, CaptionedImages, ImageTextDataset
from megatron.data.images import LABEL_SUFFIX
from megatron.errors import ConfigError, UserError
from megatron.evaluation.images import mean_and_error
from megatron.evaluation.retrieval import features_of_set, recalls
from megatron.evaluation.zero_shot import ZeroShotClassifier, class_vectors
from megatron.inference.prepare import load_pair_model
from megatron.model.clip_model import ClipModel
from megatron.mpu import Layout
from megatron.tasks import ClipTask, ImageClassificationTask

_IMAGES_AT_ONCE = 64  # where eval_batch_size is auto


def evaluate_pairs(config: RunConfig, layout: Layout, results_file: Path) -> dict[str, Any]:
    """Of each set that the configuration names, zero-shot accuracy if it has labels, and retrieval if it has captions.

    Args:
        layout: of all processes, which call this together; the data axis shares images, texts and classes, the tensor
            axis the model.
        results_file: beside it go the pictures.

    Returns: `results["NAME_zero_shot"]` as evaluate_images has it, and `results["NAME_retrieval"]` with
        `image_retrieval_recall@1,none` and so on.

    Raises: UserError when checkpoint, data or names of classes are missing, or do not fit the configuration.
    """
    model, images, options = config.model, config.images, config.evaluation
    assert isinstance(model, ClipConfig) and isinstance(images, ImagesConfig)
    results = ImageResults(config, layout, results_file)
    shape = ImageShape(model.in_channels, model.image_size)
    parts = evaluated_parts(config.data, shape, options)
    classes = {name: _class_names(config, part) for name, part in parts.items() if has_document(part, LABEL_SUFFIX)}
    captioned = {name: part for name, part in parts.items() if has_document(part, TEXT_SUFFIX)}
    for name, part in parts.items():
        if name not in classes and name not in captioned:
            raise UserError(f"{part.indexed.prefix}: there are neither labels nor captions beside it")
    if options.confusion:
        check_drawable(max(map(len, classes.values()), default=0))
    loaded, task = load_pair_model(config, layout), ClipTask(config)
    for name, names in classes.items():
        _zero_shot(results, config, loaded, task, layout, name, parts[name], names)
    for name, part in captioned.items():
        dataset = ImageTextDataset([CaptionedImages(part)], shape, task.text_shape, images)
        found = _recalls(config, loaded, task, dataset, layout)
        counts = {"num_images": len(dataset), "num_texts": len(found["image_retrieval_recall@1"])}
        results.add(f"{name}_retrieval", part.indexed.prefix, _means(found), counts, {})
    return results.values


def _class_names(config: RunConfig, part: Part) -> Sequence[str]:
    """What the classes of a labelled set are called. Raises ConfigError where nothing says it, or as many names."""
    given, found = config.evaluation.zero_shot_classes, class_names(part.indexed.prefix)
    if given is None and found is None:
        reason = f"there is no file of names beside {part.indexed.prefix}"
        raise ConfigError("zero_shot_classes", reason, "give the names of its classes, in order")
    if given and found and len(given) != len(found):
        reason = f"{len(given)} names for the {len(found)} classes of {part.indexed.prefix}"
        raise ConfigError("zero_shot_classes", reason, "give one for each")
    return given or found or []


def _zero_shot(
    results: ImageResults,
    config: RunConfig,
    model: ClipModel,
    task: ClipTask,
    layout: Layout,
    name: str,
    part: Part,
    names: Sequence[str],
) -> None:
    """Add how often an image is taken for its class by what texts about the classes say."""
    templates, images = config.evaluation.zero_shot_templates, config.images
    assert isinstance(images, ImagesConfig)
    section = ImageConfig(
        **{key: getattr(model.config, key) for key in ImageTowerSection.model_fields}, num_classes=len(names)
    )
    shape = ImageShape(section.in_channels, section.image_size, len(names))
    evaluated = labelled_set(f"{name}_zero_shot", part, names, images, shape)
    classifier = ZeroShotClassifier(model, class_vectors(model, task.texts, names, templates, layout.data))
    of_classes = ImageClassificationTask(config.replaced(model=section))
    results.classify(classifier, of_classes, evaluated, templates=templates)


def _recalls(
    config: RunConfig, model: ClipModel, task: ClipTask, dataset: ImageTextDataset, layout: Layout
) -> Mapping[str, Any]:
    size = config.evaluation.eval_batch_size
    number = _IMAGES_AT_ONCE if size == "auto" else size
    features = features_of_set(model, task, dataset, number, layout.data, config.data.num_workers)
    return recalls(features, layout.data)


def _means(found: Mapping[str, Any]) -> dict[str, float]:
    means: dict[str, float] = {}
    for metric, hits in found.items():
        means[metric], means[f"{metric}_stderr"] = mean_and_error(hits)
    return means
