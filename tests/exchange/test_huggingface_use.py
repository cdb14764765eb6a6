"""What people do with a model of transformers holds for exports too; GPTNeoXForCausalLM is the witness."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import accelerate
import pytest
import torch
import transformers
from torch import Tensor, nn

from megatron.config.sections.tokenizer import TokenizerConfig
from megatron.exchange.convert import export_huggingface
from megatron.inference import load_model
from tests.exchange.loaded_exports import IDS, PROMPTS, loaded, private_modules
from tests.random_models import make_model

if TYPE_CHECKING:
    import peft  # takes seconds, which a process that runs other files is spared

KINDS: dict[str, dict[str, Any]] = {
    "tokenformer": {},
    "untied": {"no_weight_tying": True, "norm": "rmsnorm", "norm_activation_type": "softmax", "pos_emb": "none"},
    "mixed": {"attention_config": [[["tokenformer", "global"], 1]], "intermediate_size": 48, "norm": "layernorm"},
    "gpt_neox": {"kind": "transformer", "norm": "layernorm"},
}
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0
BATCH = {"input_ids": IDS, "attention_mask": MASK}
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A folder of each kind; that of a Transformer needs no code of its own."""
    root = tmp_path_factory.mktemp("exports")
    for name, keys in KINDS.items():
        tokenizer = TokenizerConfig(tokenizer_type="CharLevelTokenizer")
        export_huggingface(make_model(dtype=torch.float32, **keys), root / name, tokenizer)
    with private_modules(root / "modules"):
        yield {name: root / name for name in KINDS}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, exports: dict[str, Path]) -> Path:
    return exports[request.param]


def with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}


def test_every_module_with_parameters_is_called_once_with_one_input(folder: Path) -> None:
    model, called = loaded(folder), []
    for name, module in with_parameters(model).items():
        module.register_forward_hook(lambda module, args, output, name=name: called.append((name, len(args))))
    model(IDS)
    assert sorted(called) == sorted((name, 1) for name in with_parameters(model))


@torch.no_grad()
def test_weights_elsewhere_give_the_same_logits(folder: Path, tmp_path: Path) -> None:
    expected = loaded(folder)(**BATCH).logits
    blocks = "gpt_neox" if folder.name == "gpt_neox" else "model"
    places = {name: "cpu" for name, _ in getattr(loaded(folder), blocks).named_children() if name != "layers"}
    places = {f"{blocks}.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    on_disk = {**places, f"{blocks}.layers.0": "disk", f"{blocks}.layers.1": "disk"}
    models = [
        accelerate.cpu_offload(loaded(folder), execution_device="cpu"),
        accelerate.disk_offload(loaded(folder), tmp_path / "a", execution_device="cpu"),
        loaded(folder, device_map=on_disk, offload_folder=tmp_path / "b"),
        loaded(folder, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path / "c"),
    ]
    for model in models:
        assert any(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(**BATCH).logits, expected)
    models[2].save_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(tmp_path / "saved")(**BATCH).logits, expected)


def adapted(folder: Path) -> tuple[peft.PeftModel, int]:
    """The model with LoRA on weights of query, key, value, proj and mlp, and the number of weights of each block."""
    import peft

    tokens = ["query.key_tokens_0", "query.value_tokens_0", "key.key_tokens_0", "value.value_tokens_0",
              "proj.key_tokens_0", "mlp.key_tokens_0", "mlp.value_tokens_0"]  # fmt: skip
    matrices = ["query.weight", "key.weight", "value.weight", "proj.weight", "fc_in.weight", "fc_out.weight"]
    fused = ["query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight"]
    names = {"gpt_neox": fused, "mixed": [*tokens, *matrices]}.get(folder.name, tokens)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_parameters=names, target_modules=[], init_lora_weights=False)
    return peft.get_peft_model(loaded(folder), config), len(names) * (1 if folder.name == "mixed" else 2)


