"""python -m tools.paper: published figures, and this program's own beside them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from eval_tasks.published import COLUMNS, ZERO_SHOT
from megatron.errors import UserError
from tests.growth.grown_runs import MakeConfig, metric, run, stage
from tests.random_models import make_config, save_random_models
from tools.paper import cost
from tools.paper.__main__ import main
from tools.paper.found import Stage, find
from tools.paper.published import ABLATIONS, GROWTH, IMAGES
from tools.paper.tables import TABLES, growth, zero_shot
from tools.paper.widen import main as widen

FIXTURES = Path(__file__).parents[2] / "fixtures"
SECOND_READING = (FIXTURES / "paper" / "tables.md").read_text()
RESULTS = {
    "lambada_openai": {"perplexity,none": 900.5, "acc,none": 0.02}, "hellaswag": {"acc_norm,none": 0.26},
    "piqa": {"acc,none": 0.5}, "arc_easy": {"acc,none": 0.25}, "arc_challenge": {"acc_norm,none": 0.2},
    "winogrande": {"acc,none": 0.49}, "perplexity": {"alias": "data/pile_valid.jsonl", "token_perplexity,none": 77.25},
}  # fmt: skip


def table_rows(first: str) -> dict[str, list[str]]:
    """A table of the fixture by its first column."""
    lines = SECOND_READING.split(first, 1)[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {name: rest for name, *rest in cells}


def number(cell: str) -> float | None:
    """The first number of a cell; None for a dash and for nothing."""
    match = re.match(r"\d+\.?\d*", cell)
    return float(match[0]) if match else None


def test_zero_shot_figures_against_a_second_reading() -> None:
    rows = table_rows("| model |")
    assert {row.name: list(row.figures) for row in ZERO_SHOT} == {
        name: [number(cell) for cell in cells] for name, cells in rows.items()
    }


def test_growth_figures_against_a_second_reading() -> None:
    rows = table_rows("| | 15B |")
    sizes = [
        ("124M", "124M, from scratch"),
        ("354M", "354M (grown 2.9-fold)"),
        ("757M", "757M (2.1)"),
        ("1.4B", "1.4B (1.7)"),
    ]
    for size, name in sizes:
        b15, b30, b60, transformer300, transformer30, _ = (number(cell) for cell in rows[name])
        [grown] = [row for row in GROWTH if row.name.startswith(f"TokenFormer {size}")]
        [scratch] = [row for row in GROWTH if row.name == f"Transformer {size}"]
        assert grown.figures == (b15, b30, b60, None)
        assert scratch.figures == (None, transformer30, None, transformer300)


def test_image_figures_against_a_second_reading() -> None:
    text = SECOND_READING
    for row in IMAGES:
        assert re.search(rf"\b{row.accuracy}\b", text), row.name
    expected = {
        "ViT-B/16 (384)": "ViT-B/16 77.9 (384)", "DeiT-B/16": "DeiT-B/16 81.8",
        "ViT-B/16, MAE's recipe": "MAE recipe 82.3",
        "TokenFormer-B/16, matched": "TokenFormer-B/16 82.1 (matched)", "TokenFormer-B/16": "(matched) and 82.5",
        "ViT-L/16 (384)": "ViT-L/16 76.5 (384)", "ViT-L/16, MAE's recipe": "MAE recipe 82.6",
        "TokenFormer-L/16, matched": "TokenFormer-L/16 83.0 (matched)", "TokenFormer-L/16": "(matched) and 83.1",
    }  # fmt: skip
    assert {row.name for row in IMAGES} == set(expected)
    assert all(words in text and f"{row.accuracy}" in words for row in IMAGES for words in [expected[row.name]])
    ablations = [(row.accuracy) for row in ABLATIONS]
    assert re.findall(r"(?:L1|L2|both|only|none) (\d\d\.\d)", text) == [f"{value}" for value in ablations]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the results of an evaluation beside it, and others that are not its own or not of the whole."""
    root = tmp_path_factory.mktemp("run")
    save_random_models(root / "checkpoints", make_config(), (3,))
    results = {"results": RESULTS, "checkpoint": str(root / "checkpoints" / "global_step3")}
    (root / "a_eval_results_1.json").write_text(json.dumps(results))
    wrong = {"results": {"piqa": {"acc,none": 0.9}}, "checkpoint": str(root / "checkpoints" / "global_step3")}
    others: list[dict[str, Any]] = [
        {"checkpoint": "x"}, {"checkpoint": str(root / "checkpoints" / "global_step1")},
        {"configs": {"piqa": {"limit": 5}}}, {"config": {"limit": 0.5}}, {"tokens_used": {"ffn": 0.1}},
    ]  # fmt: skip
    for number, other in enumerate(others):
        (root / f"b{number}_eval_results_1.json").write_text(json.dumps(wrong | other))
    return root


def test_results_beside_a_run_are_its_row(folder: Path) -> None:
    for path in (folder / "checkpoints", folder / "checkpoints/global_step3", folder / "a_eval_results_1.json"):
        table = zero_shot([find(str(path))])
        [own] = [row for row in table.rows if row.name == str(path)]
        assert own.figures["Pile ppl"] == 77.25 and own.figures["PIQA"] == 50 and set(own.figures) == set(COLUMNS)
        assert (
            str(path) in table.as_text()
            and "[1] python deepy.py eval.py -d configs tokenformer/150M_eval.yml" in table.as_text()
        )


def test_results_of_a_part_say_so_when_they_are_named(folder: Path) -> None:
    names = [find(str(folder / f"b{number}_eval_results_1.json")).name.partition(": ")[2] for number in (2, 3, 4)]
    assert names == ["a part of the samples"] * 2 + ["a part of the parameter tokens"]


