# `make demo` and `make test` set up everything they need; see README.md.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two torch threads on a two-core machine fight with any neighbour; one per process is the steady choice.
export OMP_NUM_THREADS ?= 1
# Each with one torch thread; more take more memory, not only more cores.
TEST_PROCESSES ?= 2
# Run history lies in this repository (dagster.yaml), wherever a DAGSTER_HOME of the shell points.
export DAGSTER_HOME := $(CURDIR)
export PYTHONWARNINGS ?= ignore

.PHONY: help setup demo ui test-fast test test-all lint lock clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-9s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## make .venv with the pinned dependencies

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tensorboard]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tensorboard,wandb,optimizers,quantization,lycoris,s3,http,faces]'
	@touch $@

demo: $(VENV)/.ready ## train, evaluate and package the demo LoRA (a few minutes on 2 CPU cores)
	$(BIN)/python -m dagster asset materialize -m sdxl_pipeline.definitions --select 'group:"demo"'
	@$(BIN)/python -m assets.summary demo

ui: $(VENV)/.ready ## the Dagster UI on http://127.0.0.1:3000
	$(BIN)/dagster dev

# Unit tests that start no stage and load no model.
FAST_TESTS := tests/config tests/files tests/data/buckets tests/data/captions tests/training/data tests/training/diffusion \
	tests/training/logging tests/training/test_rng.py tests/tools --ignore=tests/tools/tiny_sdxl \
	--ignore=tests/training/diffusion/test_batch_loss.py --ignore=tests/training/diffusion/test_prior_preservation.py \
	--ignore=tests/training/data/test_on_demand_cache.py --ignore=tests/training/logging/test_tracker_logging.py \
	--ignore=tests/data/buckets/test_holdout.py --ignore=tests/config/test_hardware_profiles.py

test-fast: $(VENV)/.ready-dev ## the unit tests (about a minute on 2 cores)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m 'not slow and not real and not gpu' $(FAST_TESTS)

test: $(VENV)/.ready-dev ## the test suite (about 14 minutes on 2 cores)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

test-all: $(VENV)/.ready-dev ## the test suite with the slow tests
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m ''

lint: $(VENV)/.ready-dev ## format, lint, types, dependency rule
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tools.check_vocabulary

lock: ## resolve all dependencies anew and write constraints.txt
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --dry-run --ignore-installed --report .venv-lock/report.json '.[dev,wandb,tensorboard,quantization,optimizers,lycoris,ray,kubernetes,s3,gs,http,faces]' torch==2.13.0
	.venv-lock/bin/python -c 'import json; r = json.load(open(".venv-lock/report.json")); print("# Every package of the project and of its extras, pinned. `make lock` writes this file anew."); [print(l) for l in sorted({i["metadata"]["name"].lower().replace("_", "-") + "==" + i["metadata"]["version"].split("+")[0] for i in r["install"] if i["metadata"]["name"] != "sdxl-pipeline"})]' > constraints.txt
	rm -rf .venv-lock

clean: ## remove the environment, caches, run history and the demo's results (never your data or other projects' output)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .dagster storage
	rm -rf projects/demo/output projects/demo/data projects/demo/.data.lock
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
