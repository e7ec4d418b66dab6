# Two commands for a fresh machine: `make quickstart` and `make test`. Each sets up .venv by itself, once.
VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := $(VENV)/bin/python
export MPLBACKEND := Agg
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test lint format

quickstart: $(VENV)/.ready
	$(PY) -m ecdit.cli prepare shapes data/shapes
	$(PY) -m ecdit.cli train recipes/quickstart.yaml
	$(PY) -m ecdit.cli sample runs/quickstart --heatmap
	$(PY) -m ecdit.cli evaluate runs/quickstart --suite shapes -n 25

test: $(VENV)/.ready
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The pins of constraints.txt are one set that is known to work together; setup.py says what else is admitted.
$(VENV)/.ready: setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or name one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
