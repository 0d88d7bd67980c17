# `make train` and `make test` set everything up by themselves: they need Python (3.10 or newer) and make.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONFIG ?= configs/cls/stvit_pico_digits.yaml
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test test-long test-ultralytics lint format clean

help:  ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

setup: $(VENV)/.installed  ## Create .venv and install the project with its extras

# Made again only when the dependencies change; pip resolves torch and torchvision together, so that they match.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install --editable '.[train,yolo,visualize,export,demo,dev]'
	touch $@

train: setup  ## Train stvit_pico on handwritten digits (a minute on two cores); CONFIG=… and ARGS=… for other runs
	$(BIN)/python tools/train_cls.py --config $(CONFIG) $(ARGS)

# One thread: the tests' models are small, and threads that wait for each other in turns are slow beside other programs.
# Two processes that take whole files, for what the tests of a file share is made once; in the order of tests/conftest.py.
test: setup  ## Run the tests (up to 15 minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not long" $(ARGS)

test-long: setup  ## Run the tests that `make test` leaves out (half an hour on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long $(ARGS)

test-ultralytics: setup  ## Run Ultralytics' own tests on our models (three quarters of an hour on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python tests/ultralytics_suite.py $(ARGS)

lint: setup  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## Mend style where that can be done by a machine
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove what the commands above made, results in runs/ excepted
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache build *.egg-info
