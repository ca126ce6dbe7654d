# `make train` and `make test` do all set-up on a fresh machine.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
STAMP := $(VENV)/.installed

.PHONY: train test exhaustive parity planner lint docs clean

train: $(STAMP)
	$(RUN) -m moe_jax.train --config=configs/quickstart.py --workdir=$(WORKDIR)

test: $(STAMP) lint
	$(RUN) -m pytest tests --numprocesses=2 --dist=loadfile

# What `make test` leaves out: the rest of matrices, and the tests of tests/exhaustive.txt.
exhaustive: $(STAMP)
	$(RUN) -m pytest tests --numprocesses=2 --dist=loadfile -m exhaustive

# The reference implementations, for the tests that compare with them live.
parity: $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .[parity]

# The TPU compiler, for plans of TPUs that are not here.
planner: $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .[tpu]

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The documentation site, into site/.
docs: $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .[docs]
	$(RUN) -m tools.config_reference --check
	$(RUN) -m mkdocs build --strict

$(STAMP): setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python found: install 3.11 or newer" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .[test]
	touch $@

clean:
	rm -rf $(VENV) runs site
