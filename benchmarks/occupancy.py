"""What the compiled CUDA kernels need of a multiprocessor: registers, shared memory, spilled bytes, and the occupancy that is left.

    python -m benchmarks.occupancy [--all]

Reads the installed module with `cuobjdump`, which comes with CUDA and with Triton; no GPU is needed. Shared memory that a
launch asks for (the resident Sinkhorn kernel and sparse sketches do) is not in the module and so not counted.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# A multiprocessor of compute capability 9.0 (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
REGISTERS, SHARED, WARPS, BLOCKS = 65_536, 233_472, 64, 32
SHARED_OF_SYSTEM = 1_024  # per block
REGISTERS_PER_WARP = 256  # they are given out in multiples of this
# The kernels that take the time, by their names in csrc/cuda.
MAIN = (
    "greedy", "farthest", "tile_of_pairs", "solve_resident", "solve_streaming", "apply_plan", "write_plan", "dense_sums",
    "sparse_sums", "hadamard_sums", "sieve", "weigh", "advance", "sum_pieces", "multiply", "score_rows",
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel: its name, and what one thread or block of it takes."""

    name: str
    registers: int
    stack: int  # bytes of local memory per thread
    shared: int  # bytes per block, of those that the module names
    threads: int  # the most in a block

    def blocks(self) -> int:
        """How many blocks of it a multiprocessor holds at a time."""
        warps = -(-self.threads // 32)
        per_warp = -(-self.registers * 32 // REGISTERS_PER_WARP) * REGISTERS_PER_WARP
        return min(
            BLOCKS,
            WARPS // warps,
            REGISTERS // per_warp // warps,
            SHARED // (self.shared + SHARED_OF_SYSTEM),
        )

    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that its blocks fill."""
        return self.blocks() * -(-self.threads // 32) / WARPS


def find_cuobjdump() -> str | None:
    """CUDA's cuobjdump, or the one in Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    carried = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(carried) if carried.is_file() else None


def short_name(function: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|\(fc::\w+\)|fc::cuda::|fc::|^void ", "", function)
    return name[: name.rindex("(")] if "(" in name else name


def read_kernels(usage: str, elf: str) -> list[Kernel]:
    """The kernels of a module from what cuobjdump prints with --dump-resource-usage and with -elf."""
    threads = {
        name: int(most, 16)
        for name, most in re.findall(
            r"\.nv\.info\.(\S+)\n(?:(?!\.nv\.info\.).)*?EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+)",
            elf,
            re.DOTALL,
        )
    }
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return [
        Kernel(name, int(registers), int(stack), int(shared), threads.get(name, 1024))
        for name, registers, stack, shared in re.findall(pattern, usage)
    ]


def table(kernels: list[Kernel], names: list[str]) -> str:
    """The kernels with their demangled names, in Markdown; equal rows are given once."""
    lines = [
        "| kernel | threads | registers | local memory | shared memory | blocks | occupancy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel, name in sorted(zip(kernels, names, strict=True), key=lambda pair: pair[1]):
        lines.append(
            f"| `{name}` | {kernel.threads} | {kernel.registers} | {kernel.stack} B | {kernel.shared} B | {kernel.blocks()} "
            f"| {kernel.occupancy():.0%} |"
        )
    return "\n".join(dict.fromkeys(lines)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--all", action="store_true", help="every kernel, not those for float32 that take the time"
    )
    arguments = parser.parse_args()
    spec = importlib.util.find_spec("flashcoreset._cuda")
    cuobjdump = find_cuobjdump()
    if spec is None or spec.origin is None:
        raise SystemExit("the package has no CUDA module: install it where nvcc is found")
    if cuobjdump is None:
        raise SystemExit("there is no cuobjdump: install CUDA's, or triton, which carries one")

    def run(*command: str, stdin: str | None = None) -> str:
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=True).stdout

    kernels = read_kernels(
        run(cuobjdump, "--dump-resource-usage", spec.origin), run(cuobjdump, "-elf", spec.origin)
    )
    names = [
        short_name(name) for name in run("c++filt", stdin="\n".join(k.name for k in kernels)).splitlines()
    ]
    if not arguments.all:
        kept = [
            i
            for i, name in enumerate(names)
            if name.partition("<")[0] in MAIN
            and not re.search(r"<double|BFloat16|Half|__half|bfloat16", name)
        ]
        kernels, names = [kernels[i] for i in kept], [names[i] for i in kept]
    print(table(kernels, names))


if __name__ == "__main__":
    main()
