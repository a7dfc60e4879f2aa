# Set-up happens by itself, once: the first target creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: help setup demo notebooks test slow check lint types wheel bench clean

help:
	@echo "make demo       the whole flow on the shipped base (set-up included, once)"
	@echo "make notebooks  all notebooks are run, in temporary folders"
	@echo "make test       the tests"
	@echo "make check      lint, types and tests: what CI runs"
	@echo "make slow       the tests that take minutes"
	@echo "make wheel      build the wheel, and run the README's Python lines from it in an empty environment"
	@echo "make bench      all benchmarks at a small setting, ours beside the peers'; about a quarter of an hour"

# Nothing is compiled to bytecode but what a run imports: a quarter of the work that compiling all would be.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
IMPORTED := sftflow.api, sftflow.training.run, sftflow.comparison.compare, transformers.models.llama.modeling_llama

$(VENV)/.ready: pyproject.toml constraints.txt
	begun=$$(date +%s) && (test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)) && $(INSTALL) -e . && \
	$(BIN)/python -c "import $(IMPORTED)" && echo "set-up, once: $$(($$(date +%s) - begun)) s" > $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(INSTALL) -e '.[dev]'
	touch $@

$(VENV)/.ready-notebooks: $(VENV)/.ready
	$(INSTALL) -e '.[notebooks]'
	touch $@

setup: $(VENV)/.ready-dev

demo: $(VENV)/.ready
	$(BIN)/sftflow demo --out $(OUT)
	@cat $(VENV)/.ready

# Two at a time, of one thread each.
notebooks: $(VENV)/.ready-notebooks
	OMP_NUM_THREADS=1 $(BIN)/python scripts/run_notebooks.py

# Two processes of one thread each: torch's threads would wait for each other.
test: $(VENV)/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# With the packages whose templates are read, the clients that are put before the server, and torchao's optimizer.
slow: $(VENV)/.ready-dev
	$(INSTALL) -e '.[peers,clients,adamw8bit]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 --dist worksteal

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check src tests benchmarks scripts notebooks
	$(BIN)/ruff format --check src tests benchmarks scripts notebooks

types: $(VENV)/.ready-dev
	$(BIN)/mypy

check: lint types test

wheel:
	scripts/check_wheel.sh

# Each part says what it needs and is not here; figures go into benchmarks/results/, from which the docs' tables are made.
# BENCH='--model DIR --peer-python PY' for what compares with other programs.
bench: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/all.py $(BENCH)

clean:
	rm -rf $(VENV) build *.egg-info
