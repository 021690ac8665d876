# `make demo` and `make test` do all the set-up they need: .venv is made and filled where it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

BENCH_VENV ?= .venv-benchmarks
BENCH := $(BENCH_VENV)/bin
BENCH_INSTALLED := $(BENCH_VENV)/.installed

.PHONY: demo docs test test-fast test-field test-slow test-lowest test-newest check format gpu-check clean help
.PHONY: bench-codecs bench-convergence bench-round-trip bench-round-overhead bench-checkpoint-io bench-memory bench-step-memory
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 24

# torch first and alone: an open range would pull gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## three sites fine-tune one model: jobs, curves, generations (under 6 minutes)
	$(BIN)/nvflare-llm demo

test: $(INSTALLED)  ## all tests that CI runs, simulator jobs included (about 15 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-fast: $(INSTALLED)  ## without simulator jobs: for people who change one thing (about 5 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 -m 'not integration and not slow and not gpu'

test-field: $(INSTALLED)  ## faults in a deployed federation, and a message of 758 MB at 10 Mbit/s (about an hour)
	$(BIN)/python -m pytest -m slow tests/integration/test_faults.py tests/integration/test_slow_line.py

test-slow: $(INSTALLED)  ## the kill matrix, the full product of exactness cases, a POC federation; some twenty minutes
	$(BIN)/python -m pytest -m slow

# What pyproject.toml promises: an environment with the oldest, and one with the newest, that it admits.
test-lowest test-newest: test-%:  ## the fast tests with the lowest, or the newest, dependencies
	rm -rf .venv-$*
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check uv
	.venv-$*/bin/pip install --quiet --disable-pip-version-check $(if $(filter lowest,$*),torch==2.6.0,torch==2.13.0)
	.venv-$*/bin/uv pip install --quiet --python .venv-$*/bin/python \
		$(if $(filter lowest,$*),--resolution lowest-direct,--upgrade) 'torch<=2.13.0' --editable '.[dev]'
	.venv-$*/bin/python -m pytest -n 2 -o filterwarnings=default -m 'not integration and not slow and not gpu'

bench-memory: $(INSTALLED)  ## whether memory stays flat over 100 rounds, by number of sites
	$(BIN)/python -m benchmarks.memory_over_rounds --clients 2,4,8,16

gpu-check: $(INSTALLED)  ## what needs a GPU: exactness, codecs, one round of a Llama-3.2-1B shape
	$(BIN)/python -m benchmarks.gpu_check

# The peers get an environment of their own: transformers changes its ways where it finds them.
$(BENCH_INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BENCH)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[benchmarks]'
	@touch $@

bench-codecs: $(BENCH_INSTALLED)  ## speed and error of the codecs beside bitsandbytes, torchao and stock FLARE
	$(BENCH)/python -m benchmarks.codecs

bench-convergence: $(INSTALLED)  ## eval loss and bytes by precision, SFT and LoRA, three seeds
	$(BIN)/python -m benchmarks.convergence

# Stock's quantizer needs bitsandbytes.
bench-round-trip: $(BENCH_INSTALLED)  ## memory and time of two rounds of a 1152 MiB model beside stock FLARE
	$(BENCH)/python -m benchmarks.round_trip

bench-round-overhead: $(INSTALLED)  ## job time over training time beside stock flare.patch
	$(BIN)/python -m benchmarks.round_overhead

bench-step-memory: $(INSTALLED)  ## what sizes --memory tells, beside measured training steps
	$(BIN)/python -m benchmarks.step_memory

bench-checkpoint-io: $(INSTALLED)  ## saving and loading beside torch.save and save_pretrained
	$(BIN)/python -m benchmarks.checkpoint_io

# Docstrings are read, not imported: the site needs none of the package's dependencies.
DOCS_VENV ?= .venv-docs
# Not --quiet: mkdocs counts the warnings that it prints, and --strict finds none then.
docs:  ## the documentation as a site, in site/; fails on dead links
	test -x $(DOCS_VENV)/bin/mkdocs || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		mkdocs mkdocs-material mkdocstrings-python
	$(DOCS_VENV)/bin/mkdocs build --strict

check: $(INSTALLED)  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED)  ## rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and what the demo wrote
	rm -rf $(VENV) $(BENCH_VENV) $(DOCS_VENV) .venv-lowest .venv-newest demo site
