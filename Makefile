# make demo       a model learns from 40 labels and 1,437 unlabelled scans, on all GPUs or two CPU processes
# make test       the tests
# make test-all   the slow ones too; installs the programs that they need where it can, and names what it skips
# make lint       style and types
# make gpu        tests and measurements on a GPU, nine minutes (docs/gpu.md); make gpu-dry-run: the same on a CPU, tiny
# make gpu-wheels what a machine with a GPU but without an index lacks: make gpu takes it from there
#
# Each makes .venv first, if need be. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint .ci/constraints.txt $(INSTALL_OPTIONS)
INSTALLED := .venv/.installed
# A worker more than cores, for many tests wait, but five at most, for each takes a gigabyte. What
# takes longest comes first.
COUNT = $(shell $(BIN)/python -c 'import os; print(min(len(os.sched_getaffinity(0)) + 1, 5))')
WORKERS = --numprocesses $(COUNT) --dist loadfile --no-loadscope-reorder

# Where there are wheels, no index is asked, and what this Python has is used with them.
BEGUN := $(shell date +%s)
GPU_VENV := $(if $(wildcard .wheels/*.whl),.venv-gpu,.venv)
GPU_PYTHON ?=
GPU_PACKAGES ?=
GPU_OPTIONS ?=

# Tests start hundreds of interpreters: compiled once, whatever the environment says.
test test-all: export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all lint gpu gpu-dry-run gpu-wheels clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(BIN)/python launch/demo.py

test: $(INSTALLED)
	@$(BIN)/python -m pytest $(WORKERS) --durations=20

test-all: $(INSTALLED)
	@.ci/system-packages all
	@for extra in openvino executorch privacy; do \
	  $(PIP) --quiet --editable ".[dev,$$extra]" || \
	    echo "Not installed: the extra $$extra. The tests that need it are skipped." >&2; \
	done
	@$(BIN)/python -m pytest $(WORKERS) -m "not gpu" --durations=20 -rs

lint: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

gpu: $(GPU_VENV)/.installed
	@$(GPU_VENV)/bin/python -m tests.gpu --since $(BEGUN) $(GPU_OPTIONS)

gpu-dry-run: $(INSTALLED)
	@$(BIN)/python -m tests.gpu --dry-run $(GPU_OPTIONS)

gpu-wheels:
	@.ci/gpu-wheels $(PYTHON) $(or $(GPU_PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')) $(GPU_PACKAGES)

.venv-gpu/.installed: pyproject.toml $(wildcard .wheels/*.whl)
	@$(PYTHON) .ci/gpu_venv.py
	@touch $@

clean:
	rm -rf .venv .venv-gpu .wheels demo runs build dist .pytest_cache .ruff_cache .mypy_cache

# torch goes first: on its own it stays within the constraint, whatever the other packages would pull in,
# and DeepSpeed's build finds it.
$(INSTALLED): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "hpdist needs Python 3.10 or newer, and $(PYTHON) is not; try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
	  exit 1; }
	@echo "Installing into .venv, once; this takes a few minutes."
	@$(PYTHON) -m venv .venv
	@$(PIP) torch
	@$(PIP) --editable ".[dev]"
	@touch $@
