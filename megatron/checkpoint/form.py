"""What a checkpoint may hold: its manifest, its train_state.json, the values of its tensors.

Each check returns None, or in words what is wrong: "names a file outside its folder". They go by structure alone, and
so find contents that somebody changed together with the checksums. `value_fault` is for values, before they are saved
as well as after they are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.pieces import coverage_fault
from megatron.checkpoint.state import EMA, SMALL_FILES, TENSOR_KINDS

CHECKSUM = "sha256"
"""The manifest's key for the SHA-256 of everything else in it. Every version of the format is to keep it."""

SAFETENSORS_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""Names of dtypes in the manifest, and those in the header of a file."""

# An entry is [file, dtype, shape] of a tensor that is whole, or [[[file, offset, size] of each part], dtype, shape].
_MANIFEST_KEYS = {"format", "version", "iteration", "files", "tensors"}
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,30}")
_HASH = re.compile(r"[0-9a-f]{64}")
_LARGEST = 2**53
"""No count of samples, tokens or bytes is larger; all of them fit into 64 bits with room to add."""
_MAX_VALUES, _MAX_DEPTH, _MAX_DIMENSIONS = 2_000_000, 32, 16


MOST_IN_MANIFEST = 100_000_000
"""Values of a manifest: a large model in the parts of many ranks has millions. JSON has no aliases."""


def dtype_name(tensor: Tensor) -> str:
    """`float32` and the like."""
    return str(tensor.dtype).removeprefix("torch.")


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without its checksum, however it is spaced and ordered."""
    rest = {key: value for key, value in manifest.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_fault(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a manifest of this version."""
    if unknown := manifest.keys() - _MANIFEST_KEYS - {CHECKSUM}:
        return f"has an unknown key '{min(unknown)[:40]}'"
    if not manifest.keys() >= _MANIFEST_KEYS:
        return f"is incomplete: {min(_MANIFEST_KEYS - manifest.keys())} is missing"
    if not _is_count(manifest["iteration"]):
        return "has no number of an iteration"
    fault = _files_fault(manifest["files"]) or _tensors_fault(manifest["tensors"], manifest["files"])
    if fault is None and manifest["version"] != version_of(manifest["tensors"]):
        return f"is of version {manifest['version']}, its tables of version {version_of(manifest['tensors'])}"
    return fault


def version_of(index: Mapping[str, Any]) -> int:
    """Version of the format that tables of tensors need: 2 where one is in parts."""
    return 1 + any(isinstance(entry[0], list) for table in index.values() for entry in table.values())


def places_of(entry: Sequence[Any]) -> list[Any]:
    """Where a tensor is, from its entry in the manifest: [file, offset, size] of each of its parts."""
    file, _, shape = entry
    return file if isinstance(file, list) else [[file, [0] * len(shape), shape]]


def _files_fault(files: Any) -> str | None:
    if not isinstance(files, dict):
        return "has no table of files"
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            return f"names a file that cannot be one of its folder: '{name[:40]}'"
        if not isinstance(entry, dict) or not _is_count(entry.get("bytes")):
            return f"has no size of {name}"
        if not isinstance(entry.get("sha256"), str) or not _HASH.fullmatch(entry["sha256"]):
            return f"has no checksum of {name}"
    missing = [name for name in SMALL_FILES if name not in files]
    return f"does not list {missing[0]}" if missing else None


def _tensors_fault(tensors: Any, files: Mapping[str, Any]) -> str | None:
    if not isinstance(tensors, dict) or not tensors.keys() >= set(TENSOR_KINDS):
        return f"has no tables of {', '.join(TENSOR_KINDS)} tensors"
    for kind, index in tensors.items():
        if not _KIND.fullmatch(kind):
            return f"has a kind of tensors that is no name: '{kind[:40]}'"
        if not isinstance(index, dict):
            return f"has no table of {kind} tensors"
        for name, entry in index.items():
            if not _is_entry(entry) or not all(_is_place(place, kind, entry[2], files) for place in places_of(entry)):
                return f"has no file, dtype and shape of {name[:80]} ({kind})"
            boxes = [(tuple(offset), tuple(size)) for _, offset, size in places_of(entry)]
            if isinstance(entry[0], list) and (fault := coverage_fault(entry[2], boxes)):
                return f"says that {name[:80]} ({kind}) {fault}"
    named = {place[0] for index in tensors.values() for entry in index.values() for place in places_of(entry)}
    unused = [name for name in files if name.endswith(".safetensors") and name not in named]
    if unused:
        return f"lists no tensor of {unused[0]}"
    model = tensors["model"]
    return (
        _model_fault(model) or _optimizer_fault(tensors["optimizer"], model) or _ema_fault(tensors.get(EMA, {}), model)
    )


def _is_entry(entry: Any) -> bool:
    """Is it [file or parts, dtype, shape]?"""
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], (str, list)):
        return False
    _, dtype, shape = entry
    is_shape = _are_counts(shape) and len(shape) <= _MAX_DIMENSIONS and math.prod(shape) < _LARGEST
    return isinstance(dtype, str) and dtype in SAFETENSORS_DTYPES and is_shape


def _is_place(place: Any, kind: str, shape: list[int], files: Mapping[str, Any]) -> bool:
    """Is it [file, offset, size] of a part of a tensor of `shape`?"""
    if not isinstance(place, list) or len(place) != 3 or not isinstance(place[0], str):
        return False
    file, offset, size = place
    is_box = _are_counts(offset) and _are_counts(size) and len(offset) == len(size) == len(shape)
    return is_box and file in files and file.startswith(f"{kind}-")


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_count, values))


def _model_fault(model: Mapping[str, Any]) -> str | None:
    for name, (_, dtype, shape) in model.items():
        is_count = name.endswith(".tau_tokens")
        is_right = dtype == "int64" and (not shape or len(shape) == 1 < shape[0]) if is_count else dtype == "float32"
        if not is_right:
            return f"makes {name[:80]} {dtype} of shape {shape}"
        if name.endswith(".key_tokens_0") and (tau := name.replace("key_tokens_0", "tau_tokens")) not in model:
            return f"lacks {tau[:80]}"
    return None


# What optimizers keep for each value of a parameter; other states may be counts.
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def _optimizer_fault(optimizer: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    for full_name, (_, dtype, shape) in optimizer.items():
        moment, _, name = full_name.partition("/")
        if name not in model:
            return f"has an optimizer state {full_name[:80]} of no parameter"
        whole = model[name][2]
        if shape != whole and (shape or moment in _MOMENTS):
            return f"makes {full_name[:80]} of shape {shape}, its parameter is of {whole}"
        if moment in _MOMENTS and dtype != "float32":
            return f"makes {full_name[:80]} {dtype}"
    return None


def _ema_fault(ema: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """Is there the average of every parameter, or of none?"""
    parameters = {name: entry[1:] for name, entry in model.items() if not name.endswith(".tau_tokens")}
    averages = {name: entry[1:] for name, entry in ema.items()}
    if not averages or averages == parameters:
        return None
    name = min(n for n in parameters.keys() | averages.keys() if parameters.get(n) != averages.get(n))
    if name not in averages:
        return f"lacks the average of {name[:80]}"
    dtype, shape = averages[name]
    return f"makes the average of {name[:80]} {dtype} of shape {shape}, unlike the parameter"


_COUNTS = ("iteration", "skipped_iterations", "consumed_samples", "consumed_tokens")
_REQUIRED = (*_COUNTS, "epoch_blocks", "loss_scaler", "lineage")
TRAIN_STATE_KEYS = (
    *_REQUIRED, "rollbacks", "restarts", "left_out_iterations", "skips", "spike_window", "spikes_in_a_row",
)  # fmt: skip
"""What train_state.json may hold: `rollbacks` and what follows came later, and a converted model has no state, or only
a lineage."""
_ORDER_KEY = re.compile(r"(train|valid|test)/(?:(\d{1,6})(/later)?|(period))")
_SCALER_KEYS = {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}


def train_state_fault(state: Mapping[str, Any], iteration: int) -> str | None:
    """What is wrong with the train_state.json of a checkpoint of `iteration`."""
    if unknown := state.keys() - set(TRAIN_STATE_KEYS):
        return f"has an unknown key '{min(unknown)[:40]}'"
    if not is_plain(state):
        return "is nested too deeply"
    if state.keys() - {"lineage"} and (missing := [key for key in _REQUIRED if key not in state]):
        return f"is incomplete: {missing[0]} is missing"
    for key in (*_COUNTS, "restarts"):
        if not _is_count(state.get(key, 0)):
            return f"has no number for {key}"
    if state.get("iteration", iteration) != iteration:
        return f"is of iteration {state['iteration']}, the manifest of {iteration}"
    if fault := _spikes_fault(state):
        return fault
    if state.get("skipped_iterations", 0) + state.get("left_out_iterations", 0) > iteration:
        return "has more skipped iterations than iterations"
    return _order_fault(state.get("epoch_blocks", {})) or _history_fault(state)


def _spikes_fault(state: Mapping[str, Any]) -> str | None:
    for key in ("left_out_iterations", "spikes_in_a_row"):
        if not _is_count(state.get(key, 0)):
            return f"has no number for {key}"
    skips, window = state.get("skips", []), state.get("spike_window", {})
    if not isinstance(skips, list) or not all(map(_is_span, skips)):
        return "has skips that are no spans of iterations"
    lists = list(window.values()) if isinstance(window, dict) else [None]
    if not all(isinstance(values, list) and all(map(_is_finite, values)) for values in lists):
        return "has a spike_window that is no table of numbers"
    return None


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[0] <= value[1]


def _order_fault(blocks: Any) -> str | None:
    """Is every entry a list of epochs, or of one number where it is later blocks or a period?"""
    if not isinstance(blocks, dict):
        return "has no table epoch_blocks"
    for key, numbers in blocks.items():
        match = _ORDER_KEY.fullmatch(key)
        if match is None or not isinstance(numbers, list) or not all(_is_count(n) and n > 0 for n in numbers):
            return f"has no positive numbers for {key[:40]} in epoch_blocks"
        if len(numbers) != 1 if match[3] or match[4] else not numbers:
            return f"has {len(numbers)} numbers for {key[:40]} in epoch_blocks"
    return None


def _history_fault(state: Mapping[str, Any]) -> str | None:
    scaler, lineage, rollbacks = state.get("loss_scaler", {}), state.get("lineage", []), state.get("rollbacks", [])
    if not isinstance(scaler, dict) or not scaler.keys() <= _SCALER_KEYS or not all(map(_is_finite, scaler.values())):
        return "has no numbers of a loss scaler"
    if scaler and not scaler.get("cur_scale", 1) > 0:
        return "has a loss scale that is not positive"
    if not isinstance(lineage, list) or not all(map(_is_growth, lineage)):
        return "has a lineage that does not list growths"
    if not isinstance(rollbacks, list) or not all(map(_is_count, rollbacks)):
        return "has rollbacks that are no iterations"
    return None


def _is_growth(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("scheduled", False), bool):
        return False
    counts = ("iteration", "updates", "consumed_tokens", "parameters")
    decays = entry.get("decays_since", {})
    slots = [entry[key] for key in entry if key.endswith("_slot_num")]
    return (
        all(_is_count(entry.get(key)) for key in counts)
        and all(slot is None or _is_count(slot) for slot in slots)
        and isinstance(entry.get("added"), str)
        and all(isinstance(entry.get(key, ""), str) for key in ("new_keys", "row_norm"))
        and all(_is_finite(entry.get(key, 0.0)) for key in ("logit_difference", "ema_logit_difference"))
        and isinstance(decays, dict)
        and all(map(_is_count, decays.values()))
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _LARGEST**4 and math.isfinite(value)


def is_plain(value: Any, most: int | None = None) -> bool:
    """Is it no deeper and larger than files of ours are? Aliases of YAML can make a few bytes a billion values.

    Args:
        most: values; default as many as a configuration or a state may have.
    """
    most = _MAX_VALUES if most is None else most
    return sum(1 for _ in islice(_values(value, _MAX_DEPTH, most), most + 1)) <= most


def _values(value: Any, depth: int, most: int) -> Any:
    if depth == 0:
        yield from (None for _ in range(most + 1))
    yield value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for item in inside:
        yield from _values(item, depth - 1, most)


def value_fault(kind: str, name: str, tensor: Tensor) -> str | None:
    """What is wrong with the values of a tensor of kind model, optimizer or ema: no run can go on from them."""
    if kind not in ("model", "optimizer", EMA) or not tensor.numel():
        return None
    if tensor.is_floating_point():
        lowest, highest = (extreme.item() for extreme in torch.aminmax(tensor.detach()))
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            count = int((~torch.isfinite(tensor)).sum())
            return f"has {count:,} of {tensor.numel():,} values that are not finite"
        # The sums of squares that Adam divides by.
        if name.startswith(("exp_avg_sq/", "step/")) and kind == "optimizer" and lowest < 0:
            return "has negative values"
    elif name.endswith(".tau_tokens") and tensor.min().item() < 1:
        return f"is {tensor.min().item()}, but has to be positive"
    return None
