# `make` lists the targets. Everything runs in .venv, which is created from requirements.lock on first use. CUDA kernels
# are compiled for the GPUs of this machine; FORCE_CUDA=1 compiles them without a GPU, for TORCH_CUDA_ARCH_LIST.
.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-family fuzz gpu-test gpu-check gpu-kit sanitize mutate floor lint ui bench \
  screenshots tour image image-cpu cluster cluster-test cluster-down lock sbom audit clean
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check
# uv is three times as fast as pip, but ignores pip's configuration. pip is used if that names an index or a proxy, or
# if uv fails.
PIP_SETTINGS := (index-url|no-index|proxy|trusted-host|client-cert)=
INSTALL = $$($(BIN)/python -m pip config list < /dev/null | grep -qE '$(PIP_SETTINGS)' \
  && echo '$(PIP_INSTALL)' || echo '$(BIN)/uv pip install --python $(BIN)/python --system-certs --compile-bytecode')
# $(call install,COMMAND,OPTIONS) installs the requirements that a command prints.
install = $1 | $(INSTALL) $2 -r /dev/stdin || $1 | $(PIP_INSTALL) $2 -r /dev/stdin
# Files whose hash is not in the lock are refused. Packages without a wheel are built by the locked setuptools.
LOCKED := --require-hashes --no-build-isolation
# The maximum number of processes of `make test`.
JOBS ?= 4
# TORCH=cpu installs torch from TORCH_INDEX and leaves out the packages OF_CUDA. That index has other files than PyPI,
# so the lock has no hashes for them. nvidia-ml-py, which reads a GPU's load, stays. The environment remembers the
# choice, so a change of the lock does not replace it by torch with CUDA.
TORCH ?= $(shell cat $(VENV)/.torch 2> /dev/null)
ifneq ($(filter-out cpu,$(TORCH)),)
$(error TORCH must be cpu or nothing, got $(TORCH))
endif
ifneq ($(wildcard $(VENV)/.torch),)
ifneq ($(strip $(TORCH)),$(shell cat $(VENV)/.torch))
$(error $(VENV) was made with TORCH=$(shell cat $(VENV)/.torch), got TORCH=$(TORCH); remove $(VENV) first)
endif
endif
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
OF_CUDA := torch==|torchvision==|triton==|cuda-|nvidia-(cu|nccl|nv)
# Changes of other files do not make the commit of an image dirty; see components/runs/environment.py.
CODE := ':(top)*.py' ':(top)*.cpp' ':(top)*.cu' ':(top)*.h'
PORT ?= 5000
DOCKER ?= docker
IMAGE ?= maskrcnn:dev
# For `make image`: another base, such as python:3.12-slim-bookworm@sha256:…; by default that of the Dockerfile.
NGC_IMAGE ?=
PYTHON_IMAGE ?=
SERVICE ?= pypi
RUNS ?= runs/shapes_demo
# For `make mutate`: the files (default: all), the number of mutants, the seed of the sample.
FILES ?=
SAMPLE ?= 200
SEED ?= 0
# DVC runs `python`, which must be that of .venv.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | sort -u)
export FORCE_CUDA ?= $(if $(GPUS),,0)
ifneq ($(GPUS),)
export TORCH_CUDA_ARCH_LIST ?= $(GPUS)
endif

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.built  ## create .venv with the locked packages; PYTHON=… is the interpreter, TORCH=cpu omits CUDA

# The system's python3 is tried first. venv needs ensurepip, which Debian puts in a separate package.
$(VENV)/.installed: requirements.lock setup.py
	@python="$(PYTHON)"; [ "$$python" ] || for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	  $$name -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2> /dev/null && \
	    python=$$name && break; \
	done; \
	[ "$$python" ] || { \
	  echo "error: no Python 3.11 to 3.14 with the module ensurepip on PATH; install one (on Debian and Ubuntu" \
	  "python3 and python3-venv), or name it: make venv PYTHON=/path/to/python"; exit 1; }; \
	echo "installing into $(VENV) with $$python: about $(if $(TORCH),1,5) GB, some minutes"; \
	[ -x $(BIN)/pip ] || "$$python" -m venv $(VENV)
	.ci/locked uv setuptools | $(PIP_INSTALL) --quiet --require-hashes -r /dev/stdin
ifeq ($(TORCH),cpu)
	$(call install,.ci/locked torch torchvision | sed '/^ /d; s/ *\\$$//',--no-deps --index-url $(TORCH_INDEX))
	$(call install,.ci/locked --but '$(OF_CUDA)',$(LOCKED))
else
	$(INSTALL) $(LOCKED) -r requirements.lock || $(PIP_INSTALL) $(LOCKED) -r requirements.lock
