# make test | demo | lint | clean. Both test and demo set everything up by themselves, in .venv and .cache.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
WARM := .cache/warm

# DeepSpeed compiles its CPU helpers once; kept here, a fresh clone leaves nothing behind in the home folder.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help test test-full demo lint clean install warm kernels-mutants

help:
	@echo "make test    set up .venv and run the whole test suite"
	@echo "make test-full  the whole grid of ZeRO stages, accumulation, checkpointing and offload, recorded in benchmarks/results"
	@echo "make demo    set up .venv, then distil, prune and compare on the embedded data set (15 minutes on 2 cores)"
	@echo "make chaos   kill training runs at random moments and compare (ROUNDS=100, about an hour)"
	@echo "make kernels-mutants  break the CUDA sources in one place at a time: do the tests notice?"
	@echo "make lint    ruff, pyright, import-linter and codespell"
	@echo "make clean   remove .venv, caches and the demo's results"

# setup.cfg and the constraints decide what is installed: after a change of either, pip runs again.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) .ci/preflight.py
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

install: $(STAMP)

# In one process, before several ranks would compile the same file and wait for each other's lock.
$(WARM): $(STAMP)
	@mkdir -p $(dir $@)
	$(PY) -m train.doctor --warm
	@touch $@

warm: $(WARM)

# Two at a time; tests that start several processes stay in one group and run one after the other (tests/conftest.py).
test: $(WARM)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadgroup

# All 42 cells where `make test` takes a pairwise choice.
test-full: $(WARM)
	OMP_NUM_THREADS=1 ESPALIER_ZERO_GRID=benchmarks/results/zero_grid.json \
		$(PY) -m pytest tests/distributed/test_zero_stages.py

demo: $(WARM)
	$(PY) -m train.demo

ROUNDS ?= 100
chaos: $(WARM)
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(PY) -m tests.distributed.chaos --rounds $(ROUNDS) --json benchmarks/results/chaos.json

kernels-mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m tests.mutation.kernels

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/codespell
	$(VENV)/bin/pyright

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage build dist
	rm -rf runs/demo data/demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf *.egg-info
