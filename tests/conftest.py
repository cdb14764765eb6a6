"""Shared fixtures: a tiny tokenizer, corpus and configuration, and one gloo process group for the session."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two test processes share two cores
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# DeepSpeed compiles Muon's iteration anew for many shapes, half a minute in all, and a compiled one rounds otherwise.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
# Triton's kernels run on the CPU; read when they are defined.
os.environ["TRITON_INTERPRET"] = "1"
# Code of exports is copied there; two test runs in one folder would pull it from under each other.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf_modules_")

import numpy as np
import pytest

from megatron.config import RunConfig, load_config
from megatron.log import get_logger
from megatron.signals import STOP_SIGNALS

if importlib.util.find_spec("torchvision"):  # before transformers imports it
    from tests.with_timm import mend_torchvision

    mend_torchvision()

FIXTURES = Path(__file__).parent / "fixtures"
VOCABULARY = 300

TINY = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 16, "rotary_pct": 0.25,
    "qkv_slot_num": 24, "proj_slot_num": 24, "ffn_slot_num": 40, "norm": "layernorm_nonparam",
    "final_norm": "layernorm", "output_layer_init_method": "wang_init", "make_vocab_size_divisible_by": 64,
    "tokenizer_type": "HFTokenizer", "train_micro_batch_size_per_gpu": 4, "train_iters": 20, "eval_iters": 2,
    "eval_interval": 10, "log_interval": 1, "num_workers": 0, "split": "90,10,0", "warmup": 0.0, "min_lr": 1e-4,
    "lr_decay_style": "cosine", "distributed_backend": "gloo", "precision": "fp32",
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}},
}  # fmt: skip


@pytest.fixture
def package_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, each line once; its logger does not pass lines on to the one that caplog listens to."""
    get_logger().addHandler(caplog.handler)  # pytest may have, where the logger is there already
    yield caplog
    get_logger().removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer.json of 300 entries."""
    from megatron.tokenizer.training import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["the people of the united states and the congress of the states " * 20], VOCABULARY, path)
    return path


@pytest.fixture(scope="session")
def corpus_prefix(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> str:
    """A learnable corpus of 60 documents: repetitions of three token patterns."""
    from megatron.data import IndexedDatasetBuilder
    from megatron.tokenizer import build_tokenizer

    settings = load_config([], {**TINY, "vocab_file": str(tokenizer_file)})
    vocabulary = build_tokenizer(settings.tokenizer).vocab_size
    random = np.random.RandomState(0)
    prefix = str(tmp_path_factory.mktemp("corpus") / "corpus")
    builder = IndexedDatasetBuilder(prefix, np.uint16)
    patterns = [random.randint(1, vocabulary, size=size) for size in (5, 7, 11)]
    for number in range(60):
        document = np.resize(patterns[number % 3], random.randint(40, 160))
        builder.add_document([*document.tolist(), 0])
    builder.finalize()
    return prefix


@pytest.fixture(scope="session")
def tiny_config(tokenizer_file: Path, corpus_prefix: str) -> Callable[..., RunConfig]:
    """Makes a complete small run's configuration; keyword arguments override keys."""

    def make(**overrides: Any) -> RunConfig:
        base = {**TINY, "vocab_file": str(tokenizer_file), "data_path": corpus_prefix}
        return load_config([], {**base, **overrides})

    return make


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """A command run in this process hears signals, then ignores them until its end: the next test's children would."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def processes_are_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make test-fast` goes by the marks: a test that joins processes without one fails."""
    if request.node.get_closest_marker("processes") is None:
        monkeypatch.setattr("tests.ranks.fork_server", lambda: pytest.fail("mark this test: @pytest.mark.processes"))


@pytest.fixture(scope="session")
def single_process() -> Iterator[None]:
    """This process as a process group of one, shared by every test that builds an engine here."""
    from megatron.mpu.environment import ensure_process_environment
    from megatron.training.loop import shut_down

    ensure_process_environment()
    import deepspeed  # noqa: F401

    gc.freeze()  # an engine collects garbage when it is closed: what has been imported need not be looked through
    yield
    shut_down()


# Files in the order in which they are worth starting, so that no process is left with a long one at the end.
_LONGEST = (
    "growth/test_layouts.py", "training/test_layouts.py", "growth/test_runs.py", "test_resume.py",
    "eval_tasks/test_ranks.py", "launch/test_supervise.py", "growth/test_kills.py", "test_pretrain.py",
    "test_preflight.py",
)  # fmt: skip


# Files that take a core longest for what they cover; `make test-all` runs them too.
_SLOW = (
    "launch/test_supervise.py", "launch/test_restarts.py", "engine/test_compiled.py", "growth/test_kills.py",
    "growth/test_runs.py", "data/test_loader.py", "faults/test_soak.py", "faults/test_injected.py",
    "inference/test_equality.py", "slurm/test_pretrain.py", "slurm/test_preflight.py", "mpu/test_stacks.py",
    "mpu/test_through_host.py", "training/test_resume.py", "tools/test_vision_accuracy.py", "config/test_fuzz.py",
    "ops/test_cross_entropy_triton.py", "training/test_quiet_step.py", "model/test_other_device.py",
    "bench/test_gpu_report.py", "test_cluster_page.py", "eval_tasks/test_pretrained.py", "inference/test_answers.py",
    "ops/test_pattention_backends.py", "training/test_layouts.py", "growth/test_layouts.py", "tasks/test_images.py",
    "engine/test_head.py", "mpu/test_tensor_parallel.py", "doctor/test_machine.py", "exchange/test_timm.py",
    "tools/test_gpu_check.py", "training/test_spikes.py", "training/test_hardware.py", "training/test_gpu_terms.py",
    "tasks/test_image_loading.py", "tools/test_growth_regime.py",
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test` does not import the files of which it runs nothing."""
    return True if config.option.markexpr == "not slow" and str(collection_path).endswith(_SLOW) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first; what builds engines in this process, and what is slow, is marked so."""
    for item in items:
        if str(item.path).endswith(_SLOW):
            item.add_marker(pytest.mark.slow)
        if "single_process" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.engine)
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: next((places[n] for n in _LONGEST if str(item.path).endswith(n)), len(_LONGEST)))


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage need look it through again."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """The folder of this process goes with it."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)
