# make serve:       install, build, serve the bundled demo model on 127.0.0.1:8000
# make test:        install, build, run the whole suite
# make newest:      the server's tests on the newest versions that pyproject.toml allows, in .venv-newest
# make constraints: rewrite constraints.txt, the exact versions that the first two install
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEWEST := .venv-newest
JOBS ?= $(shell nproc)
SERVE_ARGS ?=
TEST_ARGS ?=
SERVER_TESTS := tests/api tests/engine/test_engine_client.py
SOURCES := pyproject.toml constraints.txt setup.py csrc/cuda/nvcc.py $(shell find CMakeLists.txt csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.def' -o -name CMakeLists.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve test quick lint newest constraints asan clean
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
	$(BIN)/python tools/list_large.py

# Requirements of the build. The package is then built without isolation, so that torch is downloaded once.
BUILD_REQUIRES := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")

$(VENV)/.build: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c '$(BUILD_REQUIRES)' | $(BIN)/pip install -q --progress-bar off -c constraints.txt -r /dev/stdin
	touch $@

$(VENV)/.serve: $(VENV)/.build $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --progress-bar off --no-build-isolation -c constraints.txt -e ".[bench]"
	touch $@

$(VENV)/.test: $(VENV)/.build $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install -q --progress-bar off --no-build-isolation -c constraints.txt -e ".[bench,test]"
	touch $@ $(VENV)/.serve

# Reinstalled each time, for newer versions. The library it builds also works in .venv: torch's ABI is stable.
newest:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -c '$(BUILD_REQUIRES)' | $(NEWEST)/bin/pip install -q --progress-bar off -r /dev/stdin
	PATH="$(CURDIR)/$(NEWEST)/bin:$$PATH" $(NEWEST)/bin/pip install -q --progress-bar off --no-build-isolation -e ".[bench,test]"
	$(NEWEST)/bin/pip list
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -P -m pytest -q -n $(JOBS) --dist loadfile $(SERVER_TESTS) $(TEST_ARGS)

constraints: $(VENV)/.build
	$(BIN)/pip install -q --progress-bar off "uv>=0.13,<0.14"
	$(BIN)/python tools/make_constraints.py

# Every kernel of every instruction set under the address and undefined-behaviour sanitizers.
asan: $(VENV)/.build
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/asan -GNinja -DFUSELINE_ASAN=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/asan -j $(JOBS)
	build/asan/csrc/tests/kernel_driver

clean:
	rm -rf build dist *.egg-info $(VENV) $(NEWEST) .cache
