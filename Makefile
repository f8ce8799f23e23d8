# Needs Python >= 3.11 and make; everything else goes into .venv. `make` alone lists the targets.

VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
FLOORS := kernels models trainer launch

# The first interpreter that is new enough; a version manager's shim may be there and not run.
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

.PHONY: help install dev quickstart test gpu-check lint format types docs clean

help:
	@echo "make quickstart   install, then train a real model on this machine in minutes"
	@echo "make install      weft and what it needs, in $(VENV)"
	@echo "make dev          the same, with what the tests need"
	@echo "make test         all tests"
	@echo "make gpu-check    the kernels on this GPU: tests, accuracy, speed against peers; needs only torch and pytest"
	@echo "make lint         ruff: rules and format;  make format mends what it can"
	@echo "make types        mypy over the whole tree"
	@echo "make docs         rewrite the generated tables in docs/"
	@echo "make clean        remove build products and caches; keeps $(VENV) and runs/"

install: $(VENV)/.installed

dev: $(VENV)/.installed-dev

quickstart: install
	$(BIN)/weft quickstart

# Tests that share a cluster, a run or a compiler share a worker: tests/conftest.py.
test: dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist load

# From a bare checkout, with the machine's own torch: results in GPU_OUT as kernels.json and kernels.md. Tests that
# compile for a GPU without one are left to `make test`.
GPU_PYTHON ?= python3
GPU_OUT ?= build/gpu-check
gpu-check: links
	@$(GPU_PYTHON) -c 'import torch; torch.empty(1, device="cuda")' 2>/dev/null || { echo "make gpu-check: $(GPU_PYTHON) sees no CUDA device through torch; set GPU_PYTHON, or let make test run the kernels in the interpreter"; exit 2; }
	@mkdir -p $(GPU_OUT)
	@failed=0; export PYTHONPATH=$(abspath build/types); \
	timeout 240 $(GPU_PYTHON) -m pytest tests/kernels -k "not sm90" -q -p no:cacheprovider --maxfail 30 || failed=$$?; \
	timeout 220 $(GPU_PYTHON) -m weft bench kernels --device cuda --json $(GPU_OUT)/kernels.json --markdown $(GPU_OUT)/kernels.md || failed=$$?; \
	exit $$failed

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A folder called weft made of links: what relative imports resolve in where nothing is installed.
links:
	@mkdir -p build/types/weft
	@for floor in $(FLOORS); do ln -sfn ../../../$$floor build/types/weft/$$floor; done
	@for file in __init__ __main__; do ln -sfn ../../../launch/weft/$$file.py build/types/weft/$$file.py; done

types: dev links
	cd build/types && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml weft

docs: install
	$(BIN)/python -m weft.trainer.configuration.reference docs/configuration.md

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(FLOORS) tests -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 here (python3 is $$(python3 --version 2>&1)); install one, or: make PYTHON=/path/to/python"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make environments; on Debian: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Stamps: an install happens again only when what is installed has changed.
$(VENV)/.installed: $(VENV)/pyvenv.cfg setup.py pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/pyvenv.cfg setup.py pyproject.toml constraints.txt
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@
