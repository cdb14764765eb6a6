"""The command line that deepy.py, train.py, eval.py and generate.py share: YAML files and flags to a RunConfig."""

from __future__ import annotations

import argparse
import os
import re
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron.config.build import Check
from megatron.config.checks import find_evaluation_mistakes, find_setting_mistakes, find_training_mistakes
from megatron.config.explain import explain
from megatron.config.hostfile import find_host_mistakes
from megatron.config.load import Resolved, resolve_config
from megatron.config.reference import SHOWN_SECTIONS, all_keys, section_title
from megatron.config.schema import RunConfig
from megatron.config.yaml_file import Setting
from megatron.errors import UserError
from megatron.files import refuse_inputs
from megatron.log import get_logger
from megatron.text import shortened, suggestion

FLAG_KEYS: dict[str, str] = {
    "hostfile": "hostfile",
    "load": "load",
    "save": "save",
    "iteration": "iteration",
    "eval_tasks": "eval_tasks",
    "eval_results_prefix": "eval_results_prefix",
    "eval_batch_size": "eval_batch_size",
    "limit": "eval_limit",
    "num_fewshot": "num_fewshot",
    "include_path": "include_path",
    "perplexity": "perplexity_data",
    "perplexity_stride": "perplexity_stride",
    "eval_data_paths": "eval_data_paths",
    "eval_split": "eval_split",
    "per_class": "per_class",
    "confusion": "confusion",
    "text_gen_type": "text_gen_type",
    "sample_input_file": "sample_input_file",
    "sample_output_file": "sample_output_file",
    "wandb_group": "wandb_group",
    "wandb_team": "wandb_team",
    "num_gpus": "num_gpus",
    "master_port": "master_port",
    "max_restarts": "max_restarts",
}
"""The key that each flag sets."""

_LM_EVAL = "lm-eval's own command, `python -m eval_tasks --model tokenformer --model_args pretrained=FOLDER`, has it"
OTHER_WORDS: dict[str, str] = {
    "--batch_size": "--eval_batch_size is the word for evaluation, train_micro_batch_size_per_gpu for training",
    "--tasks": "--eval_tasks is the word here",
    "--output_path": "--eval_results_prefix is the word here",
    "--log_samples": _LM_EVAL,
    "--gen_kwargs": _LM_EVAL,
    "--model_args": _LM_EVAL,
    "--use_cache": _LM_EVAL,
    "--predict_only": _LM_EVAL,
    "--apply_chat_template": "prompts are plain text here, as in training",
}
"""What to use instead of flags of lm-eval's command."""

_NUMBER_KEYS = {
    "iteration", "eval_batch_size", "eval_limit", "num_fewshot", "perplexity_stride", "num_gpus", "master_port",
    "max_restarts",
}  # fmt: skip
_MOST_GPUS = 100_000
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,19}")
_DEEPY_HELP = (
    "Starts train.py, eval.py or generate.py on every device with DeepSpeed. `python deepy.py doctor conf_file ...` "
    "checks the nodes before."
)
_SCRIPT_HELP = "train.py, eval.py or generate.py"


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one UserError line, and whose --help goes on with all config keys."""

    def error(self, message: str) -> NoReturn:
        known = [name for action in self._actions for name in action.option_strings]
        for word in message.rpartition(":")[2].split():
            name = word.partition("=")[0]
            if name in OTHER_WORDS:
                message += f"; {name}: {OTHER_WORDS[name]}"
                continue
            if name.startswith("--") and name[2:] in {key.name for key in all_keys()}:
                message += f"; {name[2:]} is a key: --set {name[2:]}=VALUE"
                continue
            if name.startswith("-") and name not in known and (meant := suggestion(name, known)):
                message += f"; {meant}"
                break
        raise UserError(f"{self.prog}: {message} (see `python {self.prog} --help`)")

    def format_help(self) -> str:
        return f"{super().format_help()}\n{describe_keys()}\n"


def build_parser(prog: str, with_script: bool = False) -> argparse.ArgumentParser:
    """The parser of a command; `with_script` adds deepy.py's first argument."""
    files = "script conf_file [conf_file ...]" if with_script else "conf_file [conf_file ...]"
    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        usage=f"python {prog} {files} [flags]",
        description=_DEEPY_HELP if with_script else None,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
    )
    if with_script:
        parser.add_argument("script", nargs="?", help=_SCRIPT_HELP)
        _add_plan_flags(parser.add_argument_group("plan"))
    parser.add_argument("conf_file", nargs="*", help="YAML files, merged in this order; .yml may be left off")
    parser.add_argument("-d", "--conf_dir", metavar="DIR", help="folder the YAML files are looked up in first")
    set_help = "override a key, for example --set train_iters=100 --set optimizer.params.lr=1e-3"
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=set_help)
    parser.add_argument("--explain", action="store_true", help="print every value and its source, then stop")
    _add_run_flags(parser.add_argument_group("run"))
    _add_evaluation_flags(parser.add_argument_group("evaluation and generation"))
    return parser


