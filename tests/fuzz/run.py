"""Runs fuzz targets, some at a time, and tells inputs and faults of each: python tests/fuzz/run.py --seconds 60 [TARGET...]

Targets: the random callers of call.py (public, cpu, cuda), on modules with the address and undefined-behaviour sanitizers, and
the C++ targets of this folder by the names of their kernels (sinkhorn, sketch, ...), which libFuzzer runs if
build/fuzz-targets has been built by Clang, and else a seeded driver. `make fuzz` builds both. Each target writes to
build/fuzz/TARGET.log; the table goes to build/fuzz/figures.txt too. Exit status 1: there are faults.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FUZZ = Path(__file__).resolve().parent
ROOT = FUZZ.parent.parent
LOGS = ROOT / "build" / "fuzz"
KERNELS = ROOT / "build" / "fuzz-targets"
CALLERS = ("public", "cpu", "cuda")
# A sanitizer that ends a program lets it report where it was.
ABORT = {
    "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


def kernels() -> dict[str, Path]:
    """The C++ targets that are built, by name."""
    names = sorted(path.stem.removeprefix("fuzz_") for path in FUZZ.glob("fuzz_*.cpp"))
    found = {name: sorted(KERNELS.glob(f"fuzz_{name}_*")) for name in names}
    return {name: programs[-1] for name, programs in found.items() if programs}


def _output(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> str:
    """What the command prints, which also goes to the log. The command has extra time for reducing the faults that it
    finds."""
    began = log.stat().st_size if log.exists() else 0
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, cwd=LOGS, env={**os.environ, **environment}, stdout=file, stderr=file
        )
        try:
            process.wait(seconds + 1200)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with open(log, "rb") as file:
        file.seek(began)
        return file.read().decode(errors="replace")


def run_caller(name: str, seconds: float, seed: int) -> tuple[str, int, str]:
    """The numbers of inputs and faults, and a description of the faults."""
    command = [sys.executable, str(FUZZ / "call.py"), name, "--sanitizer", "address", "--limit", "120",
               "--seconds", str(seconds), "--seed", str(seed)]  # fmt: skip
    text = _output(command, {}, LOGS / f"{name}.out", seconds)
    found = re.search(
        r"^\w+: (\d+) programs, (\d+) calls, (\d+) faults of (\d+) kinds.*((?:\n    .*)*)", text, re.MULTILINE
    )
    if found is None:
        return "0", 1, f"it ended without figures: {LOGS / f'{name}.out'}"
    return f"{int(found[2]):,} calls", int(found[4]), found[5].strip()


def run_kernel(name: str, program: Path, seconds: float, seed: int) -> tuple[str, int, str]:
    """libFuzzer ends at a fault: it goes on with what is left of the time, from the inputs it has kept, until it meets faults that it has
    met already again and again."""
    folder = LOGS / name
    folder.mkdir(exist_ok=True)
    log, until, inputs, faults = LOGS / f"{name}.log", time.monotonic() + seconds, 0, {}
    with_libfuzzer = b"LLVMFuzzerRunDriver" in program.read_bytes()
    first, again = seed << 32, 0
    while (left := int(until - time.monotonic())) > 0 and again < 20:
        if with_libfuzzer:
            command = [str(program), f"-max_total_time={left}", "-print_final_stats=1", "-timeout=60", "-rss_limit_mb=4096",
                       f"-artifact_prefix={folder}/", "-verbosity=0", f"-seed={seed + 1 + len(faults) + again}", str(folder)]  # fmt: skip
            text = _output(command, ABORT, log, left)
            counted = re.search(r"number_of_executed_units: (\d+)", text)
            inputs += int(counted[1]) if counted else 0
            failed = re.search(r"Test unit written to (\S+)", text)
        else:
            text = _output(
                [str(program)], ABORT | {"FC_FUZZ_SECONDS": str(left), "FC_FUZZ_FIRST": str(first)}, log, left
            )
            counted, failed = (
                re.search(r"(\d+) passed", text),
                re.search(r"input (\d+) ends the program", text),
            )
            inputs += int(counted[1]) if counted else int(failed[1]) - first + 1 if failed else 0
            first = int(failed[1]) + 1 if failed else first + inputs
        if failed is None:
            break
        error = re.search(r"(?:\S+:\d+:\d+: runtime error|ERROR: \w+|SUMMARY): .*", text)
        fault = error[0] if error else "abort"
        if fault.replace(str(ROOT) + "/", "") in faults:
            again += 1
        else:
            faults[fault.replace(str(ROOT) + "/", "")] = failed[1]
    return f"{inputs:,} inputs", len(faults), "\n".join(f"{what}: {where}" for what, where in faults.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("targets", nargs="*")
    options = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    programs = kernels()
    names = options.targets or [*CALLERS, *programs]
    unknown = sorted(set(names) - {*CALLERS, *programs})
    if unknown:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join((*CALLERS, *programs))}")

    def one(name: str) -> tuple[str, tuple[str, int, str]]:
        if name in CALLERS:
            return name, run_caller(name, options.seconds, options.seed)
        return name, run_kernel(name, programs[name], options.seconds, options.seed)

    total = 0
    with ThreadPoolExecutor(options.jobs) as pool, open(LOGS / "figures.txt", "a") as figures:
        figures.write(
            f"{time.strftime('%Y-%m-%d %H:%M')}, {options.seconds:.0f} s a target, seed {options.seed}\n"
        )
        for name, (inputs, faults, what) in pool.map(one, names):
            total += faults
            line = f"{name:18} {inputs:>20} {faults:>4} faults" + "".join(
                f"\n    {text}" for text in what.splitlines()
            )
            print(line, flush=True)
            figures.write(line + "\n")
            figures.flush()
    return min(total, 1)


if __name__ == "__main__":
    sys.exit(main())