def test_lora_by_target_parameters_trains_saves_and_merges(folder: Path, tmp_path: Path) -> None:
    import peft

    model, count = adapted(folder)
    model(**BATCH, labels=IDS).loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * count
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)
    model.eval()
    logits, plain = model(IDS).logits, loaded(folder)(IDS).logits
    assert not torch.allclose(logits, plain)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, plain)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter")
    assert torch.allclose(again(IDS).logits, logits, atol=1e-4)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(IDS).logits, logits, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(load_model(tmp_path / "merged")(IDS), logits, atol=1e-4)


def test_lora_trains_with_gradient_checkpointing(folder: Path) -> None:
    gradients = []
    for options in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model, _ = adapted(folder)
        model.train()
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
            model.enable_input_require_grads()
        model(**BATCH, labels=IDS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for other in gradients[1:]:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients[0], other, strict=True))


def test_lora_by_modules_reaches_linear_projections(exports: dict[str, Path]) -> None:
    import peft

    config = peft.LoraConfig(target_modules=["query", "key", "value"], layers_to_transform=[1], init_lora_weights=False)
    model = peft.get_peft_model(loaded(exports["mixed"]), config)
    model(IDS).logits.sum().backward()
    assert len([p for p in model.parameters() if p.requires_grad and p.grad is not None and p.grad.any()]) == 6


@pytest.mark.parametrize(
    ("kind", "attention"), [("tokenformer", "sdpa"), ("tokenformer", "eager"), ("mixed", "sdpa"), ("gpt_neox", "sdpa")]
)
def test_continuous_batching_generates_what_generate_does(exports: dict[str, Path], kind: str, attention: str) -> None:
    model = loaded(exports[kind], attn_implementation=attention)
    small = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64, page_size=32)
    answers = model.generate_batch(PROMPTS, max_new_tokens=6, progress_bar=False, continuous_batching_config=small)
    for prompt, (_, answer) in zip(PROMPTS, sorted(answers.items()), strict=True):
        assert answer.error is None
        assert [*prompt, *answer.generated_tokens] == model.generate(torch.tensor([prompt]), **GREEDY)[0].tolist()
    assert model.config._attn_implementation == attention


def test_eager_attention_returns_its_weights(folder: Path) -> None:
    model = loaded(folder, attn_implementation="eager")
    outputs = model(**BATCH, output_attentions=True)
    assert len(outputs.attentions) == 2
    for weights in outputs.attentions:
        assert weights.shape == (2, 4, 12, 12)
        assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 12), atol=1e-5)
        assert not weights[0, :, 4:, :4].any() and not weights[1].triu(1).any()
    fast = loaded(folder)
    logits, real = fast(**BATCH, output_attentions=True).logits, MASK.bool()
    assert torch.allclose(outputs.logits[real], logits[real], atol=1e-4)
    assert not fast(**BATCH, output_attentions=True).attentions  # sdpa has none to give
    fast.set_attn_implementation("eager")
    assert torch.equal(fast(**BATCH, output_attentions=True).attentions[1], outputs.attentions[1])
    generated = model.generate(**BATCH, **GREEDY, output_attentions=True, return_dict_in_generate=True)
    assert generated.attentions[-1][1].shape[:3] == (2, 4, 1)


def test_a_tuple_is_returned_where_one_is_asked_for(folder: Path) -> None:
    model = loaded(folder)
    expected = model(**BATCH, labels=IDS)
    loss, logits, *_ = model(**BATCH, labels=IDS, return_dict=False)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    base = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(base(IDS, return_dict=False), tuple) and base(IDS).last_hidden_state.shape == (2, 12, 32)
    if folder.name != "gpt_neox":  # transformers 5.23 fails there
        assert isinstance(loaded(folder, return_dict=False)(IDS), tuple)


@torch.no_grad()
def test_every_way_to_generate_gives_the_greedy_texts(folder: Path) -> None:
    model = loaded(folder)
    expected = model.generate(**BATCH, **GREEDY)
    for options in (
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 1},
    ):
        assert torch.equal(model.generate(**BATCH, **{**GREEDY, **options}), expected)
    embedded = model.get_input_embeddings()(IDS)
    answers = model.generate(inputs_embeds=embedded, attention_mask=MASK, **GREEDY)
    assert torch.equal(answers, expected[:, 12:])
    alone = model.generate(IDS[1:], **GREEDY)
    assert torch.equal(model.generate(IDS[1:], **GREEDY, prompt_lookup_num_tokens=2), alone)
    assert torch.equal(model.generate(IDS[1:], **GREEDY, assistant_model=loaded(folder)), alone)


