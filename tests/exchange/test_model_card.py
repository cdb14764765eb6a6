"""The model card of an export: read by the Hub's own parser, and true to the run's files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.exchange import canonical, open_checkpoint
from megatron.exchange.convert import export_huggingface, to_huggingface
from tests.exchange.image_models import TOKENS, image_model, save_run
from tests.exchange.loaded_exports import private_modules
from tests.random_models import make_model
from tools.ckpts.convert import main

RUN = Path(__file__).parents[1] / "fixtures/checkpoints/global_step3"
RESULTS: dict[str, Any] = {
    "results": {
        "lambada_openai": {
            "alias": "lambada_openai", "perplexity,none": 18.5, "perplexity_stderr,none": 0.5, "acc,none": 0.451,
            "acc_stderr,none": 0.007,
        },
        "harbor": {"alias": "harbor", "acc,none": 0.96, "acc,first": 0.5, "acc_stderr,none": None},
        "perplexity": {"alias": "/data/private/text.jsonl", "bits_per_byte,none": 1.5, "num_tokens": 9},
    },
    "configs": {
        "lambada_openai": {"dataset_path": "EleutherAI/lambada", "dataset_name": "default", "test_split": "test"},
        "harbor": {"dataset_path": "json", "dataset_name": None, "validation_split": "train"},
    },
    "n-shot": {"lambada_openai": 0, "harbor": 2},
    "checkpoint": "elsewhere/run/global_step3",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has grown once, with what it has logged."""
    folder = tmp_path / "run"
    shutil.copytree(RUN, folder / "global_step3")
    (folder / "latest").write_text("global_step3")
    entries: list[dict[str, Any]] = [
        {"iteration": 1, "lm_loss": 6.5, "learning_rate": 1e-3},
        {"iteration": 2, "lm_loss": 6.25, "valid_lm_loss": 6.125, "valid_perplexity": 457.25},
        {"iteration": 3, "lm_loss": None, "grad_norm": 1.5},
        {"iteration": 4, "lm_loss": 1.0, "valid_lm_loss": 1.0},
    ]
    lines = [json.dumps(entry) for entry in entries]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"iteration": 3, "lm_lo']) + "\n")
    return folder


def card_of(folder: Path) -> Any:
    """By the Hub's parser, which fails for front matter that it cannot use."""
    return ModelCard.load(folder / "README.md", ignore_metadata_errors=False)


def rows(card: Any) -> dict[str, str]:
    """The tables of two columns."""
    return dict(re.findall(r"^\| ([^|]+?) \| ([^|]*?) \|$", card.text, re.MULTILINE))


def test_figures_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    main(["to-hf", str(run), str(tmp_path / "small-model"), "--license", "cc-by-4.0", "--dtype", "bf16"])
    card = card_of(tmp_path / "small-model")
    assert card.data.to_dict() == {
        "library_name": "transformers", "license": "cc-by-4.0", "pipeline_tag": "text-generation",
        "tags": ["tokenformer"],
    }  # fmt: skip
    found, state = rows(card), json.loads((RUN / "train_state.json").read_text())
    assert found["parameters"] == "5,616" and found["parameter tokens of the feed-forward"] == "12"
    assert (found["iterations"], found["weights"]) == ("3", "bfloat16")
    assert found["tokens read"] == f"{state['consumed_tokens']:,}"
    assert found["lm_loss at iteration 2"] == "6.2500", "what comes after the checkpoint is no figure of it"
    assert found["valid_lm_loss at iteration 2"] == "6.1250"
    [growth] = state["lineage"]
    assert f"| {growth['iteration']} | {growth['consumed_tokens']} | {growth['added']} | " in card.text
    assert "tokens were added that at first changed nothing." in card.text
    assert "## Evaluation" not in card.text and str(tmp_path) not in card.text


