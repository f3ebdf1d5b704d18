"""What `make venv` installs and which CUDA toolkit setup.py takes, by running both with stand-ins for
pip and for nvcc.
"""

import ast
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[1]
# Writes its arguments, and what it has to read from standard input; pip's configuration is that of PIP_CONFIGURATION.
RECORDER = """#!/bin/sh
case "$*" in *"pip config list") echo "$PIP_CONFIGURATION"; exit ;; esac
echo "${0##*/} $@" >> "$RECORD"
[ "${0##*/}$UV_FAILS" != uvyes ] || exit 2
case "$*" in */dev/stdin) sed 's/^/  /' >> "$RECORD" ;; esac
"""
# An interpreter that makes environments of the above.
MAKES_VENV = """#!/bin/sh
[ "$2" = venv ] || exit 0
mkdir -p "$3/bin"
for name in python pip uv dvc; do cp "$RECORDER" "$3/bin/$name"; done
"""
# Knows its folder, as nvcc does, by the profile that lies beside it; and compiles nothing.
NVCC = """#!/bin/sh
here=$(dirname "$0")
case "$1" in
  --dryrun) [ -f "$here/nvcc.profile" ] && echo "#$ TOP=$here/.." >&2 ;;
  --version) echo "Cuda compilation tools, release {release}, V{release}.1" ;;
  *) echo "cc1plus: fatal error: cuda_runtime.h: No such file or directory" >&2; exit 1 ;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def installed(tmp_path: Path):
    """Lines that `make venv` gives to Python, with what it reads indented below; into an environment
    that does nothing.
    """

    def run(*arguments: str, configuration: str = "") -> list[str]:
        venv, record = tmp_path / "venv", tmp_path / "record"
        record.write_text("")
        recorder = script(tmp_path / "recorder", RECORDER)
        python = script(tmp_path / "python", MAKES_VENV)
        environment = {
            **os.environ,
            "RECORD": str(record),
            "RECORDER": str(recorder),
            "PIP_CONFIGURATION": configuration,
            "FORCE_CUDA": "0",
        }
        done = subprocess.run(
            ["make", "venv", f"VENV={venv}", f"PYTHON={python}", *arguments],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return record.read_text().splitlines()

    return run


def entries(lines: str) -> list[str]:
    """A lock's entries: name and version, and their hashes below."""
    return re.findall(r"^\w.*(?:\n .*)*", lines, flags=re.MULTILINE)


def lock(name: str = "requirements.lock") -> list[str]:
    return entries((REPOSITORY / name).read_text())


def given(lines: list[str], i: int) -> list[str]:
    """The entries that the command of a line reads."""
    read = itertools.takewhile(lambda line: line.startswith("  "), lines[i + 1 :])
    return entries("\n".join(line[2:] for line in read))


