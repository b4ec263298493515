# Everything that a person does with this project. It needs make and Python 3.11, 3.12 or 3.13; `make` alone lists what there is.

PYTHON := .venv/bin/python
# Written when everything is installed; holds the place of the checkout.
READY := .venv/.ready

.PHONY: help
help: ## List the commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 18

.PHONY: demo
demo: $(READY) ## Pay 36 sample refunds through Airflow and a local Payroc, and show what became of each
	@$(PYTHON) -m demo run

.PHONY: up
up: $(READY) ## The same in Airflow's web interface, until Ctrl-C
	@$(PYTHON) -m demo up

.PHONY: down
down: ## Stop what `make up` or `make demo` started in another terminal, or left over
	@$(find_any_python); "$$python" -m demo down

.PHONY: reset
reset: ## Remove the demo's data (databases, keys, logs), so that the next start makes it afresh
	@$(find_any_python); "$$python" -m demo reset

.PHONY: clean
clean: reset ## The same, and remove .venv and all caches
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build plugins/*.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
	@echo "Removed .venv and the caches of Python, pytest, mypy, ruff and Hypothesis."

ENV_FILE := .env
.PHONY: env
env: ## Write the secrets that docker-compose.yaml needs into .env, each drawn afresh; one that is there is left alone
	@$(find_any_python); "$$python" docker/env.py $(ENV_FILE)

# Files start in the order of the collection: tests/conftest.py sorts the longest to the front.
PYTEST := $(PYTHON) -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: test
test: $(READY) ## Run all tests
	@$(PYTEST)

.PHONY: test-long
test-long: $(READY) ## The same with the tests of safety at full size, about an hour; docs/safety.md has its figures
	@$(PYTEST) --long

SEEDS := 2000
.PHONY: simulate
simulate: $(READY) ## Play SEEDS=2000 histories of refunds in which everything goes wrong, and count what was paid twice or lost
	@$(PYTHON) -m tests.simulation --seeds $(SEEDS)

.PHONY: bench
bench: $(READY) ## Measure what the project costs beside what others would have written, in half an hour or more; benchmarks/results/ has what came out
	@$(PYTHON) -m benchmarks

.PHONY: bench-quick
bench-quick: $(READY) ## The same in a few minutes; it fails when a figure falls clearly short of its goal
	@$(PYTHON) -m benchmarks --quick

.PHONY: lint
lint: $(READY) ## Check style and layout with ruff
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check

.PHONY: types
types: $(READY) ## Check types with mypy
	@$(PYTHON) -m mypy

.PHONY: format
format: $(READY) ## Put the code into ruff's format
	@$(PYTHON) -m ruff check --fix
	@$(PYTHON) -m ruff format

# It does not wait for $(READY): with a new version in requirements.txt the old constraints.txt cannot be installed any more.
.PHONY: lock
lock: ## Renew constraints.txt after a change of requirements*.txt
	@[ -x $(PYTHON) ] || { echo "Run make .venv first: what renews constraints.txt is installed there." >&2; exit 1; }
	@sed '/^[^#]/,$$d' constraints.txt > .venv/constraints.head
	@sed '/^#/d' constraints.txt > .venv/constraints.body
	@$(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header --no-emit-index-url \
	    --output-file .venv/constraints.body requirements.txt requirements-dev.txt requirements-mysql.txt
	@cat .venv/constraints.head .venv/constraints.body > constraints.txt

# --- .venv --------------------------------------------------------------------------------------------------------------

# A name alone says little: it may be a placeholder of a version manager.
CANDIDATES := python3 python3.13 python3.12 python3.11 python /usr/bin/python3

ifeq ($(CURDIR),$(shell cat $(READY) 2>/dev/null))
CANDIDATES := $(PYTHON) $(CANDIDATES)
else
# There is none, its installation was cut off, or the checkout was moved and the programs in it point to the old place: make it anew.
.PHONY: $(READY)
endif

# The first candidate that can run the code in $(1), or an empty name.
first_python = python=; for candidate in $(CANDIDATES); do \
  if "$$candidate" -c '$(1)' 2>/dev/null; then python=$$candidate; break; fi; done

# For what needs the standard library alone.
ANY_PYTHON := import sys; sys.exit(sys.version_info < (3, 9))
define find_any_python
$(call first_python,$(ANY_PYTHON)); \
if [ -z "$$python" ]; then \
  echo "This needs Python 3.9 or newer, and none was found. Install one so that python3 starts it." >&2; exit 1; fi
endef

# For the packages: Debian keeps the module that installs pip in a package of its own.
RIGHT_PYTHON := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
VENV_PYTHON := import venv, ensurepip; $(RIGHT_PYTHON)
define find_python
$(call first_python,$(VENV_PYTHON)); \
if [ -z "$$python" ]; then $(call first_python,$(RIGHT_PYTHON)); \
  if [ -n "$$python" ]; then \
    echo "Python is here, but it cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv" >&2; \
  else \
    echo "This project needs Python 3.11, 3.12 or 3.13, and none was found. Install one so that python3 or python3.12 starts it." >&2; \
  fi; exit 1; fi
endef

.PHONY: .venv
.venv: $(READY)

# uv does in seconds what takes pip a minute; where it cannot be had, or finds no way to the packages, pip does it.
PIP := $(PYTHON) -m pip --quiet --disable-pip-version-check
REQUIREMENTS := -r requirements.txt -r requirements-dev.txt -c constraints.txt
$(READY): requirements.txt requirements-image.txt requirements-dev.txt constraints.txt pyproject.toml
	@$(find_python); if [ "$$python" != $(PYTHON) ]; then \
	  echo "Creating .venv with $$("$$python" --version) …"; "$$python" -m venv --clear .venv; fi
	@rm -f $(READY)
	@echo "Installing Airflow, Postgres and what else is needed into .venv: about 220 packages, half a minute to three minutes …"
	@$(PIP) install --constraint constraints.txt uv || true
	@$(PYTHON) -m uv pip install --quiet --compile-bytecode --python $(PYTHON) $(REQUIREMENTS) 2>.venv/uv.log \
	  || { echo "uv could not do it (.venv/uv.log says why). Now pip does, which takes longer …"; $(PIP) install $(REQUIREMENTS); }
	@$(PIP) install --no-deps --editable .
	@printf '%s' '$(CURDIR)' > $(READY)
	@echo "The packages are installed."
