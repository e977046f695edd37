# make demo   the whole path in small, on sample text: results and report in runs/demo
# make test   lint, types, tests
# make bench  benchmark the installed ops
#
# Each makes .venv when it is missing. A torch that is already there (in .venv, or in the Python that makes .venv) is kept;
# otherwise torch is installed first, alone, so that nothing else can pull in a build of its own choice.

PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test bench

demo: .venv/installed
	$(BIN)/hyperllama experiment recipes/demo.yaml

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: .venv/installed
	$(BIN)/python -m bench.harness --quick

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