def test_every_locked_package_has_hashes_and_the_image_has_no_other_versions() -> None:
    hashed = r"\S+==\S+(?: ; [^\\]+)?(?: \\\n    --hash=sha256:[0-9a-f]{64})+"
    locks = [lock(name) for name in ("requirements.lock", "requirements.image.lock")]
    assert [entry for entries in locks for entry in entries if not re.fullmatch(hashed, entry)] == []
    whole, image = ({re.sub(r" ; [^\\]+", " ", entry) for entry in entries} for entries in locks)  # without markers
    assert len(image) > 100
    assert image < whole


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_torch_for_cpus_comes_from_its_own_index_and_nothing_of_cuda_with_it(installed) -> None:
    lines = installed("TORCH=cpu")
    tools, first, second = (i for i, line in enumerate(lines) if line.endswith("-r /dev/stdin"))
    assert "--no-deps --index-url https://download.pytorch.org/whl/cpu " in lines[first]
    assert "index-url" not in lines[second]
    # The hashes are those of PyPI's files.
    assert [" --require-hashes " in lines[i] for i in (tools, first, second)] == [True, False, True]
    torches = given(lines, first)
    assert torches == [e.partition(" ")[0] for e in lock() if re.match("torch(vision)?==", e)]
    assert len(torches) == 2
    # Version specifiers without a local part take wheels with one: 2.15.0+cpu.
    assert all(next(iter(Requirement(line).specifier)).contains(f"{line.partition('==')[2]}+cpu") for line in torches)
    assert set(given(lines, second)) < set(lock())
    rest = {entry.partition("==")[0] for entry in set(lock()) - set(given(lines, second))}
    assert rest >= {"torch", "torchvision", "triton", "cuda-toolkit", "nvidia-cublas", "nvidia-nccl-cu13"}
    assert all(re.match("torch|triton|cuda-|nvidia-", name) for name in rest)
    kept = {entry.partition("==")[0] for entry in given(lines, second)}
    assert {name for name in kept if name.startswith("nvidia-")} == {"nvidia-ml-py"}
    assert installed("--always-make") == lines  # the environment stays what it is when the lock changes


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_whole_lock_is_installed_unless_something_else_is_asked(installed, tmp_path: Path) -> None:
    lines = installed()
    assert [line for line in lines if line.endswith("-r requirements.lock")] == [
        f"uv pip install --python {tmp_path}/venv/bin/python --system-certs --compile-bytecode --require-hashes "
        "--no-build-isolation -r requirements.lock"
    ]
    assert lines[0].endswith(" --require-hashes -r /dev/stdin")
    assert given(lines, 0) == [
        entry for name in ("uv", "setuptools") for entry in lock() if entry.startswith(f"{name}==")
    ]
    assert sum("/dev/stdin" in line for line in lines) == 1
    with pytest.raises(AssertionError, match="TORCH must be cpu or nothing, got gpu"):
        installed("TORCH=gpu")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("cpu", [False, True])
