# make serve: install, build, serve the bundled demo model on 127.0.0.1:8000
# make test:  install, build, run the whole suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
SERVE_ARGS ?=
TEST_ARGS ?=
SOURCES := pyproject.toml setup.py csrc/cuda/nvcc.py $(shell find CMakeLists.txt csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.def' -o -name CMakeLists.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve test quick lint asan clean
.DELETE_ON_ERROR:

serve: $(VENV)/.serve
	$(BIN)/fuseline serve $(SERVE_ARGS)

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -q -n $(JOBS) --dist loadfile $(TEST_ARGS)

# Without the slow tests.
quick: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -q -n $(JOBS) --dist loadfile -m "not slow" $(TEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .

# What the build needs; the package is then built without isolation, so torch is downloaded once.
$(VENV)/.build:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --progress-bar off "torch>=2.11,<=2.13.0" "setuptools>=77" wheel "pybind11>=2.13" ninja "cmake>=3.26"
	touch $@

$(VENV)/.serve: $(VENV)/.build $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --progress-bar off --no-build-isolation -e .
	touch $@

$(VENV)/.test: $(VENV)/.build $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --progress-bar off --no-build-isolation -e ".[test]"
	touch $@ $(VENV)/.serve

# Every kernel of every instruction set under the address and undefined-behaviour sanitizers.
asan: $(VENV)/.build
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/asan -GNinja -DFUSELINE_ASAN=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/asan -j $(JOBS)
	build/asan/csrc/tests/kernel_driver

clean:
	rm -rf build dist *.egg-info $(VENV) .cache
