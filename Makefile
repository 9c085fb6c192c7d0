# make quickstart   a first run, from nothing
# make check test   what CI runs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/fluvial run configs/quickstart.toml

.PHONY: quickstart install dev check docs test test-portable test-slow test-claims test-flower test-browser faults clean

quickstart: install
	rm -rf runs/quickstart
	$(RUN) --out runs/quickstart

install: $(VENV)/.installed
dev: $(VENV)/.dev

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Fluvial needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing about 2 GB of packages into $(VENV); this takes some minutes.'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,flower]'
	touch $@

check: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/check

# The documents as a site, in build/site.
docs: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/site

test: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test -n 2 --dist worksteal

# The oracle and contract tests with torch's plainest kernels, as on a processor without AVX2.
test-portable: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" ATEN_CPU_CAPABILITY=default scripts/test -n 2 --dist worksteal \
	  -m '(oracle or contract) and not slow and not claims and not flower and not faults and not browser'

test-slow: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test -m slow

test-flower: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test -m 'flower and not faults'

test-browser: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test -m browser

faults: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" python scripts/faults.py --out docs/reliability.md

test-claims: dev
	PATH="$(CURDIR)/$(BIN):$$PATH" scripts/test -m claims

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
