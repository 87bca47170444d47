# `make demo` and `make test` do all their own set-up: a .venv with pinned packages, the native build, then the work.
# `make gpu` is for a machine with a GPU and without a network: it uses that machine's own Python.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
ARGS ?=

.PHONY: help demo test test-all bench build lint format gpu clean

help:
	@echo "make demo    train, compare and time on this machine (about a minute after the set-up)"
	@echo "make test    the tests, but for those marked slow: about half an hour on two cores"
	@echo "             ARGS='-k depthwise' picks tests"
	@echo "make test-all  every test, the slow ones too (what pytest -m '' runs)"
	@echo "make bench   the micro-benchmark suite       ARGS='--quick'"
	@echo "make build   compile the native libraries"
	@echo "make lint    ruff, mypy, clang-format;  make format  applies them"
	@echo "make gpu     build, test, measure on a GPU machine, with its own Python (PYTHON=$(PYTHON))"
	@echo "make clean   remove what was built (not $(VENV))"

demo: build
	$(PY) -m segkernels demo $(ARGS)

test: build
	$(PY) -m pytest $(ARGS)

test-all: build
	$(PY) -m pytest -m '' $(ARGS)

bench: build
	$(PY) -m segkernels bench $(ARGS)

build: $(READY)  # always asked, since ninja knows what changed
	$(PY) -m segkernels build

$(READY): requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	SEGKERNELS_BUILD=none $(PY) -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $@

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf build dist *.egg-info segkernels/_*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
