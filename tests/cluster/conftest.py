"""Fixtures of the tests on the cluster that `make cluster` starts: kubectl, a namespace for each test, the launcher."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL = "localhost/maskrcnn-cluster/shell:1"  # of operators.py: runs what the variable DO says
Json = dict[str, Any]
_DELETE = "apiVersion: any\nkind: {kind}\nmetadata:\n  name: any\n$patch: delete\n"


@dataclass(frozen=True)
class Kubectl:
    """kubectl with an account of the cluster, in one namespace."""

    kubeconfig: Path
    namespace: str = "default"

    def __call__(self, *words: str, text: str | None = None) -> str:
        """What kubectl prints; an error of kubectl fails the test."""
        done = self.run(*words, text=text)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def run(self, *words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        command = ["kubectl", f"--kubeconfig={self.kubeconfig}", f"--namespace={self.namespace}", *words]
        return subprocess.run(command, input=text, check=False, capture_output=True, text=True, timeout=300)

    def json(self, *words: str) -> Json:
        return json.loads(self(*words, "-o", "json"))

    def names(self, *words: str) -> list[str]:
        """Names of the objects that `get` lists."""
        return [line.rpartition("/")[2] for line in self("get", *words, "-o", "name").split()]

    def apply(self, *documents: Json) -> None:
        bundle = {"apiVersion": "v1", "kind": "List", "items": documents}
        self("apply", "--server-side", "-f", "-", text=json.dumps(bundle))

    @staticmethod
    def wait_until(is_so: Callable[[], object], seconds: float = 90) -> None:
        """Wait for what the cluster will do; it fails the test if it has not after `seconds`."""
        until_s = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < until_s, "waited in vain"
            time.sleep(0.5)


@dataclass(frozen=True)
class Ended:
    """How `maskrcnn pytorchjob` ended."""

    status: int
    said: str
    seconds: float

    @property
    def error(self) -> str:
        """The error that it ended with: all lines from it on."""
        _, mark, rest = self.said.partition("error: ")
        return mark + rest


@dataclass(frozen=True)
class Launcher:
    """`maskrcnn pytorchjob` with the token of the service account `launcher`, and what its jobs leave."""

    kubectl: Kubectl  # with all rights
    kubeconfig: Path  # with those of the Role `launcher`
    api: str
    folder: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return {"pytorchjob": "pytorchjobs", "trainjob": "trainjobs"}[self.api]

    def values(self, do: str) -> list[str]:
        """Overrides of a job of the image `shell` in which the script `do` stands for the training, in each pod."""
        return [
            *("tracking.enabled=false", f"cluster.api={self.api}", f"cluster.image={SHELL}"),
            *("cluster.gpus_per_node=0", "cluster.cpu=1", "cluster.memory=64Mi", "cluster.shm=16Mi"),
            *("cluster.grace_s=30", "cluster.poll_s=2", f"cluster.namespace={self.kubectl.namespace}"),
            f"cluster.env={json.dumps([f'DO={do}'])}",
        ]

    def start(self, do: str, *overrides: str, run_id: str = "try") -> subprocess.Popen[str]:
        """Start it with the job of `values`; a later override of a key counts."""
        environment = {**os.environ, "KUBECONFIG": str(self.kubeconfig), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", "pytorchjob", "--run-id", run_id, *self.values(do), *overrides],
            **{"cwd": self.folder, "env": environment, "text": True},
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )
        self.started.append(process)
        return process

    def run(self, do: str, *overrides: str, run_id: str = "try", timeout_s: float = 240) -> Ended:
        """Run it to its end."""
        return self.finish(self.start(do, *overrides, run_id=run_id), timeout_s=timeout_s)

    def finish(self, process: subprocess.Popen[str], *, timeout_s: float = 240) -> Ended:
        """Wait for its end; one that hangs is killed, and what it said is in the error."""
        began_s = time.monotonic()
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            pytest.fail(f"the launcher did not end within {timeout_s} s; it said:\n{said}")
        print(said)
        return Ended(process.returncode, said, time.monotonic() - began_s)

    def jobs(self) -> list[str]:
        return self.kubectl.names(self.kind)

    def pods(self) -> list[str]:
        return self.kubectl.names("pods")


@pytest.fixture(scope="session")
def cluster() -> Kubectl:
    """kubectl with all rights."""
    path = os.environ.get("KUBECONFIG", "")
    if not path:
        pytest.fail("KUBECONFIG: must name the kubeconfig of the cluster that `make cluster` starts, got nothing")
    kubectl = Kubectl(Path(path))
    kubectl("get", "--raw", "/readyz")
    return kubectl


@pytest.fixture
def kubectl(cluster: Kubectl, tmp_path: Path) -> Iterator[Kubectl]:
    """kubectl with all rights, in a namespace of its own that has the accounts, and claims with volumes on the node."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    enforced = {f"pod-security.kubernetes.io/{mode}": "baseline" for mode in ("enforce", "warn")}
    own = Kubectl(cluster.kubeconfig, name)
    own.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": enforced}})
    try:
        for file in ("launcher", "trainer"):
            own("apply", "--server-side", "-f", str(ROOT / "k8s" / "base" / f"{file}.yaml"))
        folders = {claim: tmp_path / claim for claim in ("data", "runs")}
        for folder in folders.values():
            folder.mkdir()
            folder.chmod(0o777)  # the pods' user is another one, and no fsGroup applies to a folder
        # A claim that comes before its volume is looked at again only after 15 s.
        own.apply(*(_volume(name, claim, folder) for claim, folder in folders.items()))
        own.apply(*(_claim(name, claim) for claim in folders))
        own("wait", "--for=jsonpath={.status.phase}=Bound", "--timeout=60s", "pvc/data", "pvc/runs")
        yield own
    finally:
        own("delete", "namespace", name, "--wait=false")
        own("delete", "persistentvolume", f"{name}-data", f"{name}-runs", "--wait=false", "--ignore-not-found")


