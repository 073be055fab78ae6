# make help          this list
# make demo          prune a small transformer, from training to the report
# make test          the tests
# make test-minimum  the smoke tests on the lowest versions of the dependencies, in .venv-minimum
# make coverage      the tests, and the lines of the package that none of them reaches
# make lint          style and types
# make bench         the benchmarks
# make docs          the site, in build/site
# make package       build the wheel and the sdist into dist, and check them
# make clean         remove the environments and everything built
#
# Each installs what it needs into .venv first. PYTHON=python3.12 picks another interpreter for it.
# ARGS="tests/core -x" goes on to the tests, the benchmarks and the demo.

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
MINIMUM := .venv-minimum

# One thread a worker: tiny operations on several threads slow each other down many times over.
# worksteal gives each worker whole files, as far as it can: what the tests of a file share is made once.
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable

.DEFAULT_GOAL := help
.PHONY: help demo test test-minimum coverage lint bench docs package clean

help:
	@sed -n "/^$$/q; s/^# \{0,1\}//p; s/^#$$//p" Makefile

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "xprune needs Python 3.11 or newer; '$(PYTHON)' is" \
		"$$($(PYTHON) --version 2>&1 || true). Try: make PYTHON=python3.12" >&2; exit 1; }
endef

# The version is read when the package is installed, so a new version installs it again.
$(INSTALLED): pyproject.toml xprune/environment.py
	$(CHECK_PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/xprune demo $(ARGS)

test: $(INSTALLED)
	$(PYTEST) $(ARGS)

# Made anew when pyproject.toml changes: uv leaves versions alone that are installed and high enough.
# timm wants any torchvision, of which uv would take the newest and with it a newer torch: 0.26 is that of torch 2.11.
$(MINIMUM)/.installed: pyproject.toml
	$(CHECK_PYTHON)
	$(PYTHON) -m venv --clear $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet "uv>=0.9"
	$(MINIMUM)/bin/uv pip install --quiet --python $(MINIMUM)/bin/python --resolution lowest-direct \
		-e ".[all,test]" "torchvision>=0.26"
	@touch $@

test-minimum: BIN := $(MINIMUM)/bin
test-minimum: $(MINIMUM)/.installed
	XPRUNE_LOWEST_VERSIONS=1 $(PYTEST) -m smoke $(ARGS)

coverage: $(INSTALLED)
	$(PYTEST) --cov --cov-report=term-missing $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 0 --benchmark-disable -k "imports or circle" tests/test_layout.py

bench: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks $(ARGS)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

package: $(INSTALLED)
	PYTHON=$(PYTHON) bash .ci/package dist

clean:
	rm -rf $(VENV) $(MINIMUM) .coverage build dist *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find xprune tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
