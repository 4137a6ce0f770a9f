# make demo | test | lint | format | clean
#
# Needs Python 3.10 or later (with venv), a C++17 compiler and make; all else goes into .venv.
#
#   make PYTHON=python3.11        another interpreter
#   make TORCH_INSTALL="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#                                 the CPU build of torch, much smaller than the default one
#   make demo DEMO="--cell lstm"  arguments of examples/char_lm.py

PYTHON ?= python3
VENV ?= .venv
TORCH_INSTALL ?= torch==2.13.0
DEMO ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format clean

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

# Builds first, so that a failure to compile fails here instead of passing on the reference path,
# which the second run takes as machines without a compiler do.
test: setup
	$(BIN)/python -m fused_rnn build
	$(BIN)/python -m pytest -q
	FUSED_RNN_BACKEND=reference $(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fused_rnn
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fused_rnn tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

# make bench BENCH="--suite headline --json out/mine.json"; see benchmarks/README.md
BENCH ?= --suite quick
BENCH_STAMP := $(VENV)/.bench

.PHONY: bench
$(BENCH_STAMP): $(SETUP_STAMP)
	$(PIP) install --quiet --no-build-isolation --editable '.[bench]'
	@touch $@

bench: $(BENCH_STAMP)
	$(BIN)/python -m benchmarks run $(BENCH)
