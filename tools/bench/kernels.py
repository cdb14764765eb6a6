"""The Triton kernels of Pattention compiled ahead of time, for GPUs that need not be here.

    python -m tools.bench.kernels [--capabilities 80 90 100] [--columns 768 1536 3072 7168 16384] [--json FILE]

Prints, for each GPU generation, row length, activation and phase, the registers of a thread, the bytes it spills, and
the bytes that the kernel moves through memory for a score in bf16, counted from its loads and stores.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.errors import UserError, run_command
from megatron.files import write_output
from megatron.text import align

_ACTIVATIONS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
_POINTERS = {"scores": "entry", "grads": "entry", "weights": "entry", "scales": "fp32", "dots": "fp32", "tau2s": "fp32"}


def compiled(kernel: Any, n: int, activation: int, capability: int, phase: int = 0, dtype: str = "bf16") -> Any:
    """(a kernel compiled for rows of n columns, its Launch)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron.ops.pattention_triton import Launch

    launch = Launch.of(n)
    types = {name: f"*{dtype if kind == 'entry' else kind}" for name, kind in _POINTERS.items()}
    types |= {"n": "i32", "stride": "i32", "layers": "i32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    constants = {"ACTIVATION": activation, "PHASE": phase, "EXACT": dtype == "fp32", **launch.sizes}
    rows = ("n", "stride")
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in rows]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned if n % 16 == 0 or i < len(_POINTERS)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.num_warps}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), launch


def registers(ptx: str, capability: int) -> tuple[int, int]:
    """(registers of a thread, bytes spilled) as the assembler that comes with Triton reports them."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", str(file)]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True)
    used, spilled = re.search(r"Used (\d+) registers", done.stderr), re.findall(r"(\d+) bytes spill", done.stderr)
    if used is None or len(spilled) != 2:
        raise UserError(f"ptxas: does not report registers and spills: {done.stderr[:200]}")
    return int(used[1]), sum(map(int, spilled))


def bytes_a_score(ptx: str, launch: Any, n: int) -> float:
    """Global loads and stores of 16-bit entries, in bytes for each column of a row; a second read counts too."""
    entries = re.findall(r"(?:ld|st)\.global\.v(\d)\.b32", ptx)  # single ones are statistics
    passes = 1 if launch.resident else n / launch.sizes["SIZE"]
    return 4 * sum(map(int, entries)) * 32 * launch.num_warps * passes / n


def measured(capabilities: list[int], columns: list[int]) -> Iterator[dict[str, Any]]:
    """One record a kernel, compiled side by side."""
    from megatron.ops import pattention_triton as kernels

    def record(case: tuple[int, int, int, str]) -> dict[str, Any]:
        capability, n, activation, way = case
        kernel = getattr(kernels, f"{way}_{'resident' if n <= kernels.RESIDENT_COLUMNS else 'chunked'}")
        found, launch = compiled(kernel, n, activation, capability)
        used, spilled = registers(found.asm["ptx"], capability)
        facts = {"kernel": kernel.fn.__name__, "activation": _ACTIVATIONS[activation], "columns": n}
        facts |= {"capability": capability, "warps": launch.num_warps, "registers": used, "spill_bytes": spilled}
        return facts | {"bytes_a_score": round(bytes_a_score(found.asm["ptx"], launch, n), 2)}

    cases = [(c, n, a, way) for c in capabilities for n in columns for a in range(3) for way in ("forward", "backward")]
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(record, cases)


def main() -> int:
    """Compile, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--columns", type=int, nargs="+", default=[768, 1536, 3072, 7168, 16384])
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file, - for the screen")
    options = parser.parse_args()
    try:
        import triton
    except ImportError:
        raise UserError("tools.bench.kernels: triton is not installed; pip install triton") from None
    records = list(measured(options.capabilities, options.columns))
    rows = [tuple(records[0])] + [tuple(map(str, record.values())) for record in records]
    print("\n".join(align(rows, [0, 1])))
    document = json.dumps({"triton": triton.__version__, "kernels": records}, indent=1)
    if options.json == "-":
        print(document)
    elif options.json:
        write_output(options.json, document + "\n", "--json")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
