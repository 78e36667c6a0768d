# The two commands of the README, and the pieces they are made of. Everything is made inside $(VENV) and models/.
VENV ?= .venv
PYTHON ?= python3
# A pinned Torch keeps the tests reproducible; the demo does not need it.
TORCH ?= torch==2.13.0
RUN = sh examples/with-openblas $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/demo.stamp
	$(RUN)/python examples/demo.py

test: $(VENV)/test.stamp lint
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(RUN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/test.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "$(PYTHON) must be Python 3.11 or newer with venv (Debian: apt-get install python3-venv);" \
	        "name another with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/demo.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q -e .
	touch $@

$(VENV)/test.stamp: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install -q "$(TORCH)"
	$(VENV)/bin/python -m pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) models .cache build dist *.egg-info
