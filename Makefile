# `make train` and `make test` do all set-up on a fresh machine.

# The newest Python that starts: a name on the PATH may belong to a version that is not active.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11 python3; do \
	$$name -c 'import ssl, venv' 2>/dev/null && command -v $$name && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
STAMP := $(VENV)/.installed
WORKERS := --numprocesses=2 --dist=loadfile --no-loadscope-reorder
SMOKE := tests/routing/test_references.py tests/routing/test_capacity.py tests/transport \
	tests/parallel/test_exchange.py tests/training/test_checkpoint.py tests/training/test_loss.py \
	tests/system/test_resume.py

# Test processes start faster if modules stay compiled, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE

# By default, glibc returns the memory of a step to the system and gets it back page by page.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help train test exhaustive smoke parity planner browser lint gpu docs python-version clean

help:
	@echo 'make train        installs and trains the quickstart into $(WORKDIR), in minutes'
	@echo 'make test         installs and runs ruff, mypy and the tests'
	@echo 'make exhaustive   runs the tests that make test leaves out'
	@echo 'make smoke        runs a part of the tests'
	@echo 'make lint         runs ruff and mypy'
	@echo 'make gpu          runs kernels, layers, steps and an ablation on a GPU'
	@echo 'make docs         builds the documentation site into site/'
	@echo 'make parity       installs torch and transformers, for tests against them'
	@echo 'make planner      installs the TPU compiler, for plans of pods'
	@echo 'make browser      installs playwright, for tests of pages in Chromium'
	@echo 'make clean        removes environments, runs, compiled test programs and the site'
	@echo
	@echo 'After make train: $(VENV)/bin/moe-jax lists the commands of the package.'

train: $(STAMP)
	$(RUN) -m moe_jax.train --config=configs/quickstart.py --workdir=$(WORKDIR)

test: $(STAMP) lint
	$(RUN) -m pytest tests $(WORKERS)

# What `make test` leaves out: the rest of matrices, and the tests of tests/exhaustive.txt. With
# LIMIT=2400, tests that would start later are skipped, and each commit has another order of files.
exhaustive: $(STAMP)
	$(RUN) -m pytest tests $(WORKERS) -m exhaustive $(if $(LIMIT),--seconds=$(LIMIT) -rs)

# A part of the suite: routing, transport, collectives, checkpoints and a run. For another Python,
# `make smoke VENV=.venv-smoke PYTHON=python3.13`.
smoke: $(STAMP)
	$(RUN) -m pytest $(WORKERS) $(SMOKE)

python-version:
	@$(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'

# The reference implementations, for the tests that compare with them live.
parity: $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .[parity]

# The TPU compiler, for plans of TPUs that are not here.
planner: $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .[tpu]

# What drives an installed Chromium, for tests of pages: apt-get install chromium.
browser: $(STAMP)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable .[browser]

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Kernels, layers, steps and an ablation on a GPU, in eight minutes. Without an environment of its
# own, the package is installed into the one of python3, with what is there: see docs/speed.md.
gpu:
	$(if $(wildcard $(RUN)),,python3 -m pip install --quiet --no-index --no-deps --no-build-isolation \
		--editable .)
	$(if $(wildcard $(RUN)),$(RUN),python3) -m tools.gpu

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
	rm -rf $(VENV) .venv-smoke .cache runs site
