"""Every kind of model, with all that is done to it, on a device that is not the CPU: nothing is made on the wrong one.

What is computed there is also what the CPU computes.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration

from megatron.checkpoint import tensors
from megatron.engine.gradients import clip_gradients
from megatron.engine.state import EngineState
from megatron.evaluation.corpus import Document
from megatron.evaluation.perplexity import corpus_perplexity
from megatron.exchange import Checkpoint
from megatron.exchange.convert import export_huggingface
from megatron.growth.grow import grow
from megatron.growth.proof import compare_logits
from megatron.inference.generate import generate
from megatron.model import LanguageModel
from megatron.model.embedding import HeadInput
from megatron.mpu import SINGLE
from megatron.ops.cross_entropy import cross_entropy
from megatron.ops.linear_cross_entropy import linear_cross_entropy
from megatron.tokenizer import CharLevelTokenizer
from tests.other_device import NAME, install
from tests.random_models import OWN_NORMS, make_config
from tests.ranks import run_ranks
from tests.whole_state import Whole

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot be told of a device from Python",
)
TRANSFORMER = {"qkv_slot_num": None, "proj_slot_num": None, "ffn_slot_num": None}
SEGMENTS = {"qkv": [[24, 6], [24, 0]], "proj": [[20, 4], [20, 4]], "ffn": [[40, 0, 8], [40, 16, 0]]}
MODELS: dict[str, dict[str, Any]] = {
    "l2_norm_gelu": {},
    "gelu_l2_norm": {"norm_activation_type": "gelu_l2_norm"},
    "softmax": {"norm_activation_type": "softmax"},
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "norm": "layernorm", "rotary_pct": 1.0},
    "rmsnorm": {"norm": "rmsnorm", "final_norm": "rmsnorm", "gpt_j_residual": True},
    "untied": {"no_weight_tying": True, "use_bias_in_attn_linear": True},
    "transformer": {**TRANSFORMER, "use_bias_in_attn_linear": True, "activation": "silu"},
    "mixed": {"attention_config": [[["tokenformer", "global"], 1]]},
    "grown": {"token_segments": SEGMENTS, "qkv_slot_num": 30, "proj_slot_num": 24, "ffn_slot_num": 56},
    "norms": OWN_NORMS,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROWTHS: dict[str, dict[str, Any]] = {
    "l2_norm_gelu": {"qkv": 36, "proj": 24, "ffn": 64},
    "gelu_l2_norm": {"ffn": 64, "layers": (1,)},
    "softmax": {"qkv": 48, "ffn": 80},
    "rotated": {"qkv": 48, "ffn": 80, "new_keys": "rotated"},
    "mixed": {"proj": 41},
    "norms": {"qkv": 30, "ffn": 51, "row_norm": "segment"},
}
TEXTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3},
    "recomputed": {"recompute": True, "logprobs": True},
}
PROMPTS = ["The", "a union of", "The Union " * 30]
IDS = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(0))


def made(name: str, device: Any, dtype: torch.dtype, **options: Any) -> LanguageModel:
    return LanguageModel(make_config(**MODELS[name]).model, seed=3, device=device, dtype=dtype, **options)


def trained(model: LanguageModel, ids: Tensor) -> Tensor:
    """The loss on ids [b, s + 1] before an update; the update is made."""
    torch.manual_seed(1)
    model.train()
    labels, mask = ids[:, 1:], ids[:, :-1] != 0
    output = model(ids[:, :-1])
    if isinstance(output, HeadInput):
        loss = output.through(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, mask))
    else:
        loss = cross_entropy(output, labels, mask)
    loss.backward()
    assert all(p.grad is not None and p.grad.device == ids.device for p in model.parameters())
    assert clip_gradients(model.parameters(), 1.0, SINGLE).device == loss.device == ids.device
    optimizer = torch.optim.AdamW(model.parameters(), eps=1e-4)  # 1e-8 is 0 in fp16
    optimizer.step()
    state = EngineState(model, optimizer, 0)
    saved = Whole(state)
    state.write_masters(saved)
    state.write_optimizer_state(saved)
    return loss.detach()


def training(name: str, dtype: str, backend: str, recomputed: int) -> None:
    options = {"pattention_backend": "auto" if backend == "rescored" else backend, "checkpoint_layers": recomputed}
    options |= {"recompute_scores": backend == "rescored", "defer_logits": backend != "reference"}
    here, there = (made(name, device, DTYPES[dtype], **options) for device in ("cpu", NAME))
    expected, found = trained(here, IDS), trained(there, IDS.to(NAME))
    # A device multiplies by the keys of query, key and value at once.
    rounding = {"bf16": 2e-2, "fp16": 2e-3, "fp32": 1e-5}[dtype]
    assert abs(found.item() - expected.item()) < rounding * expected.item(), (found, expected)


def decoding(name: str) -> None:
    here, there = (made(name, device, torch.float64).eval() for device in ("cpu", NAME))
    for options in TEXTS.values():
        texts = [
            [c.text for c in generate(model, CharLevelTokenizer(), PROMPTS, maximum_tokens=6, **options)]
            for model in (here, there)
        ]
        assert texts[0] == texts[1], texts
    documents = [Document(list(range(n)), n, n) for n in (9, 70)]
    expected, found = (corpus_perplexity(model, documents, 0, 16) for model in (here, there))
    assert found == pytest.approx(expected, rel=1e-9)


class Tensors(tensors.Tensors):
    """A model's tensors, as a checkpoint gives them: on the CPU."""

    def __init__(self, model: LanguageModel) -> None:
        self.values = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}

    def names(self, kind: str) -> list[str]:
        return list(self.values)

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def tensor(self, kind: str, name: str) -> Tensor:
        return self.values[name]


