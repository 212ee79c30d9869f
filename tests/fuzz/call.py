"""Calls at random: every public function, or every function and class of a compiled module, with arguments that fit and with hostile ones.

    python tests/fuzz/call.py public|cpu|cuda [--seconds 60 | --calls 2000] [--seed 0] [--sanitizer address]
    python tests/fuzz/call.py cpu --replay 17,18        what the seeds 17 and 18 call, printed and run
    python tests/fuzz/call.py cpu --run FILE...         programs that were printed before (tests/fuzz/regressions)

What may happen is that a call returns, or that it is refused by a TypeError, a ValueError, a BackendUnavailableError or a MemoryError.
Anything else is a fault: another exception, a program that dies, one that does not end (--limit), results that are wrong or that
differ between backends. Programs run in forked processes, so that one that dies costs milliseconds; the seed stands in
build/fuzz/TARGET.now before it is run. Each kind of fault is cut down to the smallest program that still shows it and
printed; build/fuzz/TARGET.log keeps them with their seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import linecache
import mmap
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FUZZ = Path(__file__).resolve().parent
ROOT = FUZZ.parent.parent
LOGS = ROOT / "build" / "fuzz"

TARGETS = ("public", "cpu", "cuda")
STATE = struct.Struct("qqqq")  # the program's number, its step, programs and steps done so far


@dataclass(frozen=True)
class Fault:
    """A fault: `kind` and `where` say which one, whatever the arguments."""

    kind: str
    where: str
    detail: str


def _prepared(options: argparse.Namespace) -> None:
    """Starts this program anew if its environment is not what it has to be."""
    wanted = {
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONFAULTHANDLER": "1",
    }
    wanted |= {f"POT_BACKEND_DISABLE_{name}": "1" for name in ("JAX", "TENSORFLOW", "CUPY", "PYTORCH")}
    if options.sanitizer:
        sys.path.insert(0, str(FUZZ.parent))
        import sanitize

        if os.environ.get("FLASHCORESET_SANITIZER") != options.sanitizer:
            wanted = {**sanitize.environment(options.sanitizer), **wanted}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


class Target:
    """How one target's programs are made from seeds, and run."""

    def __init__(self, name: str) -> None:
        sys.path[:0] = [str(FUZZ), str(FUZZ.parent)]
        warnings.simplefilter("ignore")
        import torch
        import values
        from conftest import emulated_module

        import flashcoreset
        from flashcoreset._core import cuda, native

        torch.set_num_threads(1)
        self.name = name
        self.allowed = (
            TypeError,
            ValueError,
            MemoryError,
            flashcoreset.BackendUnavailableError,
            values.Planted,
        )
        self.space = {key: value for key, value in vars(values).items() if not key.startswith("_")}
        self.space["fc"] = flashcoreset
        emulated = emulated_module()
        if emulated is None:
            raise SystemExit("the emulated CUDA module is not built: make emulated")
        if name == "public":
            native.cuda_failure = lambda device=0: None
            native.cuda_module = lambda device=0: emulated
            cuda.DEVICE_TYPE = "cpu"
            import ot  # noqa: F401 - seconds, which each process would take again
            import public
            import sklearn.cluster  # noqa: F401

            self.generate: Callable[[int], Any] = public.generate
            self.space |= public.SPACE
        else:
            import raw

            module = self.space["m"] = emulated if name == "cuda" else native.module()
            self.generate = lambda seed: raw.generate(seed, module, name == "cuda")

    def run(
        self, source: str, valid: bool = False, on_step: Callable[[int], None] = lambda i: None
    ) -> Fault | None:
        """Runs the lines of a program. A line that is refused is left out, and so are the lines that need its result."""
        space = dict(self.space)
        for i, line in enumerate(source.splitlines()):
            on_step(i)
            try:
                exec(compile(line, "<program>", "exec"), space)
            except Exception as error:
                fault = self._judged(error, line, space)
                if fault is None and valid:
                    fault = Fault("refused", f"{_target(line)}: {type(error).__name__}", str(error))
                if fault is not None:
                    return fault
                if i == 0:
                    return None
        return None

    def _judged(self, error: Exception, line: str, space: dict[str, Any]) -> Fault | None:
        frames = traceback.extract_tb(error.__traceback__)[1:]  # without run()
        values_file = str(FUZZ / "values.py")
        if isinstance(error, NameError) and len(frames) == 1:
            return None  # the result of a line that was refused
        text = str(error)
        if isinstance(error, RuntimeError) and (
            "allocate memory" in text
            or "in use by another thread" in text
            or "was interrupted" in text
            or "meta tensor" in text  # torch's words on its tensors that hold no data
        ):
            return None
        # Exceptions that an argument raises while it is made, or because it is a liar, are the caller's own.
        known = isinstance(error, self.allowed) or frames[-1].filename == values_file
        # torch's own refusal to export a tensor is the producer's answer.
        if not known and frames[-1].filename.endswith(("torch/_tensor.py", "torch/utils/dlpack.py")):
            known = self.name != "public"
        if known:
            return None
        return Fault("exception", f"{_target(line)}: {type(error).__name__} {_place(frames)}", text[:500])


