# make demo   the whole path in small, on sample text: results and report in runs/demo
# make test   lint, types, tests
# make bench  every op against its roof and peers, briefly; fails when a target is missed
# make sanitize   the tests of the C++ under AddressSanitizer and UndefinedBehaviorSanitizer
#
# Each makes .venv when it is missing. A torch that is already there (in .venv, or in the Python that makes .venv) is kept;
# otherwise torch is installed first, alone, so that nothing else can pull in a build of its own choice.

PYTHON ?= python3
BIN := .venv/bin
CPP_TESTS := tests/kernels tests/merge tests/grow --ignore tests/kernels/test_interpreted.py
CAPABILITIES ?= avx2 avx512
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test bench sanitize

demo: .venv/installed
	$(BIN)/hyperllama experiment recipes/demo.yaml

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: .venv/installed
	$(BIN)/hyperllama bench kernels --quick

# The first wrong access ends the run. Python and torch are not instrumented: the runtime is loaded before them (libstdc++ too, whose
# throw it stands in for), and leaks are theirs.
runtime = $$($(CXX) -print-file-name=$(1))
SANITIZED := LD_PRELOAD="$(call runtime,libasan.so) $(call runtime,libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	HYPERLLAMA_CSRC=build/sanitize/hyperllama/lib
sanitize: .venv/installed-test
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --upgrade --target build/sanitize -C cmake.define.SANITIZE=ON .
	for cpu in $(CAPABILITIES); do \
		ATEN_CPU_CAPABILITY=$$cpu $(SANITIZED) $(BIN)/pytest --capture=sys $(CPP_TESTS) || exit 1; \
	done

.venv/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --disable-pip-version-check -c constraints.txt torch
	@# what torch brought (or pins, such as a CUDA build's Triton) stays; the rest comes in the tested versions
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(BIN)/python -c "import triton" 2>/dev/null && sed -i '/^triton==/d' .venv/constraints.txt || true
	touch $@

.venv/installed: .venv/torch $(SOURCES)
	$(BIN)/pip install --disable-pip-version-check -c .venv/constraints.txt -e .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --disable-pip-version-check -c .venv/constraints.txt -e ".[test]"
	touch $@