def _add_plan_flags(group: Any) -> None:
    group.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="print the command and a plan, start nothing"
    )
    group.add_argument("--gpus", type=_positive, metavar="N", help="GPUs to plan for; default: those of the launch")
    group.add_argument("--machine", metavar="NAME", help="known machine, or a YAML file that describes one")


def _positive(text: str) -> int:
    if not _WHOLE_NUMBER.fullmatch(text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got '{shortened(text)}'")
    if int(text) > _MOST_GPUS:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_GPUS:,} GPUs, got {text}")
    return int(text)


def without_plan_flags(argv: Sequence[str]) -> list[str]:
    """The words of a command line less --dry-run, --gpus N and --machine NAME, which are not for the workers."""
    words, kept = iter(argv), []
    for word in words:
        name, equals, _ = _underscores(word).partition("=")
        if name in ("--gpus", "--machine"):
            if not equals:
                next(words, None)
        elif name != "--dry_run":
            kept.append(word)
    return kept


def _add_run_flags(group: Any) -> None:
    group.add_argument("--load", metavar="DIR", help="folder of checkpoints to load")
    group.add_argument("--save", metavar="DIR", help="folder to save checkpoints to")
    group.add_argument("--iteration", metavar="N", help="iteration to load instead of the latest")
    group.add_argument("-H", "--hostfile", metavar="FILE", help="nodes to run on, `name slots=8` a line")
    group.add_argument("--num_gpus", metavar="N", help="processes per node")
    group.add_argument("--master_port", metavar="PORT", help="port of the first node")
    group.add_argument("--max_restarts", metavar="N", help="restarts of train.py after failures; for deepy.py")
    group.add_argument("--wandb_group", metavar="NAME", help="Weights & Biases group")
    group.add_argument("--wandb_team", metavar="NAME", help="Weights & Biases team")


def _add_evaluation_flags(group: Any) -> None:
    group.add_argument("--eval_tasks", nargs="+", metavar="TASK", help="lm-eval tasks, for example lambada_openai piqa")
    group.add_argument("--eval_results_prefix", metavar="TEXT", help="prefix of the results file")
    group.add_argument("--eval_batch_size", metavar="N", help="requests evaluated together, or auto")
    group.add_argument("--limit", metavar="N", help="documents per task, images per set")
    group.add_argument("--num_fewshot", metavar="N", help="examples in the prompt")
    group.add_argument("--include_path", metavar="DIR", help="folder with further task YAMLs")
    group.add_argument("--perplexity", metavar="DATA", help="measure the perplexity of a .bin/.idx prefix or text file")
    group.add_argument("--perplexity_stride", metavar="N", help="tokens the window moves on; default seq_length / 2")
    group.add_argument("--eval_data_paths", nargs="+", metavar="PREFIX", help="image sets, instead of the run's")
    group.add_argument("--eval_split", metavar="NAME", help="which image sets of the run: train, valid or test")
    group.add_argument("--per_class", action="store_true", default=None, help="accuracy of each class of images")
    group.add_argument("--confusion", action="store_true", default=None, help="draw what images are taken for")
    group.add_argument("--text_gen_type", metavar="KIND", help="unconditional, input-file or interactive")
    group.add_argument("-i", "--sample_input_file", metavar="FILE", help="prompts, each up to prompt_end")
    group.add_argument("-o", "--sample_output_file", metavar="FILE", help="where texts are written")


