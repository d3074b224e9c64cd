# Everything is installed into .venv, from the lock files, hashes checked. Nothing else is fetched.

PYTHON ?= python3
ARGS ?=
# Test processes: most tests wait for timers, so four keep two cores busy.
WORKERS ?= 4

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SDK := tests/sdk
TOOLS := $(CURDIR)/.cache/bin
LOCKS := requirements.lock requirements-package.lock

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint format bench lock chart clean

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/project.stamp ## install and start the gateway with a simulated upstream
	@exec $(BIN)/sd-gateway demo $(ARGS)

test: .venv/project.stamp .venv/dev.stamp sdk ## run the tests; ARGS='--no-cov -k NAME' for some of them
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term-missing:skip-covered $(ARGS)

.PHONY: check matrix
check: lint ## style, types and the unit tests, in less than a minute
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --no-cov -q tests/unit $(ARGS)

matrix: ## run the unit tests on every Python from 3.11 to 3.14 that is installed
	@.ci/matrix

lint: .venv/project.stamp .venv/dev.stamp ## check style, types, the layers' imports and the words
	@.ci/words
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

.PHONY: audit
audit: .venv/project.stamp .venv/dev.stamp ## look for insecure code, and for known vulnerabilities of what is locked
	$(BIN)/python .ci/bandit.py
	$(BIN)/python .ci/audit.py requirements*.lock

format: .venv/dev.stamp ## sort the imports, mend what ruff can, format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/project.stamp .venv/dev.stamp .venv/bench.stamp ## measure; ARGS=--help tells what
	@$(BIN)/python tests/bench/run.py $(ARGS)

.PHONY: docs docs-check pictures release
docs: .venv/project.stamp .venv/dev.stamp ## write what the documents have from the code: settings, metrics, alerts
	@$(BIN)/python -m tests.documents.tables

docs-check: .venv/project.stamp .venv/dev.stamp ## run the documents' commands and programs, follow their links
	@PATH="$(TOOLS):$$PATH" $(BIN)/python -m pytest --no-cov tests/test_documents.py tests/test_snippets.py $(ARGS)

pictures: .venv/project.stamp .venv/dev.stamp ## take the documents' pictures anew, with the system's Chromium
	@$(BIN)/python -m tests.documents.pictures

release: .venv/project.stamp .venv/dev.stamp ## build wheel, sdist, chart and bill of materials into dist, twice
	@PATH="$(TOOLS):$$PATH" $(BIN)/python .ci/release.py dist

# The widest file first: the others are its subsets, at the same versions. Extras stay in the lines, for pip
# looks for the hashes of coverage[toml] there, and not below coverage.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --no-strip-extras --custom-compile-command 'make lock' $(ARGS)

lock: .venv/dev.stamp ## write the lock files anew from pyproject.toml; ARGS=--upgrade for newer versions
	$(COMPILE) --group dev --all-extras pyproject.toml --output-file requirements-dev.lock
	$(COMPILE) --constraints requirements-dev.lock pyproject.toml --output-file requirements.lock
	$(COMPILE) --constraints requirements-dev.lock --all-extras pyproject.toml --output-file requirements-image.lock
	$(COMPILE) --constraints requirements-dev.lock --group package --output-file requirements-package.lock
	$(COMPILE) --constraints requirements-dev.lock --group bench --output-file requirements-bench.lock
	$(COMPILE) --group audit --output-file .ci/checkov.lock
	npm install --prefix $(SDK) --package-lock-only --omit-lockfile-registry-resolved \
	  --ignore-scripts --no-audit --no-fund --silent
	@! grep -n '://' requirements*.lock .ci/checkov.lock $(SDK)/package-lock.json

chart: .venv/dev.stamp ## write the table of values in the chart's README anew
	@$(BIN)/python helm/readme.py

clean: ## remove all that make and the tools have made
	rm -rf .venv .cache .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache \
	  .ruff_cache .schemathesis build dist $(SDK)/node_modules
	find .ci gateway helm tests -name __pycache__ -prune -exec rm -rf {} +

# What the targets above stand on.

PYTHON_FITS = $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)

$(BIN)/python:
	$(if $(filter yes,$(PYTHON_FITS)),,$(error Python 3.11 or newer is needed, and $(PYTHON) is not: name one with make PYTHON=python3.11))
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; exit 1; }

.venv/runtime.stamp: $(LOCKS) | $(BIN)/python
	@echo 'Installing $(LOCKS) into .venv' >&2
	@$(PIP) install --require-hashes $(LOCKS:%=-r %)
	@touch $@

.venv/project.stamp: pyproject.toml gateway/__init__.py .venv/runtime.stamp
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev.stamp: requirements-dev.lock .venv/runtime.stamp
	@echo 'Installing requirements-dev.lock into .venv' >&2
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@touch $@

.venv/bench.stamp: requirements-bench.lock .venv/dev.stamp
	@echo 'Installing requirements-bench.lock into .venv' >&2
	@$(PIP) install --require-hashes -r requirements-bench.lock
	@touch $@

# The vendor's own client, which some tests run. They are skipped where there is no npm.
.PHONY: sdk
ifeq ($(shell command -v npm 2>/dev/null),)
sdk:
	@echo 'No npm here: the tests that run the vendor'\''s npm client will be skipped.' >&2
else
sdk: .venv/sdk.stamp
endif

.venv/sdk.stamp: $(SDK)/package-lock.json | $(BIN)/python
	@npm ci --prefix $(SDK) --ignore-scripts --no-audit --no-fund --silent
	@touch $@
