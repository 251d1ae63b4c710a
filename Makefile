# make demo, make test, make lint, make bench: each sets up .venv first where that is needed.
# make test-keras KERAS=3.12.*: the core of the tests with another Keras; KERAS=nightly for the development version.
# make fuzz, make fuzz-mutants: hostile calls of the ops, under sanitizers.
# make sanitize-cpu: the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer, without TensorFlow.
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

# Two at a time: each process of the tests grows to some 6 GB. Long tests begin first (tests/conftest.py). And in three runs:
# what XLA compiles stays mapped, and a process may have 65,530 mappings (vm.max_map_count); a full run takes more.
PARALLEL := -n 2 --dist worksteal
FIRST_TESTS := tests/promise tests/partitions
SECOND_TESTS := tests/step tests/ops

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
SANITIZED_CPU = ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
	UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)"
FUZZED = $(SANITIZED_CPU) $(PY)
KERNELS_BUILD = cmake -S . -G Ninja -DFREEZEOPS_KERNELS_ONLY=ON -DFREEZEOPS_WERROR=ON

.PHONY: all setup demo test test-keras test-gpu sanitize fuzz fuzz-build fuzz-mutants sanitize-cpu lint tidy tidy-ops format \
	bench bench-gpu clean

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
ifdef PYTEST_ARGS
	$(PY) -m pytest $(PYTEST_ARGS)
else
	$(PY) -m pytest $(PARALLEL) $(FIRST_TESTS)
	$(PY) -m pytest $(PARALLEL) $(SECOND_TESTS)
	$(PY) -m pytest $(PARALLEL) tests $(addprefix --ignore=,$(FIRST_TESTS) $(SECOND_TESTS))
endif

# Another Keras before that of .venv, whose other packages are used: in a virtual environment of its own.
KERAS ?= 3.12.0
KERAS_VENV = build/keras-$(subst *,x,$(KERAS))
KERAS_PY = $(KERAS_VENV)/bin/python
KERAS_PACKAGE = $(if $(filter nightly,$(KERAS)),--pre keras-nightly,'keras==$(KERAS)')
SITE = import sysconfig; print(sysconfig.get_path("purelib"))
KERAS_TESTS ?= tests/keras_compat tests/promise tests/files/test_saving.py tests/step/test_fused.py \
	tests/partitions/test_compact.py tests/integration/test_mixed_precision.py tests/slots

test-keras: $(STAMP)
	$(PY) -m venv $(KERAS_VENV)
	$(PY) -c '$(SITE)' > $$($(KERAS_PY) -c '$(SITE)')/packages_of_venv.pth
	$(KERAS_PY) -m pip install --quiet --ignore-installed --no-deps $(KERAS_PACKAGE)
	$(KERAS_PY) -c 'import keras; print("Keras", keras.__version__, "in", keras.__path__[0])'
	$(KERAS_PY) -m pytest $(or $(PYTEST_ARGS),$(PARALLEL)) $(KERAS_TESTS)

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

# Every CPU kernel of every instruction set (tests/kernels) under AddressSanitizer and UBSan, and what threads share in
# them under ThreadSanitizer. KERNELS_PYTHON: another interpreter than that of .venv, with NumPy, pytest and hypothesis.
sanitize-cpu: $(if $(KERNELS_PYTHON),,$(STAMP))
	$(KERNELS_BUILD) -B build/kernels-address -DFREEZEOPS_SANITIZE=address,undefined
	$(KERNELS_BUILD) -B build/kernels-thread -DFREEZEOPS_SANITIZE=thread
	cmake --build build/kernels-address --target kernels_c_api
	cmake --build build/kernels-thread --target kernel_threads
	for isa in generic avx2 avx512; do FREEZEOPS_ISA=$$isa build/kernels-thread/kernel_threads || exit 1; done
	FREEZEOPS_KERNELS_LIBRARY=build/kernels-address/libkernels_c_api.so FREEZEOPS_TEST_EXAMPLES=25 \
		$(SANITIZED_CPU) $(or $(KERNELS_PYTHON),$(PY)) -m pytest -q -p no:cacheprovider --confcutdir=tests/kernels tests/kernels

lint: $(STAMP) tidy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/typos
	$(VENV)/bin/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cc' -o -name '*.cu')
	$(PY) -m mypy

# clang-tidy (.clang-tidy): the kernels, their tests and the host module. `tidy-ops`: what includes TensorFlow's headers,
# which takes minutes. CLANG_TIDY and TIDY_PYTHON (with pybind11): others than those of .venv.
CLANG_TIDY ?= $(VENV)/bin/clang-tidy
TIDY_PYTHON ?= $(PY)
TIDY_STAMP := $(if $(filter $(PY),$(TIDY_PYTHON)),$(STAMP))

tidy: $(TIDY_STAMP)
	$(KERNELS_BUILD) -B build/tidy -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
	$(CLANG_TIDY) --quiet -p build/tidy csrc/kernels/cpu/*.cc tests/kernels/cpu_c_api.cc
	$(CLANG_TIDY) --quiet tests/gpu/kernels_c_api.cu -- -x c++ -std=c++17 -Icsrc
	$(CLANG_TIDY) --quiet tests/kernels/threads.cc -- -std=c++17 -Icsrc
	$(CLANG_TIDY) --quiet csrc/host/module.cc -- -std=c++17 -Icsrc $$($(TIDY_PYTHON) -m pybind11 --includes)

tidy-ops: $(TIDY_STAMP)
	cmake -S . -B build/tidy-ops -G Ninja -DPython_EXECUTABLE=$(abspath $(TIDY_PYTHON)) -DFREEZEOPS_CUDA=OFF \
		-DFREEZEOPS_SANITIZE=address -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
	$(CLANG_TIDY) --quiet -p build/tidy-ops $(filter-out %/gpu.cc,$(wildcard csrc/ops/*/*.cc))

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cc' -o -name '*.cu')

bench: $(STAMP)
	$(PY) -m pip install --quiet -e '.[bench]'
	$(PY) benchmarks/bench_ops.py
	$(PY) benchmarks/bench_step.py
	$(PY) benchmarks/bench_sparse.py
	$(PY) benchmarks/bench_sampled_matmul.py
	$(PY) benchmarks/bench_compact.py --plot docs/images
	$(PY) benchmarks/bench_fused.py
	$(PY) benchmarks/bench_fit.py
	$(PY) benchmarks/bench_backward.py
	$(PY) benchmarks/bench_weight_gradient.py --plot docs/images

bench-gpu:
	$(GPU_PYTHON) benchmarks/bench_gpu.py

clean:
	rm -rf build dist *.egg-info $(VENV) .pytest_cache .mypy_cache .ruff_cache
	rm -f freezeops/libfreezeops_tf*.so freezeops/libfreezeops_tf*.json freezeops/_host*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
