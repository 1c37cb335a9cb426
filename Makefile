# Everything a fresh machine needs is Python 3.11 or newer, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build/demo_model

.PHONY: demo test test-slow lint types clean

demo: $(DEMO)/config.json
	@echo "The weights of this tiny model are random: what it says means nothing, how it says it is the real thing."
	$(BIN)/python generate.py --model $(DEMO) --image tests/photos/chelsea.jpg --prompt "What is the cat doing?" -m 24

test: $(VENV)/installed
	$(BIN)/pytest -n 2 --dist loadfile

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

clean:
	rm -rf build $(VENV)

$(DEMO)/config.json: $(VENV)/installed
	rm -rf $(DEMO)
	$(BIN)/python convert.py --hf-path tests/golden/checkpoint --mlx-path $(DEMO)

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@
