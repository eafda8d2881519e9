# Needs only make and python3 (3.11 or newer, with venv). Every target sets up .venv itself, once.
PYTHON ?= python3
VENV ?= .venv
EVAL_OUT ?= runs/quickstart
EVAL_ARGS ?=
HOST ?= 127.0.0.1
PORT ?= 7860
ARGS ?=
TEST_ARGS ?=
UV ?= uv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Idle OpenMP threads that spin make a busy machine several times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help eval demo test install lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

eval: $(INSTALLED) ## generate with the built-in model under five guidances, score, write runs/quickstart (EVAL_ARGS="--num-samples 100" for less)
	$(BIN)/genkit-eval quickstart --out $(EVAL_OUT) $(EVAL_ARGS)

demo: $(INSTALLED) ## start the Gradio app at http://HOST:PORT (ARGS="--model PATH --runs runs" for more; genkit-demo --help lists all)
	$(BIN)/genkit-demo --host $(HOST) --port $(PORT) $(ARGS)

test: export OMP_NUM_THREADS ?= 1
test: $(INSTALLED) ## lint, types and tests (TEST_ARGS="-m 'not slow'" for less)
	@echo "==> lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "==> types"
	$(BIN)/mypy
	@echo "==> tests"
	$(BIN)/python -m pytest -n auto --dist worksteal $(TEST_ARGS)

install: $(INSTALLED) ## set up .venv with everything that the other targets need

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "genkit needs Python 3.11 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "==> creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "==> installing into $(VENV) (the first time: about 1.5 GB, a few minutes)"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
	@echo "==> $(VENV) is ready"

lock: ## resolve constraints.txt anew from pyproject.toml (needs uv; UV_ARGS=--upgrade for the newest versions)
	@command -v $(UV) >/dev/null || { echo "make lock needs uv: pip install uv, or make UV=/path/to/uv lock" >&2; exit 1; }
	$(UV) pip compile pyproject.toml --quiet --universal --python-version 3.11 --extra all --extra dev \
	  --custom-compile-command 'make lock' -o constraints.txt $(UV_ARGS)

clean: ## remove .venv and caches; keeps runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis dist
