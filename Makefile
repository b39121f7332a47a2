# Everything a newcomer types. Each target sets up what it needs in .venv*/ and nothing else.
PYTHON ?= python3
# A CPU build of torch wherever one is at hand; the tests need no GPU.
TORCH ?= torch==2.13.0
# Two processes. A file's tests stay in one of them, because they share what is slow to set up.
SIDE_BY_SIDE = --numprocesses 2 --dist loadfile
# One thread each: more would only wait for each other.
ONE_THREAD = OMP_NUM_THREADS=1
# Modules are compiled when they are first imported: most of an engine's never are. That byte code is kept, whatever the
# caller's environment says: tests start many processes, and compiling an engine's modules takes as long as their import.
unexport PYTHONDONTWRITEBYTECODE
PIP = -m pip install --quiet --disable-pip-version-check --no-compile

CORE = .venv
SGLANG = .venv-sglang
VLLM_RELEASE ?= 0.33.0
VLLM = .venv-vllm-$(VLLM_RELEASE)
# What `make matrix` runs: an engine, or one release of it (sglang==0.5.18); all of them by default.
ENGINE ?= sglang vllm

.PHONY: demo test lint tables conformance-sglang conformance-vllm matrix canary soak clean

demo: $(CORE)/ready
	$(CORE)/bin/nsa-plugin demo
	$(CORE)/bin/nsa-plugin demo --trace examples/traces/sglang_h100.jsonl

# With THOROUGH=1 this and the conformance draw three times as many examples where kernels are interpreted.
test: $(CORE)/ready
	$(ONE_THREAD) $(CORE)/bin/python -m pytest $(SIDE_BY_SIDE)

lint: $(CORE)/ready
	$(CORE)/bin/ruff check .
	$(CORE)/bin/ruff format --check .
	$(CORE)/bin/mypy

tables: $(CORE)/ready
	$(CORE)/bin/python -m benchmarks.tables

soak: $(CORE)/ready
	$(CORE)/bin/python -m benchmarks.soak

conformance-sglang: $(SGLANG)/ready
	$(ONE_THREAD) PYTHONPATH=$(CURDIR)/tests/sglang/stubs $(SGLANG)/bin/python -m pytest $(SIDE_BY_SIDE) tests/sglang tests/plugin/test_examples.py
	PYTHONPATH=$(CURDIR)/tests/sglang/stubs $(SGLANG)/bin/nsa-plugin demo --engine sglang --rounds 10

conformance-vllm: $(VLLM)/ready
	$(ONE_THREAD) $(VLLM)/bin/python -m pytest $(SIDE_BY_SIDE) tests/vllm tests/plugin/test_examples.py

matrix: $(CORE)/ready
	$(CORE)/bin/python -m benchmarks.matrix.run $(ENGINE)

canary: $(CORE)/ready
	$(CORE)/bin/python -m benchmarks.matrix.run --newest $(ENGINE)

$(CORE)/ready: pyproject.toml
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python $(PIP) $(TORCH)
	$(CORE)/bin/python $(PIP) --editable '.[dev]'
	touch $@

$(SGLANG)/ready: pyproject.toml tests/sglang/requirements.txt tests/sglang/requirements-without-dependencies.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python $(PIP) --requirement tests/sglang/requirements.txt
	$(SGLANG)/bin/python $(PIP) --no-deps --requirement tests/sglang/requirements-without-dependencies.txt
	$(SGLANG)/bin/python $(PIP) --no-deps --editable .
	touch $@

$(VLLM)/ready: pyproject.toml tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python $(PIP) --requirement tests/vllm/requirements.txt
	$(VLLM)/bin/python $(PIP) --no-deps vllm==$(VLLM_RELEASE)
	$(VLLM)/bin/python $(PIP) --no-deps --editable .
	touch $@

clean:
	rm -rf $(CORE) $(SGLANG) .venv-vllm-* .venv-matrix-* .venv-wheels build *.egg-info
