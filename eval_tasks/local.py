"""Zero-shot tasks made from held-out text: which of four continuations did the sentence have?

The task is a folder with the documents (JSONL) and the lm-eval YAML, for `include_path`. Chance is 25 %.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron.errors import UserError
from megatron.files import find_output, read_text, write_output

CONTEXT_WORDS = 12
CONTINUATION_WORDS = 8
NUM_CHOICES = 4
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")


def write_continuation_task(
    texts: list[str],
    folder: str | Path,
    name: str = "sotu_continuation",
    num_documents: int = 200,
    seed: int = 1234,
    distractors: Literal["sentences", "word_order"] = "sentences",
    inputs: Sequence[str] = (),
) -> Path:
    """Write a multiple-choice task from `texts` that the model has not seen; the YAML's path comes back.

    A document is a sentence of at least 20 words: 12 are the context, the next 8 the true continuation. The distractors
    are the words at the same place of three other sentences (`sentences`), or the true words in three other orders
    (`word_order`, which smaller models can tell); either way length gives nothing away. The same texts and seed give
    the same files. `inputs` are files that these must not replace.

    Raises: UserError when the texts hold fewer than `num_documents` such sentences, or the folder cannot be written.
    """
    sentences = long_sentences(texts)
    if len(sentences) < max(num_documents, NUM_CHOICES):
        raise UserError(
            f"{name}: {num_documents} documents need as many sentences of {CONTEXT_WORDS + CONTINUATION_WORDS} words, "
            f"the texts hold {len(sentences)}; give more text or ask for fewer documents"
        )
    generator = random.Random(seed)
    generator.shuffle(sentences)
    documents = [_document(i, sentences, generator, distractors) for i in range(num_documents)]
    folder = Path(folder)
    data_file, task_file = folder / f"{name}.jsonl", folder / f"{name}.yaml"
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    find_output(task_file, name, inputs)
    write_output(data_file, "".join(lines), name, inputs)
    write_output(task_file, yaml.safe_dump(task_config(name, data_file), sort_keys=False), name, inputs)
    return task_file


def long_sentences(texts: Sequence[str]) -> list[list[str]]:
    """The sentences that are long enough, as lists of words, in order; they never cross a line.

    Stock phrases repeat: of sentences with the same continuation only the last is kept.
    """
    found = {}
    for text in texts:
        for line in text.splitlines():
            for sentence in _SENTENCE_END.split(line):
                words = sentence.split()
                # A continuation of one repeated word has no other order.
                if len(words) >= CONTEXT_WORDS + CONTINUATION_WORDS and len(set(_continued(words))) >= NUM_CHOICES:
                    found[_continuation(words)] = words
    return list(found.values())


def _continued(words: list[str]) -> list[str]:
    return words[CONTEXT_WORDS : CONTEXT_WORDS + CONTINUATION_WORDS]


def _continuation(words: list[str]) -> str:
    return " ".join(_continued(words))


def _document(index: int, sentences: list[list[str]], generator: random.Random, distractors: str) -> dict[str, Any]:
    truth = _continuation(sentences[index])
    if distractors == "word_order":
        others = _reordered(truth, generator)
    else:
        drawn = generator.sample(range(len(sentences)), NUM_CHOICES)
        others = [_continuation(sentences[i]) for i in drawn if i != index][: NUM_CHOICES - 1]
    choices = generator.sample([truth, *others], NUM_CHOICES)
    context = " ".join(sentences[index][:CONTEXT_WORDS])
    return {"context": context, "choices": choices, "label": choices.index(truth)}


def _reordered(text: str, generator: random.Random) -> list[str]:
    """Three different orders of the words of `text`, none of them its own."""
    words, found = text.split(), {text: None}
    while len(found) < NUM_CHOICES:
        found[" ".join(generator.sample(words, len(words)))] = None
    return list(found)[1:]


def task_config(name: str, data_file: Path) -> dict[str, Any]:
    """The lm-eval YAML of a continuation task, whose documents have `context`, `choices` and `label`."""
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data_file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": " ",
        "num_fewshot": 0,
        "metric_list": metrics,
        "metadata": {"version": 1.0},
    }


def read_texts(path: str, jsonl_key: str = "text") -> list[str]:
    """The texts of a UTF-8 file: one a line at `jsonl_key` in a .jsonl file, else the whole file. Raises UserError."""
    content = read_text(path, "--input")
    if not path.endswith(".jsonl"):
        return [content]
    try:
        return [str(json.loads(line)[jsonl_key]) for line in content.split("\n") if line.strip()]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--input: {path} is not JSONL with the key '{jsonl_key}': {error}") from error