def _volume(namespace: str, claim: str, folder: Path) -> Json:
    """Volume for a claim: a folder of this machine, which is the node."""
    spec = {
        "accessModes": ["ReadWriteMany"],
        "capacity": {"storage": "1Gi"},
        "claimRef": {"namespace": namespace, "name": claim},
        "hostPath": {"path": str(folder), "type": "Directory"},
    }
    metadata = {"name": f"{namespace}-{claim}"}
    return {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": metadata, "spec": spec}


def _claim(namespace: str, name: str) -> Json:
    spec = {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "",
        "volumeName": f"{namespace}-{name}",
        "resources": {"requests": {"storage": "1Gi"}},
    }
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


@pytest.fixture(params=["pytorchjob", "trainjob"])
def launcher(request: pytest.FixtureRequest, kubectl: Kubectl, tmp_path: Path) -> Iterator[Launcher]:
    """The launcher in a test's namespace, for each API; none outlives its test."""
    config = kubectl.json("config", "view", "--raw", "--minify")
    config["users"] = [{"name": "launcher", "user": {"token": kubectl("create", "token", "launcher").strip()}}]
    config["contexts"][0]["context"]["user"] = "launcher"
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    launcher = Launcher(kubectl, path, request.param, tmp_path)
    yield launcher
    for process in launcher.started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def applied(cluster: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Kubectl]]:
    """Give a function that applies an overlay, or `base`, to a namespace of its own, with the secret of the docs.

    Its argument `without` leaves out kinds of objects, such as the servers where the policies alone are of interest.
    All are gone after a file's tests: their pods' requests would leave no core to the trainings of the next.
    """
    made: dict[tuple[str, ...], Kubectl] = {}

    def apply(overlay: str, *, without: Sequence[str] = ()) -> Kubectl:
        key = (overlay, *without)
        if key not in made:
            name = f"test-{overlay}-{uuid.uuid4().hex[:6]}"
            made[key] = Kubectl(cluster.kubeconfig, name)
            folder = tmp_path_factory.mktemp(overlay)
            source = ROOT / "k8s" / ("base" if overlay == "base" else f"overlays/{overlay}")
            drop = [{"target": {"kind": kind}, "patch": _DELETE.format(kind=kind)} for kind in without]
            kustomization = {"namespace": name, "resources": [os.path.relpath(source, folder)], "patches": drop}
            (folder / "kustomization.yaml").write_text(json.dumps(kustomization))
            cluster("create", "namespace", name)
            passwords = ("database-password", "access-key", "secret-key")
            literals = [f"--from-literal={password}={uuid.uuid4().hex}" for password in passwords]
            made[key]("create", "secret", "generic", "mlflow", *literals)
            made[key]("apply", "--server-side", "--validate=strict", "-k", str(folder))
        return made[key]

    yield apply
    for one in made.values():
        one("delete", "namespace", one.namespace, "--timeout=180s")
