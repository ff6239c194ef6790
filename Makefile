# make train       install lkda into .venv, then train a small model on real text
# make test        install the development tools, then run the tests that take seconds
# make test-slow   the tests that take longer; CI runs them too
# make test-long   the tests that CI has no time for, and those that need other programs
# make test-fla    the tests of lkda's kernels in flash-linear-attention, on a CPU; CI runs them too
# make lint        ruff, ruff format and mypy
# make clean       delete .venv, builds and caches
# ARGS are passed on: make train ARGS="trainer.max_steps=200", make test ARGS="tests/ops -k simplified"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Two tests at a time, each with one thread of torch.
PARALLEL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Python keeps what it compiled, also where an environment forbids it: the tests start many processes.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: train help test test-slow test-long test-fla lint clean

train: $(VENV)/installed
	$(BIN)/python scripts/train.py $(ARGS)

# The comments at the top of this file.
help:
	@sed -n 's/^# \(make\|ARGS\)/\1/p' $(firstword $(MAKEFILE_LIST))

# Of the tests that ARGS choose, none need be serial: pytest then ends with 5.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m serial $(ARGS) || [ $$? -eq 5 ]
	$(PARALLEL) -m "not serial and not slow and not long and not readers" $(ARGS)

test-slow: $(VENV)/installed-dev
	$(PARALLEL) -m slow $(ARGS)

test-long: $(VENV)/installed-long
	$(PARALLEL) -m "long or readers" $(ARGS)

test-fla: $(VENV)/fla/installed
	PYTHONPATH=$(VENV)/fla $(BIN)/python -m pytest tests/integrations/test_fla.py $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Only what training needs; a stamp file makes the second call quick.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "installing lkda into $(VENV) (torch is large: minutes on a slow line)"
	$(BIN)/python -m pip install --progress-bar on -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	@echo "installing lkda and its development tools into $(VENV)"
	$(BIN)/python -m pip install --progress-bar on -e '.[dev]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-long: $(VENV)/installed-dev
	@echo "installing lm-eval into $(VENV)"
	$(BIN)/python -m pip install --progress-bar on -e '.[dev,eval]'
	@touch $@

# In a folder of its own: transformers calls flash-linear-attention wherever it is installed.
$(VENV)/fla/installed: | $(VENV)/installed-dev
	$(BIN)/python -m pip install --no-deps --target $(VENV)/fla flash-linear-attention==0.6.0 fla-core==0.6.0 einops triton
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lkda needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