endif
	@echo $(TORCH) > $(VENV)/.torch
	CUDA_OPS=0 $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@# .dvc/config sets no_scm, so that `dvc repro` works in a tree without git; with git, DVC uses it.
	@if [ -e .git ]; then $(BIN)/dvc config --local core.no_scm false; fi
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(wildcard cuda_ops/csrc/*.* cuda_ops/csrc/cuda/*)
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

demo: venv  ## generate data, train, evaluate, predict, benchmark; print the result (6 minutes on 2 cores)
	$(BIN)/dvc repro
	@$(BIN)/python -m pipelines.summary

# Each process computes with one thread, so that they do not wait for one another. There is one process more than cores,
# since some tests wait.
test: venv  ## run the quick tests, in a process for each core and one more, at most JOBS (4)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses $(JOBS) \
	  --dist worksteal

test-slow: venv  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow

test-family: venv  ## overfit each kind of network on four images (minutes each)
	$(BIN)/python -m pytest -m slow tests/components/test_memorise.py

fuzz: venv  ## give the readers of annotations, images, weights and YAML damaged files for ten minutes; FUZZ_SECONDS=120
	FUZZ_SECONDS=$(or $(FUZZ_SECONDS),120) $(BIN)/python -m pytest -v -s tests/test_fuzz.py

gpu-test: venv  ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

gpu-check: venv  ## run the GPU session, 8 minutes: tests, AP, benchmarks, sanitizers; writes build/gpu/summary.md
	KIT=none PYTHON=$(CURDIR)/$(BIN)/python .ci/gpu/session

gpu-kit: venv  ## write build/gpu_kit: what a GPU machine without network or nvcc needs (docs/gpu.md)
	PYTHON=$(CURDIR)/$(BIN)/python .ci/gpu/make_kit

sanitize: venv  ## run the operators' tests on the CPU under AddressSanitizer; needs g++
	PYTHON=$(BIN)/python .ci/sanitize

mutate: venv  ## mutation testing: do tests notice mistakes in a copy of the code? FILES=… SAMPLE=200 SEED=0
	$(BIN)/python .ci/mutate.py --sample $(SAMPLE) --seed $(SEED) $(FILES)

floor:  ## build and test the operators with the oldest and the newest torch and nvcc (12 GB, temporarily)
	PYTHON=$(or $(PYTHON),python3) .ci/floor

lint: $(VENV)/.installed  ## check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

ui: venv  ## show all runs in MLflow, at http://127.0.0.1:5000 (PORT=… changes the port)
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port $(PORT)

bench: venv  ## measure throughput, step time, memory and each operator, compared with torchvision
	$(BIN)/maskrcnn benchmark
	$(BIN)/python -m cuda_ops.benchmark

screenshots: venv  ## make docs/images/ from mlflow.db and RUNS (runs/shapes_demo); needs Chromium
	PYTHONPATH=. $(BIN)/python docs/screenshots.py $(RUNS)

tour: venv  ## run docs/tour.ipynb and keep what it shows (8 minutes on 2 cores)
	PYTHONPATH=. $(BIN)/python docs/run_tour.py

image: VARIANT := gpu
image:  ## build the container image for NVIDIA GPUs; IMAGE=REGISTRY/NAME:TAG, DOCKER=podman for another builder
image-cpu: VARIANT := cpu
image-cpu:  ## build the container image for CPUs
image image-cpu:
	@command -v $(DOCKER) > /dev/null || { \
	  echo "error: $(DOCKER) is not on PATH; install Docker, or name another builder: make $@ DOCKER=podman"; exit 1; }
	@$(DOCKER) info > /dev/null 2>&1 || { \
	  echo "error: $(DOCKER) cannot reach its daemon; start it, and see that you may use it: $(DOCKER) info"; exit 1; }
	$(DOCKER) build --build-arg VARIANT=$(VARIANT) \
	  $(foreach base,NGC_IMAGE PYTHON_IMAGE,$(if $($(base)),--build-arg $(base)=$($(base)))) \
	  --build-arg COMMIT="$$(git rev-parse --verify HEAD 2> /dev/null)$$( \
	    git diff --name-only HEAD -- $(CODE) 2> /dev/null | sed 's/.*/-dirty/;q')" \
	  --tag $(IMAGE) .

CLUSTER := $(BIN)/python tests/cluster
cluster: venv  ## build from sources and start Kubernetes with the training operators, as root (docs/cluster.md)
	$(CLUSTER)/cluster.py up
	$(CLUSTER)/operators.py up
	$(CLUSTER)/images.py
	$(CLUSTER)/cluster.py load images

cluster-test: venv  ## run the tests on that cluster
	PATH="$$($(CLUSTER)/cluster.py bin):$$PATH" KUBECONFIG="$$($(CLUSTER)/cluster.py kubeconfig)" \
	  $(BIN)/python -m pytest -m cluster tests/cluster

cluster-down: venv  ## stop that cluster, and leave nothing but what was built
	$(CLUSTER)/cluster.py down

COMPILE = $(BIN)/uv pip compile setup.py --universal --python-version 3.11 --generate-hashes --no-annotate \
  --no-emit-index-url --quiet --custom-compile-command "make lock" --output-file

lock: venv  ## update both locks, with hashes, from setup.py, keeping versions that are still allowed
	$(COMPILE) requirements.lock --all-extras
	$(COMPILE) requirements.image.lock --extra pipelines --extra build --constraint requirements.lock

# Both tools run in environments of their own.
sbom: venv  ## write build/sbom.json: the packages of .venv with licences, in CycloneDX format
	@mkdir -p build
	$(BIN)/uv tool run --from cyclonedx-bom==7.5.0 cyclonedx-py environment $(BIN)/python \
	  --output-reproducible --output-format JSON --output-file build/sbom.json

audit: venv  ## look up the locked packages among the known vulnerabilities; SERVICE=pypi or osv
	$(BIN)/uv tool run pip-audit==2.10.1 --requirement requirements.lock --require-hashes --disable-pip --strict \
	  --vulnerability-service $(SERVICE) --progress-spinner off

clean:  ## delete caches and build outputs, including the compiled operators; keeps data, runs and .venv
	rm -rf build dist *.egg-info cuda_ops/_C*.so $(VENV)/.built .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
