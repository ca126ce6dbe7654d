# `make train` and `make test` do all set-up on a fresh machine.

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
# pip's own wheels, so that nothing is compiled here.
STAMP := $(VENV)/.installed

.PHONY: train test lint clean

train: $(STAMP)
	$(RUN) -m moe_jax.train --config=configs/quickstart.py --workdir=$(WORKDIR)

test: $(STAMP) lint
	$(RUN) -m pytest tests

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(STAMP): setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found: install Python 3.11 or newer, or say make PYTHON=python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .[test]
	touch $@

clean:
	rm -rf $(VENV) runs
