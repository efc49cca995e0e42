# Every target makes the environment first; it is made once (delete .venv to begin again).
# `make PYTHON=python3.12 ...` chooses the interpreter, `make JOBS=8 test` the number of test processes.
SHELL := /bin/bash
VENV := .venv
STAMP := $(VENV)/.fluxsmith-installed
RUN := $(VENV)/bin/python
JOBS ?= 2
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo test check golden bench test-gpu docs

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(RUN) || { test -n "$(PYTHON)" || { echo "Python 3.11 or newer was not found: install it, or make PYTHON=/path/to/python"; exit 1; }; \
		$(PYTHON) -m venv $(VENV); }
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(RUN) -m fluxsmith demo --again

test: setup
	$(RUN) -m pytest -q -n $(JOBS)

check: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(VENV)/bin/basedpyright --level error
	$(RUN) -m pytest -q tests/test_architecture.py

# Rewrites the stored expectations. Commit the result alone, with the reason.
golden: setup
	$(RUN) -m pytest -q tests/golden --update-golden

bench: setup
	$(RUN) -m fluxsmith bench

test-gpu: setup
	$(RUN) -m pytest -q -m gpu

docs: setup
	$(RUN) -m fluxsmith.config.dump docs/reference
	$(RUN) -m fluxsmith.dialects.sd_scripts.show docs/reference
	$(RUN) -m pytest -q tests/docs/test_cli_reference.py --update-golden
