"""What images.py and torch_index.py make images from. No cluster is needed, and nothing is built."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("images")


@pytest.fixture
def torch_index(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("torch_index")


def test_the_images_that_the_base_names_are_made(images: ModuleType):
    named = set(re.findall(r"image: (\S+)", "".join(path.read_text() for path in (ROOT / "k8s/base").glob("*.yaml"))))
    assert len(named) == 3
    made = {image.name.removeprefix("docker.io/").removeprefix("library/") for image in images.IMAGES.values()}
    assert named == made - {"maskrcnn:1-cpu"}


def test_an_image_is_made_again_when_what_it_is_made_from_changes(
    images: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file = tmp_path / "one"
    file.write_text("1")
    made: list[str] = []

    def make(name: str) -> None:
        made.append(name)

    one = images.Image("localhost/one:1", make, (file,))
    monkeypatch.setattr(images, "IMAGES", {"one": one})
    monkeypatch.setattr(images, "ARCHIVES", tmp_path)
    monkeypatch.setattr(images, "export", lambda key: images.archive(key).write_text("archive"))
    for content, builds in (("1", 1), ("1", 1), ("2", 2)):
        file.write_text(content)
        assert images.build_all(["one"]) == {"localhost/one:1": tmp_path / "one.tar"}
        assert len(made) == builds


def test_the_machines_settings_of_pip_are_mounted_and_its_paths_are_not_named(
    images: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "ca.crt").write_text("a certificate")
    (tmp_path / "out").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_CERT", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path / 'wheels'} https://wheels.example/simple")
    monkeypatch.setenv("PIP_INDEX_URL", "https://index.example/simple")
    monkeypatch.setenv("PIP_USER", "0")  # of no use in an image
    options = images.pip_settings(tmp_path / "out")
    text = (tmp_path / "out" / "pip.conf").read_text()
    assert sorted(text.splitlines()[1:]) == [
        "cert = /etc/pip.d/cert.pem",
        "find-links = /etc/pip.d/links0 https://wheels.example/simple",
        "index-url = https://index.example/simple",
    ]
    assert (tmp_path / "out" / "cert.pem").read_text() == "a certificate"
    assert f"{tmp_path / 'wheels'}:/etc/pip.d/links0:ro" in options
    assert f"{tmp_path / 'out' / 'pip.conf'}:/etc/pip.conf:ro" in options


def test_the_commit_is_the_one_that_make_gives_to_the_image(images: ModuleType):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert images.commit().removesuffix("-dirty") == head.strip()


def test_torch_for_cpus_asks_for_no_package_of_a_gpu(torch_index: ModuleType):
    text = "Metadata-Version: 2.1\nName: torch\nVersion: 2.15.0\nRequires-Dist: nvidia-nccl-cu13==2; x\n"
    text += "Requires-Dist: triton==3\nRequires-Dist: cuda-bindings<14\nRequires-Dist: sympy>=1\n\nVersion: of a text\n"
    expected = (
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.15.0+cpu\nRequires-Dist: sympy>=1\n\nVersion: of a text\n"
    )
    assert torch_index.cpu_metadata(text, "2.15.0+cpu") == expected


def test_of_the_lock_the_wheels_that_are_packed_again_are_fetched_with_their_hashes(torch_index: ModuleType):
    text = torch_index.locked(ROOT / "requirements.image.lock", torch_index.PACKAGES)
    assert {line.partition("==")[0] for line in text.splitlines() if "==" in line} == set(torch_index.PACKAGES)
    assert text.count("--hash=sha256:") >= len(torch_index.PACKAGES)


def test_a_wheel_that_is_written_can_be_installed(torch_index: ModuleType, tmp_path: Path):
    path = tmp_path / "one-1.0-py3-none-any.whl"
    writer = torch_index.WheelWriter(path, "one-1.0.dist-info")
    writer.add("one.py", b"ONE = 1\n")
    writer.add("one-1.0.dist-info/METADATA", b"Metadata-Version: 2.1\nName: one\nVersion: 1.0\n")
    writer.add("one-1.0.dist-info/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    writer.close()
    words = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(path),
    ]
    subprocess.run([sys.executable, *words], check=True)
    assert (tmp_path / "site" / "one.py").read_text() == "ONE = 1\n"
    record = zipfile.ZipFile(path).read("one-1.0.dist-info/RECORD").decode()
    assert "one.py,sha256=" in record
    assert record.endswith("one-1.0.dist-info/RECORD,,\n")


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("nm")), reason="needs a C compiler and binutils")
def test_a_placeholder_ends_the_process_with_its_name_when_it_is_called(torch_index: ModuleType, tmp_path: Path):
    (tmp_path / "work").mkdir()
    for name, code, words in (
        ("libcufft.so.12", "int cufftExec(void) { return 1; }\nint cufftData = 2;", ["-Wl,-soname,libcufft.so.12"]),
        ("libtorch_cuda.so", "int cufftExec(void);\nint call(void) { return cufftExec(); }", ["libcufft.so.12"]),
    ):
        (tmp_path / "a.c").write_text(code)
        command = ["cc", "-shared", "-fPIC", "-o", name, "a.c", *words]
        subprocess.run(command, cwd=tmp_path, check=True)
    (made,) = torch_index.placeholders([tmp_path / "libtorch_cuda.so"], set(), tmp_path / "work")
    assert made.name == "libcufft.so.12"
    code = "import ctypes; torch = ctypes.CDLL('./libtorch_cuda.so'); print('loaded', flush=True); torch.call()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"cwd": tmp_path, "env": {"LD_LIBRARY_PATH": str(tmp_path / "work")}, "text": True},
        capture_output=True,
        check=False,
    )
    assert done.stdout == "loaded\n"
    assert done.returncode < 0
    assert done.stderr == "libcufft.so.12 is a placeholder: this torch is for CPUs\n"