def describe_keys() -> str:
    """All config keys by section, with type, default and meaning, as `--help` prints them."""
    lines = ["config keys (in YAML files as `key: value`, or with --set key=value):"]
    keys = list(all_keys())
    for section in SHOWN_SECTIONS:
        lines += ["", f"{section}: {section_title(section)}"]
        for key in keys:
            if key.section == section:
                lines.append(f"  {key.name} ({key.type}; default {key.default})")
                lines += textwrap.wrap(key.meaning, 104, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str], prog: str, with_script: bool = False) -> Namespace:
    """The parsed flags; YAML files swallowed by those that take a list are given back. UserError for a bad flag."""
    parser = build_parser(prog, with_script)
    args = parser.parse_intermixed_args([_underscores(word) for word in argv])
    if with_script and not args.dry_run and (args.gpus or args.machine):
        parser.error("--gpus and --machine are for --dry-run: a run takes the GPUs that the launch finds")
    for flag in ("eval_tasks", "eval_data_paths"):
        words = getattr(args, flag) or []
        args.conf_file += [word for word in words if word.endswith((".yml", ".yaml"))]
        setattr(args, flag, [word for word in words if not word.endswith((".yml", ".yaml"))] or None)
    if isinstance(args.eval_tasks, list):
        args.eval_tasks = [name for task in args.eval_tasks for name in task.split(",") if name]
    return args


def _underscores(word: str) -> str:
    """--eval-tasks -> --eval_tasks; values stay as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def resolve_arguments(args: Namespace, prog: str, checks: Sequence[Check] = ()) -> Resolved:
    """The config of parsed flags; a flag wins over --set, and --set over the files. `checks`: see resolve_config."""
    if not args.conf_file and not args.set:
        raise UserError(f"{prog}: no config file given; for example: python {prog} configs/demo.yml")
    overrides: list[str | Setting] = list(args.set)
    for flag, key in FLAG_KEYS.items():
        text = getattr(args, flag)
        if text is not None:
            is_number = key in _NUMBER_KEYS and _WHOLE_NUMBER.fullmatch(text)  # else the sections say what is wrong
            overrides.append(Setting(key, int(text) if is_number else text, f"--{flag}", key))
    return resolve_config(args.conf_file, overrides, args.conf_dir, checks)


def is_training(script: str) -> bool:
    """Whether a script trains: train.py, or one that is called much like it."""
    return script.rpartition("/")[2].startswith("train")


def checks_of(script: str, to_run: bool = True) -> tuple[Check, ...]:
    """What only a certain command needs: train.py a config that can be trained, a plan of it no data and no length."""
    for_all: tuple[Check, ...] = (lambda config: find_host_mistakes(config.launch, os.environ),)
    if script.rpartition("/")[2].startswith("eval"):
        return (*for_all, find_evaluation_mistakes)
    if not is_training(script):
        return for_all
    return (*for_all, find_training_mistakes if to_run else find_setting_mistakes)


def check_outputs(resolved: Resolved, script: str) -> None:
    """Raise UserError where generate.py would write over one of the configuration's files."""
    if script.rpartition("/")[2].startswith("generate"):
        files = {setting.source.rpartition(":")[0] for setting in resolved.settings.values()}
        refuse_inputs(resolved.config.generation.sample_output_file, "sample_output_file", sorted(files))


def parse_run(argv: Sequence[str], prog: str) -> tuple[RunConfig, Namespace]:
    """The config and the flags of train.py, eval.py or generate.py (`prog`).

    Logs a warning line for each ignored key. `--explain` and `--help` print and raise SystemExit(0). Raises
    UserError, one line a mistake, for bad flags, files, keys and values. The flags hold the `settings` that the config
    was made from, too.
    """
    args = parse_arguments(argv, prog)
    resolved = resolve_arguments(args, prog, () if args.explain else checks_of(prog))
    args.settings = resolved.settings
    if args.explain:
        print(explain(resolved))
        raise SystemExit(0)
    for line in resolved.warnings:
        get_logger().warning(line)
    check_outputs(resolved, prog)
    return resolved.config, args
