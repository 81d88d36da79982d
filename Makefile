PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
PRODUCTION_VENV := .venv-production
.PHONY: help setup demo demo-pages test test-slow test-production benchmark lint lock clean lint-docker images-lock

help:  ## the targets and what they do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/installed  ## create .venv from requirements.lock (again when the lock changes)

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

lock:  ## resolve pyproject.toml anew into requirements.lock (needs uv)
	(sed -n '/^#/p' requirements.lock; uv pip compile --quiet --python-version 3.11 --extra demo --extra dev --extra signing \
	  --no-annotate --no-header --no-emit-find-links $(UV_FLAGS) pyproject.toml | sed 's/^torch==\([0-9.]*\)+cpu/torch==\1/') > requirements.lock.new
	mv requirements.lock.new requirements.lock
	@echo 'now: make setup images-lock'

images-lock: setup  ## the images' parts of requirements.lock
	$(BIN)/python docker/locks.py

demo: setup  ## a real model through Airflow into S3 and MLflow, on this machine
	$(BIN)/python -m gisp_tasks.demo run

demo-pages: setup  ## Airflow's and MLflow's pages on the finished demo, until Ctrl-C
	$(BIN)/python -m gisp_tasks.demo pages

test: setup  ## the fast suite
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: setup  ## minutes: kill -9 at ten moments, Airflow's own scheduler, SmolLM2-135M
	$(BIN)/python -m pytest -m slow --timeout 3600

$(PRODUCTION_VENV)/installed: requirements.lock docker/services.lock pyproject.toml
	test -x $(PRODUCTION_VENV)/bin/python || $(PYTHON) -m venv $(PRODUCTION_VENV)
	$(PRODUCTION_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock -r docker/services.lock
	$(PRODUCTION_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-production: $(PRODUCTION_VENV)/installed  ## an hour: Celery, PostgreSQL, Redis, MLflow, S3; each fails in turn (FAULT_REPEATS=3)
	@{ command -v redis-server && ls -d /usr/lib/postgresql/*/bin; } >/dev/null || \
	  { echo "PostgreSQL and Redis are needed: apt-get install postgresql redis-server" >&2; exit 1; }
	$(PRODUCTION_VENV)/bin/python -m pytest tests/production --fault-repeats $(or $(FAULT_REPEATS),1)

benchmark: setup  ## minutes: cost of scoring beside the reference's, and memory of materialize
	$(BIN)/python tests/benchmarks/scoring.py
	$(BIN)/python tests/benchmarks/materialize.py

lint: setup lint-docker  ## style, types, import contracts, docker/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

lint-docker: .venv-lint/installed  ## Dockerfiles, scripts, compose file, Helm values
	.venv-lint/bin/python docker/lint.py

.venv-lint/installed: docker/requirements-lint.txt
	$(PYTHON) -m venv --clear .venv-lint
	.venv-lint/bin/python -m pip install --quiet --disable-pip-version-check -r docker/requirements-lint.txt
	@touch $@

clean:  ## remove the environment and the demo
	rm -rf $(VENV) .venv-lint demo
