# A new machine needs Python 3.11, make, git and a C compiler; everything else is installed into .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# The newest zarr needs a newer Python; the data layer needs neither torch nor Dask.
PYTHON_NEWEST ?= $(shell command -v python3.13 || command -v python3.12)
NEWEST := .venv-newest

.PHONY: help demo test test-all test-newest faults lint format clean

help:
	@echo "make demo      install into .venv, write demo/ and train on it"
	@echo "make test      install into .venv, lint, then the tests, without slow ones and with a part of the cases"
	@echo "make test-all  the same with the slow tests and all cases"
	@echo "make test-newest  tests/data with the newest zarr, on Python 3.12 or 3.13 (PYTHON_NEWEST=...)"
	@echo "make faults    COUNT fault schedules from SEED on: kills and freezes change no bit"
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

# Two processes, a file at a time, so that a module's servers and a process's cluster start once. Tests that start
# clusters run after the others, for which they would leave no time.
test: lint
	$(BIN)/python -m pytest -m "not alone and not slow and not extra" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m "alone and not slow and not extra" -n 2 --dist loadfile

test-all: lint
	DTRAIN_THOROUGH=1 $(BIN)/python -m pytest -m "not alone and not slow" -n 2 --dist loadfile
	DTRAIN_THOROUGH=1 $(BIN)/python -m pytest -m "alone or slow"

$(NEWEST)/.installed: pyproject.toml
	@test -n "$(PYTHON_NEWEST)" || { echo "make test-newest needs Python 3.12 or 3.13: make test-newest PYTHON_NEWEST=..."; exit 2; }
	$(PYTHON_NEWEST) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install -q --upgrade zarr xarray numpy pydantic zarrs s3fs aiohttp \
		"moto[s3]" flask flask-cors cloudpickle icechunk fastparquet scipy pytest pytest-timeout hypothesis
	$(NEWEST)/bin/python -m pip install -q --no-deps -e .
	@touch $@

# Fault schedules from seeds: make faults SEED=0 COUNT=100
SEED ?= 0
COUNT ?= 100
faults: $(VENV)/.installed
	DTRAIN_FAULTS_SEED=$(SEED) DTRAIN_FAULTS_COUNT=$(COUNT) $(BIN)/python -m pytest tests/faults/test_schedules.py

test-newest: $(NEWEST)/.installed
	$(NEWEST)/bin/python -m pytest tests/data -p no:cacheprovider

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
