# make test                         builds .venv, then formats-check, lint, types, tests
# make test VENV= PYTHON=python3    the same with an environment that you already have
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
EXTRAS := gpu,hf,cli,demo,dev
ARGS ?=

ifeq ($(strip $(VENV)),)
STAMP :=
RUN := $(PYTHON)
else
STAMP := $(VENV)/.stamp
RUN := $(VENV)/bin/python
endif

.DEFAULT_GOAL := test
.PHONY: venv lint format test pytest demo bench coverage clean

venv: $(STAMP)

# The stamp is younger than both files exactly when the environment is up to date.
$(VENV)/.stamp: pyproject.toml constraints.txt
	$(if $(PYTHON),,$(error Python 3.11 or newer was not found: say make PYTHON=/path/to/python))
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

lint: $(STAMP)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath "$$($(RUN) -c 'import sys; print(sys.executable)')"

format: $(STAMP)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

pytest: $(STAMP)
	$(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

test: lint pytest

# make demo ARGS="--docs"
demo: $(STAMP)
	$(RUN) -m examples.demo $(ARGS)

# make bench ARGS="--only llama --cases 1x4096"
bench: $(STAMP)
	$(RUN) -m benchmarks.memory $(ARGS)

# make coverage ARGS="--only llama,t5 --modes fp32"
coverage: $(STAMP)
	$(RUN) -m benchmarks.coverage $(ARGS)

clean:
	rm -rf build dist demo_output .pytest_cache .ruff_cache .hypothesis
