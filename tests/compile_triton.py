"""Compiles the Triton kernels for one NVIDIA architecture, without a GPU, and prints the resources that each of them takes.

    python tests/compile_triton.py 90

writes JSON: for each kernel its registers and shared memory, the bytes that it spills, and its PTX. TRITON_INTERPRET must not be set, since an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashcoreset.sketch.kinds import KINDS, STREAMS
from flashcoreset.triton_kernels import caratheodory, matching, pursuit, sketch
from flashcoreset.triton_kernels.facility_location import gains_kernel, update_kernel
from flashcoreset.triton_kernels.pairwise import Tile, pairwise_kernel
from flashcoreset.triton_kernels.scores import block_of, scores_kernel
from flashcoreset.triton_kernels.sinkhorn import (
    apply_kernel,
    half_iteration_kernel,
    marginal_kernel,
    schedule_kernel,
    tile_of,
)

# Types of the elements that arguments point to: that of the data, or another.
NUMBERS = ("a", "b", "out", "candidates", "clients", "best", "weights", "own", "ours", "others", "factor")
POINTERS = {
    **dict.fromkeys(("index", "owner", "gains"), "i64"),
    **dict.fromkeys(("our_count", "other_count", "row_count", "column_count"), "i64"),
    **dict.fromkeys(("stage_iterations_of", "iterations_of", "in_stage_of", "since_of"), "i64"),
    **dict.fromkeys(("trial_stages_of", "in_window_of", "rests_of"), "i64"),
    **dict.fromkeys(("accelerated_of", "translates_of", "state", "ends_of"), "i32"),
    **dict.fromkeys(("potential", "other_potential", "weight", "other_log_weight"), "fp64"),
    **dict.fromkeys(("off", "lost", "masses", "costs", "product"), "fp64"),
    **dict.fromkeys(
        ("eps_of", "omega_of", "base_of", "carried", "mass_of", "reg_of", "tol_of", "rho_of"), "fp64"
    ),
    **dict.fromkeys(("spread_of", "reach_of", "before_of", "least_of", "best_least_of"), "fp64"),
    **dict.fromkeys(("constant_of", "column_mass_of", "row_rho", "column_rho"), "fp64"),
    **dict.fromkeys(("rows_off", "columns_off", "rows_lost", "columns_lost"), "fp64"),
    **dict.fromkeys(("squares", "total_of", "rows_squares", "columns_squares", "carried_l2"), "fp64"),
    **dict.fromkeys(("targets", "refused"), "i64"),
}
# The tensors above that are elements of others, or rows of them: they may lie anywhere.
UNALIGNED = (
    "reg_of",
    "tol_of",
    "rho_of",
    "row_rho",
    "column_rho",
    "iterations_of",
    "in_stage_of",
    "since_of",
    "before_of",
    "least_of",
    "best_least_of",
    "in_window_of",
    "rests_of",
    "ends_of",
    "masses",
    "costs",
    "lost",
    "squares",
    "rows_lost",
    "columns_lost",
    "rows_squares",
    "columns_squares",
)
SINKHORN = (half_iteration_kernel, marginal_kernel, apply_kernel)
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
    *(
        (kernel, "fp32", form, True)
        for kernel in SINKHORN
        for form in ("euclidean", "precomputed", "transposed")
    ),
    (half_iteration_kernel, "fp32", "l1", True),
    *((kernel, "fp64", "euclidean", True) for kernel in SINKHORN),
    *((half_iteration_kernel, dtype, "euclidean", False) for dtype in ("fp32", "fp64")),
    (apply_kernel, "fp64", "euclidean", False),
    (schedule_kernel, "fp64", "any", True),
]


def _compiled(
    kernel: Any,
    constants: dict[str, Any],
    pointers: dict[str, str],
    architecture: int,
    warps: int,
    *,
    parts: tuple[str, ...] = (),
    integers: dict[str, str] | None = None,
) -> Any:
    """The kernel for arguments of these names; all others are 32-bit integers. Tensors begin at multiples of 16 bytes, but for
    the `parts` of one."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = f"*{pointers[name]}"
            if name not in parts:
                aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = (integers or {}).get(name, "i32")
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps},
    )


def compile_kernel(kernel: Any, dtype: str, metric: str, one_chain: bool, architecture: int) -> Any:
    """The kernel as a launch compiles it: pointers and the strides of panels are multiples of 16, and a stride of 1 is a
    constant. "transposed" is a precomputed matrix from its columns' side."""
    of_matrix = kernel in SINKHORN and metric in ("precomputed", "transposed")
    choose = partial(tile_of, metric="precomputed") if of_matrix else Tile.of
    tile = choose(torch.float32 if dtype == "fp32" else torch.float64, 256 if one_chain else 257)
    constants = {"METRIC": metric, "ROWS": tile.rows, "COLS": tile.cols, "ONE_CHAIN": one_chain}
    if of_matrix:
        constants |= {
            "METRIC": "precomputed",
            ("our_stride" if metric == "transposed" else "other_stride"): 1,
        }
    constants |= {
        "BALANCED": False,
        "SYMMETRIC": False,
        "AFTER": True,
        "L2": True,
        "FEATURES": 16,
    }  # where they take most
    constants["COSTS"] = metric != "transposed"  # <P, C> is summed from the rows' side alone
    used = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in used:
            signature[name] = "constexpr"
        elif name in POINTERS or name in NUMBERS:
            signature[name] = f"*{POINTERS.get(name, dtype)}"
        else:
            signature[name] = "i32"
        panel_stride = (
            name.endswith("_stride") and name != "out_stride" and constants["METRIC"] != "precomputed"
        )
        if (signature[name].startswith("*") and name not in UNALIGNED) or panel_stride:
            aligned[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, constexprs=used, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": tile.warps},
    )