def growing(name: str) -> None:
    model = made("l2_norm_gelu" if name == "rotated" else name, NAME, torch.float64).eval()
    ids = IDS.to(NAME)
    old = Checkpoint(Path("before"), model.config, Tensors(model))
    with torch.no_grad():
        before = model(ids)
        grow(model, **GROWTHS[name])
        assert (model(ids) - before).abs().max().item() < 1e-9 * before.abs().max().item()
    compare_logits(old, Checkpoint(Path("after"), model.config, Tensors(model)), [ids]).check("this growth")
    trained(model, ids)


def exported(name: str, root: str) -> None:
    """The code of an export, which transformers loads: training, cached steps of padded texts, generation."""
    import transformers

    model, folder = made(name, "cpu", torch.float64).eval(), Path(root) / name
    export_huggingface(model, folder)
    here, there = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float64).eval()
        for _ in range(2)
    )
    there.to(NAME)
    ids, mask = IDS[:, :9], torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    outputs = []
    for theirs, device in ((here, "cpu"), (there, NAME)):
        inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
        start = theirs(**inputs, use_cache=True)
        longer = torch.cat([inputs["attention_mask"], mask[:, -1:].to(device)], dim=1)
        step = theirs(ids[:, :1].to(device), attention_mask=longer, past_key_values=start.past_key_values)
        text = theirs.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        loss = theirs.train()(ids.to(device), labels=ids.to(device)).loss
        loss.backward()
        outputs.append([step.logits.detach().cpu(), text.cpu(), loss.detach().cpu()])
    for left, right in zip(*outputs, strict=True):
        assert torch.allclose(left.double(), right.double(), rtol=1e-9)


def cases(root: str) -> dict[str, Callable[[], None]]:
    """Every case by its name."""
    # Every model with each implementation, once recomputed; of number formats, recomputed or not, each with either.
    formats = list(DTYPES)
    kinds = [
        (name, formats[(number + turn) % 3], backend, (number + turn) % 2)
        for number, name in enumerate(MODELS)
        for turn, backend in enumerate(("auto", "reference"))
    ]
    kinds += [("l2_norm_gelu", "bf16", "compiled", 0), ("softmax", "fp16", "rescored", 1)]
    return {
        **{f"train-{'-'.join(map(str, case))}": partial(training, *case) for case in kinds},
        **{f"decode-{name}": partial(decoding, name) for name in MODELS},
        **{f"grow-{name}": partial(growing, name) for name in GROWTHS},
        **{f"export-{name}": partial(exported, name, root) for name in ("l2_norm_gelu", "softmax", "untied", "mixed")},
    }


def failures(root: str) -> dict[str, str]:
    """In a process of its own, what went wrong in each case."""
    install()
    found = {}
    for name, case in cases(root).items():
        try:
            case()
        except Exception as error:
            places = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if not f.filename.endswith(("/other_device.py", "/_compile.py", "/eval_frame.py"))
            ]
            lines = " <- ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in reversed(places[-5:]))
            found[name] = f"{type(error).__name__}: {str(error)[:500]} at {lines}"
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(1, failures, str(tmp_path_factory.mktemp("exports")))[0]


@pytest.mark.processes
@pytest.mark.parametrize("case", cases(""))
def test_nothing_is_on_the_wrong_device(found: dict[str, str], case: str) -> None:
    assert found.get(case) is None
