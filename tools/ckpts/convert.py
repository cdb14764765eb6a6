"""Convert checkpoints between this program, Hugging Face's form, the official code's flat file and timm's folders.

to-hf IN OUT, from-hf IN OUT, to-official IN OUT, from-official IN OUT --config YAML..., to-timm IN OUT,
from-timm IN OUT; see docs/exchange.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    from tools.ckpts import from_transformer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    descriptions = {
        "to-hf": "any checkpoint to a folder that transformers loads",
        "from-hf": "such a folder, or a GPT-NeoX (Pythia) one, to a training checkpoint",
        "to-official": "any checkpoint to the official code's pytorch_model.bin",
        "from-official": "an official pytorch_model.bin to a training checkpoint",
        "from-transformer": "a trained Transformer to a TokenFormer that starts near it, fitted on a text",
        "to-timm": "an image model of Transformer blocks to a folder that timm loads",
        "from-timm": "a Vision Transformer of timm, a folder or a file, to a training checkpoint",
    }
    configured = {"to-hf": ", for a pytorch_model.bin", "from-official": "", "from-timm": ", for a file of weights"}
    for name, text in descriptions.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("input", metavar="IN", help="checkpoint to read")
        command.add_argument("output", metavar="OUT", help="folder to write; new or empty")
        if name in configured:
            what = f"YAML files of the model{configured[name]}"
            command.add_argument("--config", nargs="+", metavar="YAML", required=name == "from-official", help=what)
        if name == "from-transformer":
            from_transformer.add_flags(command)
        if name.startswith("to-"):
            command.add_argument("--iteration", type=int, help="which of a run's checkpoints; default the latest")
            command.add_argument("--ema", action="store_true", help="the average of the weights (ema_decay), not these")
        if name in ("to-hf", "to-timm"):
            command.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32", help="of the weights")
            command.add_argument("--classes", metavar="FILE", help="names of an image model's classes, one a line")
        if name == "to-hf":
            command.add_argument("--license", metavar="ID", help="that the model card names, for example apache-2.0")
            what = "results of eval.py for the model card, besides those beside the checkpoint"
            command.add_argument("--results", nargs="+", metavar="FILE", default=[], help=what)
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0].replace("-", "_").removesuffix(".py") == "zero_to_fp32":
        from megatron.errors import UserError

        raise UserError(
            f"{words[0]}: there are no ZeRO shards to merge, checkpoints hold whole fp32 tensors; `to-official IN OUT` "
            "writes a pytorch_model.bin, `to-hf IN OUT` a folder for transformers"
        )
    return parser.parse_args(words)


def main(arguments: list[str] | None = None) -> None:
    """Parse and convert."""
    args = parse_args(arguments)

    from megatron.config import load_config
    from megatron.exchange import convert
    from tools.ckpts import from_transformer

    config = load_config(args.config) if getattr(args, "config", None) else None
    if args.command == "to-hf":
        convert.to_huggingface(
            args.input, args.output, config, args.dtype, args.iteration,
            licence=args.license, results=args.results, classes=args.classes, ema=args.ema,
        )  # fmt: skip
    elif args.command == "from-hf":
        convert.from_huggingface(args.input, args.output)
    elif args.command == "from-transformer":
        from_transformer.convert(args)
    elif args.command == "to-official":
        convert.to_official(args.input, args.output, args.iteration, args.ema)
    elif args.command == "to-timm":
        convert.to_timm(args.input, args.output, args.dtype, args.iteration, args.classes, args.ema)
    elif args.command == "from-timm":
        convert.from_timm(args.input, args.output, config)
    else:
        assert config is not None, "the parser requires it"
        convert.from_official(args.input, args.output, config)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    if not __package__:  # run by its path: then this folder is on the import path, not the one that holds megatron
        sys.path[0] = str(Path(__file__).resolve().parents[2])  # instead: inspect.py here is not Python's inspect
    from megatron.errors import run_command

    sys.exit(run_command(main))
