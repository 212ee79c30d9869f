"""Compiles the Triton kernels for one NVIDIA architecture, without a GPU, and prints what each of them takes.

    python tests/compile_triton.py 90

writes JSON: for each kernel its registers and shared memory, the bytes that it spills, and its PTX. TRITON_INTERPRET must not be set, since an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashcoreset.triton_kernels.facility_location import gains_kernel, update_kernel
from flashcoreset.triton_kernels.pairwise import Tile, pairwise_kernel

INDICES = ("index", "owner", "gains")
NUMBERS = ("a", "b", "out", "candidates", "clients", "best", "weights", "own")
FORMS = ("dot", "euclidean", "l1")  # cosine is dot of other rows, sqeuclidean is euclidean without the root

# (kernel, type, metric, whether one chain takes all features)
VARIANTS = [
    *(
        (kernel, "fp32", form, True)
        for kernel in (pairwise_kernel, gains_kernel, update_kernel)
        for form in FORMS
    ),
    *((kernel, "fp32", "precomputed", True) for kernel in (gains_kernel, update_kernel)),
    *((gains_kernel, "fp32", form, False) for form in FORMS),
    (gains_kernel, "fp64", "euclidean", True),
]


def compile_kernel(kernel: Any, dtype: str, metric: str, one_chain: bool, architecture: int) -> Any:
    """The kernel as a launch compiles it: pointers and the strides of panels are multiples of 16."""
    tile = Tile.of(torch.float32 if dtype == "fp32" else torch.float64, 256 if one_chain else 257)
    constants = {"METRIC": metric, "ROWS": tile.rows, "COLS": tile.cols, "ONE_CHAIN": one_chain}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in INDICES or name in NUMBERS:
            signature[name] = "*i64" if name in INDICES else f"*{dtype}"
        else:
            signature[name] = "i32"
        panel_stride = name.endswith("_stride") and name != "out_stride" and metric != "precomputed"
        if signature[name].startswith("*") or panel_stride:
            aligned[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": tile.warps},
    )


def resources(cubin: bytes) -> dict[str, int]:
    """What a kernel takes by the word of the dumper that comes with triton. Registers spill to the stack alone, which
    these kernels use for nothing else."""
    dumper = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [dumper, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def main() -> None:
    report = []
    for kernel, dtype, metric, one_chain in VARIANTS:
        compiled = compile_kernel(kernel, dtype, metric, one_chain, int(sys.argv[1]))
        ptx = compiled.asm["ptx"]
        name = f"{kernel.fn.__name__} {metric} {dtype}" + ("" if one_chain else " d > 256")
        report.append(
            {"name": name, **resources(compiled.asm["cubin"]), "shared": compiled.metadata.shared, "ptx": ptx}
        )
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
