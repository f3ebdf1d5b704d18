"""Operators of the test cluster: the training operator, JobSet, Kubeflow Trainer, Kueue, and an image for their tests.

    python tests/cluster/operators.py up            # builds what is missing, and starts them on the cluster that is up
    python tests/cluster/operators.py show trainer  # prints the manifests of one

The manifests are those of the programs' own modules. manifests/NAME/kustomization.yaml refers to the module's files by
a folder `module`, and to its release as VERSION; both exist only in the temporary folder that kustomize reads here.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cluster
import programs
from oci import write_image
from ruamel.yaml import YAML
from run import run
from settings import BIN, IMAGES

HERE = Path(__file__).resolve().parent
PREFIX = "localhost/maskrcnn-cluster"
PROGRAMS = ("training-operator", "jobset", "trainer", "kueue")  # in the order in which they can start
FOLDERS = ("manifests", "config")  # those of a module that hold manifests
BUSYBOX = Path("/bin/busybox")  # of Debian's busybox-static
# In place of tini, python and the training behind them: runs what DO says, passes SIGTERM on, and ends as that does.
TINI = """\
#!/bin/sh
sh -c "$DO" &
trap 'kill -TERM $!' TERM
wait $!; code=$?
[ $code -gt 128 ] && { wait $!; code=$?; }
exit $code
"""
Document = dict[str, Any]


def make_images() -> None:
    """Build the programs that are missing, and write the images' archives; equal programs give equal images.

    The image `shell` is for jobs that fail on demand and within seconds: everything around its script is real.
    """
    programs.main(PROGRAMS)
    for name, archive in _archives().items():
        if name in PROGRAMS:
            files = {"/manager": BIN / name}
            write_image(archive, f"{PREFIX}/{name}:{_version(name)}", files, entrypoint=["/manager"])
        else:
            names = subprocess.run([str(BUSYBOX), "--list"], check=True, capture_output=True, text=True).stdout.split()
            links = {f"/bin/{name}": "/bin/busybox" for name in names if name != "busybox"}
            shell: dict[str, Path | str] = {"/bin/busybox": BUSYBOX, "/usr/bin/tini": TINI}
            write_image(archive, f"{PREFIX}/shell:1", shell, entrypoint=["sh"], links=links, user="1000:1000")


def archives() -> list[Path]:
    """Archives of the images."""
    return list(_archives().values())


def _archives() -> dict[str, Path]:
    return {**{name: IMAGES / f"{name}-{_version(name)}.tar" for name in PROGRAMS}, "shell": IMAGES / "shell-1.tar"}


def _version(name: str) -> str:
    return str(programs.SOURCES[name]["version"])


def render(name: str) -> list[Document]:
    """Manifests of a program, in the order in which they can be created."""
    module = programs.source(name)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(HERE / "manifests" / name, Path(folder) / name))
        for path in root.rglob("*.yaml"):
            path.write_text(path.read_text().replace("VERSION", _version(name)))
        for part in FOLDERS:
            if (module / part).is_dir():
                # Not the modes: the sources are read-only, and this folder is to be deleted.
                shutil.copytree(module / part, root / "module" / part, copy_function=shutil.copyfile)
                run("chmod", "-R", "u+w", str(root / "module"))
        # A runtime of Trainer's is one file of a folder, which kustomize reads only if it may leave its root.
        text = run("kubectl", "kustomize", "--load-restrictor=LoadRestrictionsNone", str(root))
    return [document for document in YAML(typ="safe").load_all(text) if document]


def apply() -> None:
    """Apply the manifests; types come first, since objects of an unknown one are refused."""
    documents = [document for name in PROGRAMS for document in render(name)]
    types = [document for document in documents if document["kind"] == "CustomResourceDefinition"]
    for some in (types, documents):
        run("kubectl", "apply", "--server-side", "--force-conflicts", "--filename=-", text=_list(some))
        names = [f"crd/{document['metadata']['name']}" for document in types]
        run("kubectl", "wait", "--for=condition=Established", "--timeout=60s", *names)


def wait() -> None:
    """Wait until the programs are available."""
    for name in PROGRAMS:
        for document in render(name):
            if document["kind"] == "Deployment":
                where, deployment = document["metadata"]["namespace"], document["metadata"]["name"]
                run("kubectl", "--namespace", where, "rollout", "status", f"deployment/{deployment}", "--timeout=300s")


def _list(documents: list[Document]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}, indent=1)


def main(words: Sequence[str]) -> None:
    """Command line."""
    match list(words):
        case ["up"]:
            make_images()
            cluster.load(archives())
            apply()
            wait()
        case ["show", name] if name in PROGRAMS:
            print(_list(render(name)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
