# The image that trains on a cluster, for GPUs (based on NVIDIA's PyTorch image, which includes apex) or for CPUs:
#
#   docker build --tag REGISTRY/maskrcnn:1 .                              make image IMAGE=REGISTRY/maskrcnn:1
#   docker build --tag REGISTRY/maskrcnn:1-cpu --build-arg VARIANT=cpu .  make image-cpu IMAGE=REGISTRY/maskrcnn:1-cpu
#
# Building needs no GPU, and running needs no compiler. This project is installed in one virtual environment,
# /opt/maskrcnn. On NVIDIA's image it uses the torch, torchvision and numpy of the image and never replaces them. The
# root file system may be read-only: caches are in /tmp, and data and runs are volumes. The user is 1000, which needs no
# entry in /etc/passwd.
ARG VARIANT=gpu
# 26.06 has torch 2.13.0a0, torchvision 0.27.0a0, CUDA 13.3, Python 3.12. Tags before 26.04 have torch 2.11.0a0
# or older, which setup.py does not allow.
ARG NGC_IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
ARG PYTHON_IMAGE=python:3.12-slim-bookworm

FROM ${NGC_IMAGE} AS base-gpu
FROM ${PYTHON_IMAGE} AS base-cpu

# The virtual environment with torch, and a compiler.
FROM base-gpu AS torch-gpu
# The base's torchrun would start the base's Python, which does not see the environment. It stays torch's own, for any
# script; jobs call components.launch, which has the statuses of the stages.
RUN python3 -m venv --system-site-packages --without-pip /opt/maskrcnn \
    && printf '#!/bin/sh\nexec python -m torch.distributed.run "$@"\n' > /opt/maskrcnn/bin/torchrun \
    && chmod +x /opt/maskrcnn/bin/torchrun

FROM base-cpu AS torch-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY requirements.image.lock /tmp/
# --no-deps: torch's dependencies are installed with the rest, in the locked versions. The index for CPUs has other
# files than PyPI, so the lock has no hashes for them.
RUN python3 -m venv /opt/maskrcnn \
    && sed -nE '/^(torch|torchvision)==/ s/ *\\$//p' /tmp/requirements.image.lock > /tmp/torch.txt \
    && /opt/maskrcnn/bin/python -m pip install --no-cache-dir --no-deps --index-url "${TORCH_INDEX}" \
        --requirement /tmp/torch.txt

# hadolint ignore=DL3006
FROM torch-${VARIANT} AS dependencies
# NVIDIA's image sets PIP_CONSTRAINT to pin all of its packages. We keep only its torch and what is compiled against it.
ENV PATH=/opt/maskrcnn/bin:${PATH} \
    PIP_CONSTRAINT="" \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY setup.py pyproject.toml requirements.image.lock README.md LICENSE .ci/image_requirements.py ./
# Files whose hash is not in the lock are refused. Packages without a wheel are built by the locked setuptools, which
# has no dependencies: --no-deps also keeps pip from complaining that torch's are not there yet.
RUN awk '/^[^ ]/ { kept = /^(setuptools|ninja)==/ } kept' requirements.image.lock > /tmp/build.txt \
    && python -m pip install --require-hashes --no-deps --requirement /tmp/build.txt \
    && python image_requirements.py /tmp/requirements \
    && python -m pip install --require-hashes --no-build-isolation --requirement /tmp/requirements/run.txt \
        --constraint /tmp/requirements/constraints.txt

FROM dependencies AS build
COPY cuda_ops cuda_ops
COPY model model
COPY components components
COPY maskrcnn maskrcnn
COPY pipelines pipelines
COPY recipes recipes
COPY k8s/job k8s/job
ARG VARIANT
# Compute capabilities of A100, A10 and RTX 30, H100, B200; newer GPUs compile the PTX of the last one on first use.
ARG CUDA_ARCHITECTURES="8.0 8.6 9.0 10.0+PTX"
ARG MAX_JOBS=4
RUN FORCE_CUDA="$([ "${VARIANT}" = gpu ] && echo 1 || echo 0)" TORCH_CUDA_ARCH_LIST="${CUDA_ARCHITECTURES}" \
    MAX_JOBS="${MAX_JOBS}" \
    python -m pip wheel --verbose --no-deps --no-build-isolation --wheel-dir /wheels .
# Outside the source tree, so that the installed library is the one that is checked against its references.
WORKDIR /
RUN python -m pip install --no-deps --no-index /wheels/*.whl \
    && python -c 'from cuda_ops import library; assert library.HAS_CPU' && python -m cuda_ops && maskrcnn --version

# hadolint ignore=DL3006
FROM base-${VARIANT} AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/*
# Two layers: the dependencies change rarely, the code often, so most pushes and pulls are of a few megabytes.
COPY --from=dependencies /opt/maskrcnn /opt/maskrcnn
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    PIP_CONSTRAINT="" /opt/maskrcnn/bin/python -m pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
WORKDIR /workspace
COPY --chown=1000:1000 params.yaml ./
RUN mkdir -p data runs && chown 1000:1000 . data runs
ARG COMMIT=""
# USER: some libraries ask for the user's name, and user 1000 may have none.
ENV PATH=/opt/maskrcnn/bin:${PATH} \
    HOME=/tmp \
    USER=maskrcnn \
    XDG_CACHE_HOME=/tmp/cache \
    XDG_CONFIG_HOME=/tmp/config \
    MPLCONFIGDIR=/tmp/cache/matplotlib \
    TORCH_HOME=/tmp/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/tmp/cache/inductor \
    TRITON_CACHE_DIR=/tmp/cache/triton \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    DO_NOT_TRACK=true \
    MASKRCNN_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title=maskrcnn-mlops \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.revision=${COMMIT}
USER 1000:1000
# In place of NVIDIA's entry point, which prints a banner and needs a writable root: tini, as PID 1, passes signals on.
# A program without a handler, such as torchrun during its imports, would lose them as PID 1.
ENTRYPOINT ["tini", "--"]
CMD ["maskrcnn", "--help"]
