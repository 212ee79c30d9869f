"""Clones of this repository at a commit, with the compiled modules built in them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Checkout:
    """A clone at a commit, whose package Python finds by `environment`; the running Python's packages are used for all else.

    Args:
        folder: where it is made; does not exist yet.
        commit: what is checked out.
        jobs: processes that compile at once.
    """

    def __init__(self, folder: Path, commit: str = "HEAD", jobs: int = 1) -> None:
        self.root = folder
        self.jobs = jobs
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder / "python"),
            "FLASHCORESET_BUILD_ISAS": "native",
            "FLASHCORESET_CUDA": "off",
            "FLASHCORESET_TEST_EMULATED": str(folder / "build/emulated/emulator"),
        }
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
        subprocess.run(["git", "checkout", "--quiet", "--detach", commit], cwd=folder, check=True)
        (folder / "python/flashcoreset/triton_kernels").symlink_to("../../triton_kernels")
        cmakedir = [sys.executable, "-m", "pybind11", "--cmakedir"]
        self._pybind = f"-Dpybind11_DIR={subprocess.check_output(cmakedir, text=True).strip()}"

    def make(self, folder: str, options: list[str], target: str) -> bool:
        """Builds a target of CMake in `folder`; False if it does not compile."""
        configure = ["cmake", "-G", "Ninja", "-B", folder, *options]
        make = ["cmake", "--build", folder, "-j", str(self.jobs), "--target", target]
        return all(
            subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True).returncode == 0
            for command in (configure, make)
        )

    def make_module(self, *more: str, target: str = "all") -> bool:
        """Builds the CPU module, for this processor alone, with these options, and puts it beside the package's sources.

        With the option FLASHCORESET_TESTS, a C++ test of its kernels can be the target.
        """
        options = ["-S", ".", self._pybind, f"-DPython_EXECUTABLE={sys.executable}", *more]
        if not self.make("build/module", options, target):
            return False
        for built in (self.root / "build/module").glob("*.so"):
            (self.root / "python/flashcoreset" / built.name).write_bytes(built.read_bytes())
        return True

    def make_emulated(self) -> bool:
        """Builds the CUDA kernels for the emulator."""
        options = ["-S", "tests/cpp", "-DFLASHCORESET_EMULATED_MODULE=ON", self._pybind]
        return self.make("build/emulated", options, "_cuda_emulated")
