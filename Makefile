# make demo, make test, make lint, make bench: each sets up .venv first where that is needed.
# make fuzz, make fuzz-mutants, make fuzz-threads: hostile calls of the ops, under sanitizers.
# make test-gpu, make sanitize, make bench-gpu: on a machine with a GPU and nvcc, without TensorFlow; see docs/gpu.md.
#
#   PYTHON=python3.12        the interpreter to make .venv from
#   TENSORFLOW=tensorflow==2.20.*    the TensorFlow to build for
#   FREEZEOPS_CUDA=ON, OFF or AUTO   whether CUDA kernels are compiled

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

# The Python of a GPU machine: with NumPy, pytest, hypothesis, rich, and CuPy or PyTorch; TensorFlow is not needed.
GPU_PYTHON ?= $(PYTHON)
GPU_PYTEST := $(GPU_PYTHON) -m pytest --confcutdir=tests/gpu
# A quick subset: every kernel, few examples.
SANITIZE := FREEZEOPS_TEST_EXAMPLES=8 compute-sanitizer --error-exitcode=1 --target-processes=all
SANITIZED := $(GPU_PYTEST) tests/gpu/test_kernels.py tests/gpu/test_fused_kernels.py -k 'not host and not 31_bits and not failed_launch'

# The library of ops with AddressSanitizer and UBSan, for the fuzzer.
FUZZ_BUILD := build/fuzz
FUZZ_CALLS ?= 20000
FUZZ_SEED ?= 0
CONFIGURE = cmake -S . -G Ninja -DPython_EXECUTABLE=$(abspath $(PY)) -DFREEZEOPS_CUDA=OFF
FUZZED = ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
	UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" $(PY)

.PHONY: all setup demo test test-gpu sanitize fuzz fuzz-build fuzz-mutants fuzz-threads lint format bench bench-gpu clean

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

test-gpu:
	$(GPU_PYTEST) tests/gpu

sanitize:
	$(SANITIZE) --tool=memcheck $(SANITIZED)
	$(SANITIZE) --tool=racecheck $(SANITIZED)
	$(SANITIZE) --tool=initcheck $(SANITIZED)

# 20,000 calls of the ops, most of them wrong in one place; see tests/fuzz/fuzz_ops.py. A few hundred are in `make test`.
fuzz: fuzz-build
	$(FUZZED) tests/fuzz/fuzz_ops.py --library $(FUZZ_BUILD)/libfreezeops_tf*.so \
		--calls $(FUZZ_CALLS) --seed $(FUZZ_SEED) --log $(FUZZ_BUILD)/fuzz.log

fuzz-build: $(STAMP)
	$(CONFIGURE) -B $(FUZZ_BUILD) -DFREEZEOPS_SANITIZE=address,undefined
	cmake --build $(FUZZ_BUILD) --target freezeops_ops

# That the fuzzer finds planted faults.
fuzz-mutants: fuzz-build
	$(FUZZED) tests/fuzz/mutants.py $(FUZZ_BUILD)

# Bits that several threads read and clear, with ThreadSanitizer.
fuzz-threads: $(STAMP)
	$(CONFIGURE) -B build/threads -DFREEZEOPS_SANITIZE=thread
	cmake --build build/threads --target waiting_bits
	for isa in generic avx2 avx512; do FREEZEOPS_ISA=$$isa build/threads/waiting_bits || exit 1; done

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/typos
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cc' -o -name '*.cu')
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cc' -o -name '*.cu')

bench: $(STAMP)
	$(PY) -m pip install --quiet -e '.[bench]'
	$(PY) benchmarks/bench_ops.py
	$(PY) benchmarks/bench_step.py
	$(PY) benchmarks/bench_sparse.py
	$(PY) benchmarks/bench_compact.py --plot docs/images
	$(PY) benchmarks/bench_fused.py
	$(PY) benchmarks/bench_fit.py

bench-gpu:
	$(GPU_PYTHON) benchmarks/bench_gpu.py

clean:
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache
	rm -f freezeops/libfreezeops_tf*.so freezeops/libfreezeops_tf*.json freezeops/_host*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
