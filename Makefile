# Two commands do everything on a fresh machine: `make demo` and `make test`.
# VENV=DIR puts the environment elsewhere; PYTHON=... makes it with another Python (3.11 to 3.13).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
DATA ?= ../shared/latency_data
STAMP = $(VENV)/.installed
# make test-oldest: where its environments go, and the ends of requires-python
OLDEST ?= .venv-oldest
PYTHONS ?= 3.11 3.13
UV = $(OLDEST)/uv/bin/uv

.PHONY: help install demo test test-slow test-oldest lint docs format lock tables clean

help:
	@echo "make demo       set up, then search, train and export on the embedded data (some 6 minutes)"
	@echo "make test       set up, then the tests"
	@echo "make test-slow  the tests that take up to minutes each, an hour in all on two cores"
	@echo "make test-oldest  the tests with the lowest versions that pyproject.toml allows, on Python $(PYTHONS)"
	@echo "make lint       ruff, strict mypy and the rooms' contracts"
	@echo "make lock       write uv.lock again where pyproject.toml has changed (uv sync --frozen --extra dev installs it)"
	@echo "make docs       build the documentation into site/; every broken link is an error"
	@echo "make tables     fit the device models again from DATA=$(DATA) and write latency_tables/"
	@echo "make clean      remove the environment and caches"

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

demo: install
	$(BIN)/qnas search --device vpu --budget 30ms
	$(BIN)/qnas train-subnet
	$(BIN)/qnas export

# one process a core, one thread each: torch's threads would fight over the cores
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -q -m "slow and not gpu"

# uv looks for the Pythons on the PATH, and fetches those that it does not find there
test-oldest: $(PYTHONS:%=test-oldest-%)

test-oldest-%: $(OLDEST)/%/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/$*/bin/python -m pytest -n auto -q

$(OLDEST)/%/.installed: pyproject.toml $(OLDEST)/uv/.installed
	$(UV) venv --quiet --clear --python $* $(OLDEST)/$*
	$(UV) pip install --quiet --python $(OLDEST)/$*/bin/python --resolution lowest-direct --editable '.[dev]'
	touch $@

$(OLDEST)/uv/.installed:
	$(PYTHON) -m venv $(OLDEST)/uv
	$(OLDEST)/uv/bin/python -m pip install --quiet 'uv>=0.9'
	touch $@

.PRECIOUS: $(OLDEST)/%/.installed

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/.installed-docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/.installed-docs
# not --quiet, which would hide the warnings from --strict too
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# versions that the lock has stay; only what pyproject.toml has new is resolved
lock: $(OLDEST)/uv/.installed
	$(UV) lock

tables: install
	$(BIN)/python latency_tables/make_tables.py --data $(DATA)

clean:
	rm -rf $(VENV) $(OLDEST) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist site