# (type of the logits, type of the scores, classes)
OF_SCORES = [("fp32", "fp32", 10), ("fp32", "fp32", 1000), ("bf16", "fp32", 128_000), ("fp64", "fp64", 1000)]


def compile_scores(logits: str, results: str, classes: int, architecture: int) -> Any:
    """The kernel of the sample scores as a launch compiles it for logits [N, T, C] in one piece."""
    block, warps = block_of(classes)
    constants = {"class_stride": 1, "MASKED": True, "BLOCK": block}
    pointers = POINTERS | {"logits": logits, "results": results}
    return _compiled(scores_kernel, constants, pointers, architecture, warps)


# (kernel, type of x or of the matrix, kind, precision)
SKETCHES = [
    *(
        (sketch.sketch_kernel, dtype, kind, "ieee")
        for kind in KINDS
        for dtype in ("fp32", "fp64", "fp16", "bf16")
    ),
    *((sketch.sketch_kernel, "fp32", kind, "tf32") for kind in KINDS),
    *((sketch.matrix_kernel, dtype, kind, "ieee") for kind in KINDS for dtype in ("fp32", "fp64")),
    (sketch.add_kernel, "fp32", "any", "ieee"),
]
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


def compile_sketch(kernel: Any, dtype: str, kind: str, precision: str, architecture: int) -> Any:
    """The kernel as a launch compiles it, for rows of x that are contiguous."""
    products = torch.float32 if kind.startswith("gaussian") and dtype != "fp64" else TYPES[dtype]
    if kernel is sketch.matrix_kernel:
        products = torch.float64
    tile = sketch.Tile.of(products, precision == "tf32")
    constants = {
        "KIND": kind,
        "NUMBER": STREAMS.get(kind, 0),
        "SIZE": 4096 if kind == "srht" else 0,  # where it takes most
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "STEP": tile.step,
        "DTYPE": sketch.TYPES[products],
        "SUMS": sketch.TYPES[torch.float64 if dtype == "fp64" else torch.float32],
        "PRECISION": precision,
        "COUNT": 1024,
        "x_step": 1,
    }
    pointers = {
        "x": dtype,
        "out": dtype,
        "sums": "fp64",
        "scale": "fp64" if kernel is sketch.add_kernel else dtype,
    }
    return _compiled(kernel, constants, pointers, architecture, tile.warps, integers={"base": "i64"})


# (kernel, type of gradients, form)
FORMS_OF_GRADIENTS = ("rows", "one direction", "directions")
MATCHING = [
    (matching.sieve_kernel, "bf16", "rows"),
    *((matching.sieve_kernel, "fp32", form) for form in FORMS_OF_GRADIENTS),
    *((matching.weigh_kernel, dtype, form) for dtype in ("fp32", "fp64") for form in FORMS_OF_GRADIENTS),
    *(
        (kernel, "fp64", form)
        for kernel in (matching.restrict_kernel, matching.history_kernel)
        for form in FORMS_OF_GRADIENTS
    ),
    (matching.restrict_kernel, "fp32", "rows"),
    (matching.history_kernel, "fp32", "rows"),
    (matching.directions_kernel, "fp32", "directions"),
]


def compile_matching(kernel: Any, dtype: str, form: str, architecture: int) -> Any:
    """The kernel as a launch compiles it."""
    history = "fp64" if dtype == "fp64" else "fp32"
    constants = {"FORM": form, "HISTORY": True, "SIEVED": history == "fp32", "BLOCK": matching.BLOCK}
    if kernel is matching.weigh_kernel:
        constants["BLOCK"] = matching.CANDIDATES
    constants |= {"ROWS": matching.ROWS[form], "g_step": 1}
    pointers = {
        "g": dtype,
        "out": dtype,
        **dict.fromkeys(("m", "v", "new_m", "new_v"), history),
        **dict.fromkeys(("numbers", "betas", "bar", "values", "u_of"), "fp64"),
        **dict.fromkeys(("member", "offset", "candidates", "found", "refused", "dims_of", "chosen"), "i64"),
        "overflows": "i32",
    }
    return _compiled(kernel, constants, pointers, architecture, matching.WARPS)


# (kernel, type of x, columns, whether there are rows and weights)
CARATHEODORY = [
    *((caratheodory.sum_pieces_kernel, dtype, 40, given) for dtype in TYPES for given in (False, True)),
    (caratheodory.sum_pieces_kernel, "fp32", 3, True),
    (caratheodory.gather_kernel, "fp64", 40, True),
]


