# A new machine needs Python 3.11, make, git and a C compiler; everything else is installed into .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-all lint format clean

help:
	@echo "make demo      install into .venv, write demo/ and train on it"
	@echo "make test      install into .venv, lint, then the test suite"
	@echo "make test-all  the same with the slow tests"
	@echo "make lint      ruff and mypy"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	@test -f demo/dtrain.toml || $(BIN)/dtrain init demo
	$(BIN)/dtrain train demo/dtrain.toml
	$(BIN)/python demo/generate.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow"

test-all: lint
	$(BIN)/python -m pytest

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