def test_given_embeddings_are_dropped_as_looked_up_ones_are(folder: Path) -> None:
    model = loaded(folder, hidden_dropout=0.5).train()
    torch.manual_seed(0)
    looked_up = model(IDS).logits
    torch.manual_seed(0)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(IDS)).logits, looked_up)
    assert not torch.allclose(looked_up, model.eval()(IDS).logits)


@torch.no_grad()
def test_sampling_and_beams_return_as_many_texts_as_asked_for(folder: Path) -> None:
    model = loaded(folder)
    assert model.generate(**BATCH, max_new_tokens=3, do_sample=True, num_return_sequences=3).shape == (6, 15)
    assert model.generate(**BATCH, max_new_tokens=3, num_beams=3, num_return_sequences=2).shape == (4, 15)


@torch.no_grad()
def test_a_cache_is_continued_copied_and_cropped(folder: Path) -> None:
    model = loaded(folder).eval()
    whole = model(IDS).logits
    cache = model(IDS[:, :7]).past_key_values
    other = copy.deepcopy(cache)
    assert torch.allclose(model(IDS[:, 7:], past_key_values=cache).logits, whole[:, 7:], atol=1e-4)
    cache.crop(-3)
    assert torch.allclose(model(IDS[:, 9:], past_key_values=cache).logits, whole[:, 9:], atol=1e-4)
    assert torch.equal(model.generate(IDS, past_key_values=other, **GREEDY), model.generate(IDS, **GREEDY))


def test_texts_packed_into_a_row_by_their_positions_do_not_see_each_other(folder: Path) -> None:
    model = loaded(folder).train()
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(IDS[:1], position_ids=positions, use_cache=False).logits
    for text in (slice(0, 5), slice(5, 12)):
        assert torch.allclose(packed[:, text], model(IDS[:1, text]).logits, atol=1e-4)
    assert torch.isfinite(model(IDS, position_ids=torch.arange(1000, 1012)[None]).logits).all()


def masks() -> list[Tensor]:
    """Causal attention as a bool and as an additive mask."""
    causal = torch.ones(12, 12).tril().bool()[None, None]
    return [causal, torch.zeros(1, 1, 12, 12).masked_fill(~causal, torch.finfo(torch.float32).min)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_ready_made_masks_are_taken_as_they_are(exports: dict[str, Path], attention: str) -> None:
    model = loaded(exports["tokenformer"], attn_implementation=attention)
    for mask in masks():
        assert torch.allclose(model(IDS, attention_mask=mask).logits, model(IDS).logits, atol=1e-4)


def test_a_registered_attention_function_is_called(exports: dict[str, Path]) -> None:
    def mine(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        calls.append(module.layer_idx)
        return torch.zeros_like(query).transpose(1, 2), None

    calls: list[int] = []
    transformers.AttentionInterface.register("mine", mine)
    assert torch.isfinite(loaded(exports["tokenformer"], attn_implementation="mine")(IDS).logits).all()
    assert calls == [0, 1]


def test_models_go_round_through_transformers(folder: Path, tmp_path: Path) -> None:
    model = loaded(folder, dtype="auto")
    assert model.dtype == torch.float32
    model.resize_token_embeddings(700)
    model.save_pretrained(tmp_path / "saved")
    again = loaded(tmp_path / "saved", dtype="auto")
    assert torch.equal(again(IDS).logits, model(IDS).logits) and again.config.vocab_size == 700
    assert torch.allclose(load_model(tmp_path / "saved")(IDS), model(IDS).logits, atol=1e-4)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "halved")
    assert loaded(tmp_path / "halved", dtype="auto").dtype == torch.bfloat16
