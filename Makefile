# make demo   the main job on the embedded data set        make test       the tests (under 12 minutes on two cores)
# make check  ruff, mypy and the floors                     make test-slow  the long checks too
# NOVENV=1 uses $(PYTHON) as it is and installs nothing (a machine that already holds torch and the packages).
PYTHON ?= python3
VENV   ?= .venv
ifdef NOVENV
PY    := $(PYTHON)
READY :=
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
endif
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install -q
# two processes of one thread each, where pytest-xdist is there
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest $$($(PY) -c 'import xdist; print("-n 2 --dist loadfile --no-loadscope-reorder")' 2>/dev/null)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test test-slow check clean
demo: $(READY)
	$(PY) -m bench demo
test: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PYTEST)
test-slow: $(READY)
	$(PYTEST) --slow
check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest tests/test_floors.py
clean:
	rm -rf $(VENV)

$(VENV)/.ready: requirements.txt requirements-dev.txt requirements-nodeps.txt pyproject.toml
	@echo "setting up $(VENV) (once; about a minute, more where pip fetches the CUDA build of torch) ..."
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "sparsecert needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one with PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-nodeps.txt
	$(PIP) --no-deps -e .
	touch $@
