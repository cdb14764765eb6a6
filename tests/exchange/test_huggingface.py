"""Exports to Hugging Face's form: transformers computes, generates and trains what this package does."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron.config.sections.model import ModelConfig
from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.errors import UserError
from megatron.exchange import open_checkpoint
from megatron.exchange.checkpoint import of_model
from megatron.exchange.convert import export_huggingface, from_huggingface
from megatron.exchange.huggingface_source import configuration_source, modeling_source
from megatron.exchange.joined import JoinedTensors
from megatron.exchange.official import official_tensors
from megatron.inference import generate, load_model
from megatron.model import LanguageModel, Pattention
from megatron.model.pattention import named_pattentions
from megatron.tokenizer import CharLevelTokenizer, build_tokenizer
from tests.exchange.loaded_exports import PROMPTS, loaded, padded, private_modules
from tests.random_models import OWN_NORMS, make_model

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
GOLDEN_MODELS = ("model_A", "model_C_untied_gelu_l2")
MIXED = {"attention_config": [[["tokenformer", "global"], 1]]}


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path) -> Iterator[None]:
    with private_modules(tmp_path / "modules"):
        yield


def golden_model(name: str) -> LanguageModel:
    arguments = json.loads((GOLDEN / name / "config.json").read_text())["neox_args"]
    config = ModelConfig(**{key: value for key, value in arguments.items() if key in ModelConfig.model_fields})
    return load_model(GOLDEN / name / "pytorch_model.bin", config)


def exported(model: LanguageModel, folder: Path, **arguments: Any) -> Any:
    """The model as transformers loads it, in its own dtype."""
    export_huggingface(model, folder, **arguments)
    return loaded(folder, dtype=next(model.parameters()).dtype)


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_logits_survive_every_form(name: str, tmp_path: Path) -> None:
    io = load_file(GOLDEN / name / "io.safetensors")
    model = golden_model(name)
    theirs = exported(model, tmp_path / "export")
    back = load_model(tmp_path / "export")
    for logits in (model(io["input_ids"]), theirs(io["input_ids"]).logits, back(io["input_ids"])):
        assert (logits - io["logits"]).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path / "saved_by_transformers")
    original = torch.load(GOLDEN / name / "pytorch_model.bin", weights_only=True)
    for folder in ("export", "saved_by_transformers"):
        tensors = official_tensors(open_checkpoint(tmp_path / folder))
        assert tensors.keys() == original.keys()
        assert all(torch.equal(tensors[key], original[key]) for key in original)


@pytest.mark.parametrize(
    "keys",
    [
        {"norm": "rmsnorm", "final_norm": None, "norm_activation_type": "softmax"},
        {"no_weight_tying": True, "gpt_j_residual": True, "norm_activation_type": "gelu_l2_norm", "pos_emb": "none"},
        {**MIXED, "norm": "layernorm", "intermediate_size": 48, "activation": "silu", "use_bias_in_attn_linear": False},
        {**OWN_NORMS, "norm_activation_type": "softmax"},
    ],
    ids=["softmax-rmsnorm", "gelu_l2_norm-untied-parallel", "mixed-blocks", "row-norms"],
)
def test_every_kind_of_model_computes_the_same(keys: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(**keys)
    theirs = exported(model, tmp_path / "export").eval()
    ids = torch.randint(0, 500, (2, 20))
    outputs = theirs(ids, output_hidden_states=True)
    assert (outputs.logits - model(ids)).abs().max() < 1e-9
    assert len(outputs.hidden_states) == 3 and outputs.hidden_states[-1].shape == (2, 20, 32)
    back = load_model(tmp_path / "export", dtype=torch.float64)
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_greedy_texts_of_left_padded_prompts_are_ours(cache: str | None, tmp_path: Path) -> None:
    model, tokenizer = make_model(), CharLevelTokenizer()
    theirs = exported(model, tmp_path / "export", tokenizer=TokenizerConfig(tokenizer_type="CharLevelTokenizer"))
    ours = [c.text for c in generate(model, tokenizer, PROMPTS, maximum_tokens=12)]
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {"use_cache": False}
    rows = theirs.generate(**padded(PROMPTS), max_new_tokens=12, **options)
    texts = [row[6:].tolist() for row in rows]
    assert [tokenizer.decode(t[: t.index(0)] if 0 in t else t) for t in texts] == ours
    assert max(map(max, texts)) < tokenizer.vocab_size  # padding rows of the embedding are never generated


def test_padding_positions_and_cached_continuations_change_nothing(tmp_path: Path) -> None:
    theirs = exported(make_model(), tmp_path / "export").eval()
    batch = padded(PROMPTS)
    logits = theirs(**batch).logits
    for row, prompt in enumerate(PROMPTS):
        alone = theirs(torch.tensor([prompt]), use_cache=False).logits[0]
        assert (logits[row, -len(prompt) :] - alone).abs().max() < 1e-9
    first = theirs(batch["input_ids"][:, :3], attention_mask=batch["attention_mask"][:, :3])
    rest = theirs(
        batch["input_ids"][:, 3:], attention_mask=batch["attention_mask"], past_key_values=first.past_key_values
    )
    assert (rest.logits - logits[:, 3:]).abs().max() < 1e-9
    assert (theirs(**batch, logits_to_keep=1).logits - logits[:, -1:]).abs().max() < 1e-9
    beams = theirs.generate(**batch, max_new_tokens=4, num_beams=3, pad_token_id=0)
    assert beams.shape == (3, 10)


def test_gradient_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    model = exported(make_model(), tmp_path / "export").train()
    batch = padded(PROMPTS)
    gradients = []
    for enable in (False, True):
        model.gradient_checkpointing_enable() if enable else None
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


def grow(model: LanguageModel) -> None:
    """Append a segment of tokens to every layer and keep its tau."""
    for _, module in list(model.named_modules()):
        for name, child in module.named_children():
            if isinstance(child, Pattention):
                sizes = [child.num_tokens, 6]
                grown = Pattention(32, 32, sizes, child.activation, tau_tokens=child.num_tokens).double()
                grown.load_state_dict(child.state_dict(), strict=False)
                setattr(module, name, grown)


def test_a_grown_model_is_joined_and_keeps_its_tau(tmp_path: Path) -> None:
    model = make_model()
    grow(model)
    theirs = exported(model.eval(), tmp_path / "export", dtype=None)
    ids = torch.randint(0, 500, (2, 20))
    assert (theirs(ids).logits - model(ids)).abs().max() < 1e-9
    assert theirs.config.qkv_slot_num == 30 and theirs.model.layers[0].mlp.tau_tokens.item() == 40
    halved = loaded(tmp_path / "export", dtype=torch.bfloat16)
    assert halved.model.layers[0].mlp.tau_tokens.dtype == torch.int64 and halved.dtype == torch.bfloat16
    back = load_model(tmp_path / "export", dtype=torch.float64)
    assert (back(ids) - model(ids)).abs().max() < 1e-9
    assert back.config.ffn_slot_num == 46
    with pytest.raises(UserError, match=r"layers\.0\.attention\.query: has 30 tokens and tau\^2 = 24"):
        official_tensors(of_model(model))


def test_a_model_with_several_row_norms_keeps_them(tmp_path: Path) -> None:
    model = make_model(**OWN_NORMS)
    for _, layer in named_pattentions(model):
        layer.tau_tokens -= 1
    theirs = exported(model, tmp_path / "export")
    theirs.save_pretrained(tmp_path / "again")
    from_huggingface(tmp_path / "again", tmp_path / "run")
    ids = torch.randint(0, 500, (2, 20))
    for path in ("export", "again", "run"):
        back = load_model(tmp_path / path, dtype=torch.float64)
        assert back.config.segment_norms == OWN_NORMS["segment_norms"]
        assert (back(ids) - model(ids)).abs().max() < (1e-9 if path != "run" else 1e-3)  # a run is in fp32
        assert back.layers[1].mlp.tau_tokens.tolist() == [18, 20]
    fresh = transformers.AutoModelForCausalLM.from_config(theirs.config, trust_remote_code=True)
    assert fresh.model.layers[0].mlp.tau_tokens.tolist() == [19, 21]
    assert fresh.model.layers[0].mlp.key_tokens_2.std() > 0.1
    with pytest.raises(UserError, match=r"row_norm: .* the official flat file cannot say so, .*; use to-hf"):
        official_tensors(of_model(model))
    (tmp_path / "export" / "config.json").write_text(
        (tmp_path / "export" / "config.json").read_text().replace('"segment",', '"joint",')
    )
    with pytest.raises(UserError, match=r"query\.tau_tokens of shape \[2\] in a layer with one row norm"):
        load_model(tmp_path / "export")


def test_large_weights_are_spread_over_files(tmp_path: Path) -> None:
    model = make_model()
    theirs = exported(model, tmp_path / "export", shard_bytes=100_000)
    files = sorted(file.name for file in (tmp_path / "export").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    back = load_model(tmp_path / "export", dtype=torch.float64)
    ids = torch.randint(0, 500, (1, 9))
    assert torch.equal(back(ids), model(ids)) and (theirs(ids).logits - model(ids)).abs().max() < 1e-9
    (tmp_path / "export" / files[1]).unlink()
    with pytest.raises(UserError, match=rf"index\.json: names {files[1]}, which is not there"):
        load_model(tmp_path / "export")


def test_the_tokenizer_comes_along(tmp_path: Path, tokenizer_file: Path) -> None:
    model = make_model(vocab_size=300, padded_vocab_size=384)
    config = TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    export_huggingface(model, tmp_path / "export", config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    ours = build_tokenizer(config)
    text = "the people of the states"
    assert theirs(text).input_ids == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.pad_token_id == ours.eod_id and theirs.padding_side == "left"
    assert theirs(["the", text], padding=True, return_tensors="pt").attention_mask[0, 0] == 0


@pytest.mark.launches
def test_the_code_of_an_export_needs_no_other_package_than_torch_and_transformers() -> None:
    for source in (modeling_source(), configuration_source()):
        tree = ast.parse(source)
        imported = {
            (name.name if isinstance(node, ast.Import) else node.module or "").partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
            for name in node.names
        }
        assert imported <= {*sys.stdlib_module_names, "torch", "transformers"}
        result = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--no-cache", "-"],
            input=source, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout


def with_tokenizer(folder: Path, tokenizer_file: Path, **keys: Any) -> None:
    """An export whose tokenizer has 300 entries."""
    model = make_model(dtype=torch.float32, vocab_size=300, padded_vocab_size=384, **keys)
    export_huggingface(model, folder, TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file)))


def snippets(page: str) -> list[str]:
    """The Python code of a page of docs/."""
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_documented_code_runs_and_asks_nothing(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tokenizer(tmp_path / "HF_FOLDER", tokenizer_file)
    with_tokenizer(tmp_path / "pythia-160m", tokenizer_file, kind="transformer", norm="layernorm")
    monkeypatch.chdir(tmp_path)
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "n")
    names: dict[str, Any] = {}
    code = snippets("exchange.md")
    assert len(code) == 4
    for snippet in code:
        exec(snippet, names)
    assert not questions
    assert len([p for p in names["model"].parameters() if p.requires_grad]) == 2 * 2 * 10  # blocks, LoRA's A and B


def test_a_pipeline_generates_what_generate_does(tmp_path: Path, tokenizer_file: Path) -> None:
    with_tokenizer(tmp_path / "export", tokenizer_file)
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "export"), trust_remote_code=True)
    model, tokenizer = loaded(tmp_path / "export"), pipeline.tokenizer
    texts = ["the people of", "the"]
    answers = pipeline(texts, max_new_tokens=5, batch_size=2)
    for text, (answer,) in zip(texts, answers, strict=True):
        ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5)[0]
        assert answer["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.launches
def test_an_export_runs_where_this_package_is_missing(tmp_path: Path, tokenizer_file: Path) -> None:
    """With standard input open: a question would be waited for."""
    if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
        pytest.skip("transformers cannot be imported beside PyPI's torchvision, a CUDA build: requirements-vision-dev")
    with_tokenizer(tmp_path / "HF_FOLDER", tokenizer_file)
    code = "import sys\n" + snippets("exchange.md")[1] + "assert 'megatron' not in sys.modules\n"
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    asked, answers = os.pipe()
    try:
        result = subprocess.run(
            [sys.executable, "-P", "-c", code],
            cwd=tmp_path, env=environment, stdin=asked, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        os.close(asked)
        os.close(answers)
    assert result.returncode == 0 and result.stdout.startswith("['The people of"), result.stderr
    assert result.stdout.count("\n") == 1


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    export_huggingface(make_model(), folder)
    with pytest.raises(UserError, match="exists already; give a new or an empty folder"):
        export_huggingface(make_model(), folder)
    with pytest.raises(UserError, match="norm_activation_type: gelu_l2_norm in the configuration, l2_norm_gelu"):
        load_model(folder, make_model(norm_activation_type="gelu_l2_norm").config)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"architectures": ["LlamaForCausalLM"]}, "architecture LlamaForCausalLM is not supported"),
        ({"qkv_slot_num": 25}, r"query\.key_tokens_0 has shape \[24, 32\].*qkv_slot_num: 25"),
        ({"norm": "batchnorm"}, r"config\.json: norm: .batchnorm. is not supported; choose one of layernorm, "),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=message):
            load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not a readable JSON file"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "other")
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        load_model(folder)


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("megatron.exchange.huggingface_weights.save_file", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        export_huggingface(make_model(), tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_joined_tensors_of_an_ungrown_model_are_its_own() -> None:
    model = make_model()
    assert JoinedTensors(of_model(model).tensors).names("model") == list(model.state_dict())
