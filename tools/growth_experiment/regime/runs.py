"""Training one trial with the product's loop, and its result as a small JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron.checkpoint.store import RunFolder
from megatron.config import load_config
from megatron.config.schema import RunConfig
from megatron.errors import UserError
from megatron.evaluation.perplexity import perplexity
from megatron.files import read_json, replaced_file
from megatron.growth import grow
from megatron.inference import load_model
from megatron.model import LanguageModel
from megatron.training.branch import CONFIG_FILE, Decay, branch_run
from megatron.training.state import TrainState
from tools.growth_experiment.net2net import logit_difference
from tools.growth_experiment.regime.data import held_out_ids, read_facts
from tools.growth_experiment.regime.measures import of_new_tokens
from tools.growth_experiment.regime.recipes import CHOSEN, REFINED, SCREENED, options_of
from tools.growth_experiment.regime.sizes import BATCH, SEQUENCE, SIZES, TOKENS_PER_UPDATE, Kind, base_updates
from tools.growth_experiment.regime.starts import started_model
from tools.growth_experiment.regime.trials import (
    Trial,
    all_trials,
    check_trials,
    cost_before,
    first_iteration,
    rate_trials,
    slug,
)
from tools.growth_experiment.runs import read_metrics, save_start

RESULTS, CHECK = (Path(__file__).parent / name for name in ("results", "check"))
"""Where results are kept unless told: in the repository, those of a check apart."""
REPEAT = "restore it, or delete it: `run` trains what it is of again"
"""What to do about a damaged result."""
FINAL_LR = 0.1
"""At the end of a decay, as a part of the peak."""
_OF_SCHEDULE = ("lr", "decay", "decay_style", "warmup", "annealed")
"""Options of a recipe that say how it is trained; the others are configuration keys."""
_EVALUATIONS = 10
_SAMPLES = 8
"""Held-out sequences on which logits before and after a growth are compared, and tokens in use are counted."""


class Stopped(UserError):
    """A trial was told to stop; it goes on from its last checkpoint."""


@dataclass(frozen=True)
class Experiment:
    """The prepared folder, and where results are kept."""

    output: Path
    given: Path | None = None
    """Folder of results; default RESULTS or CHECK."""
    only: str = ""
    """Pattern of the names of trials that are to be run, beside what they start from."""

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What data.json says."""
        return read_facts(self.output)

    @cached_property
    def trials(self) -> dict[str, Trial]:
        """All, by name, in the order in which they run."""
        trials = check_trials if self.is_check else all_trials
        return {trial.name: trial for trial in trials(self.facts["updates"])}

    @cached_property
    def results(self) -> Path:
        """Where results are kept."""
        return self.given or (CHECK if self.is_check else RESULTS)

    @property
    def is_check(self) -> bool:
        """Does it try what was chosen by another one?"""
        return self.facts.get("plan") == "check"

    @cached_property
    def _deciding(self) -> tuple[Path, dict[str, Trial]]:
        """Where rates and recipes are chosen from, and its trials: a check takes what was chosen before."""
        if not self.is_check:
            return self.results, self.trials
        return RESULTS, {trial.name: trial for trial in all_trials(base_updates())}

    @cached_property
    def flops_per_token(self) -> dict[str, float]:
        """Of training, by size."""
        models = {name: LanguageModel(size.config(), device="meta") for name, size in SIZES.items()}
        return {name: float(model.flops_per_token(SEQUENCE)) for name, model in models.items()}

    def folder(self, trial: Trial) -> Path:
        """The trial's folder."""
        return self.output / trial.name

    def run_folder(self, trial: Trial) -> Path:
        """The folder of its checkpoints."""
        return self.folder(trial) / "checkpoints"

    def result(self, name: str) -> dict[str, Any] | None:
        """What is kept of a finished trial, or of one that is the same training under another recipe's name.

        Raises UserError for a result of another length of training or text.
        """
        trial = self.trials[name]
        found = _kept(self.results, trial) or self._of_the_same(trial)
        if found is not None and found["text"] != self.facts["text"]:
            path = self.results / self.trials[name].file
            raise UserError(f"{path}: of {found['text']}, not of {self.facts['text']}; give --results")
        return found

    def _of_the_same(self, trial: Trial) -> dict[str, Any] | None:
        """For a recipe that was chosen: the result of a trial with the same options, where there is one."""
        if trial.recipe not in CHOSEN or not all(self.is_decided(name) for name in trial.needs):
            return None
        options = self.options(trial)
        for other in self.trials.values():
            is_alike = replace(other, name=trial.name, recipe=trial.recipe, needs=trial.needs) == trial
            if is_alike and other != trial and self.options(other) == options:
                found = _kept(self.results, other)
                if found is not None:
                    return found | {"name": trial.name, "recipe": trial.recipe}
        return None

    def has_failed(self, name: str) -> bool:
        """Did it end with a mistake? Then failed.txt in its folder says which; without that file it is tried again."""
        return (self.folder(self.trials[name]) / "failed.txt").is_file()

    def is_decided(self, name: str) -> bool:
        """Is it known how well it does, by which others are chosen?"""
        folder, trials = self._deciding
        return _kept(folder, trials[name]) is not None or (name in self.trials and self.has_failed(name))

    def tuning_loss(self, name: str) -> float:
        """On the tuning text; infinite for a trial that failed."""
        folder, trials = self._deciding
        result = _kept(folder, trials[name])
        return math.inf if result is None else float(result["loss"]["tuning"])

    def peak_rate(self, kind: Kind) -> float:
        """The best of RATES."""
        trials = rate_trials(kind, self.facts["updates"])  # of the same names, however long
        return min(trials, key=lambda trial: self.tuning_loss(trial.name)).rate or 0.0

    def peak_lr(self, trial: Trial) -> float:
        """A trial's highest learning rate."""
        rate = trial.rate or self.peak_rate(trial.size.kind)
        return float(rate * self.options(trial).get("lr", 1.0))

    def screened(self) -> Mapping[str, float]:
        """Losses on the tuning text from which recipes are chosen."""
        return {recipe: self.tuning_loss(f"seed1/grown/{slug(recipe)}-tenth") for recipe in (*SCREENED, *REFINED)}

    def options(self, trial: Trial) -> dict[str, Any]:
        """The options of a TokenFormer's growth."""
        return options_of(trial.recipe, self.screened()) if trial.start in ("grow", "official") else {}


