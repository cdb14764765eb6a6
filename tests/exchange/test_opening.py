"""One door: every form opens as the same object, and is written from it without a model in between."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron.checkpoint.tensors import TensorView
from megatron.config.sections.model import RowNorm
from megatron.config.sections.scaling import NewKeys
from megatron.errors import UserError
from megatron.exchange import Checkpoint, huggingface, open_checkpoint
from megatron.exchange.checkpoint import of_model
from megatron.exchange.convert import export_huggingface, from_huggingface, from_official, to_huggingface, to_official
from megatron.exchange.huggingface_weights import Weights
from megatron.exchange.names import in_model_order
from megatron.exchange.opening import FORMATS, checkpoint_path
from megatron.growth.grow import grow, grown_checkpoint
from megatron.growth.plan import TokenCounts, grown_config
from megatron.inference import load_model
from megatron.inference.load import model_of
from megatron.model import LanguageModel
from tests.exchange.official_folders import write_layers
from tests.random_models import make_config, make_model, save_random_models

KINDS = {
    "tokenformer": {},
    "mixed": {"attention_config": [[["tokenformer", "global"], 1]], "norm": "rmsnorm", "no_weight_tying": True},
    "transformer": {"qkv_slot_num": None, "proj_slot_num": None, "ffn_slot_num": None, "norm": "layernorm"},
}


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, tuple[Path, Checkpoint]]:
    """The same random model in every form, opened."""
    config = make_config()
    save_random_models(tmp_path / "run", config, (5,))
    to_huggingface(tmp_path / "run", tmp_path / "hf")
    flat = to_official(tmp_path / "run", tmp_path / "official")
    layers = write_layers(tmp_path / "global_step3", torch.load(flat, weights_only=True))
    paths = {"canonical": tmp_path / "run", "hf": tmp_path / "hf", "flat": flat, "layers": layers}
    return {form: (path, open_checkpoint(path, config)) for form, path in paths.items()}


def test_every_form_opens_as_the_same_object(forms: dict[str, tuple[Path, Checkpoint]]) -> None:
    expected = LanguageModel(make_config().model, seed=5).state_dict()
    for form, (path, opened) in forms.items():
        tensors = opened.tensors
        assert in_model_order(tensors.names("model")) == list(expected), form
        for name, tensor in expected.items():
            assert torch.equal(tensors.tensor("model", name), tensor)
            assert tensors.shape("model", name) == tuple(tensor.shape)
        name = "layers.1.mlp.value_tokens_0"
        assert torch.equal(tensors.part("model", name, slice(3, 9), slice(0, 2)), expected[name][3:9, :2])
        assert tensors.names("optimizer") == tensors.names("a kind to come") == []
        assert opened.num_parameters == sum(t.numel() for name, t in expected.items() if "tau" not in name)
        assert opened.model_config.layer_kinds == ("tokenformer",) * 2 and opened.model_config.ffn_slot_num == 40
        assert opened.iteration == (5 if form == "canonical" else None), form
        assert checkpoint_path(path) == opened.folder


def test_one_form_claims_a_path(forms: dict[str, tuple[Path, Checkpoint]], tmp_path: Path) -> None:
    export_huggingface(make_model("transformer", norm="layernorm"), tmp_path / "neox")
    claims = {form: path for form, (path, _) in forms.items()} | {"neox": tmp_path / "neox"}
    for form, path in claims.items():
        names = [f.__name__.rpartition(".")[2] for f in FORMATS if f.matches(path, None, "load")]  # type: ignore
        first = {"canonical": "canonical", "hf": "huggingface", "neox": "gpt_neox"}.get(form, "official")
        assert names[0] == first, names
    with pytest.raises(UserError, match="eval_ckpt: no checkpoint in .*nowhere; train first"):
        open_checkpoint(tmp_path / "nowhere", key="eval_ckpt")


@pytest.mark.parametrize("kind", KINDS)
def test_no_conversion_builds_a_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(**KINDS[kind])
    save_random_models(tmp_path / "run", config, (5,))
    monkeypatch.setattr("megatron.model.layered.allocate", lambda *_: pytest.fail("a model is built"))
    to_huggingface(tmp_path / "run", tmp_path / "hf", dtype="bf16")
    from_huggingface(tmp_path / "hf", tmp_path / "back")
    if kind == "tokenformer":
        flat = to_official(tmp_path / "back", tmp_path / "flat")
        from_official(flat, tmp_path / "again", config)
    monkeypatch.undo()
    first, last = load_model(tmp_path / "run"), load_model(tmp_path / ("again" if kind == "tokenformer" else "back"))
    for name, tensor in first.state_dict().items():
        halved = tensor.bfloat16().float() if tensor.is_floating_point() else tensor
        assert torch.equal(halved, last.state_dict()[name])


def test_a_conversion_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    """The tensor that is refused is read after others have been written."""
    model = make_model(dtype=torch.float32)
    with torch.no_grad():
        model.layers[1].mlp.get_parameter("value_tokens_0").fill_(torch.nan)
    export_huggingface(model, tmp_path / "hf")
    with pytest.raises(UserError, match=r"hf: layers\.1\.mlp\.value_tokens_0 has .* not finite"):
        from_huggingface(tmp_path / "hf", tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_weights_are_written_file_by_file(tmp_path: Path) -> None:
    """No more tensors are in memory than go into one file."""
    model, written = make_model(dtype=torch.float32), list[int]()

    class Watched(TensorView):
        def tensor(self, kind: str, name: str) -> Tensor:
            written.append(len(list(tmp_path.rglob("*.part"))))
            return super().tensor(kind, name)

    checkpoint = replace(of_model(model), tensors=Watched(of_model(model).tensors))
    huggingface.write(tmp_path / "hf", checkpoint, shard_bytes=20_000)
    files = list((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(files) > 3 and written[-1] == len(files) - 1
    assert sum(len(load_file(file)) for file in files) == len(model.state_dict())


def test_a_tokenizer_that_moved_with_its_run_is_found(tmp_path: Path, tokenizer_file: Path) -> None:
    config = make_config(padded_vocab_size=384, tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    save_random_models(tmp_path / "run", config, (5,))
    to_huggingface(tmp_path / "run", tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "back")
    shutil.move(tmp_path / "back", tmp_path / "elsewhere")
    found = {form: open_checkpoint(tmp_path / form).tokenizer for form in ("run", "hf", "elsewhere")}
    files = {form: tokenizer and tokenizer.vocab_file for form, tokenizer in found.items()}
    places = {"hf": str(tmp_path / "hf/tokenizer.json"), "elsewhere": str(tmp_path / "elsewhere/tokenizer.json")}
    assert files == {"run": str(tokenizer_file), **places}
    flat = to_official(tmp_path / "run", tmp_path / "flat")
    assert open_checkpoint(flat, config).tokenizer == config.tokenizer
    assert open_checkpoint(flat, config.model).tokenizer is None


def test_a_model_of_gpt_neox_itself_is_refused_in_words(tmp_path: Path) -> None:
    names = ["0.word_embeddings.weight", "2.attention.query_key_value.weight", "5.norm.weight"]
    folder = write_layers(tmp_path / "global_step9", {f"sequential.{name}": torch.ones(2, 2) for name in names})
    config = make_config(**KINDS["transformer"])
    for path in (folder, tmp_path):
        (tmp_path / "latest").write_text("global_step9")
        with pytest.raises(UserError, match=r"load: .*global_step9 is a model of GPT-NeoX itself .*convert_neox_to_hf"):
            open_checkpoint(path, config)


@pytest.mark.parametrize("new_keys", ["zero", "rotated", "random"])
def test_growth_is_a_view(new_keys: NewKeys, forms: dict[str, tuple[Path, Checkpoint]]) -> None:
    """Nothing is written; every form grows, and to the model that grows in memory."""
    row_norm: RowNorm = "segment" if new_keys == "random" else "joint"
    after = grown_config(make_config().model, TokenCounts(56, 52, 80, new_keys=new_keys, row_norm=row_norm))
    model = LanguageModel(make_config().model, seed=5)
    grow(model, 56, 52, 80, new_keys=new_keys, row_norm=row_norm)
    state = model.state_dict()
    expected = {name: tensor for name, tensor in state.items() if new_keys != "rotated" or "key" not in name}
    for _, opened in forms.values():
        grown = grown_checkpoint(opened, after, 1234, new_keys)
        found = model_of(grown).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        for name in (
            "layers.0.mlp.key_tokens_0",
            "layers.0.mlp.key_tokens_1",
            "layers.1.attention.proj.value_tokens_1",
        ):
            part = grown.tensors.part("model", name, slice(5, 11))
            assert torch.equal(part, grown.tensors.tensor("model", name)[5:11])
        assert grown.num_parameters == model.num_parameters()
        assert grown.tensors.shape("model", "layers.0.mlp.tau_tokens") == tuple(state["layers.0.mlp.tau_tokens"].shape)


@pytest.mark.parametrize("in_safetensors", [True, False])
def test_the_weights_of_a_folder_are_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_safetensors: bool
) -> None:
    tensors, opened = {"a": torch.ones(2), "b": torch.zeros(3)}, []
    if in_safetensors:
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    read = Weights._read
    monkeypatch.setattr(Weights, "_read", lambda self, file: opened.append(file) or read(self, file))
    weights = Weights(tmp_path)
    assert weights.shape("a") == (2,) and weights.tensor("b").equal(tensors["b"]) and len(opened) == 1
