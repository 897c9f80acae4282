# Every target makes the environment that it needs, in .venv. PYTHON chooses the interpreter (>= 3.10).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install quickstart demo-memory test test-browser test-gpu test-slow bench docs lint clean

help:
	@echo "make quickstart   make demo data and train a tiny Moshi with TTT on it (about 5 minutes on 2 cores)"
	@echo "make demo-memory  show what the memory gives: one fine-tuning with TTT and without (5 to 8 minutes)"
	@echo "make test         run the tests"
	@echo "make test-browser test the web page in Chromium, which must be installed"
	@echo "make test-gpu     run the tests that need an NVIDIA GPU"
	@echo "make test-slow    run the tests that take minutes"
	@echo "make bench        measure speed and memory, see docs/performance.md (half an hour on one core)"
	@echo "make docs         build the documentation site in site/"
	@echo "make lint         check style, types and duplicate code"
	@echo "make install      only make the environment $(VENV)"
	@echo "make clean        remove $(VENV) and caches; runs/ and demo_assets/ stay"

install: $(INSTALLED)

# Some Python distributions come without ensurepip: then the pip outside installs into the environment.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed: make PYTHON=python3.11 ..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null && $(PYTHON) -m venv $(VENV) \
	  || $(PYTHON) -m venv --without-pip $(VENV)
	@echo "Installing the packages into $(VENV), the first time takes some minutes ..."
	@if $(BIN)/python -m pip --version >/dev/null 2>&1; \
	  then $(BIN)/python -m pip install --quiet -e '.[demo,annotate,prompts,wer,dev]'; \
	  else $(PYTHON) -m pip --python $(BIN)/python install --quiet -e '.[demo,annotate,prompts,wer,dev]'; fi
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/python -m finetune.demo
	$(BIN)/python train.py --config example/quickstart.yaml

demo-memory: $(INSTALLED)
	$(BIN)/python -m finetune.demo.memory

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-browser: $(INSTALLED)
	$(BIN)/python -m pytest -m browser test_scripts/browser

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu test_scripts/gpu

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

docs: $(INSTALLED)
	$(BIN)/python -m site_tools.config_reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pylint --disable=all --enable=duplicate-code --min-similarity-lines=12 --ignore-imports=yes \
	  --ignore-docstrings=yes moshi_ttt finetune benchmarks experiments site_tools *.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build dist site *.egg-info
