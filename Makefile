# Everything a fresh machine needs is Python 3.11 or newer, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LMMS := $(VENV)-lmms

.PHONY: demo test test-slow test-lmms test-page fuzz lint types metal-check wheel clean

demo: $(VENV)/installed
	$(BIN)/avg-mlx demo

test: $(VENV)/installed
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[torch]'
	$(BIN)/pytest -m slow

# What needs lmms-eval, in an environment of its own (docs/benchmarks.md).
test-lmms: $(LMMS)/installed
	$(LMMS)/bin/pytest -m slow tests/lmms

# The server's page in a real browser, which has to be there: Chromium or Chrome, and npm for what checks the page.
# SCREENSHOTS=docs draws the pictures of docs/page.md anew.
test-page: $(VENV)/installed build/page/node_modules
	$(BIN)/pip install --quiet --editable '.[page]'
	SCREENSHOTS=$(SCREENSHOTS) $(BIN)/pytest -m browser tests/page

build/page/node_modules: Makefile
	mkdir -p build/page
	npm install --silent --no-save --prefix build/page axe-core@4.14.1 typescript@7.0.2
	touch $@

# Hostile inputs and faults by the thousand, and the table in docs/reliability.md. SEED= draws others.
SEED ?= 0
fuzz: $(VENV)/installed
	$(BIN)/pip install --quiet --editable '.[torch]'
	$(BIN)/python tests/fuzz --seed $(SEED) --report docs/reliability.md

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/installed
	$(BIN)/mypy

# A report to paste into an issue, from a Mac: make -s metal-check > report.md
# WEIGHTS= chooses the bench's random weights: tiny, 300m, 1b or 7b.
WEIGHTS ?= 300m
metal-check: $(VENV)/installed
	@$(BIN)/python benchmarks/metal_check.py --random-weights $(WEIGHTS)

# An old build/lib would bring back files that have been deleted.
wheel: $(VENV)/installed
	rm -rf build/lib build/wheel
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir build/wheel .

clean:
	rm -rf build $(VENV) $(LMMS)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(LMMS)/installed: pyproject.toml tests/lmms/requirements.txt
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/pip install --quiet --requirement tests/lmms/requirements.txt
	$(LMMS)/bin/pip install --quiet --no-deps lmms-eval==0.7.3
	$(LMMS)/bin/pip install --quiet --editable '.[dev]'
	touch $@
