"""Every command that writes a file the user named: links are followed, streams written to, inputs never replaced."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from eval_tasks.results import write_results
from eval_tasks.run import run_evaluation
from megatron.checkpoint.new_folder import new_folder
from megatron.config.cli import parse_run
from megatron.config.reference import main as write_reference
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.data import IndexedDataset, IndexedDatasetBuilder
from megatron.data.preprocess import preprocess
from megatron.errors import UserError
from megatron.inference.answers import Answers
from megatron.inference.generate import Completion
from megatron.inference.modes import run_generation
from tests.random_models import make_config, save_random_models
from tools.datasets import make_demo_task, train_tokenizer

TEXT = "the people of the united states and the congress of the states in their own time and place. " * 30
BYTES = TokenizerConfig(tokenizer_type="CharLevelTokenizer")


def write_answers(output: Path) -> None:
    answers = Answers(str(output), "one")
    answers.add({0: Completion("context", "text", 4, False, None, 0.5)})
    answers.finish(1)


def train(kind: str) -> Callable[[Path], None]:
    def run(output: Path) -> None:
        text = output.with_name("source.txt")
        text.write_text(TEXT)
        vocabulary = "260" if kind == "bpe" else "290"
        arguments = ["--input", str(text), "--vocab-size", vocabulary, "--output", str(output), "--type", kind]
        train_tokenizer.main(arguments)
        text.unlink()

    return run


WRITERS: dict[str, Callable[[Path], object]] = {
    "generate -o": write_answers,
    "train_tokenizer": train("bpe"),
    "train_tokenizer spm": train("spm"),
    "eval_results_prefix": lambda output: write_results({"results": {}}, output),
    "reference": lambda output: write_reference([str(output)]),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@writers
def test_a_link_stays_and_its_file_is_replaced(write: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("old")
    (tmp_path / "link").symlink_to("elsewhere/file")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "file").read_bytes() not in (b"old", b"")
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "link"] and os.listdir(tmp_path / "elsewhere") == ["file"]


@writers
def test_a_fifo_gets_the_bytes_and_stays(write: Callable[[Path], object], tmp_path: Path) -> None:
    write(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "fifo").read_bytes()), daemon=True)
    reader.start()
    write(tmp_path / "fifo")
    reader.join(10)
    assert found == [(tmp_path / "file").read_bytes()] and stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file"]


def refused(work: Callable[[], object], source: Path) -> None:
    content = source.read_bytes()
    with pytest.raises(UserError, match="is the input .* which would be lost"):
        work()
    assert source.read_bytes() == content


def test_prompts_and_other_inputs_of_generation_are_not_replaced(tmp_path: Path) -> None:
    prompts, merges = tmp_path / "prompts.txt", tmp_path / "merges.txt"
    for path in (prompts, merges):
        path.write_text("a prompt\n")
    (tmp_path / "link").symlink_to("prompts.txt")
    keys = {"text_gen_type": "input-file", "sample_input_file": str(prompts), "merge_file": str(merges), "load": "x"}
    for output in (prompts, tmp_path / "link", merges):
        config = make_config(**keys, sample_output_file=str(output))
        refused(lambda config=config: run_generation(config), prompts)
    assert merges.read_text() == "a prompt\n" and (tmp_path / "link").is_symlink()


def test_no_file_of_a_checkpoint_is_replaced_by_what_it_generates(tmp_path: Path) -> None:
    save_random_models(tmp_path / "run", make_config(), (3,))
    folder = tmp_path / "run" / "global_step3"
    (tmp_path / "link").symlink_to(folder / "config.yml")
    for output in (*folder.iterdir(), tmp_path / "link"):
        keys = {"text_gen_type": "unconditional", "load": str(tmp_path / "run"), "sample_output_file": str(output)}
        refused(lambda keys=keys: run_generation(make_config(**keys)), output.resolve())


def test_a_configuration_is_not_replaced_by_its_output(tmp_path: Path) -> None:
    file = tmp_path / "run.yml"
    file.write_text(json.dumps(make_config().flat()))
    refused(lambda: parse_run([str(file), "-o", str(file)], "generate.py"), file)


def test_texts_are_not_replaced_by_what_is_made_of_them(tmp_path: Path) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "task.jsonl"
    text.write_text(TEXT)
    arguments = ["--input", str(text), "--vocab-size", "260", "--output", str(text)]
    refused(lambda: train_tokenizer.main(arguments), text)
    sentences = "".join(f" A{i} " + " ".join(f"w{i}x{j}" for j in range(25)) + "." for i in range(8))
    lines.write_text(json.dumps({"text": sentences}) + "\n")
    arguments = ["--input", str(lines), "--output", str(tmp_path), "--name", "task", "--num-documents", "5"]
    refused(lambda: make_demo_task.main(arguments), lines)
    (tmp_path / "out_text_document.idx").symlink_to("a.txt")
    refused(lambda: preprocess([str(text)], tmp_path / "out", BYTES), text)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out_text_document.idx", "task.jsonl"]


def test_a_pair_follows_links_and_replaces_nothing_else_than_files(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for suffix in (".bin", ".idx", ".sha256"):
        (tmp_path / f"a{suffix}").symlink_to(f"disk/big{suffix}")
    with IndexedDatasetBuilder(tmp_path / "a", np.uint16) as builder:
        builder.add_document([1, 2, 3])
        builder.finalize()
    assert IndexedDataset(tmp_path / "a")[0].tolist() == [1, 2, 3]
    assert sorted(os.listdir(tmp_path / "disk")) == ["big.bin", "big.idx", "big.sha256"]
    with IndexedDatasetBuilder(tmp_path / "a", np.uint16) as builder:
        refused(lambda: builder.add_index(tmp_path / "disk" / "big"), tmp_path / "disk" / "big.bin")
    os.mkfifo(tmp_path / "b.idx")
    with pytest.raises(UserError, match=r"b\.idx is a stream or a device"):
        IndexedDatasetBuilder(tmp_path / "b", np.uint16)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(UserError, match="--jsonl-keys: 'text' is given twice"):
        preprocess([str(tmp_path / "a.jsonl")], tmp_path / "out", BYTES, keys=["text", "text"])


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_something_else_named_like_the_unfinished_file_is_left_alone(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "out.unfinished"
    (tmp_path / "mine").write_text("keep")
    {"link": lambda: path.symlink_to("mine"), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[kind]()
    before = path.lstat().st_mode
    write_answers(tmp_path / "out")
    assert json.loads((tmp_path / "out").read_text())["text"] == "text"
    assert path.lstat().st_mode == before and (tmp_path / "mine").read_text() == "keep"


def test_an_unfinished_file_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").write_text("my prompts\n")
    with pytest.raises(UserError, match=r"out\.unfinished is a file of something else; move it away"):
        Answers(str(tmp_path / "out"), "one")
    assert (tmp_path / "out.unfinished").read_text() == "my prompts\n"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with new_folder(tmp_path / "out") as folder:
        (folder / "weights").write_text("new")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "weights").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"]


def test_results_that_cannot_be_written_are_found_before_the_evaluation(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(load=str(tmp_path), eval_results_prefix=f"{tmp_path}/file/x", perplexity_data="a.txt")
    with pytest.raises(UserError, match="eval_results_prefix: .* cannot be written: Not a directory"):
        run_evaluation(config)
