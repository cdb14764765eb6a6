"""Runs on digits with captions: CLIP, and a model that says what is on an image. See tools.vision.accuracy."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from megatron.config import load_config
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data import IndexedDataset
from megatron.data.datasets import parts_of
from megatron.data.image_sources import list_arrays
from megatron.data.prepare_images import Faults, prepare_images
from megatron.exchange import open_checkpoint
from tools.demo.captioned_digits import TEMPLATES, UNSEEN_TEMPLATES, WORDS, write_digits
from tools.vision.scripts import ROOT, ScriptFolder


@dataclass(frozen=True)
class PairTrial:
    """One run on digits with captions of `templates`, which lie in {data}/{data_name}."""

    seed: int
    subject: ClassVar[str]
    data_name: ClassVar[str]
    templates: ClassVar[tuple[str, ...]]

    @property
    def name(self) -> str:
        """By which its result is kept."""
        return f"{self.subject} seed {self.seed}"

    def run(self, path: Path, data: Path) -> dict[str, Any]:
        """Train in a folder with the images of `data`, and what came of it. Raises UserError where a script fails."""
        folder, begin = ScriptFolder(path, self.name), time.perf_counter()
        images = self.prepared(data)
        found = self.results(folder, images)
        parameters = open_checkpoint(path / "model").num_parameters
        return {**found, "parameters": parameters, "seconds": round(time.perf_counter() - begin)}

    def results(self, folder: ScriptFolder, images: Path) -> dict[str, Any]:
        """Accuracy in %, and other figures; the model is trained in {folder}/model. `images` is their prefix."""
        raise NotImplementedError

    def prepared(self, data: Path) -> Path:
        """The prefix of the images, which are prepared unless they are there with captions."""
        prefix = data / self.data_name / self.data_name
        if not Path(f"{prefix}_text_document.idx").is_file():
            with TemporaryDirectory() as folder:
                arrays = Path(folder) / "digits.npz"
                write_digits(arrays, self.templates)
                characters = TokenizerConfig(tokenizer_type="CharLevelTokenizer")
                prepare_images(list_arrays(str(arrays)), prefix, characters, Faults(skip=False))
        return Path(f"{prefix}_image_document")

    def keys(self, save: Path, data_path: Path) -> dict[str, Any]:
        """What a training changes of its file."""
        return {"seed": self.seed, "data_path": data_path, "save": save, "log_dir": save}


@dataclass(frozen=True)
class ClipTrial(PairTrial):
    """Zero-shot classes of held-out digits, told by texts of templates that captions have, and of others."""

    subject = "CLIP"
    data_name = "captioned_digits"
    templates = TEMPLATES
    config = ROOT / "configs/clip/demo_digits.yml"

    def results(self, folder: ScriptFolder, images: Path) -> dict[str, Any]:
        """See PairTrial."""
        keys = self.keys(folder.path / "model", images)
        folder.call("train.py", self.config, keys={**keys, "load": keys["save"]})
        found = {}
        for name, templates in (("accuracy", TEMPLATES), ("unseen_templates", UNSEEN_TEMPLATES)):
            keys = {"data_path": images, "load": folder.path / "model", "zero_shot_templates": json.dumps(templates)}
            result = folder.evaluate(self.config, f"{self.data_name}_zero_shot", keys)
            found[name] = round(100 * result["acc,none"], 2)
        return found


@dataclass(frozen=True)
class CaptionTrial(PairTrial):
    """What generate.py says of held-out digits: in `accuracy` % one of the ten captions with the right word."""

    subject = "captions"
    data_name = "digits"
    templates = (*TEMPLATES, *UNSEEN_TEMPLATES)
    configs = ROOT / "configs"

    def results(self, folder: ScriptFolder, images: Path) -> dict[str, Any]:
        """See PairTrial."""
        config, towers = self.configs / "image_to_text/demo_digits.yml", {}
        texts = Path(str(images).replace("_image_", "_text_"))
        sources = {"image": ("vision/demo_digits.yml", images), "text": ("image_to_text/demo_text.yml", texts)}
        for tower, (file, data_path) in sources.items():
            towers[f"pretrain_{tower}_tower"] = folder.path / tower
            folder.call("train.py", self.configs / file, keys=self.keys(folder.path / tower, data_path))
        model = folder.path / "model"
        folder.call("train.py", config, keys={**self.keys(model, images), **towers, "load": model})
        said = self.said(folder, config, images)
        evaluated = folder.evaluate(config, self.data_name, {"data_path": images, "load": model})
        right = [text in [template.format(word) for template in self.templates] for word, text in said]
        return {
            "accuracy": round(100 * sum(right) / len(right), 2),
            "exact_match": round(100 * evaluated["exact_match,none"], 2),
            "perplexity": round(evaluated["perplexity,none"], 4),
        }

    def said(self, folder: ScriptFolder, config: Path, images: Path) -> list[tuple[str, str]]:
        """(what it is, what is said of it) of every held-out digit."""
        stored, labels = IndexedDataset(images), IndexedDataset(str(images).replace("_image_", "_label_"))
        [part] = parts_of(load_config(config, [f"data_path={images}"]).data, "valid")
        files = {number: folder.path / f"held_out/{number}.png" for number in range(*part.documents)}
        lines, said = folder.path / "lines.jsonl", folder.path / "said.jsonl"
        (folder.path / "held_out").mkdir(parents=True, exist_ok=True)
        for number, file in files.items():
            file.write_bytes(stored[number].tobytes())
        lines.write_text("".join(json.dumps({"image": str(file)}) + "\n" for file in files.values()))
        words = ("--text_gen_type", "input-file", "-i", lines, "-o", said)
        folder.call("generate.py", config, *words, keys={"load": folder.path / "model", "temperature": 0.0})
        texts = [json.loads(line)["text"] for line in said.read_text(encoding="utf-8").splitlines()]
        return [(WORDS[int(labels[number][0])], text) for number, text in zip(files, texts, strict=True)]


def pair_trials(seeds: Sequence[int]) -> list[PairTrial]:
    """All of them, seed by seed."""
    return [kind(seed) for seed in seeds for kind in (ClipTrial, CaptionTrial)]
