# `make` lists the targets. Only Python 3.11+ and make are needed: everything else is installed into .venv.

PYTHON ?= python3
VENV := .venv
ARGS ?=

ifeq ($(OS),Windows_NT)
  BIN := Scripts
else
  BIN := bin
endif
RUN := $(VENV)/$(BIN)
INSTALLED := $(VENV)/.installed
VERSIONS := lowest newest langchain-1.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# $(call make-venv,folder): an empty virtual environment with a pip that knows dependency groups
define make-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "presort needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
$(PYTHON) -m venv $(1)
$(1)/$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
endef

.DEFAULT_GOAL := help
.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / { printf "  %-20s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(INSTALLED) ## Make .venv and install presort into it, editable, with all that development needs

$(INSTALLED): pyproject.toml
	$(call make-venv,$(VENV))
	$(RUN)/python -m pip install --quiet --editable ".[all]" --group dev
	@touch $@

.PHONY: format
format: $(INSTALLED) ## Format the code and mend what ruff can mend
	$(RUN)/ruff check --fix-only --quiet .
	$(RUN)/ruff format .

.PHONY: check
check: $(INSTALLED) ## Lint, formatting, types, architecture and licences
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports
	$(RUN)/python scripts/licences.py

.PHONY: test
test: $(INSTALLED) ## Run the tests (ARGS="-k name" to choose)
	$(RUN)/python -m pytest -n auto --dist worksteal $(ARGS)

.PHONY: test-lowest
test-lowest: ## Run the contract tests on the lowest versions that we support

.PHONY: test-newest
test-newest: ## Run the contract tests on SDKs that LangChain does not allow yet

.PHONY: test-langchain-1.0
test-langchain-1.0: ## Run the contract tests on the first LangChain that we support

# Old packages beside new ones may warn of each other: that is not ours to mend.
$(VERSIONS:%=test-%): test-%: .venv-%/.installed
	.venv-$*/$(BIN)/python -m pytest -W default tests/contracts $(ARGS)

$(VERSIONS:%=.venv-%/.installed): .venv-%/.installed: tests/versions/%.txt pyproject.toml
	@rm -rf .venv-$*
	$(call make-venv,.venv-$*)
	.venv-$*/$(BIN)/python -m pip install --quiet --editable ".[all]" --group test-base --requirement $<
	@touch $@

.PHONY: demo
demo: $(INSTALLED) ## Index Django's documentation against the emulator: no key, no cost
	$(RUN)/python scripts/fetch_django_docs.py .demo/docs
	$(RUN)/presort index .demo/docs --emulate --output .demo/records.jsonl $(ARGS)

.PHONY: emulator
emulator: $(INSTALLED) ## Serve the vendors' APIs on this machine
	$(RUN)/python -m presort.emulator $(ARGS)

.PHONY: bench
bench: $(INSTALLED) ## Run the benchmarks, one after the other
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(RUN)/python "$$file" $(ARGS) || exit 1; done

.PHONY: clean
clean: ## Remove what make, the tools and the demo made
	rm -rf .venv .venv-* .demo build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find src tests scripts -type d -name __pycache__ -prune -exec rm -rf {} +
