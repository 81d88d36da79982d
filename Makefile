PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
PRODUCTION_VENV := .venv-production
LLAMA_CPP_VENV := .venv-llama-cpp
VLLM_VENV := .venv-vllm
.PHONY: help setup demo demo-pages test test-slow test-production test-llama-cpp test-vllm benchmark lint lock clean lint-docker images-lock

help:  ## the targets and what they do
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

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

# Built for this machine's processor, the library alone; its four dependencies are in the lock but for diskcache.
$(LLAMA_CPP_VENV)/installed: requirements.lock pyproject.toml
	test -x $(LLAMA_CPP_VENV)/bin/python || $(PYTHON) -m venv $(LLAMA_CPP_VENV)
	$(LLAMA_CPP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(LLAMA_CPP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@echo 'building llama-cpp-python from its source package: some minutes of a C++ compiler'
	began=$$(date +%s); CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF \
	  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TOOLS=OFF" \
	  $(LLAMA_CPP_VENV)/bin/python -m pip install --disable-pip-version-check --no-deps \
	  --no-binary llama-cpp-python llama-cpp-python==0.3.36 diskcache==5.6.3 && echo "built in $$(($$(date +%s) - began)) s"
	@touch $@

test-llama-cpp: $(LLAMA_CPP_VENV)/installed  ## minutes, the first time a build: levels in llama.cpp against torch
	$(LLAMA_CPP_VENV)/bin/python -m pytest tests/oracle/test_llama_cpp.py --timeout 1200 -rP

$(VLLM_VENV)/installed: tests/vllm/requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm/requirements.lock
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-vllm: setup $(VLLM_VENV)/installed  ## minutes: a level in vLLM on the CPU, with remote code and without
	$(BIN)/python -m pytest tests/vllm

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
	rm -rf $(VENV) $(PRODUCTION_VENV) $(LLAMA_CPP_VENV) $(VLLM_VENV) .venv-lint demo
