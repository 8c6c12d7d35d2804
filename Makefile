# The commands of the project.  `make quickstart` is the whole loop on real speech, `make test` the
# proof that it works.  Everything is installed into .venv, at the versions of the lock file.

# The first Python that the project supports; name another with `make PYTHON=/path/to/python3.12`.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.13 python3.11,\
	$(shell $(p) -c '$(SUPPORTED)' 2>/dev/null && echo $(p))))

BIN := .venv/bin
# Page faults of large temporaries cost XLA on a CPU up to a third of its time.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
CONFIG ?= experiments/quickstart.py
# Your own speech instead of the quickstart corpus: CORPUS=manifest.jsonl make quickstart
CORPUS ?=
# Fields to change, for example: make quickstart ARGS=--config.selections.labelled.hours=0.05
ARGS ?=
WORKDIR ?= runs/$(if $(CORPUS),quickstart-own,quickstart)
# Arguments for pytest, for example: make test TESTS=tests/models
TESTS ?=

.PHONY: help install quickstart test test-slow test-faults lint format typecheck benchmark lock clean

help:
	@echo 'make quickstart   pre-train, fine-tune, pseudo-label, self-train and score real speech'
	@echo 'make test         lint, types and the test suite (about 12 minutes on 2 cores)'
	@echo 'make test-slow    the tests that take longer'
	@echo 'make test-faults  those that do harm: kills, full disks, damaged files (ten minutes)'
	@echo 'make lint         ruff and mypy;  make format: let ruff lay out the code'
	@echo 'make benchmark    our train step against a PyTorch Conformer of the same size'
	@echo 'make lock         resolve the newest allowed versions into the lock of this Python'

install: .venv/installed

.venv/installed: setup.py pyproject.toml $(wildcard requirements-lock-3.*.txt)
	@test -n '$(PYTHON)' && $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
		echo 'make: needs Python 3.11, 3.12 or 3.13 (found: $(or $(PYTHON),none)); install one' \
			'(Debian, Ubuntu: apt install python3 python3-venv)' \
			'or name it: make PYTHON=/path/to/python3' >&2; \
		exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
		echo 'make: venv failed; Debian and Ubuntu need: apt install python3-venv' >&2; exit 1; }
	@minor=$$($(BIN)/python -c 'import sys; print(sys.version_info.minor)'); \
	echo "installing into .venv (Python 3.$$minor, about 2.5 GB)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-r requirements-lock-3.$$minor.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

quickstart: .venv/installed
	$(HUGE_PAGES) $(BIN)/bigssl run --config $(CONFIG)$(if $(CORPUS),:$(CORPUS)) --workdir $(WORKDIR) \
		$(ARGS)

test: lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(TESTS)

test-slow: .venv/installed
	$(BIN)/python -m pytest -q -m slow $(TESTS)

# What they print says which moments were hit.
test-faults: .venv/installed
	$(BIN)/python -m pytest -q -m 'not network' tests/faults

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: .venv/installed
	$(HUGE_PAGES) $(BIN)/python benchmarks/train_step.py

lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check '.[dev]'
	minor=$$(.venv-lock/bin/python -c 'import sys; print(sys.version_info.minor)'); \
	{ echo "# Python 3.$$minor on Linux; made by \`make lock\`"; \
	  .venv-lock/bin/python -m pip freeze --exclude bigssl-jax --exclude setuptools \
		--exclude wheel; } > requirements-lock-3.$$minor.txt
	rm -rf .venv-lock

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .jax_cache *.egg-info
