# The commands: `make demo`, `make test`, `make bench`. Each sets up what it needs, with nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PATH_TO_INDEX ?=
BENCH := .venv-bench
ROUNDS ?= 3
ONLY ?=
PEERS ?=
UVLOOP ?=
MERGE ?=
SECONDS ?= 600
SEED ?= 1

.PHONY: demo test browser matrix soak explore bench lint types check clean

demo: $(VENV)/.installed
	$(BIN)/python examples/10_index_source.py $(PATH_TO_INDEX)

# Three processes, also on two cores, for most of what the tests do is to wait.
TEST = -m pytest -n 3 --dist worksteal
test: $(VENV)/.installed-dev browser
	$(BIN)/python $(TEST)

# The page's tests drive a real browser. One that cannot be had stops nothing: they say so and are skipped.
browser: $(VENV)/.installed-dev
	@command -v chromium chromium-browser google-chrome >/dev/null \
		|| ls $$HOME/.cache/ms-playwright/chromium-*/ >/dev/null 2>&1 \
		|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && { apt-get install -y -q chromium || { apt-get update -q && apt-get install -y -q chromium; }; } >/dev/null 2>&1; } \
		|| $(BIN)/python -m playwright install --with-deps chromium \
		|| echo "no Chromium could be installed; the tests of the page are skipped"

# Every fault as often as it was promised; the suite injects a share of that.
matrix: $(VENV)/.installed-dev
	MATRIX_SHARE=1 $(BIN)/python -m pytest tests/test_fault_matrix.py

# Every step of every topology in more orders, and more samples where threads and processes are; the suite takes one.
ORDERS ?= 10
explore: $(VENV)/.installed-dev
	EXPLORE=$(ORDERS) $(BIN)/python -m pytest tests/test_explorer.py --timeout=0

# `make soak SECONDS=600 SEED=1`: mixed pipelines under random faults.
soak: $(VENV)/.installed-dev
	cd tests && PYTHONPATH=.. ../$(BIN)/python -m matrix.soak --seconds $(SECONDS) --seed $(SEED)

# `make bench ROUNDS=5 ONLY=sync3 PEERS=streamable UVLOOP=1 MERGE=1`: see benchmarks/README.md.
bench: $(BENCH)/.installed
	$(BENCH)/bin/python -m benchmarks --rounds $(ROUNDS) --only '$(ONLY)' --peers '$(PEERS)' $(if $(UVLOOP),--uvloop) $(if $(MERGE),--merge)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/pyright

check: test lint types

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "penstock needs Python 3.11 or newer; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# A peer that cannot be installed stops nothing: its rows say so.
$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/peers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "penstock needs Python 3.11 or newer; set PYTHON=python3.x")'
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	for peer in $$(grep -v '^#' benchmarks/peers.txt); do \
		$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $$peer \
			|| echo "$$peer could not be installed; its rows will say so"; \
	done
	@touch $@

clean:
	rm -rf $(VENV) $(BENCH) .pytest_cache .ruff_cache .hypothesis
