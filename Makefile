# `make run` and `make test` set everything up first: a virtual environment in .venv, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV := $(VENV)/.ready-dev

.DEFAULT_GOAL := help
.PHONY: help setup run study test test-kit test-kernels test-slow attack lint format examples docs bench build clean

help:  ## what can be done here
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(DEV)  ## virtual environment with everything for development

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[tasks,study]'
	touch $@

# The CUDA compiler's wheels are here because the kernels' machine code is tested without a GPU. torchdistill comes
# without what it depends on: its losses need none of it, and the torchvision that it brings does not import beside
# the CPU build of torch, which breaks transformers too.
$(DEV): $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[tasks,study,tensorboard,cuda,mlflow,wandb]' --group dev
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps torchdistill
	touch $@

run: $(READY)  ## the main job: hard labels, KD, KD on all inputs and SLD on MNIST-1D, 3 seeds, one table
	$(BIN)/stillhouse compare mnist1d-hard mnist1d-kd mnist1d-kd-all mnist1d-sld --seeds 0,1,2 --overwrite

test: $(DEV)  ## the test suite, but for the kernels' own
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/kernels --ignore tests/ptx

test-kit: $(DEV)  ## what a plugin's author does, beside the wheel in clean environments; every plugin's checks
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'slow and not gpu' tests/kit tests/packaging

# As the processor is, and held to AVX2; the CUDA kernels' machine code (tests/ptx) does not depend on it.
KERNELS := $(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow and not gpu'
AVX2 := ATEN_CPU_CAPABILITY=avx2 NUMBA_CPU_NAME=x86-64-v3 NUMBA_CPU_FEATURES=
test-kernels: $(DEV)  ## the kernels' tests with the CUDA machine code's, then those of the CPU held to AVX2
	$(KERNELS) tests/kernels tests/ptx
	test "$$(uname -m)" != x86_64 || $(AVX2) $(KERNELS) tests/kernels tests/pitfalls

test-slow: $(DEV)  ## the long tests: wheel in a clean environment, full sweeps
	$(BIN)/python -m pytest -m 'slow and not gpu'

attack: $(DEV)  ## attacks at full length (an hour or so): kills, damage, processes, hostile configs; prints the table
	$(BIN)/python tests/attacks/table.py

lint: $(DEV)  ## ruff, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy engine/stillhouse plugins
	$(BIN)/lint-imports

format: $(DEV)  ## format the sources
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

examples: $(DEV)  ## run every example
	for file in examples/*.py; do echo "$$file"; $(BIN)/python $$file || exit 1; done

study: $(READY)  ## a small study of every method: tuning, seeds, report
	$(BIN)/stillhouse study mnist1d --quick --resume

docs: $(DEV)  ## the site in build/site, refusing any warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: $(DEV)  ## what the engine and the kernels cost, side by side
	$(BIN)/stillhouse bench overhead
	$(BIN)/stillhouse bench kernels

build: $(DEV)  ## wheel and sdist in dist/
	$(BIN)/python -m build

clean:  ## remove what was built, not what was run
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
