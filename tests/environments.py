"""Builds a wheel and runs the quick tests on it in environments of their own: ``make release-check`` and ``make compat``.

    python tests/environments.py release            # sdist, wheel, its size, auditwheel, a bare environment, PYTHONMALLOC=debug
    python tests/environments.py compat oldest newest   # the dependencies of tests/compat/oldest.txt, then of newest.txt
    python tests/environments.py quick              # the quick tests with the packages at hand

All of it lies in build/release and build/compat. The build is without CUDA.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASE, COMPAT = ROOT / "build" / "release", ROOT / "build" / "compat"
LARGEST_WHEEL = 6_000_000  # bytes, without CUDA
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_28_aarch64")
# One or two files a subject, which need the package's own dependencies and pytest alone and take about a minute together.
QUICK = (
    "test_budgets.py",
    "test_boundary.py",
    "test_ccs.py",
    "test_scores.py",
    "test_simcore.py",
    "test_sketch.py",
    "test_select.py",
    "test_native_loader.py",
)
TEST_TOOLS = ("pytest>=8", "pytest-timeout>=2.2", "hypothesis>=6.90", "scipy>=1.11")


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment}, check=True)


def build() -> Path:
    """The sdist, and the wheel made from it."""
    shutil.rmtree(RELEASE, ignore_errors=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", RELEASE,
        FLASHCORESET_CUDA="off", FLASHCORESET_BUILD_ISAS="all", PATH=path,
    )  # fmt: skip
    (wheel,) = RELEASE.glob("*.whl")
    (sdist,) = RELEASE.glob("*.tar.gz")
    print(
        f"{sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB; {wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB"
    )
    return wheel


def repaired(wheel: Path) -> Path:
    """The wheel under its manylinux name; if the compiler's own libraries are newer than 2_28, under that of the local glibc."""
    target = RELEASE / "repaired"
    for platform in (*PLATFORMS, "auto"):
        command = [sys.executable, "-m", "auditwheel", "repair", "--plat", platform, "-w", target, wheel]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode == 0:
            (found,) = target.glob("*.whl")
            print(f"auditwheel: {found.name}")
            return found
        print(f"auditwheel: {platform}: {done.stderr.strip().splitlines()[-1]}")
    raise SystemExit("auditwheel takes the wheel for no platform")


def check_size(wheel: Path) -> None:
    size = wheel.stat().st_size
    if size > LARGEST_WHEEL:
        raise SystemExit(f"{wheel.name} has {size / 1e6:.1f} MB, more than {LARGEST_WHEEL / 1e6:g} MB")


def environment(folder: Path, *packages: str | Path) -> Path:
    """A new environment with these packages; its Python."""
    venv.create(folder, clear=True, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *packages)
    return python


def quick(python: str | Path, **variables: str) -> None:
    """The quick tests, on the package that is installed for this Python."""
    run(
        python,
        "-c",
        "import flashcoreset as fc; print(fc.__file__); assert 'site-packages' in fc.__file__",
        **variables,
    )
    tests = [f"tests/{name}" for name in QUICK]
    run(
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *tests,
        FLASHCORESET_TEST_BARE="1",
        **variables,
    )


def release() -> None:
    wheel = build()
    check_size(wheel)
    if sys.platform == "linux":
        wheel = repaired(wheel)
        check_size(wheel)
    python = environment(RELEASE / "venv", "-c", ROOT / "constraints.txt", wheel, *TEST_TOOLS)
    quick(python, PYTHONMALLOC="debug")


def compat(names: list[str]) -> None:
    wheel = build()
    for name in names:
        python = environment(
            COMPAT / name, "-r", ROOT / "tests" / "compat" / f"{name}.txt", wheel, *TEST_TOOLS
        )
        quick(python)


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("what", choices=["release", "compat", "quick"])
    arguments.add_argument("names", nargs="*", help="for compat: files of tests/compat")
    options = arguments.parse_args()
    if options.what == "release":
        release()
    elif options.what == "compat":
        compat(options.names or ["oldest", "newest"])
    else:
        quick(sys.executable)


if __name__ == "__main__":
    main()
