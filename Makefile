# `make demo` and `make test` need Python >= 3.11 and make; they create everything else in .venv.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Several processes share the cores, so each of them computes on one.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint tests slow pretrain pretrain-backdoor docs wheel clean help

help:
	@echo "make demo   train the starter zoo, index it, show similar models and a model card"
	@echo "make test   ruff, mypy and the tests"
	@echo "make slow   the tests that take longer: the explorer in a browser, large networks"
	@echo "make pretrain  train the pretrained metanets anew, with the populations that are missing (hours)"
	@echo "make docs   write the API reference into site/"
	@echo "make pretrain-backdoor  train the backdoor detector anew, with its population (hours)"
	@echo "make wheel  build dist/*.whl"
	@echo "make clean  remove what these targets made"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "weightspace needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.core

demo: $(VENV)/.core
	$(BIN)/weightspace demo models/starter

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

tests: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow

test: lint tests

pretrain: $(VENV)/.dev
	$(BIN)/python -m weightspace.pretrained

docs: $(VENV)/.dev
	$(BIN)/python docs/reference.py site

pretrain-backdoor: $(VENV)/.dev
	$(BIN)/weightspace train backdoor --zoo models/backdoors --out weightspace/backdoor/files

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis models/starter
