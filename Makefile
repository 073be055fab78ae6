# make demo    prune a small transformer, from training to the report
# make test    the tests
# make lint    style and types
# make bench   the benchmarks
# make docs    the site, in build/site
# make clean   remove the environment and everything built
#
# Each installs what it needs into .venv first. PYTHON=python3.12 picks another interpreter for it.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench docs clean

help:
	@sed -n "/^$$/q; s/^# \{0,1\}//p; s/^#$$//p" Makefile

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "xprune needs Python 3.11 or newer; '$(PYTHON)' is" \
			"$$($(PYTHON) --version 2>&1 || true). Try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/xprune demo $(ARGS)

# One thread a worker: tiny operations on several threads slow each other down many times over.
test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --benchmark-disable $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 0 --benchmark-disable -k "imports or circle" tests/test_layout.py

bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks $(ARGS)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find xprune tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
