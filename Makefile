# Needs Python 3.11 or 3.12, make and a POSIX shell; everything else is installed into .venv.
# Variables: PYTHON (interpreter to build .venv with), ARGS (for run, test and its kin), WORKERS (test processes).

SHELL := /bin/sh
.DEFAULT_GOAL := help

PYTHON ?=
ARGS ?=
WORKERS ?= 2
export PYTHON

# Relative, so that a checkout in a path with spaces works.
VENV_PYTHON := .venv/bin/python
STAMP := .venv/.installed
# Exists while packages are being installed: if it is still there, the last set-up was cut short.
UNFINISHED := .venv/.unfinished

# One torch thread per process: more would fight for the same cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST := $(ONE_THREAD) $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile

# Succeeds if the interpreter put before it runs and is of a supported version.
SUPPORTED := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null

.PHONY: help
help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: setup
setup: $(STAMP) ## make .venv with everything needed (again only when pyproject.toml, setup.py or constraints.txt changed)

.PHONY: run
run: $(STAMP) ## train: digits, feature_recon, k4; choose with ARGS='dataset=cifar10 split=k2'
	@$(VENV_PYTHON) -m localfeat.run $(ARGS)

.PHONY: test
test: $(STAMP) ## fast tests; narrow with ARGS='-k name' or ARGS=tests/folder
	@$(PYTEST) $(ARGS)

.PHONY: test-slow
test-slow: $(STAMP) ## tests marked slow
	@$(PYTEST) -m 'slow and not gpu' --timeout 1800 --no-loadscope-reorder $(or $(ARGS),tests/experiments tests)

.PHONY: smoke
smoke: $(STAMP) ## a minute: the laws, and a run of one batch
	@$(PYTEST) -q tests/laws $(ARGS)
	@$(ONE_THREAD) $(VENV_PYTHON) -m localfeat.run debug=one_batch trainer=cpu callbacks.progress_bar=false

.PHONY: mutants
mutants: $(STAMP) ## break the code on purpose: every mutant must fail a test
	@$(ONE_THREAD) $(VENV_PYTHON) -m tests.laws.break_the_laws $(ARGS)

.PHONY: test-gpu
test-gpu: $(STAMP) ## tests marked gpu, one at a time (needs a CUDA device)
	@$(VENV_PYTHON) -m pytest -m gpu --timeout 1800 $(ARGS)

.PHONY: check
check: $(STAMP) ## ruff check, ruff format --check, mypy, the import law
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/lint-imports --no-logo

.PHONY: format
format: $(STAMP) ## mend what ruff can mend, and format
	@$(VENV_PYTHON) -m ruff check --fix .
	@$(VENV_PYTHON) -m ruff format .

.PHONY: hooks
hooks: $(STAMP) ## run the checks before every commit (git hook by pre-commit)
	@$(VENV_PYTHON) -m pre_commit install

.PHONY: upgrade
upgrade: $(STAMP) ## raise .venv to the newest versions pyproject.toml allows; then: make test constraints
	@$(VENV_PYTHON) -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'

# Frozen into a variable first, so that a failing freeze leaves the old file alone. Anything that is not
# name==version (an address, a path) is refused: it could not be installed elsewhere.
.PHONY: constraints
constraints: $(STAMP) ## write the versions in .venv to constraints.txt
	@set -e; \
	pins=$$($(VENV_PYTHON) -m pip freeze --all --exclude-editable --exclude pip --exclude wheel --exclude localfeat); \
	if printf '%s\n' "$$pins" | grep -v '^[A-Za-z0-9._-]*==[^ ]*$$'; then \
		echo 'constraints.txt not written: the lines above are no exact pins' >&2; exit 1; \
	fi; \
	{ \
		echo '# Exact versions that the tests passed with; pip install -c constraints.txt reads them.'; \
		echo '# Written by: make constraints        (newer versions: make upgrade test constraints)'; \
		printf '%s\n' "$$pins"; \
	} > constraints.txt
	@touch $(STAMP)

.PHONY: clean
clean: ## remove outputs, build products and caches (keeps .venv and data/)
	@rm -rf outputs multirun wandb lightning_logs build dist localfeat.egg-info .coverage \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./.venv -prune -o -path ./data -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: distclean
distclean: clean ## as clean, and remove .venv
	@rm -rf .venv

# A .venv is kept and brought up to date if the last set-up ended well; otherwise it is made anew.
$(STAMP): pyproject.toml setup.py constraints.txt
	@set -e; \
	if [ -e $(UNFINISHED) ] || ! $(VENV_PYTHON) $(SUPPORTED) || ! $(VENV_PYTHON) -m pip --version >/dev/null 2>&1; then \
		for candidate in "$${PYTHON:-python3.11}" "$${PYTHON:-python3.12}" "$${PYTHON:-python3}"; do \
			if "$$candidate" $(SUPPORTED); then found=$$candidate; break; fi; \
		done; \
		if [ -z "$${found:-}" ]; then \
			echo "$${PYTHON:-python3.11, python3.12, python3}: none is Python 3.11 or 3.12; name one with make PYTHON=..." >&2; \
			exit 1; \
		fi; \
		echo "Making .venv with $$found"; \
		"$$found" -m venv --clear .venv; \
	fi; \
	: > $(UNFINISHED); \
	echo 'Installing localfeat and its dependencies (the first time several GB; to watch: tail -f .venv/install.log)'; \
	$(VENV_PYTHON) -m pip install --disable-pip-version-check --progress-bar off \
		--constraint constraints.txt --editable '.[dev]' > .venv/install.log \
		|| { echo 'Installation failed: reason above, what led there in .venv/install.log' >&2; exit 1; }; \
	rm -f $(UNFINISHED); \
	touch $(STAMP); \
	echo 'Installed'
