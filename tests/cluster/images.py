"""Container images for the cluster of the tests, as OCI archives in a cache outside the tree.

    python tests/cluster/images.py                  # builds what is missing or out of date, and tells sizes and times
    python tests/cluster/images.py maskrcnn store   # these alone
    python tests/cluster/images.py --clean          # removes buildah's storage, 5 GB that make the next build faster

The image `maskrcnn` is what the repository's own Dockerfile makes for CPUs. The others take the place of images that
k8s/base names, and have these names: the same programs from Debian, PyPI and Go's module proxy, which are asked with
this machine's own settings. Nothing of the settings is in the images. Needs root, buildah and debootstrap.
"""

import argparse
import ast
import contextlib
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import programs
import torch_index
from settings import BIN, CACHE, ROOT
from settings import IMAGES as ARCHIVES

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "images"
PYTHON_BASE = "localhost/python-of-debian:12"
PYTHON = "3.11"  # Debian 12's
# In images of ours, an empty folder for settings of pip, which a build mounts.
SETTINGS = "/etc/pip.d"
# Left out of file systems, as in the slim images of Debian.
DOCUMENTATION = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale")
SLIM = "".join(f"path-exclude /{folder}/*\n" for folder in DOCUMENTATION) + "path-include /usr/share/doc/*/copyright\n"
PIP_OPTIONS = {
    "index-url",
    "extra-index-url",
    "trusted-host",
    "proxy",
    "timeout",
    "default-timeout",
    "retries",
    "no-index",
}


def run(*words: str | Path, **options: object) -> None:
    """Run a program; a failure ends the build with its own message."""
    subprocess.run([str(word) for word in words], check=True, **options)  # type: ignore[call-overload]


def buildah(*words: str | Path) -> None:
    """Run buildah on a storage of our own, so that the machine's is left alone."""
    storage = CACHE / "buildah"
    run("buildah", "--root", storage / "root", "--runroot", storage / "run", "--storage-driver", "overlay", *words)


def pip_settings(folder: Path) -> list[str]:
    """Write this machine's settings of pip into a folder, as pip.conf, and return the options that mount it in a build.

    The certificate is copied; folders of wheels are mounted beside it.
    """
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = {}
    for line in sorted(done.stdout.splitlines(), key=lambda line: line.startswith(":env:")):  # the environment's last
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    kept = {name: value for name, value in found.items() if name in PIP_OPTIONS}
    mounts = [f"{folder}:{SETTINGS}:ro", f"{folder / 'pip.conf'}:/etc/pip.conf:ro"]
    if "cert" in found:
        shutil.copyfile(found["cert"], folder / "cert.pem")
        kept["cert"] = f"{SETTINGS}/cert.pem"
    links = []
    for number, link in enumerate(found.get("find-links", "").split()):
        if Path(link).is_dir():
            (folder / f"links{number}").mkdir()
            mounts.append(f"{link}:{SETTINGS}/links{number}:ro")
            link = f"{SETTINGS}/links{number}"
        links.append(link)
    if links:
        kept["find-links"] = " ".join(links)
    lines = [f"{name} = {value}\n" for name, value in kept.items()]
    (folder / "pip.conf").write_text("".join(["[global]\n", *lines]), encoding="utf-8")
    return [word for mount in mounts for word in ("--volume", mount)]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give a folder that is removed afterwards."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="build-") as folder:
        yield Path(folder)


def by_file(name: str, context: Path, file: Path, *options: str | Path) -> None:
    """Build an image by a Containerfile. Steps run with the machine's network and without a container runtime."""
    command = ("build", "--isolation", "chroot", "--layers", "--file", file, "--tag", name)
    buildah(*command, *options, context)


