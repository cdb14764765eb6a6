"""Packages carried along to a machine without a network.

`python -m tools.gpu.wheels FOLDER` on a connected machine fills FOLDER with wheels for Linux on x86-64: DeepSpeed and
all that a machine with torch may lack, at the versions of requirements/requirements.txt (about 15 MB without numpy).
`bring` installs from there what is missing, into a folder of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# {distribution: module}: what this project and DeepSpeed import, and what these need.
PACKAGES = {
    "deepspeed": "deepspeed", "tokenizers": "tokenizers", "safetensors": "safetensors", "pydantic": "pydantic",
    "PyYAML": "yaml", "tqdm": "tqdm", "zstandard": "zstandard", "psutil": "psutil", "numpy": "numpy",
    "einops": "einops", "hjson": "hjson", "msgpack": "msgpack", "ninja": "ninja", "packaging": "packaging",
    "py-cpuinfo": "cpuinfo", "pydantic-core": "pydantic_core", "annotated-types": "annotated_types",
    "typing-inspection": "typing_inspection", "typing-extensions": "typing_extensions",
}  # fmt: skip
_LIMIT_MIB = 60
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def missing() -> list[str]:
    """Distributions whose module cannot be found."""
    return [name for name, module in PACKAGES.items() if importlib.util.find_spec(module) is None]


def bring(folder: Path, target: Path) -> list[str]:
    """Install the missing packages that `folder` has wheels of into `target`, for this process and those it starts.

    Returns: what is missing still.
    """
    wanted = [wheel for name in missing() if (wheel := _wheel_of(folder, name)) is not None]
    if wanted:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--target", str(target), *map(str, wanted)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"--wheels {folder}: pip says: {done.stderr.strip().splitlines()[-1][:300]}")
        sys.path.insert(0, str(target))
        inherited = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{target}{os.pathsep}{inherited}" if inherited else str(target)
        importlib.invalidate_caches()
    return missing()


def _wheel_of(folder: Path, name: str) -> Path | None:
    pattern = re.sub(r"[-_.]", "[-_.]", name)
    return next((f for f in sorted(folder.glob("*.whl")) if re.match(rf"{pattern}-\d", f.name, re.IGNORECASE)), None)


def pinned_versions() -> dict[str, str]:
    """{distribution: version} of requirements.txt."""
    lines = (ROOT / "requirements/requirements.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if re.match(r"[\w-]+==", line))


def collect(folder: Path, python: str, with_numpy: bool) -> int:
    """Download the wheels; returns their size in MiB. Raises CalledProcessError where pip cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    pins, pip = pinned_versions(), [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    tags = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    tags += ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    for name in PACKAGES:
        if name == "numpy" and not with_numpy:
            continue
        wanted = f"{name}=={pins[name]}" if name in pins else name
        if name == "deepspeed":  # PyPI has its source only; the wheel is pure Python
            command = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), wanted]
            subprocess.run(command, check=True, env={**os.environ, "DS_BUILD_OPS": "0"})
        elif name == "pydantic-core":
            continue
        else:
            subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), *tags, wanted], check=True)
    core = _core_of(folder)
    subprocess.run([*pip, "download", "--quiet", "--no-deps", "--dest", str(folder), *tags, core], check=True)
    return sum(file.stat().st_size for file in folder.glob("*.whl")) // 2**20


def _core_of(folder: Path) -> str:
    """pydantic-core at the one version that the downloaded pydantic takes."""
    import zipfile

    wheel = _wheel_of(folder, "pydantic")
    assert wheel is not None, "downloaded before"
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        found = re.search(r"^Requires-Dist: (pydantic-core==[\w.]+)", archive.read(name).decode(), re.MULTILINE)
    assert found is not None, "pydantic pins its core"
    return found[1]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="tools.gpu.wheels", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", metavar="3.X", help="Python of the other machine (default 3.12)")
    parser.add_argument("--with-numpy", action="store_true", help="numpy too, where the other machine has none")
    options = parser.parse_args()
    size = collect(options.folder, options.python, options.with_numpy)
    print(f"{options.folder}: {len(list(options.folder.glob('*.whl')))} wheels, {size} MiB")
    return 0 if size <= _LIMIT_MIB else 1


if __name__ == "__main__":
    sys.exit(main())
