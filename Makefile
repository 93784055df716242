# Everything runs in a virtual environment of its own, made by the first command that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED_BY := setup.cfg setup.py pyproject.toml constraints.txt $(wildcard declarative_cvx/compiled/*)
OUTPUT ?= elastic_net.png
MIXED ?= mixed_network.png

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export MPLCONFIGDIR ?= $(CURDIR)/$(VENV)/matplotlib

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs clean
.NOTPARALLEL:

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1: /p' $(firstword $(MAKEFILE_LIST)) | awk -F': ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: $(VENV)/.examples  ## tune an elastic net, train a mixed network, draw two pictures
	@$(BIN)/python examples/elastic_net.py --output $(OUTPUT)
	@$(BIN)/python examples/mixed_network.py --output $(MIXED)

test: lint  ## check style, types and imports, then run the tests
	@echo "== pytest"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 $(PYTEST_ARGS)

lint: $(VENV)/.test  ## check style, types and imports
	@echo "== ruff check"
	@$(BIN)/ruff check .
	@echo "== ruff format --check"
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== lint-imports"
	@$(BIN)/lint-imports --no-logo --config setup.cfg

format: $(VENV)/.test  ## bring the code into the style that lint checks
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(VENV)/.docs  ## build the site of guides and reference in docs/_build/html
	@$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:  ## remove the environment, caches and results
	rm -rf $(VENV) build dist *.egg-info *.png docs/_build docs/api/generated
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	rm -f declarative_cvx/*.so declarative_cvx/compiled/*.so declarative_cvx/cones/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "== making $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV) \
		|| { echo "On Debian and Ubuntu: apt install python3-venv"; rm -rf $(VENV); exit 1; }

# The stamp files say which extras are installed, and when; "test" contains "docs" and "examples".
$(VENV)/.docs $(VENV)/.examples $(VENV)/.test: $(VENV)/.%: $(INSTALLED_BY) | $(BIN)/python
	@echo "== installing the package with its $* extra into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --progress-bar off \
		--constraint constraints.txt --editable '.[$*]'
	@touch $@
