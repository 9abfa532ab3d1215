# `make run` and `make test` set everything up first: a virtual environment in .venv, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow lint format examples bench build clean

help:  ## what can be done here
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(READY)  ## virtual environment with everything for development

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]' --group dev
	touch $@

run: $(READY)  ## the main job: hard labels, KD and SLD on MNIST-1D, 3 seeds, one table
	$(BIN)/stillhouse compare mnist1d-hard mnist1d-kd mnist1d-sld --seeds 0,1,2 --overwrite

test: $(READY)  ## the test suite
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(READY)  ## the long tests: wheel in a clean environment, full sweeps
	$(BIN)/python -m pytest -m 'slow and not gpu'

lint: $(READY)  ## ruff, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy engine/stillhouse plugins
	$(BIN)/lint-imports

format: $(READY)  ## format the sources
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

examples: $(READY)  ## run every example
	for file in examples/*.py; do echo "$$file"; $(BIN)/python $$file || exit 1; done

bench: $(READY)  ## what the engine and the kernels cost, side by side
	$(BIN)/stillhouse bench overhead
	$(BIN)/stillhouse bench kernels

build: $(READY)  ## wheel and sdist in dist/
	$(BIN)/python -m build

clean:  ## remove what was built, not what was run
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
