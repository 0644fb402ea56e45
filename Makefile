# Two commands, from nothing but Python, a C++ compiler and make:
#   make quickstart   builds fastrlhf and runs SFT, a reward model and PPO on arithmetic in words
#   make test         builds it and runs the tests
# With a GPU: make gpu-check, which builds, tests and measures the GPU kernels in eight minutes.
# Everything lands in .venv, .venv-peers and build/. PYTHON chooses the interpreter, TORCH the torch to install.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without a GPU the plain `torch` pulls gigabytes of CUDA packages; this version has a CPU build that was tried.
TORCH ?= $(shell [ -e /dev/nvidiactl ] && echo torch || echo torch==2.13.0)
# Tests run in so many processes at once, of one thread each; the slow ones, which train, one at a time on all.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PEERS ?= .venv-peers
PEERS_PIP := $(PEERS)/bin/python -m pip --disable-pip-version-check -q

SOURCES := $(shell find src kernels python cmake -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake') CMakeLists.txt pyproject.toml

.PHONY: quickstart test slow-test parallel-test gpu-kernel-test triton-test cuda-host-test ahead-of-time peers peers-test host-runs lint bench gpu-check wheel clean

quickstart: $(VENV)/.installed
	$(BIN)/fastrlhf chain examples/arithmetic/chain.yaml --directory build/quickstart

test: $(VENV)/.installed
	$(PYTEST)

slow-test: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow --ignore tests/parallel --ignore tests/training/test_plan.py

# Everything over several processes, gloo on this machine's cores: the matrix of layouts, kills, checkpoints, memory.
parallel-test: $(VENV)/.installed
	$(PYTEST) tests/parallel tests/training/test_plan.py -m "slow or not slow"

# The GPU kernels without a GPU: CUDA's sources built for the host and run thread by thread, Triton's on its interpreter, and
# compiled ahead of time.
gpu-kernel-test: triton-test cuda-host-test ahead-of-time

triton-test: $(VENV)/.installed
	TRITON_INTERPRET=1 $(PYTEST) tests/ops tests/generation/test_kernels.py --kernels triton

cuda-host-test: $(VENV)/.installed
	$(PYTEST) tests/ops tests/refit/test_cuda_ipc.py --kernels cuda

ahead-of-time: $(VENV)/.installed
	$(BIN)/python scripts/ahead_of_time.py --processes $(JOBS)

# What people use today, to test and benchmark against, in an environment of its own. verl first: it holds transformers back.
peers: $(PEERS)/.installed

peers-test: $(PEERS)/.installed
	FASTRLHF_OLDER_HOSTS=$(CURDIR)/$(PEERS)/hosts $(PEERS)/bin/python -m pytest tests/peers
	FASTRLHF_OPENRLHF=$(CURDIR)/$(PEERS)/openrlhf $(PEERS)/bin/python -m pytest tests/peers/test_openrlhf_seams.py

bench: $(VENV)/.installed
	$(BIN)/python -m bench --device cpu --out bench/results/cpu.json

# On a machine with an NVIDIA GPU and nvcc, with PYTHON's own torch and packages: no environment is made, nothing fetched.
# OPTIONS="--only bench,plots --minutes 9"
gpu-check:
	$(PYTHON) scripts/gpu_check.py $(OPTIONS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml -p fastrlhf

wheel: $(VENV)/.venv
	$(PIP) install build
	$(BIN)/python -m build --wheel --outdir dist .

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	touch $@

$(VENV)/.torch: $(VENV)/.venv
	$(PIP) install '$(TORCH)' numpy
	touch $@

$(VENV)/.wheel: $(VENV)/.torch $(SOURCES) $(shell find python kernels -name '*.py' -o -name '*.json')
	rm -rf build/wheel
	$(PIP) wheel --no-deps -w build/wheel . -Cbuild-dir=build/make
	touch $@

# Not editable: what is tested is what a user installs.
$(VENV)/.installed: $(VENV)/.wheel
	$(PIP) install --force-reinstall --no-deps build/wheel/*.whl
	$(PIP) install "$$(echo build/wheel/*.whl)[test,bench]"
	touch $@

$(PEERS)/.torch:
	$(PYTHON) -m venv $(PEERS)
	$(PEERS_PIP) install --upgrade pip
	$(PEERS_PIP) install '$(TORCH)' numpy
	touch $@

$(PEERS)/.hosts: $(PEERS)/.torch
	$(PEERS_PIP) install verl uvicorn fastapi cachetools pyzmq msgspec
	$(PEERS_PIP) install trl
	$(PEERS_PIP) install --no-deps --target $(PEERS)/openrlhf openrlhf==0.11.2  # beside the environment: it has a package "tests"
	for host in trl-1.13.0 trl-1.14.2 trl-1.15.0 verl-0.7.1 verl-0.8.0; do \
	  $(PEERS_PIP) install --no-deps --target $(PEERS)/hosts/$$host $${host%-*}==$${host#*-} || exit 1; done
	touch $@

$(PEERS)/.installed: $(PEERS)/.hosts $(VENV)/.installed
	$(PEERS_PIP) install --force-reinstall --no-deps build/wheel/*.whl
	$(PEERS_PIP) install "$$(echo build/wheel/*.whl)[test,bench]"
	touch $@

# Training runs of TRL and verl as they are and with ours in their place: the same metrics?
host-runs: $(PEERS)/.installed
	$(PEERS)/bin/python -m bench.hosts --out build/hosts.json

$(VENV)/.lint: $(VENV)/.installed
	$(PIP) install "$$(echo build/wheel/*.whl)[lint]"
	touch $@

clean:
	rm -rf $(VENV) $(PEERS) build dist
