# `make train` and `make test` set everything up by themselves: they need Python (3.10 or newer) and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The oldest supported Python. The commands of pyenv refuse versions that are not selected, so look for it there, too.
PYTHON_OLDEST ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python3.10) python3.10)
OLDEST := .venv-oldest
OLDEST_TESTS ?= $(addprefix tests/test_,ops.py triton.py layers.py stvit.py inference.py safe_text.py images.py \
	visualize.py superpixels.py timm.py backbone.py adapter_folder.py) $(wildcard tests/test_weights*.py tests/test_yolo*.py \
	tests/test_torchvision*.py tests/test_segmentation*.py tests/test_detection*.py)
CONFIG ?= configs/cls/stvit_pico_digits.yaml
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-long test-gpu test-oldest test-ultralytics lint format docs clean

help:  ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(VENV)/.installed  ## Create .venv and install the project with its extras

# Installs again when pyproject.toml changes. pip resolves torch and torchvision together, so that they match.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --editable '.[train,yolo,detection,segmentation,visualize,export,demo,dev]'
	touch $@

train: setup  ## Train stvit_pico on handwritten digits (a minute on two cores); CONFIG=… and ARGS=… for other runs
	$(BIN)/python tools/train_cls.py --config $(CONFIG) $(ARGS)

# One thread: the tests' models are small, and threads that wait for each other in turns are slow beside other programs.
# Two processes that take whole files, for what the tests of a file share is made once; in the order of tests/conftest.py.
test: setup  ## Run the tests (up to 15 minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not long" $(ARGS)

test-long: setup  ## Run the tests that `make test` leaves out (over an hour on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long $(ARGS)

test-gpu: setup  ## Run the tests that need a GPU (planned for 90 seconds on a GPU and 12 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 12 --dist worksteal --verbose -m gpu $(ARGS)

# Skips are allowed here: the tests' own packages, which are not part of what is supported, are not all installed.
test-oldest: $(OLDEST)/.installed  ## Run the library's tests with the oldest supported versions and Python 3.10
	env -u CI OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder \
		-m "not long" $(OLDEST_TESTS) $(ARGS)

# uv resolves each dependency to its lower bound in pyproject.toml. That file is the one place that states them.
$(OLDEST)/.installed: pyproject.toml
	$(PYTHON_OLDEST) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --upgrade pip uv
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python --resolution lowest-direct \
		--editable '.[train,yolo,detection,segmentation,visualize,export]'
	$(OLDEST)/bin/uv pip install --python $(OLDEST)/bin/python pytest pytest-timeout pytest-xdist pycocotools scikit-learn
	touch $@

test-ultralytics: setup  ## Run Ultralytics' own tests on our models (three quarters of an hour on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python tests/ultralytics_suite.py $(ARGS)

# mypy checks the installed layout, with adapters, configs and tools inside stvit. Otherwise the imports between these
# folders would have the type Any.
lint: setup  ## Check style, spelling, docstrings and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python tests/check_docstrings.py
	rm -rf build/typed && mkdir -p build/typed/stvit
	ln -s $(wildcard $(CURDIR)/stvit/*) $(addprefix $(CURDIR)/,adapters configs tools) build/typed/stvit
	$(BIN)/mypy

format: setup  ## Fix style automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Strict: a broken link, a missing picture, or a file from another host fails the build. It needs no network.
docs: setup  ## Build the documentation site in build/site (under a minute)
	$(BIN)/python docs/build_site.py

clean:  ## Remove environments and build outputs, but not runs/
	rm -rf $(VENV) $(OLDEST) .cache .mypy_cache .pytest_cache .ruff_cache build *.egg-info
