# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# DALI's package is named after the CUDA version; it also runs without a GPU. For CUDA 12: make DALI=dali-cuda12 ...
DALI ?= dali

.DEFAULT_GOAL := help
.PHONY: quickstart study test test-fast test-gpu test-kernels-ir lint gpu-day bench docs clean help

$(VENV)/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS='ignore:Editable installation' \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(DALI),quickstart,export,dev]'
	touch $@

quickstart: $(VENV)/ready  ## The main job on real data: teacher, auxiliary model, descendants, a report
	$(BIN)/python launcher/quickstart.py

study: $(VENV)/ready  ## The method and its rivals on Fashion-MNIST (35 minutes on 2 CPU cores), and their report
	$(BIN)/python launcher/study.py

# Four processes keep two cores busy: the cluster tests wait more than they compute. A file's tests stay in one process,
# where they share its fixtures; tests/conftest.py puts the longest files first.
PYTEST := $(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/ready  ## All tests; those that need a GPU say so and are skipped where there is none
	$(PYTEST) --durations 15

test-fast: $(VENV)/ready  ## The tests that start no training: before each push
	$(PYTEST) tests/unit

test-gpu: $(VENV)/ready  ## The tests that need a GPU
	$(BIN)/python -m pytest tests/gpu tests/kernels

test-kernels-ir: $(VENV)/ready  ## The kernels' compiler IR, run on the CPU: real bf16, races, bounds (3 minutes)
	tests/kernels_ir/run.sh

lint: $(VENV)/ready  ## ruff (style, imports, format) and mypy (types)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-day: $(VENV)/ready  ## In nine minutes of a GPU, all that only it can show: tests, steps, operators, decoding
	$(BIN)/python benchmarks/gpu_day.py --out gpu-day

bench: $(VENV)/ready  ## Measure the input and, on a GPU, the kernels against their alternatives
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/expansion.py
	$(BIN)/python -m benchmarks.kernels --out benchmarks/results/kernels.json --chart benchmarks/results/kernels.png

$(VENV)/docs-ready: $(VENV)/ready
	PYTHONWARNINGS='ignore:Editable installation' \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/docs-ready  ## Rewrite the pages that are made from the code, build the site and check its links
	$(BIN)/python docs/make.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "the site: build/site/index.html"

clean:  ## Remove caches; runs/, data/ and the virtual environment stay
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'