def test_pip_installs_where_its_configuration_names_an_index_or_a_proxy(cpu: bool, installed) -> None:
    arguments = ["--always-make", *(["TORCH=cpu"] if cpu else [])]
    for setting in (
        "global.index-url='https://mirror.example/simple'",
        ":env:.extra-index-url='x'",
        "user.proxy='p:1'",
    ):
        lines = installed(*arguments, configuration=f"global.timeout='60'\n{setting}")
        assert not any(line.startswith("uv ") for line in lines), setting
        assert any(line.startswith("python -m pip install") and "-r " in line for line in lines)
    assert any(line.startswith("uv ") for line in installed(*arguments, configuration="global.timeout='60'"))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_pip_installs_if_uv_fails(installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_FAILS", "yes")
    lines = [line for line in installed() if line.endswith("-r requirements.lock")]
    assert [line.split()[0] for line in lines] == ["uv", "python"]
    assert all(" --require-hashes " in line for line in lines)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_pip_installs_torch_for_cpus_if_uv_fails(installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_FAILS", "yes")
    lines = installed("TORCH=cpu")
    _, first, second = (
        i for i, line in enumerate(lines) if line.startswith("python ") and "/dev/stdin" in line
    )  # uv itself first
    assert lines[first].split()[-5:-1] == ["--no-deps", "--index-url", "https://download.pytorch.org/whl/cpu", "-r"]
    assert "index-url" not in lines[second]
    assert [line.partition("==")[0] for line in lines[first + 1 : first + 3]] == ["  torch", "  torchvision"]
    assert "  numpy" in {line.partition("==")[0] for line in lines[second:]}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_environment_with_another_torch_is_not_taken_for_the_one_asked_for(installed) -> None:
    installed()
    for asked in ("TORCH=cpu", "TORCH=cpu --always-make"):
        with pytest.raises(AssertionError, match=r"venv was made with TORCH=, got TORCH=cpu; remove .*venv first"):
            installed(*asked.split())


# setup.py up to where it would build, once for each CUDA_HOME, in a process that has imported torch for all of them. It
# does not see pip's toolkit, with which it would compile a kernel after each refusal.
SET_UP = """
import os, runpy, sys, sysconfig
import setuptools, torch
homes, sys.argv = sys.argv[1:], ["setup.py", "--version"]
path = sysconfig.get_path
sysconfig.get_path = lambda *names, **options: os.devnull if names == ("purelib",) else path(*names, **options)
for home in homes:
    child = os.fork()
    if not child:
        os.environ["CUDA_HOME"] = home
        runpy.run_path("setup.py", run_name="__main__")
        sys.exit(0)
    print("status", os.waitpid(child, 0)[1], file=sys.stderr, flush=True)
"""


def set_up(*homes: Path) -> list[str]:
    """The words of setup.py for each CUDA_HOME, and its status in the last line."""
    done = subprocess.run(
        [sys.executable, "-c", SET_UP, *map(str, homes)],
        cwd=REPOSITORY,
        env={**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"},
        capture_output=True,
        text=True,
        check=True,
    )
    return re.findall(r"(?s)(.*?\nstatus \d+)\n", done.stderr)


@pytest.mark.skipif(torch.version.cuda is None or not shutil.which("c++"), reason="needs c++, and torch with CUDA")
def test_the_toolkit_is_the_top_that_nvcc_names_if_it_compiles_a_kernel(tmp_path: Path) -> None:
    """Wherever the script lies that calls nvcc; a folder with nvcc alone is no toolkit."""
    major = torch.version.cuda.partition(".")[0]
    cases = {
        "empty": "it has no bin/nvcc",
        "old": r"torch was built with CUDA \S+, its nvcc says Cuda compilation tools, release 9.2",
        "bare": "its nvcc compiles nothing: cc1plus: fatal error: cuda_runtime.h: No such file or directory",
    }
    (tmp_path / "empty").mkdir()
    for name, release in (("old", "9.2"), ("bare", f"{major}.0")):
        script(tmp_path / name / "bin" / "nvcc", NVCC.format(release=release))
        (tmp_path / name / "bin" / "nvcc.profile").touch()
    (tmp_path / "link" / "bin").mkdir(parents=True)
    (tmp_path / "link" / "bin" / "nvcc").symlink_to(tmp_path / "bare" / "bin" / "nvcc")
    installed = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin/nvcc"))
    for nvcc in installed[-1:]:
        script(tmp_path / "caller" / "bin" / "nvcc", f'#!/bin/sh\nexec {nvcc} "$@"\n')
    *refusals, of_caller = set_up(*(tmp_path / name for name in ("empty", "old", "link", "caller")))
    for output, (name, reason) in zip(refusals, cases.items(), strict=True):
        assert re.search(f"cuda_ops: {tmp_path / name} is passed over: {reason}", output), output
    if not installed:
        pytest.skip("needs nvcc of nvidia-cuda-nvcc")
    if "unsupported GNU version" in of_caller:
        pytest.skip("needs a c++ that the installed nvcc supports")
    assert of_caller.endswith("\nstatus 0")
    assert f"CUDA by {installed[-1].resolve().parents[1]} for 9.0" in of_caller
    assert "passed over" not in of_caller


def test_two_builds_may_link_cudart_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two steps of one build another may do the same."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    (function,) = [node for node in tree.body if getattr(node, "name", "") == "linkable_cudart"]
    names = {"Path": Path, "ROOT": tmp_path, "os": os}
    exec(compile(ast.Module([function], []), "setup.py", "exec"), names)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart.so.13").touch()
    symlink_to = Path.symlink_to

    def after_another(path: Path, target: Path) -> None:
        monkeypatch.setattr(Path, "symlink_to", symlink_to)
        monkeypatch.setattr(os, "getpid", lambda: 2)
        names["linkable_cudart"](tmp_path)
        assert link.resolve() == target
        symlink_to(path, target)

    link = tmp_path / "build" / "cudart" / "libcudart.so"
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(Path, "symlink_to", after_another)
    assert names["linkable_cudart"](tmp_path) == [str(link.parent)]
    assert link.resolve().name == "libcudart.so.13"
    assert [path.name for path in link.parent.iterdir()] == ["libcudart.so"]


def test_the_tests_of_the_operators_need_only_what_the_scripts_copy(tmp_path: Path) -> None:
    texts = [(REPOSITORY / ".ci" / name).read_text() for name in ("sanitize", "floor")]
    (copied,) = {re.search(r"^ *cp -r (.*) \"\$", text, re.MULTILINE)[1] for text in texts}  # type: ignore[index]
    subprocess.run(["cp", "-r", *copied.split(), tmp_path], cwd=REPOSITORY, check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/cuda_ops/test_library.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
