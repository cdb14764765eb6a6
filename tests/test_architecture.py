"""The house keeps its floors: a file imports from its own package or from floors below, never upwards."""

from __future__ import annotations

import ast
import sys
from collections.abc import Collection, Iterator, Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Longest matching prefix counts.
FLOORS = {
    "megatron.text": 0, "megatron.errors": 0.2, "megatron.log": 0, "megatron": 0,
    "megatron.files": 0.5, "megatron.signals": 0.5, "megatron.failures": 0.5, "megatron.metrics": 1.5,
    "megatron.mpu": 1, "megatron.config": 1,
    "megatron.ops": 2, "megatron.checkpoint": 2, "megatron.tokenizer": 2,
    "megatron.model": 3, "megatron.data": 3,
    "megatron.tasks": 3.5, "megatron.exchange": 3.5, "megatron.growth": 4, "megatron.engine": 4.5,
    "megatron.training": 5, "megatron.inference": 5, "megatron.evaluation": 5, "megatron.planner": 5,
    "megatron.launch": 6, "megatron.doctor": 6.2, "eval_tasks": 6,
    "tools": 6.5,  # tools are faces of everything below, eval_tasks included
    "deepy": 7, "train": 7, "eval": 7, "generate": 7, "prepare_data": 7,
}  # fmt: skip
# What a package must not know, whatever its floor.
MUST_NOT_KNOW = {
    "megatron.config": ("torch", "deepspeed"),
    "megatron.mpu": ("megatron.config",),
    "megatron.ops": ("megatron.config",),
    "megatron.data": ("megatron.model",),
    "megatron.model": ("yaml", "wandb"),
    "megatron.checkpoint": ("torch.nn", "megatron.model", "megatron.exchange", "megatron.training"),
    "megatron.exchange": ("megatron.engine", "megatron.training"),
    "megatron.tasks": ("megatron.engine", "megatron.training"),
    "megatron.engine": ("yaml", "megatron.training", "megatron.tokenizer", "megatron.tasks.language"),
    "megatron.training": ("deepspeed", "torch.nn", "megatron.tokenizer", "megatron.tasks.language"),
    "megatron.growth": ("megatron.engine", "megatron.training"),
    "megatron.evaluation": ("megatron.training", "megatron.engine"),
    "megatron.inference": ("megatron.training", "megatron.engine"),
    "megatron.planner": ("subprocess", "multiprocessing", "torch.distributed", "megatron.mpu.processes"),
    "megatron.launch": ("megatron.model", "megatron.ops"),
    "eval_tasks": ("megatron.training", "megatron.engine"),
}
ENTRY_SCRIPTS = ("deepy.py", "train.py", "eval.py", "generate.py", "prepare_data.py")


def package(module: str) -> str | None:
    matching = [name for name in FLOORS if module == name or module.startswith(name + ".")]
    return max(matching, key=len, default=None)


def source_files() -> list[Path]:
    folders = [
        *(ROOT / "megatron").rglob("*.py"),
        *(ROOT / "eval_tasks").rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
    ]
    return [*folders, *(ROOT / name for name in ENTRY_SCRIPTS)]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path: Path, known: Collection[str]) -> Iterator[str]:
    """Modules of this project that a file imports, wherever in it, those for type checking included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # a module of the package, or something that the package has
                inner = f"{node.module}.{alias.name}"
                yield from (name for name in (inner if inner in known else node.module,) if name in known)


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {name_of(path): path for path in source_files()}
    TopologicalSorter({name: set(imported_modules(path, files)) for name, path in files.items()}).prepare()


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_never_go_upwards(path: Path) -> None:
    module = name_of(path)
    here = package(module)
    assert here is not None, f"{module} has no floor"
    for name in imports(path):
        there = package(name)
        if there is None or there == here:
            continue
        assert FLOORS[there] < FLOORS[here], f"{module} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})"


def _imported_at_once(nodes: Sequence[ast.AST], known: Collection[str]) -> Iterator[str]:
    """Modules that are imported when a file is, which bodies of functions are not."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif not isinstance(node, ast.FunctionDef) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", [])):
            yield from _imported_at_once(list(ast.iter_child_nodes(node)), known)


@pytest.mark.parametrize(
    "entry",
    ["megatron.training.loop", "megatron.inference.modes", "eval_tasks.run", "megatron.planner", "prepare_data"],
)
def test_a_base_install_has_all_that_a_command_imports_at_once(entry: str) -> None:
    base = (ROOT / "requirements" / "requirements.txt").read_text(encoding="utf-8").lower()
    files = {name_of(path): path for path in source_files()}
    seen, todo = set[str](), [entry]
    while todo:
        module = todo.pop()
        if module in files and module not in seen:
            seen.add(module)
            tree = ast.parse(files[module].read_text(encoding="utf-8"))
            todo += [module.rpartition(".")[0], *_imported_at_once([tree], files)]
        elif module and module not in seen:
            name = module.partition(".")[0]
            package_name = {"yaml": "pyyaml", "pydantic_core": "pydantic"}.get(name, name)
            assert name in sys.stdlib_module_names or f"{package_name}==" in base, f"{entry} needs {module}"


def test_deepspeed_is_imported_by_the_engine_only() -> None:
    """Elsewhere it may be missing, or not be looked at before the environment it reads is set."""
    engine = ROOT / "megatron" / "engine"
    importers = {p for p in source_files() if any(name.partition(".")[0] == "deepspeed" for name in imports(p))}
    assert importers and all(engine in path.parents for path in importers), importers


def test_one_file_calls_deepspeed_initialize() -> None:
    callers = [p.relative_to(ROOT) for p in source_files() if "deepspeed.initialize(" in p.read_text(encoding="utf-8")]
    assert callers == [Path("megatron/engine/base.py")]


def names_in_imports(path: Path) -> Iterator[str]:
    """All that a file imports, with what it takes from where: `from torch import distributed` is torch.distributed."""
    yield from imports(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("owner", "forbidden"), MUST_NOT_KNOW.items(), ids=lambda value: str(value))
def test_a_package_does_not_know_what_is_not_its_business(owner: str, forbidden: tuple[str, ...]) -> None:
    files = [path for path in source_files() if (name_of(path) + ".").startswith(owner + ".")]
    assert files, f"{owner} is not there"
    for path in files:
        found = [n for n in names_in_imports(path) if any((n + ".").startswith(name + ".") for name in forbidden)]
        assert not found, f"{name_of(path)} must not know {', '.join(found)}"


@pytest.mark.parametrize("name", ENTRY_SCRIPTS)
def test_entry_scripts_are_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= 80


def test_nothing_loads_pickles_or_uses_a_shell() -> None:
    forbidden = (
        "weights_only=False",
        "allow_pickle=True",
        "shell=True",
        "os.system",
        "yaml.unsafe_load",
        "yaml.Loader",
        "eval(",
    )
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        found = [word for word in forbidden if word in text.replace(".eval(", "")]
        assert not found, (path, found)