def test_a_model_of_a_published_size_stands_below_its_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(str(folder / "checkpoints"))
    published = ZERO_SHOT[1]
    sizes = ("num_layers", "hidden_size", "qkv_slot_num", "proj_slot_num", "ffn_slot_num")
    found.config = make_config(**dict(zip(sizes, published.size or (), strict=True))).model
    names = [row.name for row in zero_shot([found]).rows]
    place = names.index(published.name)
    assert names[place + 1] == f"  {found.name}" and names.count("  this program") == 3


def test_stages_of_a_grown_run(tiny_config: MakeConfig, tmp_path: Path, single_process: None) -> None:
    run(tiny_config, tmp_path, growth=[stage(4, new_keys="official")], train_iters=8, eval_interval=2)
    found = find(str(tmp_path))
    values = metric(tmp_path, "valid_perplexity")
    before, after = values[4], values[8]
    assert found.stages == [
        Stage((2, 32, 24, 24, 40), 4 * 64, before), Stage((2, 32, 48, 36, 72), 4 * 64, after),
    ]  # fmt: skip
    table = growth([found])
    assert [row.figures for row in table.rows[-2:]] == [{"other": before}, {"other": after}]
    found.stages = [Stage((12, 768, 2140, 2140, 8560), 31.4e9, 13.5), Stage((12, 768, 2140, 2140, 8560), 45e9, 13.4)]
    table = growth([found])
    [own] = [row for row in table.rows if row.name == f"  {found.name}"]
    assert own.figures == {"30B": 13.5} and table.rows[-1].figures == {"other": 13.4}


@pytest.mark.parametrize("model", ["model_A", "model_C_untied_gelu_l2"])
def test_official_checkpoints_are_read(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FIXTURES / "golden" / model
    config = tmp_path / "model.yml"
    arguments: dict[str, Any] = json.loads((source / "config.json").read_text())["neox_args"]
    config.write_text(json.dumps(arguments))
    assert (
        main(["all", str(source / "pytorch_model.bin"), "--config", str(config), "--json", str(tmp_path / "t.json")])
        == 0
    )
    titles = [table["title"] for table in json.loads((tmp_path / "t.json").read_text())]
    text = capsys.readouterr().out
    assert len(titles) == 5 and all(f"{title}  " in text for title in titles)


def test_every_figure_that_is_missing_has_a_command_that_names_a_file() -> None:
    for make in TABLES.values():
        table = make([])
        for row in table.rows:
            assert not row.command or not row.figures
            for config in re.findall(r"\S+\.yml", row.command):
                assert (Path("configs") / config).is_file(), row.command


def test_cost_is_that_of_table_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2 N T + 4 L d T^2 forward, three times that in training; a Transformer of 12 L d^2 has TokenFormer's 124M."""
    token, transformer = cost.MODELS[0], cost.MODELS[4]
    assert token.parameters == transformer.parameters == 12 * 12 * 768**2
    assert token.with_parameters(1024) == 3 * 2 * token.parameters * 1024
    assert token.among_tokens(1024) == 3 * 4 * 12 * 768 * 1024**2
    grown = cost.MODELS[3]
    assert grown.among_tokens(4096) == token.among_tokens(4096) < cost.MODELS[7].among_tokens(4096)
    assert main(["cost", "--png", str(tmp_path / "cost.png"), "--json", str(tmp_path / "cost.json")]) == 0
    point = json.loads((tmp_path / "cost.json").read_text())[0]
    assert point["tokens"] == 1024 and point["among_tokens"] == token.among_tokens(1024)
    assert (tmp_path / "cost.png").read_bytes()[:4] == b"\x89PNG" and "TokenFormer 1.4B" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zero_shot", "nowhere"], "PATH: no checkpoint in nowhere"),
        (["zero_shot", "x_eval_results.json"], "x_eval_results.json cannot be read"),
        (["growth", "--png", "a.png"], "--png: only cost has a figure"),
        (["cost", "work_dirs"], "PATH: cost is computed from sizes alone; leave work_dirs off"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        main(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[1]", '{"results": {}}', '{"results": 1, "checkpoint": 1}'])
def test_what_is_no_results_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json is no results file of eval\.py"):
        main(["zero_shot", str(tmp_path / "a.json")])


def test_a_widened_transformer_computes_the_same(tmp_path: Path) -> None:
    import torch

    from megatron.inference import load_model

    slots = {"qkv_slot_num": None, "proj_slot_num": None, "ffn_slot_num": None}
    save_random_models(tmp_path / "small", make_config(**slots, norm="layernorm"), (2,))
    assert widen([str(tmp_path / "small"), str(tmp_path / "wide"), "--intermediate-size", "384"]) == 0
    small, wide = (load_model(tmp_path / name) for name in ("small", "wide"))
    ids = torch.randint(64, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(wide(ids), small(ids), rtol=0, atol=1e-5 * small(ids).abs().max().item())
    weight = wide.get_parameter("layers.0.mlp.fc_out.weight")
    assert weight.shape == (32, 384) and weight.std() > 0
    copies = wide.get_parameter("layers.0.mlp.fc_in.weight")
    alike = (copies[:, None] == copies[None]).all(-1).sum(1) > 1
    assert alike.any() and torch.unique(weight[:, alike], dim=1).shape[1] == int(alike.sum()), "copies may differ"
    with pytest.raises(UserError, match="--intermediate-size: 128 is not more than the 128 of"):
        widen([str(tmp_path / "small"), str(tmp_path / "x"), "--intermediate-size", "128"])
    save_random_models(tmp_path / "tokens", make_config(), (2,))
    with pytest.raises(UserError, match=r"has tokenformer blocks; grow it with tools/ckpts/grow\.py"):
        widen([str(tmp_path / "tokens"), str(tmp_path / "x"), "--intermediate-size", "384"])
