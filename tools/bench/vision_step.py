"""Images a second of vision models, beside timm's Vision Transformer, measured in turn in one run.

    python -m tools.bench.vision_step [--shapes tiny small] [--samples 8] [--threads 1] [--rounds 10] [--json FILE]

timm's model of a shape, patches of 16 and images of 224 x 224; `Transformer`, this project's of the same shape; and
`TokenFormer` of as many parameters: d tokens of width d for 3/4 of query, key, value and proj each, 3 d for the
feed-forward. `forward` is an evaluation without gradients, `training` forward, backward and AdamW, in fp32 on a CPU and
bf16 on a GPU; of a CPU the processor time of this process counts. Where timm is not installed
(requirements/requirements-vision-dev.txt) it is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import load_config
from megatron.engine.adamw import AdamW
from megatron.errors import UserError, run_command
from megatron.model.build import build_model
from tools.bench.measure import (
    Result,
    as_document,
    clocked,
    compare,
    default_device,
    parser,
    processor_clocked,
    table,
    take_turns,
    where,
    write_json,
)
from tools.bench.with_timm import mend_torchvision

TIMM = "timm"


@dataclass(frozen=True)
class Shape:
    """A Vision Transformer, as timm calls it."""

    name: str
    layers: int
    width: int
    heads: int
    image_size: int = 224

    def section(self, tokenformer: bool) -> Any:
        """The model section of ours."""
        attention, feed_forward = 3 * self.width // 4, 3 * self.width
        tokens = {"qkv_slot_num": attention, "proj_slot_num": attention, "ffn_slot_num": feed_forward}
        own = {**tokens, "norm": "layernorm_nonparam"} if tokenformer else {"norm": "layernorm"}
        keys: dict[str, Any] = {
            "task": "image_classification", "num_layers": self.layers, "hidden_size": self.width,
            "num_attention_heads": self.heads, "image_size": self.image_size, "patch_size": 16, "num_classes": 1000,
            "final_norm": "layernorm", "layernorm_epsilon": 1e-6,
        }  # fmt: skip
        return load_config([], {**keys, **own}).model

    def models(self, device: torch.device) -> dict[str, nn.Module]:
        """Contestants by name; the first is what the others are compared with."""
        found: dict[str, nn.Module] = {}
        if find_spec(TIMM) is not None:
            mend_torchvision()
            import timm

            sizes: Any = {"depth": self.layers, "embed_dim": self.width, "num_heads": self.heads}
            found[TIMM] = timm.create_model("vit_base_patch16_224", img_size=self.image_size, **sizes).to(device)
        for name, tokenformer in (("Transformer", False), ("TokenFormer", True)):
            found[name] = build_model(self.section(tokenformer), seed=0, device=device)
        return found


SHAPES = {
    shape.name: shape for shape in (Shape("tiny", 12, 192, 3), Shape("small", 12, 384, 6), Shape("base", 12, 768, 12))
}


def forward(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """What evaluates a batch."""

    def work() -> None:
        with torch.no_grad():
            model.eval()(images)

    return work


def training(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """What makes one update."""
    optimizer = AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.3, fused=True)
    labels = torch.arange(len(images), device=images.device)

    def work() -> None:
        F.cross_entropy(model.train()(images).float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def measure(shape: Shape, samples: int, rounds: int, device: torch.device) -> dict[str, dict[str, Result]]:
    """Results by kind of work and contestant."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = (samples, 3, shape.image_size, shape.image_size)
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    models, found = {name: model.to(dtype) for name, model in shape.models(device).items()}, {}
    for kind in (forward, training):
        work = {name: kind(model, images) for name, model in models.items()}
        on_cpu = device.type == "cpu"
        timed = {name: processor_clocked(each) if on_cpu else clocked(each, device) for name, each in work.items()}
        results = compare(take_turns(timed, rounds), next(iter(models)))
        for name, result in results.items():
            count = sum(parameter.numel() for parameter in models[name].parameters())
            result.facts = {
                "parameters": f"{count:,}", "images/s": f"{samples / result.median:.1f}",
                "of the rate": f"{1 / result.ratio:.2f}",
            }  # fmt: skip
        found[kind.__name__] = results
    return found


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__, rounds=10)
    flags.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny", "small"])
    flags.add_argument("--samples", type=int, default=8, help="images of a batch (default 8)")
    flags.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    options = flags.parse_args()
    if min(options.samples, options.threads) < 1:
        raise UserError("--samples, --threads: give positive numbers")
    torch.set_num_threads(options.threads)
    device, tables = default_device(), {}
    for name in options.shapes:
        for kind, results in measure(SHAPES[name], options.samples, options.rounds, device).items():
            tables[f"{name}, {kind}"] = results
            print(f"{name}, {kind}: {options.samples} images, {where(device)}; ratios are to {next(iter(results))}'s")
            print(table(results, ["parameters", "images/s", "of the rate"]))
    write_json(options.json, as_document("vision_step", tables, vars(options), device))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