def _target(line: str) -> str:
    """The function that a line calls."""
    found = re.match(r"\w+ = (?:called\()?([\w.]+)", line)
    return found[1] if found else line[:40]


def _place(frames: list[traceback.FrameSummary]) -> str:
    """The innermost function of the package."""
    for frame in reversed(frames):
        if "flashcoreset" in frame.filename:
            return f"in {Path(frame.filename).name} {frame.name}"
    return (
        "in the compiled module"
        if len(frames) == 1
        else f"in {Path(frames[-1].filename).name} {frames[-1].name}"
    )


# ------------------------------------------------------------------------------------------------ processes


def _forked(work: Callable[[], None], errors: int) -> int:
    """Runs work() in a child of its own; its standard error goes to the file descriptor."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(errors, 2)
        faulthandler.enable(file=2, all_threads=False)
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(3)


def _died(status: int, text: str, target: str) -> Fault:
    """The output that a process that ended on its own left behind."""
    summary = re.search(r"SUMMARY: (.+)", text)
    undefined = re.search(r"(\S+:\d+):\d+: runtime error: (.+)", text)
    if undefined:
        return Fault("undefined behaviour", _short(undefined[1]), _trace(text))
    if summary:
        return Fault("sanitizer", _short(summary[1]), _trace(text))
    if os.WIFSIGNALED(status):
        return Fault("signal", f"{signal.Signals(os.WTERMSIG(status)).name} in {target}", _trace(text))
    return Fault("exit", f"{os.waitstatus_to_exitcode(status)} in {target}", _trace(text))


def _trace(text: str) -> str:
    """The lines of a report that are not pybind11's, the interpreter's or about bytes."""
    lines = text[text.rfind("ERROR: ") if "ERROR: " in text else 0 :].splitlines()
    ours = [
        line for line in lines if not re.match(r"\s+#\d+ ", line) or "/csrc/" in line or "/emulator/" in line
    ]
    return "\n".join(line for line in ours if not line.startswith("Extension modules"))[:3000]


def _short(text: str) -> str:
    return re.sub(r"\(/.*\)|/\S*/(?=\S+)", "", text).strip()


def _harmless(fault: Fault) -> bool:
    """The sanitizer ends a program whose `new` gets no memory; without it that is a MemoryError."""
    return fault.kind == "sanitizer" and (
        "allocation-size-too-big" in fault.where or "out-of-memory" in fault.where
    )


class Isolated:
    """Runs programs one by one, each in a process of its own."""

    def __init__(self, target: Target, limit: float) -> None:
        self.target, self.limit = target, limit

    def __call__(self, source: str, valid: bool = False) -> Fault | None:
        with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as answer:

            def work() -> None:
                fault = self.target.run(source, valid)
                os.write(answer.fileno(), json.dumps(asdict(fault) if fault else None).encode())

            child = _forked(work, errors.fileno())
            status = _ended(child, time.monotonic() + self.limit)
            errors.seek(0)
            text = errors.read().decode(errors="replace")
            first = _target(source.splitlines()[0]) if source else ""
            if status is None:
                return Fault("hang", first, _trace(text))
            answer.seek(0)
            said = answer.read()
            if status != 0 or not said:
                return _died(status, text, first)
            fault = json.loads(said)
            return Fault(**fault) if fault else None


def _ended(child: int, until: float) -> int | None:
    """The child's exit status; None if it had to be killed."""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > until:
            _kill(child)
            return None
        time.sleep(0.002)