def compile_caratheodory(kernel: Any, dtype: str, columns: int, given: bool, architecture: int) -> Any:
    """The kernel as a launch compiles it, for rows of x that are contiguous."""
    tile_rows, tile_columns = caratheodory.tile_of(columns)
    constants = {
        "HAS_ROWS": given,
        "HAS_WEIGHTS": given,
        "ROWS": tile_rows,
        "COLS": tile_columns,
        "PIECE": caratheodory.PIECE,
        "BLOCK": caratheodory.BLOCK,
        "x_step": 1,
    }
    pointers = {
        "x": dtype,
        **dict.fromkeys(("rows_of", "kept", "new_rows"), "i64"),
        **dict.fromkeys(("weights", "numbers", "out", "factors", "new_weights"), "fp64"),
    }
    return _compiled(kernel, constants, pointers, architecture, caratheodory.WARPS)


# (kernel, type of g, the operand that is multiplied with it, or which of the kernel's forms)
PURSUIT = [
    *(
        (pursuit.products_kernel, dtype, form)
        for dtype in ("fp32", "fp64")
        for form in ("rows", "split", "vector", "listed", "squares")
    ),
    (pursuit.add_pieces_kernel, "fp64", "sums"),
    *((pursuit.pick_kernel, "fp64", form) for form in ("signed", "magnitude")),
    (pursuit.best_kernel, "fp64", "all"),
    *((pursuit.residual_kernel, dtype, "rows") for dtype in ("fp32", "fp64")),
]


def compile_pursuit(kernel: Any, dtype: str, form: str, architecture: int) -> Any:
    """The kernel as a launch compiles it."""
    sizes = ("ROWS", "STEP", "PIECE", "LINES", "TERMS", "COLUMNS", "CHUNK")
    constants = {name: getattr(pursuit, name) for name in sizes}
    constants |= {
        "LISTED": form == "listed",
        "SQUARES": form == "squares",
        "SPLIT": form == "split",
        "COUNT": pursuit.VECTORS if form in ("rows", "split") else 1,
        "MAGNITUDE": form == "magnitude",
    }
    numbers = ("out", "sums", "correlation", "gram", "numbers", "norm", "scores", "best", "found")
    pointers = {
        "g": dtype,
        "vectors": "fp64" if form == "vector" else dtype,
        **dict.fromkeys((*numbers, "target", "weights"), "fp64"),
        **dict.fromkeys(("rows", "which", "places", "slots", "best_row"), "i64"),
    }
    if kernel is pursuit.pick_kernel:
        del pointers["rows"]  # is their number there
    return _compiled(kernel, constants, pointers, architecture, pursuit.WARPS, parts=("which", "places"))


def resources(cubin: bytes) -> dict[str, int]:
    """The resources that a kernel takes, as reported by the dumper that comes with triton. Registers spill to the stack alone,
    which these kernels use for nothing else."""
    dumper = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [dumper, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return {"registers": int(found["REG"]), "spilled": int(found["STACK"]) + int(found["LOCAL"])}


def reduced_layouts(compiled: Any) -> list[str]:
    """The layouts of the tensors that the kernel reduces."""
    code = compiled.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    reduced = re.findall(r'"tt\.reduce"\((?:.*\n)+?.*\}\) : \(tensor<\S+, (#\w+)>\)', code)
    return sorted({layouts[name] for name in reduced})


def described(name: str, compiled: Any) -> dict[str, Any]:
    taken = resources(compiled.asm["cubin"])
    return {"name": name, **taken, "shared": compiled.metadata.shared, "ptx": compiled.asm["ptx"]}


def main() -> None:
    report, architecture = [], int(sys.argv[1])
    for kernel, dtype, metric, one_chain in VARIANTS:
        name = f"{kernel.fn.__name__} {metric} {dtype}" + ("" if one_chain else " d > 256")
        report.append(described(name, compile_kernel(kernel, dtype, metric, one_chain, architecture)))
    for kernel, dtype, kind, precision in SKETCHES:
        name = f"{kernel.fn.__name__} {kind} {dtype} {precision}"
        report.append(described(name, compile_sketch(kernel, dtype, kind, precision, architecture)))
    for logits, results, classes in OF_SCORES:
        name = f"{scores_kernel.fn.__name__} {logits} C = {classes}"
        report.append(described(name, compile_scores(logits, results, classes, architecture)))
    for kernel, dtype, form in MATCHING:
        name = f"{kernel.fn.__name__} {form} {dtype}"
        report.append(described(name, compile_matching(kernel, dtype, form, architecture)))
    for kernel, dtype, columns, given in CARATHEODORY:
        name = f"{kernel.fn.__name__} {dtype} d = {columns}" + (" with rows and weights" if given else "")
        report.append(described(name, compile_caratheodory(kernel, dtype, columns, given, architecture)))
    for kernel, dtype, form in PURSUIT:
        compiled = compile_pursuit(kernel, dtype, form, architecture)
        told = described(f"{kernel.fn.__name__} {form} {dtype}", compiled)
        report.append(told | {"reduced": reduced_layouts(compiled)})
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
