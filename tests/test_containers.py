"""requirements-no-torch.txt and the container recipes fit the base requirements."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTAINERS = ROOT / "tools/containers"
RECIPES = [CONTAINERS / "Dockerfile", CONTAINERS / "tokenformer.def"]


def _packages(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _base(recipe: Path) -> str:
    found = re.findall(r"nvcr\.io/nvidia/pytorch:[\w.-]+", _steps(recipe))
    assert len(found) == 1, f"{recipe.name} names {found}"
    return str(found[0])


def _steps(recipe: Path) -> str:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.lstrip().startswith("#"))


def test_no_torch_is_the_base_install_without_torch() -> None:
    base = _packages("requirements.txt")
    assert _packages("requirements-no-torch.txt") == [line for line in base if not line.startswith("torch==")]
    assert len(base) == len(_packages("requirements-no-torch.txt")) + 1


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipes_keep_the_torch_of_their_image(recipe: Path) -> None:
    steps = _steps(recipe)
    files = re.findall(r"-r (requirements/\S+\.txt)", steps)
    assert "requirements/requirements-no-torch.txt" in files and "requirements/requirements.txt" not in files
    assert all((ROOT / file).is_file() for file in files)
    assert "PIP_CONSTRAINT=/opt/tokenformer/constraints.txt" in steps and "diff - constraints.txt" in steps
    assert re.findall(r"[\w-]+==\d", steps) == [], "versions belong into requirements/"


def test_both_recipes_make_the_same_image() -> None:
    docker, apptainer = RECIPES
    assert _base(docker) == _base(apptainer)
    assert re.findall(r"-r (\S+)", _steps(docker)) == re.findall(r"-r (\S+)", _steps(apptainer))
