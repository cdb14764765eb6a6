"""Preparing the growth experiment's data and running its trials with the product's own training loop.

A trial is a folder: config.yml (also good for `python train.py FOLDER/config.yml`), checkpoints, metrics.jsonl,
trial.json. A finished one is skipped, a killed one resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from megatron.checkpoint.pieces import whole_pieces
from megatron.checkpoint.state import CanonicalState
from megatron.checkpoint.store import RunFolder
from megatron.config import load_config
from megatron.config.sections.model import ModelConfig
from megatron.data import IndexedDataset, IndexedDatasetBuilder
from megatron.errors import UserError
from megatron.evaluation.perplexity import perplexity
from megatron.files import read_json, replaced_file
from megatron.growth import grow
from megatron.inference import load_model
from megatron.log import get_logger
from megatron.model import LanguageModel
from megatron.model.init import initial_value
from megatron.tokenizer.training import train_tokenizer
from tools.demo.prepare import HELD_OUT_EVERY, read_addresses
from tools.growth_experiment.net2net import expanded_model, logit_difference
from tools.growth_experiment.trials import (
    BATCH,
    FRACTIONS,
    HELD_OUT_SEQUENCES,
    SEQUENCE,
    SIZES,
    TOKENS_PER_UPDATE,
    VOCABULARY,
    Trial,
)

# The first updates after a growth are evaluated more often: every 5 until the 41st.
_RECOVERY, _RECOVERY_INTERVAL = 41, 5


def prepare(output: Path, tokens: int) -> None:
    """Write tokenizer, token files and data.json, unless they are there.

    The held-out document is made of the first tokens of every twelfth State of the Union address, and exactly as long
    as a validation: every trial is evaluated on the same sequences, whatever its seed. Trials that choose learning
    rates have another one, from the sixth of every twelve. Neither kind of address is trained on.
    """
    description = output / "data.json"
    if description.is_file():
        return
    folder = output / "data"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"tokens": tokens, **write_token_files(folder, read_addresses(), HELD_OUT_SEQUENCES)}
    needed = tokens * (1 + (len(SIZES) - 1) * max(FRACTIONS.values()))
    with replaced_file(description) as file:
        file.write(json.dumps(facts, indent=1).encode())
    print(
        f"{facts['training_tokens']:,} training tokens, {facts['held_out_tokens']:,} held out; "
        f"the longest chain reads {needed:,.0f}"
    )


def write_token_files(folder: Path, addresses: list[str], sequences: int) -> dict[str, int]:
    """Write tokenizer.json, and `text` and `tuning`: the documents that are trained on and one that is held out.

    Args:
        addresses: the texts; of every twelve the last is held out for `text`, and the sixth for `tuning`.
        sequences: of SEQUENCE tokens that are held out.

    Returns: how many documents and tokens there are. Raises: UserError for too little text.
    """
    training = [text for i, text in enumerate(addresses) if (i + 1) % (HELD_OUT_EVERY // 2)]
    tokenizer = train_tokenizer(training, VOCABULARY, folder / "tokenizer.json")
    eod: int = tokenizer.token_to_id("<|endoftext|>")  # type: ignore[assignment]
    documents = [[*tokenizer.encode(text).ids, eod] for text in training]
    for name, first in (("text", HELD_OUT_EVERY - 1), ("tuning", HELD_OUT_EVERY // 2 - 1)):
        texts = addresses[first::HELD_OUT_EVERY]
        held_out = _held_out(texts, lambda text: tokenizer.encode(text).ids, eod, sequences * SEQUENCE + 1)
        with IndexedDatasetBuilder(folder / name, np.uint16) as builder:
            for ids in (*documents, held_out):
                builder.add_document(ids)
            builder.finalize()
    available = sum(len(ids) for ids in documents)
    return {"documents": len(training), "training_tokens": available, "held_out_tokens": len(held_out)}


def _held_out(addresses: list[str], encode: Any, eod: int, wanted: int) -> list[int]:
    if not addresses:
        raise UserError("too little text: of every twelve pieces two are held out")
    share = -(-wanted // len(addresses))
    ids = [token for text in addresses for token in [*encode(text[: 20 * share])[: share - 1], eod]]
    if len(ids) < wanted:
        raise UserError("the held-out addresses are too short")
    return ids[:wanted]


def held_out_ids(output: Path, validation: str) -> np.ndarray:
    """Tokens of the held-out document of data/`validation`."""
    dataset = IndexedDataset(output / "data" / validation)
    return np.asarray(dataset[len(dataset) - 1])


def held_out_loss(model: LanguageModel, output: Path, validation: str) -> float:
    """Nats per token, on the sequences that training runs are validated on."""
    return perplexity(model, held_out_ids(output, validation), SEQUENCE, batch_size=BATCH)["loss"]


def run(output: Path, trials: list[Trial], tokens: int) -> None:
    """Run all trials that are not finished.

    Args:
        tokens: of a trial from scratch.

    Raises: UserError when a trial was told to stop, or `output` was prepared for another number of tokens.
    """
    if not (output / "data.json").is_file():
        raise UserError(f"--stage: {output} is not prepared; run the stage prepare first")
    data = read_json(output / "data.json", "delete it and run the stage prepare again")
    if data["tokens"] != tokens:
        raise UserError(f"--tokens: {output} was prepared for {data['tokens']}; give that, or another --output")
    documents = data["documents"]
    for number, trial in enumerate(trials):
        if is_finished(output, trial):
            continue
        print(f"[{number + 1}/{len(trials)}] {trial.folder} {trial.label}: {trial.updates} updates", flush=True)
        start = time.perf_counter()
        _run_one(output, trial, documents)
        print(f"    {time.perf_counter() - start:.0f} s", flush=True)


def is_finished(output: Path, trial: Trial) -> bool:
    """Has the trial been trained and validated to its end?"""
    lines = read_metrics(output / trial.folder)
    return any(line["iteration"] == trial.updates and "valid_lm_loss" in line for line in lines)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    path, lines = folder / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # the last line of a killed run
    return lines


def _run_one(output: Path, trial: Trial, documents: int) -> None:
    from megatron.training import train

    folder = output / trial.folder
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.yml"
    config_file.write_text(yaml.safe_dump(trial.config(output, documents), sort_keys=False))
    if not (folder / "trial.json").is_file():
        _write_facts(output, trial)
    if trial.start != "scratch" and _iteration(folder) < _RECOVERY < trial.updates:
        keys = {"eval_interval": _RECOVERY_INTERVAL, "exit_interval": _RECOVERY}
        train(load_config([config_file], {**_weights_only(folder, trial), **keys}))
        if _iteration(folder) < _RECOVERY:
            raise UserError(f"stopped in {folder}; the same command goes on from there")
    state = train(load_config([config_file], _weights_only(folder, trial)))
    if state.iteration < trial.updates:
        raise UserError(f"stopped in {folder}; the same command goes on from there")
    if not is_finished(output, trial):  # killed between the last checkpoint and its validation
        loss = held_out_loss(load_model(folder / "checkpoints"), output, trial.validation)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"iteration": trial.updates, "valid_lm_loss": loss}) + "\n")


def _iteration(folder: Path) -> int:
    return max(RunFolder(folder / "checkpoints").iterations(), default=0)


def _weights_only(folder: Path, trial: Trial) -> dict[str, Any]:
    """What makes a run that has no checkpoint yet start from the weights of a prepared one."""
    if trial.start == "scratch" or trial.new_keys or RunFolder(folder / "checkpoints").find() is not None:
        return {}
    return {"load": str(folder / "start"), "finetune": True}


def _write_facts(output: Path, trial: Trial) -> None:
    """trial.json: what the report needs beside the metrics; and the checkpoint a trial of parts d and e starts from."""
    folder, config = output / trial.folder, trial.model_config()
    model = LanguageModel(config, device="meta")
    embedding = (config.padded_vocab_size or 0) * config.hidden_size
    facts: dict[str, Any] = {
        "part": trial.part, "seed": trial.seed, "size": trial.size.name, "label": trial.label, "start": trial.start,
        "kind": trial.kind, "peak_lr": trial.peak_lr,
        "parent": trial.parent, "updates": trial.updates, "tokens_per_update": TOKENS_PER_UPDATE,
        "parameters": model.num_parameters(), "non_embedding": model.num_parameters() - embedding,
        "flops_per_token": model.flops_per_token(SEQUENCE),
    }  # fmt: skip
    if trial.parent:
        base = load_model(output / trial.parent / "checkpoints")
        facts["loss_before_growth"] = held_out_loss(base, output, trial.validation)
        grown = _grown(base, trial, config)
        facts["loss_after_growth"] = held_out_loss(grown, output, trial.validation)
        held_out = held_out_ids(output, trial.validation)[: 4 * SEQUENCE].astype(np.int64)
        ids = torch.from_numpy(held_out).view(4, SEQUENCE)
        unchanged = load_model(output / trial.parent / "checkpoints")
        facts["logit_difference"], facts["largest_logit"] = logit_difference(unchanged, grown, ids)
        get_logger().info("logits change by %.1e at the growth", facts["logit_difference"])
        if not trial.new_keys:
            save_start(folder / "start", grown, trial.config(output, 1))
    with replaced_file(folder / "trial.json") as file:
        file.write(json.dumps(facts, indent=1).encode())


def save_start(folder: Path, model: LanguageModel, keys: Mapping[str, Any]) -> None:
    """A checkpoint of weights alone, which a run takes with `load` and `finetune`.

    Args:
        keys: of the run's configuration.
    """
    flat = {**keys, **model.config.model_dump(mode="json")}
    pieces = whole_pieces({"model": list(model.state_dict().items())})
    RunFolder(folder).save(CanonicalState(0, {}, flat, pieces))


def _grown(base: LanguageModel, trial: Trial, config: ModelConfig) -> LanguageModel:
    if trial.start == "net2net":
        return expanded_model(base, config, trial.seed)
    if trial.start == "official":
        return grown_as_official(base, config, trial.seed)
    if trial.start == "repeat":
        return grown_by_repeating(base, config)
    counts = config.qkv_slot_num, config.proj_slot_num, config.ffn_slot_num
    grow(base, *counts, new_keys=trial.new_keys or "zero", seed=trial.seed)
    return base


@torch.no_grad()
def grown_as_official(base: LanguageModel, config: ModelConfig, seed: int) -> LanguageModel:
    """Growth as in the official code: new keys and values at their initialisation, tau the root of the new count."""
    grown = LanguageModel(config)
    old = {name: tensor for name, tensor in base.named_parameters()}
    for name, parameter in grown.named_parameters():
        parameter.copy_(initial_value(f"grown.{name}", parameter, config, seed))
        parameter[: len(old[name])].copy_(old[name])
    return grown


@torch.no_grad()
def grown_by_repeating(base: LanguageModel, config: ModelConfig) -> LanguageModel:
    """The other exact growth: each key a whole number of times, new values zero, tau the root of the new count."""
    grown = LanguageModel(config)
    old = {name: tensor for name, tensor in base.named_parameters()}
    for name, parameter in grown.named_parameters():
        if "key_tokens" in name:
            parameter.copy_(old[name].repeat(len(parameter) // len(old[name]), 1))
        else:
            parameter.zero_()
            parameter[: len(old[name])].copy_(old[name])
    return grown