def root_file_system(suite: str, packages: Sequence[str], tar: Path) -> None:
    """Make an archive of a small Debian by debootstrap, without documentation and downloaded packages."""
    with scratch() as folder:
        root = folder / "root"
        include = ",".join(["ca-certificates", *packages])
        run("debootstrap", "--variant=minbase", f"--include={include}", suite, root, stdout=subprocess.DEVNULL)
        (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(SLIM)
        for part in (*DOCUMENTATION, "var/lib/apt/lists", "var/cache/apt", "var/log"):
            for path in (root / part).iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (root / "etc/hostname").unlink(missing_ok=True)
        (root / "etc/resolv.conf").write_text("")
        (root / "etc/pip.conf").touch()
        (root / SETTINGS[1:]).mkdir()
        run("tar", "--numeric-owner", "--one-file-system", "-C", root, "-cf", tar, ".")


def python_base() -> None:
    """Build the stand-in for python:3.12-slim-bookworm, unless the storage has it: Debian 12 with its Python 3.11."""
    file, mark = SOURCES / "python.Containerfile", CACHE / "buildah" / "python-base"
    if mark.is_file() and mark.read_text() == file.read_text():
        return
    with scratch() as folder:
        root_file_system("bookworm", ["python3", "python3-venv"], folder / "rootfs.tar")
        by_file(PYTHON_BASE, folder, file)
    mark.write_text(file.read_text())


def commit() -> str:
    """The commit of the tree, as `make image-cpu` gives it to the image."""
    dry = subprocess.run(["make", "--dry-run", "image-cpu"], cwd=ROOT, capture_output=True, text=True, check=True)
    (argument,) = [part for part in dry.stdout.split("--build-arg ") if part.startswith("COMMIT=")]
    expression = argument.partition(" --tag")[0].replace("\\\n", "").strip().removeprefix("COMMIT=")
    done = subprocess.run(["sh", "-c", f"echo {expression}"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def maskrcnn(name: str) -> None:
    """Build this project's image for CPUs by its Dockerfile, with torch of TORCH_INDEX, or else made from PyPI's."""
    with scratch() as folder:
        options = pip_settings(folder)
        index = os.environ.get("TORCH_INDEX")
        if index is None:
            made = torch_index.build(ROOT / "requirements.image.lock", PYTHON, CACHE)
            (folder / "torch").mkdir()
            options += ["--volume", f"{made}:{SETTINGS}/torch:ro"]
            index = f"file://{SETTINGS}/torch"
        for argument in ("VARIANT=cpu", f"PYTHON_IMAGE={PYTHON_BASE}", f"TORCH_INDEX={index}", f"COMMIT={commit()}"):
            options += ["--build-arg", argument]
        # Of a step that installs what another stage has built, and of an argument, buildah 1.28 does not see the
        # change, and takes the old layers. They go with the image; those of the dependencies stay.
        with contextlib.suppress(subprocess.CalledProcessError):  # there is none yet
            buildah("rmi", "--force", name)
        by_file(name, ROOT, ROOT / "Dockerfile", *options)


def mlflow(name: str) -> None:
    """Build MLflow's server in the version of the name."""
    version = name.partition(":v")[2].partition("-")[0]
    with scratch() as folder:
        arguments = ["--build-arg", f"PYTHON_IMAGE={PYTHON_BASE}", "--build-arg", f"MLFLOW={version}"]
        by_file(name, SOURCES, SOURCES / "mlflow.Containerfile", *pip_settings(folder), *arguments)


def postgres(name: str) -> None:
    """Build Debian 13 with its PostgreSQL 17."""
    with scratch() as folder:
        root_file_system("trixie", [], folder / "rootfs.tar")
        shutil.copy(SOURCES / "postgres.sh", folder)
        by_file(name, folder, SOURCES / "postgres.Containerfile")


def store(name: str) -> None:
    """Build an image of SeaweedFS' one program, from its sources."""
    programs.build("seaweedfs")
    with scratch() as folder:
        shutil.copy(BIN / "weed", folder)
        (folder / "tmp").mkdir(mode=0o1777)
        by_file(name, folder, SOURCES / "store.Containerfile")


@dataclass(frozen=True)
class Image:
    """An image of the cluster.

    Attributes:
        name: what manifests call it.
        build: makes it under a name, in buildah's storage.
        inputs: files and folders that it is made from; it is made again when one changes.
    """

    name: str
    build: Callable[[str], None]
    inputs: tuple[Path, ...]


def sent() -> tuple[Path, ...]:
    """The files that .dockerignore sends to the builder."""
    from docker.utils.build import exclude_paths

    patterns = (ROOT / ".dockerignore").read_text().splitlines()
    found = exclude_paths(str(ROOT), [line for line in patterns if line and not line.startswith("#")])
    return tuple(sorted(ROOT / path for path in found if (ROOT / path).is_file()))


IMAGES = {
    "maskrcnn": Image(
        "docker.io/library/maskrcnn:1-cpu", maskrcnn, (SOURCES / "python.Containerfile", HERE / "torch_index.py")
    ),
    "postgres": Image(
        "docker.io/library/postgres:17.6", postgres, (SOURCES / "postgres.Containerfile", SOURCES / "postgres.sh")
    ),
    "store": Image(
        "docker.io/chrislusf/seaweedfs:4.47", store, (SOURCES / "store.Containerfile", HERE / "sources.toml")
    ),
    "mlflow": Image(
        "ghcr.io/mlflow/mlflow:v3.14.0-full",
        mlflow,
        (SOURCES / "mlflow.Containerfile", SOURCES / "python.Containerfile"),
    ),
}


def digest(key: str) -> str:
    """A digest of what an image is made from: its name, the code that makes it, and its inputs."""
    image = IMAGES[key]
    total = hashlib.sha256(image.name.encode())
    for code in (image.build, by_file, root_file_system):
        total.update(inspect.getsource(code).encode())
    for path in (*image.inputs, *(sent() if key == "maskrcnn" else ())):
        total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def archive(key: str) -> Path:
    """Path of an image's OCI archive."""
    return ARCHIVES / f"{key}.tar"


def export(key: str) -> None:
    """Write an image's archive, layers compressed."""
    path, name = archive(key), IMAGES[key].name
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.unlink(missing_ok=True)
    buildah("push", "--quiet", "--compression-format", "zstd", name, f"oci-archive:{new}:{name}")
    new.replace(path)


def build_all(keys: Sequence[str] = tuple(IMAGES)) -> dict[str, Path]:
    """Build the images whose archives are missing or out of date; returns all their archives by image name."""
    for key in keys:
        mark = archive(key).with_suffix(".digest")
        if archive(key).is_file() and mark.is_file() and mark.read_text() == digest(key):
            print(f"{key}: up to date")
            continue
        begin, made_from = time.monotonic(), digest(key)
        if key in ("maskrcnn", "mlflow"):
            python_base()
        IMAGES[key].build(IMAGES[key].name)
        buildah("rm", "--all")  # a build of several stages leaves the containers of its stages, mounted
        export(key)
        mark.write_text(made_from)
        if key != "maskrcnn":  # whose dependencies stay in the storage, 5 GB, so that new code is built in less time
            buildah("rmi", "--force", IMAGES[key].name)
        size = archive(key).stat().st_size / 2**20
        print(f"{key}: {IMAGES[key].name}, {size:.0f} MiB compressed, built in {time.monotonic() - begin:.0f} s")
    return {IMAGES[key].name: archive(key) for key in keys}


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python tests/cluster/images.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("images", nargs="*", choices=[*IMAGES, []], help="all by default")
    parser.add_argument("--clean", action="store_true", help="remove buildah's storage")
    arguments = parser.parse_args(argv)
    if arguments.clean:
        buildah("rmi", "--all", "--force")
        shutil.rmtree(CACHE / "buildah")
    else:
        build_all(arguments.images or tuple(IMAGES))


if __name__ == "__main__":
    main()
