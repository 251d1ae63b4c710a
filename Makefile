# make demo, make test, make lint, make bench: each sets up .venv first where that is needed.
#
#   PYTHON=python3.12        the interpreter to make .venv from
#   TENSORFLOW=tensorflow==2.20.*    the TensorFlow to build for

PYTHON ?= python3
TENSORFLOW ?= tensorflow==2.21.*
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Two at a time: each process of the tests grows to some 6 GB. Long tests begin first (tests/conftest.py).
PYTEST_ARGS ?= -n 2 --dist worksteal

# What the installed package depends on: compiled code and build files. Python files are used in place.
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt freezeops/_version.py \
	$(wildcard cmake/*) $(wildcard build_backend/*.py) $(shell find csrc -name '*.h' -o -name '*.cc' -o -name '*.cu')

.PHONY: all setup demo test lint format bench clean

all: setup
setup: $(STAMP)

$(PY):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip

$(STAMP): $(BUILD_FILES) | $(PY)
	$(PY) -m pip install --quiet '$(TENSORFLOW)'
	$(PY) -m pip install --quiet -e '.[test,demo,dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(PY) examples/demo_digits.py

test: $(STAMP)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cc' -o -name '*.cu')
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc -name '*.h' -o -name '*.cc' -o -name '*.cu')

bench: $(STAMP)
	$(PY) -m pip install --quiet -e '.[bench]'
	$(PY) benchmarks/bench_ops.py
	$(PY) benchmarks/bench_step.py
	$(PY) benchmarks/bench_sparse.py
	$(PY) benchmarks/bench_compact.py --plot docs/images

clean:
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache
	rm -f freezeops/libfreezeops_tf*.so freezeops/libfreezeops_tf*.json freezeops/_host*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
