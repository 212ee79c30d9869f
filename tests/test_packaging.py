"""The sdist builds into a wheel without network, and the wheel holds the package and nothing else."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

import flashcoreset as fc
from flashcoreset._core import native

ROOT = Path(__file__).resolve().parent.parent


def version() -> str:
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def tools_environment(**more: str) -> dict[str, str]:
    """The environment with this installation's cmake and ninja in front."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **more}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        folder,
    ]
    # The wheel has the same form at every optimisation and for one instruction set and no GPU, which take less time to build.
    command += ["--config-settings=cmake.build-type=Debug", sdist]
    environment = tools_environment(FLASHCORESET_BUILD_ISAS="native", FLASHCORESET_CUDA="off")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.iterdir()
    return built


def test_version_stands_in_one_place() -> None:
    assert fc.__version__ == version()
    others = [ROOT / "CMakeLists.txt", *(ROOT / "python").rglob("*.py"), *(ROOT / "csrc").rglob("*.[ch]*")]
    assert [path for path in others if f'"{version()}"' in path.read_text()] == []


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    bounds = {
        name.lower(): bound
        for name, bound in re.findall(r'"([\w-]+)>=([\d.]+)', text.split("[project.scripts]")[0])
    }
    for line in (ROOT / "tests" / "compat" / "oldest.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([\w-]+)==([\d.]+?)(?:\.\*)?", line).groups()  # type: ignore[union-attr]
            assert bounds[name.lower()] == version, line
    needed = re.search(r"^dependencies = (.*)$", text, re.MULTILINE)
    assert needed is not None
    oldest = (ROOT / "tests" / "compat" / "oldest.txt").read_text()
    assert all(f"{name}==" in oldest for name in re.findall(r'"([\w-]+)>=', needed[1]))


def test_sdist(sdist: Path) -> None:
    assert sdist.name == f"flashcoreset-{version()}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "README.md", "pyproject.toml", "CMakeLists.txt", "Makefile", "constraints.txt"):
        assert name in names
    for folder in ("csrc", "python", "triton_kernels"):
        sources = {
            str(p.relative_to(ROOT)) for s in ("*.py", "*.cpp", "*.h") for p in (ROOT / folder).rglob(s)
        }
        assert sources <= names
    assert not [name for name in names if re.search(r"^(build|dist|\.venv|\.ci)/|__pycache__|\.so$", name)]


def test_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(f"flashcoreset-{version()}.dist-info/METADATA").decode())
        entry_points = archive.read(f"flashcoreset-{version()}.dist-info/entry_points.txt").decode()
    assert {name.partition("/")[0] for name in names} == {
        "flashcoreset",
        "flashcoreset_cli",
        f"flashcoreset-{version()}.dist-info",
    }
    assert not [
        name for name in names if "test" in name or "benchmark" in name or name.endswith((".cpp", ".h"))
    ]
    python = {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python").rglob("*.py")}
    python |= {f"flashcoreset/{path.relative_to(ROOT)}" for path in (ROOT / "triton_kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == python
    assert "flashcoreset/py.typed" in names
    modules = {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}
    assert modules == {"_processor", native.MODULES[native.available_isas()[0]]}
    assert f"flashcoreset-{version()}.dist-info/licenses/LICENSE" in names
    assert metadata["Version"] == version()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "flashcoreset=flashcoreset_cli:main" in entry_points.replace(" ", "")


def test_all_builds_are_installed() -> None:
    architecture = [isa for isa in native.MODULES if isa.startswith(platform.machine().replace("_", "-"))]
    installed = [isa for isa in native.MODULES if find_spec(f"flashcoreset.{native.MODULES[isa]}")]
    assert installed == (architecture or ["generic"])


@pytest.mark.parametrize("variable", ["FLASHCORESET_BUILD_ISAS", "FLASHCORESET_CUDA"])
def test_a_wrong_build_switch_names_the_values(variable: str, tmp_path: Path) -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-DFLASHCORESET_PYTHON=OFF"]
    done = subprocess.run(
        command, env=tools_environment(**{variable: "maybe"}), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert re.search(rf'{variable} must be \w+ or \w+, got\s+"maybe"', done.stderr)


def nvcc() -> str | None:
    """The CUDA compiler that a build here takes, if it is new enough."""
    folders = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
    found = os.environ.get("CUDACXX") or shutil.which("nvcc", path=folders)
    if found is None:
        return None
    told = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    return found if release is not None and (int(release[1]), int(release[2])) >= (12, 4) else None


def configure(build: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), f"-Dpybind11_DIR={pybind11}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Debug"]
    every = tools_environment(FLASHCORESET_BUILD_ISAS="native", FLASHCORESET_CUDA="auto", **environment)
    if "FLASHCORESET_CUDA_ARCHITECTURES" not in environment:
        every.pop("FLASHCORESET_CUDA_ARCHITECTURES", None)
    return subprocess.run(command, env=every, capture_output=True, text=True)


@pytest.mark.skipif(nvcc() is None, reason="there is no nvcc 12.4 or newer")
def test_the_default_architectures_reach_the_compiler(tmp_path: Path) -> None:
    """All other builds of the test suite name one architecture. With a list, the module's own sources must compile."""
    done = configure(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    target = "CMakeFiles/_cuda.dir/csrc/bindings/bindings.cpp.o"
    built = subprocess.run(
        ["ninja", "-C", str(tmp_path), target], env=tools_environment(), capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout
    assert "80-real 86-real 89-real 90" in (tmp_path / "build.ninja").read_text()


@pytest.mark.parametrize("variable", ["PATH", "CUDACXX"])
def test_a_cuda_compiler_that_does_not_work_is_left_out(variable: str, tmp_path: Path) -> None:
    """The compiler is found, and reports that it is new enough, but compiles nothing (no host compiler for it, say)."""
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo release 12.8 && exit 0\nexit 1\n')
    broken.chmod(0o755)
    environment = {"CUDACXX": str(broken)}
    if variable == "PATH":
        path = f"{broken.parent}{os.pathsep}{tools_environment()['PATH']}"
        environment = {"PATH": path, "CUDACXX": "", "CUDA_HOME": ""}
    done = configure(tmp_path / "build", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"CUDA kernels are left out: {re.escape(str(broken))} does not work", done.stdout)
    assert "_cuda.dir" not in (tmp_path / "build" / "build.ninja").read_text()


def test_the_wheel_runs_where_it_is_unpacked(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # -S leaves an editable install out, whose import hook would go before the path.
    code = (
        "import flashcoreset as fc, torch\n"
        "print(fc.__file__)\n"
        "print(fc.facility_location(torch.eye(3), 2, backend='cpu').indices.tolist())"
    )
    site = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path.endswith("site-packages"))])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": site},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / "flashcoreset" / "__init__.py"), "[0, 1]"]
