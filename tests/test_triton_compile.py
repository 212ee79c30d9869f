"""The Triton kernels compile ahead of time for the GPUs that they are meant for, spill no accumulator and round exactly."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if platform.machine() != "x86_64":
    pytest.skip("triton is published for x86-64 alone", allow_module_level=True)

# One of them takes a processor one to two minutes; `make test-large` compiles for the others.
ARCHITECTURES = pytest.mark.parametrize(
    "architecture", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)

# Bytes per thread. ptxas keeps two scalars of the loop over tiles on the stack if that lets another warp in (the l1 gains on
# sm_100: 96 registers); they are read once per tile. A spilled accumulator would come with more bytes.
SPILLED = 8

# The instruction of float32's exponential (2 units in the last place), and the ones inside logarithms and exponentials of
# float64: the start of a division's Newton iteration, and a comparison of magnitudes.
OF_EXPONENTIALS = r"\b(ex2\.approx\.f32|rcp\.approx\.ftz\.f64|abs\.ftz\.f32)\b"
WITH_EXPONENTIALS = ("half_iteration", "marginal", "apply", "schedule", "scores")
# The instructions of normal numbers, which have logarithms of float64; and those of sketches' products that are not of
# float32.
WITH_LOGARITHMS = r"(sketch|matrix)_kernel gaussian-boxmuller|\w+_kernel (one direction|directions) "
OF_LOGARITHMS = r"\brcp\.approx\.ftz\.f64\b"
WITH_MATRIX_UNITS = r"sketch_kernel [\w-]+ (fp16|bf16|fp64|fp32 tf32)\b"


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """The resources that each kernel takes on an architecture; compiled in a process of its own, where Triton does not interpret."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))

    @functools.cache
    def report(architecture: int) -> list[dict[str, Any]]:
        command = [sys.executable, str(script), str(architecture)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return report


@pytest.fixture
def report(architecture: int, reported: Callable[[int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return reported(architecture)


@ARCHITECTURES
def test_no_accumulator_is_spilled(
    architecture: int, report: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print(f"\nsm_{architecture:<42} registers  spilled  shared")
        for kernel in report:
            print(
                f"{kernel['name']:<45} {kernel['registers']:>9}  {kernel['spilled']:>7}  {kernel['shared']:>6}"
            )
    assert [kernel["name"] for kernel in report if kernel["spilled"] > SPILLED] == []


@ARCHITECTURES
def test_arithmetic_is_exactly_rounded(report: list[dict[str, Any]]) -> None:
    """No matrix units, TF32, approximations (but of exponentials) or flushed subnormals; and the inner loop works from registers: its loads
    are not exchanged through shared memory."""
    for kernel in report:
        ptx = kernel["ptx"]
        if kernel["name"].startswith(WITH_EXPONENTIALS):
            ptx = re.sub(OF_EXPONENTIALS, "", ptx)
        if re.match(WITH_LOGARITHMS, kernel["name"]):
            ptx = re.sub(OF_LOGARITHMS, "", ptx)
        if re.match(WITH_MATRIX_UNITS, kernel["name"]):
            continue
        assert re.findall(r"mma|tf32|\.approx|\.ftz", ptx) == [], kernel["name"]
        # A block of scores ends in reductions over the warps.
        if (
            re.search(
                "precomputed|transposed|scores|sketch|matrix|add|direction|restrict|sieve|gather",
                kernel["name"],
            )
            is None
        ):
            loop = innermost_loop(kernel["ptx"])
            assert "ld.global" in loop, kernel["name"]
            assert "bar.sync" not in loop, kernel["name"]


@ARCHITECTURES
def test_sketches_use_matrix_units_where_they_may(report: list[dict[str, Any]]) -> None:
    """Matrix units are those of the half types or, if allowed, TF32's; normal numbers are not exact in half types."""
    sketches = [kernel for kernel in report if kernel["name"].startswith("sketch_kernel")]
    assert len(sketches) == 25
    for kernel in sketches:
        _, kind, dtype, precision = kernel["name"].split()
        if dtype in ("fp16", "bf16") and not kind.startswith("gaussian"):
            # By the operand's type: of Blackwell's units it is f16 for both.
            assert re.search(r"mma\S*f16", kernel["ptx"]), kernel["name"]
        elif precision == "tf32":
            assert re.search(r"mma\S*tf32", kernel["ptx"]), kernel["name"]
        else:
            assert "tf32" not in kernel["ptx"], kernel["name"]
            assert re.search(r"mma\S*f16", kernel["ptx"]) is None, kernel["name"]


@ARCHITECTURES
def test_products_have_one_order_of_sums(report: list[dict[str, Any]]) -> None:
    """With one vector or several, of all rows or some, in pieces or not."""
    products = [kernel for kernel in report if kernel["name"].startswith("products_kernel")]
    assert len(products) == 10
    layouts = [kernel["reduced"] for kernel in products]
    assert len(layouts[0]) == 1
    assert layouts == layouts[:1] * len(layouts)


def innermost_loop(ptx: str) -> str:
    """The shortest stretch of `ptx` that ends by branching back to its label; empty if nothing does."""
    loops = []
    for label in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE):
        back = re.search(rf"bra(\.uni)?\s+{re.escape(label[1])};", ptx[label.end() :])
        if back is not None:
            loops.append(ptx[label.end() :][: back.end()])
    return min(loops, key=len, default="")