def _kept(folder: Path, trial: Trial) -> dict[str, Any] | None:
    path = folder / trial.file
    if not path.is_file():
        return None
    found = read_json(path, REPEAT)
    if found["updates"] != trial.updates:
        raise UserError(f"{path}: {found['updates']} updates, not {trial.updates}; give --results")
    return found


def run_trial(experiment: Experiment, trial: Trial, train: Callable[[RunConfig], TrainState]) -> None:
    """Train to the end, from its last checkpoint if there is one, and write the result.

    Args:
        train: megatron.training.train, or what does the same beside other trials.

    Raises: Stopped when it was told to stop; UserError for what keeps it from training.
    """
    folder = experiment.folder(trial)
    folder.mkdir(parents=True, exist_ok=True)
    moment = {} if trial.start in ("scratch", "branch") else _moment_of_growth(experiment, trial)
    file, overrides = _configuration(experiment, trial)
    state = train(load_config([file], overrides))
    if state.iteration < first_iteration(trial) + trial.updates:
        raise Stopped(f"stopped in {folder}; the same command goes on from there")
    _write_result(experiment, trial, moment)


def _configuration(experiment: Experiment, trial: Trial) -> tuple[Path, dict[str, Any]]:
    """The run's configuration file, and what is said beside it."""
    interval = max(1, trial.updates // _EVALUATIONS)
    if trial.start == "branch":
        target = experiment.run_folder(trial)
        if not (target / CONFIG_FILE).is_file():
            parent = experiment.trials[str(trial.parent)]
            lr = experiment.peak_rate(trial.size.kind)
            branch_run(
                experiment.run_folder(parent), target, Decay(trial.updates, "cosine", FINAL_LR * lr), iteration=trial.at
            )
        log = str(experiment.folder(trial))
        return target / CONFIG_FILE, {"eval_interval": interval, "log_dir": log}
    file = experiment.folder(trial) / CONFIG_FILE
    keys = run_keys(experiment, trial) | {"eval_interval": interval}
    file.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    is_resumed = RunFolder(experiment.run_folder(trial)).find() is not None
    if trial.start in ("scratch", "grow") or is_resumed:
        return file, {}
    return file, {"load": str(experiment.folder(trial) / "start"), "finetune": True}


def run_keys(experiment: Experiment, trial: Trial) -> dict[str, Any]:
    """The run's YAML, but for how often it is evaluated. Not for a branch, whose trunk says it."""
    options, save, lr = experiment.options(trial), str(experiment.run_folder(trial)), experiment.peak_lr(trial)
    data, output = experiment.facts, experiment.output
    keys = {
        **trial.size.model(),
        "tokenizer_type": "HFTokenizer", "vocab_file": str(output / "data/tokenizer.json"),
        "data_path": str(output / "data/text"), "split": f"{data['documents']}, 1, 0", "num_workers": 0,
        "train_iters": trial.updates, "train_micro_batch_size_per_gpu": BATCH, "seed": trial.seed,
        "optimizer": {"type": "Adam", "params": {"lr": lr, "betas": [0.9, 0.95], "eps": 1e-8}},
        "min_lr": FINAL_LR * lr, **_schedule(trial, options, data["updates"]),
        "weight_decay": 0.1, "gradient_clipping": 1.0, "precision": "fp32",
        "save": save, "load": save, "checkpoint_factor": 4000, "extra_save_iters": list(trial.saves),
        "keep_last_n_checkpoints": 1, "eval_iters": max(1, data["sequences"] // BATCH),
        "log_dir": str(experiment.folder(trial)), "log_interval": 200, "peak_tflops": 1.0,
        "watchdog": {"enabled": False},
    }  # fmt: skip
    if trial.start == "grow":
        keys |= _growth(experiment, trial, options)
    return keys


def _schedule(trial: Trial, options: Mapping[str, Any], updates: int) -> dict[str, Any]:
    """Warm-up, stable, decay. What starts with an empty optimizer warms up; what grew exactly need not."""
    decay = options.get("decay", trial.decay) if trial.decay else 0.0
    parts = {"scratch": 0.01 * updates, "grow": options.get("warmup", 0.0) * trial.updates}
    warmup = min(round(parts.get(trial.start, 0.05 * trial.updates)), trial.updates // 4)
    iterations = min(round(decay * trial.updates), trial.updates - warmup)
    style = options.get("decay_style", "cosine")
    decays = {"lr_wsd_decay_style": style, "lr_wsd_decay_iters": iterations} if iterations else {}
    return {"lr_decay_style": "WSD", "lr_warmup_iters": warmup, **decays}


def _growth(experiment: Experiment, trial: Trial, options: Mapping[str, Any]) -> dict[str, Any]:
    keys = {key: value for key, value in options.items() if key not in _OF_SCHEDULE}
    if "new_tokens_warmup" in keys:
        keys["new_tokens_warmup"] = round(keys["new_tokens_warmup"] * trial.updates)
    return {"pretrain_partial_init": str(parent_checkpoint(experiment, trial)), **keys}


def parent_checkpoint(experiment: Experiment, trial: Trial) -> Path:
    """The checkpoint that a trial starts from."""
    return experiment.run_folder(experiment.trials[str(trial.parent)]) / f"global_step{trial.at}"


def _moment_of_growth(experiment: Experiment, trial: Trial) -> dict[str, Any]:
    """Losses and logits before and after the growth; once. What the product does not grow itself is saved to start."""
    file = experiment.folder(trial) / "moment.json"
    if file.is_file():
        return read_json(file, "delete it: it is measured again")
    before, after = (load_model(parent_checkpoint(experiment, trial)) for _ in range(2))
    options = experiment.options(trial)
    if trial.start == "grow":
        keys = {key: options[key] for key in ("new_keys", "row_norm") if key in options}
        slots = trial.size.slots
        grow(after, slots, slots, 4 * slots, seed=trial.seed, **keys)
    else:
        after = started_model(trial.start, before, trial.size.config(), trial.seed)
        save_start(experiment.folder(trial) / "start", after, run_keys(experiment, trial))
    difference, largest = logit_difference(before, after, _samples(experiment))
    found = {
        "loss_before": _losses(experiment, before)["text"], "loss_after": _losses(experiment, after)["text"],
        "logit_difference": difference, "largest_logit": largest,
    }  # fmt: skip
    with replaced_file(file) as whole:
        whole.write(json.dumps(found).encode())
    return found


def _samples(experiment: Experiment) -> torch.Tensor:
    count = min(_SAMPLES, experiment.facts["sequences"])
    ids = held_out_ids(experiment.output, "text")[: count * SEQUENCE]
    return torch.from_numpy(ids.astype(np.int64)).view(count, SEQUENCE)


def _losses(experiment: Experiment, model: LanguageModel) -> dict[str, float]:
    """Nats a token, on the text that results come from and on that which settings are chosen on."""
    texts = {name: held_out_ids(experiment.output, name) for name in ("text", "tuning")}
    return {name: float(perplexity(model, ids, SEQUENCE, batch_size=16)["loss"]) for name, ids in texts.items()}


def _write_result(experiment: Experiment, trial: Trial, moment: Mapping[str, Any]) -> None:
    first, size = first_iteration(trial), trial.size
    model = load_model(experiment.run_folder(trial))
    losses = _losses(experiment, model)
    if not math.isfinite(losses["text"]):
        raise UserError(f"{trial.name}: the loss is not finite")
    curve = {line["iteration"] - first: line["valid_lm_loss"] for line in read_metrics(experiment.folder(trial))
             if "valid_lm_loss" in line}  # fmt: skip
    tokens, flops = cost_before(trial, experiment.trials, experiment.flops_per_token)
    result: dict[str, Any] = {
        "name": trial.name, "seed": trial.seed, "size": size.name, "kind": size.kind, "start": trial.start,
        "recipe": trial.recipe, "label": trial.label, "options": experiment.options(trial),
        "peak_lr": experiment.peak_lr(trial), "text": experiment.facts["text"],
        "updates": trial.updates, "tokens_per_update": TOKENS_PER_UPDATE, "parameters": size.parameters(),
        "flops_per_token": experiment.flops_per_token[size.name], "tokens_before": tokens, "flops_before": flops,
        "loss": losses, "curve": sorted(({**curve, trial.updates: losses["text"]}).items()),
        **moment,
    }  # fmt: skip
    if trial.start in ("grow", "official"):
        result |= of_new_tokens(model, load_model(parent_checkpoint(experiment, trial)), _samples(experiment))
    experiment.results.mkdir(parents=True, exist_ok=True)
    with replaced_file(experiment.results / trial.file) as file:
        file.write((json.dumps(result, indent=None) + "\n").encode())