def test_an_iteration_that_is_written_as_text_is_the_number(run: Path, tmp_path: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": "3", "lm_loss": 5.5}\n')
    to_huggingface(run, tmp_path / "model")
    assert rows(card_of(tmp_path / "model"))["lm_loss at iteration 3"] == "5.5000"


def test_results_are_in_the_index_of_the_hub(run: Path, tmp_path: Path) -> None:
    other = {**RESULTS, "checkpoint": "run/global_step2"}
    (run / "eval_results_01-02-2026-03-04-05.json").write_text(json.dumps(RESULTS))
    (run / "older_eval_results_01-02-2026-03-04-05.json").write_text(json.dumps(other))
    to_huggingface(run, tmp_path / "model")
    card = card_of(tmp_path / "model")
    assert card.data.model_name == "model"
    _, parsed = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert parsed == card.data.eval_results
    lambada: dict[str, Any] = {
        "task_type": "text-generation", "dataset_type": "EleutherAI/lambada", "dataset_name": "lambada_openai",
        "dataset_config": "default", "dataset_split": "test",
    }  # fmt: skip
    harbor = {"task_type": "text-generation", "dataset_type": "harbor", "dataset_name": "harbor"}
    text = {"task_type": "text-generation", "dataset_type": "perplexity", "dataset_name": "perplexity"}
    assert parsed == [
        EvalResult(**lambada, metric_type="perplexity", metric_name="perplexity", metric_value=18.5),
        EvalResult(**lambada, metric_type="accuracy", metric_name="acc", metric_value=0.451),
        EvalResult(**harbor, metric_type="accuracy", metric_name="acc", metric_value=0.96),
        EvalResult(**harbor, metric_type="accuracy", metric_name="acc (first)", metric_value=0.5),
        EvalResult(**text, metric_type="bits_per_byte", metric_name="bits_per_byte", metric_value=1.5),
    ]
    assert "| lambada_openai | acc | 0.4510 | 0.0070 | 0 | all |" in card.text
    assert "| harbor | acc | 0.9600 |  | 2 | all |" in card.text and "private" not in card.text


@pytest.mark.parametrize("place", ["run", "set"])
def test_results_of_some_samples_say_so_and_are_in_no_index(place: str, run: Path, tmp_path: Path) -> None:
    """As eval.py --limit gives them, of tasks and of sets of images."""
    limits = {"config": {"limit": 20}} if place == "run" else {"configs": {"digits": {"limit": 20}}}
    results = {"results": {"digits": {"acc,none": 0.95}}, "checkpoint": "global_step3", **limits}
    (run / "global_step3" / "eval_results_01-02-2026-03-04-05.json").write_text(json.dumps(results))
    to_huggingface(run, tmp_path / "model")
    card = card_of(tmp_path / "model")
    assert "| digits | acc | 0.9500 |  |  | the first 20 |" in card.text
    assert card.data.eval_results is None and "model-index" not in card.data.to_dict()


def test_a_growth_that_changed_the_model_is_not_said_to_have_changed_nothing(run: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(run)
    [growth] = checkpoint.train_state["lineage"]
    state = {**checkpoint.train_state, "lineage": [growth | {"new_keys": "official"}]}
    canonical.write(tmp_path / "drawn", replace(checkpoint, train_state=state))
    to_huggingface(tmp_path / "drawn", tmp_path / "model")
    text = card_of(tmp_path / "model").text
    assert "parameter tokens were added.\n" in text and " | official | " in text


def test_results_with_a_part_of_the_tokens_are_not_the_models(run: Path, tmp_path: Path) -> None:
    file = run / "eval_results_01-02-2026-03-04-05.json"
    file.write_text(json.dumps({**RESULTS, "tokens_used": {"ffn": 0.25}}))
    to_huggingface(run, tmp_path / "model")
    assert "## Evaluation" not in card_of(tmp_path / "model").text
    with pytest.raises(UserError, match="holds results with a part of the parameter tokens; evaluate with all of them"):
        main(["to-hf", str(run), str(tmp_path / "named"), "--results", str(file)])


def test_two_tasks_on_the_same_data_are_told_apart(run: Path, tmp_path: Path) -> None:
    config = {"dataset_path": "allenai/ai2_arc", "dataset_name": "ARC", "test_split": "test"}
    results = {"results": {"a": {"acc,none": 0.1}, "b": {"acc,none": 0.2}}, "configs": {"a": config, "b": config}}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**results, "checkpoint": "global_step3"}))
    main(["to-hf", str(run), str(tmp_path / "model"), "--results", str(file)])
    index = card_of(tmp_path / "model").data.to_dict()["model-index"]
    assert [r["dataset"]["name"] for r in index[0]["results"]] == ["a", "b"]
    assert [r["metrics"][0]["value"] for r in index[0]["results"]] == [0.1, 0.2]


@pytest.mark.parametrize(
    ("arguments", "content", "message"),
    [
        (["--license", "My Licence"], {}, "--license: 'My Licence' is no identifier of a licence; give one such as"),
        (["--results"], {"checkpoint": "global_step3"}, "results.json: holds no results; give a file that eval.py wr"),
        (
            ["--results"],
            {**RESULTS, "checkpoint": "x/global_step9"},
            "holds results of x/global_step9, and this is glo",
        ),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], content: Any, message: str, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    files = [str(file)] if arguments == ["--results"] else []
    with pytest.raises(UserError, match=message) as error:
        main(["to-hf", str(run), str(tmp_path / "model"), *arguments, *files])
    assert "\n" not in str(error.value) and not (tmp_path / "model").exists()


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    export_huggingface(make_model(kind="transformer", norm="layernorm"), tmp_path / "model")
    card = card_of(tmp_path / "model")
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["transformer"],
    }  # fmt: skip
    assert re.findall(r"^## (\w+)", card.text, re.MULTILINE) == ["Model", "Use", "Sharing"]
    assert "None" not in card.text and "trust_remote_code" not in card.text


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Iterator[Path]:
    """A language and an image model."""
    root = tmp_path_factory.mktemp("exports")
    tokenizer = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    export_huggingface(make_model(vocab_size=300, padded_vocab_size=384), root / "text", tokenizer)
    save_run(root / "run", image_model(**TOKENS))
    (root / "run" / "metrics.jsonl").write_text('{"iteration": 3, "loss": 1.25, "valid_acc1": 0.75}\n')
    to_huggingface(root / "run", root / "image")
    with private_modules(root / "modules"):
        yield root


def test_the_code_of_a_card_runs(exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pushed: list[str] = []
    monkeypatch.setattr("transformers.PreTrainedModel.push_to_hub", lambda self, name: pushed.append(name))
    monkeypatch.chdir(exports)
    Image.new("RGB", (30, 20)).save("image.jpg")
    for name in ("text", "image"):
        names: dict[str, Any] = {}
        for code in re.findall(r"^```python\n(.*?)^```$", card_of(exports / name).text, re.DOTALL | re.MULTILINE):
            exec(code, names)
    assert pushed == ["USER/text", "USER/image"] and "LABEL_" in capsys.readouterr().out


def test_an_image_model_has_a_card_of_its_kind(exports: Path) -> None:
    card = card_of(exports / "image")
    assert card.data.pipeline_tag == "image-classification" and card.data.tags == ["tokenformer", "vision"]
    found = rows(card)
    assert (found["images"], found["classes"]) == ("8 x 8, 3 channels", "5")
    assert (found["loss at iteration 3"], found["valid_acc1 at iteration 3"]) == ("1.2500", "0.7500")