def _kill(child: int) -> None:
    """Ends the child, after asking for its Python stack."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGABRT)
        for _ in range(100):
            if os.waitpid(child, os.WNOHANG)[0]:
                return
            time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ------------------------------------------------------------------------------------------------- campaign


def campaign(target: Target, options: argparse.Namespace) -> int:
    """The number of kinds of faults."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = open(LOGS / f"{target.name}.log", "a", buffering=1)  # noqa: SIM115
    now = open(LOGS / f"{target.name}.now", "w+b")  # noqa: SIM115
    now.truncate(STATE.size)
    state = mmap.mmap(now.fileno(), STATE.size)
    began = time.monotonic()
    until = began + options.seconds if options.seconds else None
    first = options.seed << 32
    counts: Counter[str] = Counter()
    kinds: dict[tuple[str, str], int] = {}
    isolated = Isolated(target, options.limit)
    STATE.pack_into(state, 0, first, 0, 0, 0)
    log.write(f"{target.name}, seeds from {first}: {' '.join(sys.argv)}\n")

    def on_step(i: int) -> None:
        at, _, done, calls = STATE.unpack_from(state)
        STATE.pack_into(state, 0, at, i, done, calls)

    def work() -> None:
        """From the state's number on; faults that leave the process alive go to the file."""
        at, _, done, calls = STATE.unpack_from(state)
        while (options.calls is None or done < options.calls) and (until is None or time.monotonic() < until):
            program = target.generate(at)
            fault = target.run(program.source(), program.valid, on_step)
            done, calls = done + 1, calls + len(program.steps)
            if fault is not None:
                os.write(found.fileno(), (json.dumps({"seed": at, **asdict(fault)}) + "\n").encode())
            at += 1
            STATE.pack_into(state, 0, at, 0, done, calls)

    def record(seed: int, fault: Fault) -> None:
        counts[fault.kind] += 1
        kinds[fault.kind, fault.where] = kinds.get((fault.kind, fault.where), 0) + 1
        if kinds[fault.kind, fault.where] > 1:
            return
        program = target.generate(seed)
        smaller = _reduced(program, fault, isolated)
        text = (
            f"--- {fault.kind}: {fault.where} (seed {seed})\n{fault.detail.strip()}\n"
            f"--- the smallest program that shows it:\n{smaller}\n"
        )
        log.write(text)
        print(text, flush=True)

    with tempfile.TemporaryFile() as found, tempfile.TemporaryFile() as errors:
        while True:
            for file in (found, errors):
                file.seek(0)
                file.truncate()
            child = _forked(work, errors.fileno())
            status = _watched(child, state, options.limit)
            found.seek(0)
            for line in found.read().decode().splitlines():
                said = json.loads(line)
                record(said.pop("seed"), Fault(**said))
            if status == 0:
                break
            at, step, done, calls = STATE.unpack_from(state)
            errors.seek(0)
            text = errors.read().decode(errors="replace")
            lines = target.generate(at).source().splitlines()
            name = _target(lines[min(step, len(lines) - 1)])
            fault = Fault("hang", name, _trace(text)) if status is None else _died(status, text, name)
            if _harmless(fault):
                counts["out of memory"] += 1
            else:
                record(at, fault)
            STATE.pack_into(state, 0, at + 1, 0, done + 1, calls + len(lines))
    _, _, done, calls = STATE.unpack_from(state)
    seconds = time.monotonic() - began
    out_of_memory = counts.pop("out of memory", 0)
    summary = (
        f"{target.name}: {done} programs, {calls} calls, {counts.total()} faults of {len(kinds)} kinds, {seconds:.0f} s"
        + (f" ({out_of_memory} ended for want of memory)" if out_of_memory else "")
    )
    for (kind, where), number in sorted(kinds.items(), key=lambda item: -item[1]):
        summary += f"\n    {number} x {kind}: {where}"
    log.write(summary + "\n")
    print(summary, flush=True)
    return len(kinds)


def _watched(child: int, state: mmap.mmap, limit: float) -> int | None:
    """The child's exit status, or None if one step took longer than the limit and the child was killed."""
    last, since = None, time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        current = bytes(state)
        if current != last:
            last, since = current, time.monotonic()
        elif time.monotonic() - since > limit:
            _kill(child)
            return None
        time.sleep(0.05)


def _reduced(program: Any, fault: Fault, isolated: Isolated) -> str:
    from programs import reduce

    until = time.monotonic() + 30

    def fails(smaller: Any) -> bool:
        if time.monotonic() > until:
            return False
        try:
            source = smaller.source()
        except Exception:
            return False
        other = isolated(source, smaller.valid)
        return other is not None and (other.kind, other.where) == (fault.kind, fault.where)

    if fault.kind == "hang":
        return program.source()
    return reduce(program, fails).source()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--calls", type=int, help="so many programs instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=20, help="seconds that one call may take")
    parser.add_argument("--sanitizer", choices=("address", "thread"))
    parser.add_argument("--replay", help="seeds of programs, with commas between")
    parser.add_argument("--run", nargs="+", type=Path, metavar="FILE")
    options = parser.parse_args()
    _prepared(options)
    target = Target(options.target)
    if not options.sanitizer:
        memory = 1 << 36
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if options.replay or options.run:
        isolated = Isolated(target, options.limit)
        programs = [(path.name, path.read_text(), False) for path in options.run or ()]
        for seed in map(int, options.replay.split(",") if options.replay else ()):
            program = target.generate(seed)
            programs.append((f"seed {seed}", program.source(), program.valid))
        faults = 0
        for name, source, valid in programs:
            fault = isolated(source, valid)
            faults += fault is not None
            print(f"{name}: {'as it should be' if fault is None else f'{fault.kind}: {fault.where}'}")
            if options.replay or fault:
                print(source, *([fault.detail.strip()] if fault else []), sep="\n")
        return min(faults, 1)
    if not options.seconds and not options.calls:
        options.seconds = 60.0
    return min(campaign(target, options), 1)


if __name__ == "__main__":
    linecache.clearcache()
    sys.exit(main())
