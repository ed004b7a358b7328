# Every target does its own set-up: a .venv, torch, the compiled kernels. What it needs beforehand
# is Python 3.10 or later (with venv), a C++ compiler and make.
#
#   PYTHON       the interpreter that .venv is made with
#   TORCH        what is installed where PYTHON has no torch that is new enough
#   TRITON       for make aot: a version of Triton that is not the one in .venv
#   WORKERS      processes that share the tests, each with torch's threads
#   TORCH_INDEX  package index to take it from. On Linux the common index has a torch of several
#                gigabytes, with CUDA; PyTorch's own index has one for the CPU (pytorch.org,
#                "Get started", Compute platform: CPU, shows its address).

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
WORKERS ?= 2
TRITON ?=
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := setup.py pyproject.toml $(shell find csrc -name '*.cpp' -o -name '*.h')
NEW_ENOUGH := import torch; v = torch.__version__.split("+")[0].split(".")[:2]; \
	raise SystemExit(tuple(map(int, v)) < (2, 11))
READY_FOR_GPU := import pytest, torch, triton; \
	raise SystemExit(None if torch.cuda.is_available() else "torch finds no GPU on this machine")
OPS := unfold conv2d linear patch_embed topk_attention attention_with_penalty projected_step
SANITIZED := build/sanitize/lib
# Threads that wait for work sleep. They would take the processor from another process's: two
# processes of two threads on two cores need seven times as long if they don't.
PATIENT := OMP_WAIT_POLICY=passive
NVCC_PACKAGES := $(foreach part,cuda-nvcc cuda-crt cuda-cccl cuda-runtime nvvm,'nvidia-$(part)==13.0.*')

.DEFAULT_GOAL := help
.PHONY: help demo test bench scaling lint asan aot nvcc wheel gpu clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo ## train, attack and compare on real images; writes demo.png
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.dev ## every test (ARGS="-k conv2d" for some)
	$(PATIENT) $(BIN)/python -m pytest tests -n $(WORKERS) $(ARGS)

bench: $(VENV)/.bench ## every kernel against PyTorch; writes bench.json and bench.png
	$(BIN)/python -m pyvit bench --json bench.json --plot bench.png $(ARGS)

scaling: $(VENV)/.bench ## time against sizes, batch and threads; writes scaling.json and scaling.png
	$(BIN)/python -m pyvit bench --scaling --json scaling.json --plot scaling.png $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Built into a folder of its own, which stands before the checkout on the path (the pytest script,
# unlike python -m pytest, leaves the working directory off it). Compilers started by torch.compile
# are slow under sanitizers, and Triton's interpreter has nothing to do with what was built: those
# tests stay out. Emulated CUDA kernels run once for every op, in several orders of their threads.
asan: $(VENV)/.dev ## op tests under address and undefined-behaviour sanitizers (OPS="conv2d")
	PYVIT_SANITIZE=1 $(BIN)/python setup.py -q build --build-lib $(SANITIZED)
	export PYTHONPATH=$(CURDIR)/$(SANITIZED) ASAN_OPTIONS=detect_leaks=0 \
	    LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)"; \
	cd tests && export $(PATIENT) && \
	../$(BIN)/python -c 'import pyvit._C as c; assert c.build_info()["sanitized"], c.__file__' && \
	../$(BIN)/pytest -n $(WORKERS) -p no:cacheprovider $(OPS:%=test_%*.py) test_backends.py \
	    -k "not compile and not triton and not cuda-emulated and not other_kernels"

# Another version than .venv's is compiled with from a folder of its own, first on the path.
aot: $(VENV)/.dev ## the Triton kernels compiled for sm_80 and sm_90, no GPU needed (TRITON=3.6.0)
	@[ -z "$(TRITON)" ] || [ -d build/triton-$(TRITON) ] || \
	    $(PIP) install --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=$(if $(TRITON),build/triton-$(TRITON):)$${PYTHONPATH-} \
	    $(BIN)/python benchmarks/aot.py --json build/aot.json $(ARGS)

# The compiler alone, from the package index: it needs no GPU and no driver.
nvcc: $(VENV)/.dev ## the CUDA kernels compiled for sm_80 and sm_90a, no GPU needed
	@[ -n "$$CUDA_HOME" ] || command -v nvcc >/dev/null || [ -d build/nvcc ] || \
	    $(PIP) install --no-deps --target build/nvcc $(NVCC_PACKAGES)
	$(BIN)/python benchmarks/nvcc.py --launches --json build/nvcc.json $(ARGS)

wheel: $(VENV)/.torch ## a wheel in dist/
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

# With PYTHON itself where it has a torch that finds the GPU: nothing is installed then. A machine
# with a GPU often has a processor that no other test machine has: its kernels are tested too.
gpu: ## everything on a machine with a GPU, in ten minutes; results in gpu-results/ (or $OUT)
	@if $(PYTHON) -c '$(READY_FOR_GPU)' 2>/dev/null; \
	then $(PYTHON) benchmarks/on_gpu.py $(ARGS); \
	else $(MAKE) $(VENV)/.dev && $(BIN)/python -c '$(READY_FOR_GPU)' && \
	    $(BIN)/python benchmarks/on_gpu.py $(ARGS); fi

clean: ## remove what the other targets made, .venv too
	rm -rf $(VENV) build dist pyvit.egg-info pyvit/*.so demo.png bench.json bench.png \
	    scaling.json scaling.png gpu-results

# A torch that PYTHON already has is used, not installed again.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "$(PYTHON) is older than 3.10: make PYTHON=/path/to/python3.12 ..."; exit 1; }
	@flag=; if $(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null; then flag=--system-site-packages; fi; \
	echo "making $(VENV)"; $(PYTHON) -m venv $$flag $(VENV) || \
	    { echo "python3 -m venv failed. To mend it: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null || { echo "installing $(TORCH)"; \
	$(PIP) install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)); }
	$(PIP) install 'setuptools>=77' wheel 'pybind11>=2.13' ninja numpy
	@touch $@

# .demo, .bench, .dev: the kernels are built and the extra of that name is installed.
$(VENV)/.demo $(VENV)/.bench $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	@echo "building the kernels (a few minutes the first time) and installing what $* needs"
	$(PIP) install --no-build-isolation --editable '.[$*]'
	@touch $@

$(VENV)/.dev: $(VENV)/.peers

$(VENV)/.peers: $(VENV)/.torch tests/requirements-nodeps.txt
	$(PIP) install --no-deps --requirement tests/requirements-nodeps.txt
	@touch $@
