# Every target sets up what it needs; a second run finds it there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONSTRAINTS ?= -c constraints.txt
export HF_HUB_OFFLINE ?= 1
export SAFETY_LENS_MODELS ?= $(CURDIR)/real-models
REAL := $(BIN)/python -m pytest -q -n 2 --dist loadfile -rs --durations 5

.PHONY: demo test test-all real test-real test-real-all check docs bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev,docs]'
	touch $@

demo: $(STAMP)
	$(BIN)/safety-lens demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2

test-all: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 -m 'not real and not real_large'
	$(MAKE) docs

real: $(STAMP)
	$(BIN)/python tools/real_models.py

test-real: $(STAMP)
	$(REAL) -m real

test-real-all: $(STAMP)
	$(REAL) -m 'real or real_large'

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[bench]'
	$(BIN)/python benchmarks/parity.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/extract.py --peers
	$(BIN)/python benchmarks/steering.py
	$(BIN)/python benchmarks/sweep.py
	$(BIN)/python benchmarks/fold.py
	$(BIN)/python benchmarks/monitor.py
	$(BIN)/python benchmarks/risk.py
	$(BIN)/python benchmarks/forecast.py

clean:
	rm -rf $(VENV) .bench-venv runs site build *.egg-info
