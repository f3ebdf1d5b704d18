"""`maskrcnn pytorchjob --check` on the cluster of `make cluster`: each fault is planted and must be found, by an
account with all rights and by the launcher's.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from components import pytorchjob
from components.cluster.findings import Finding
from components.params import load_config

pytest.importorskip("kubernetes", reason="needs kubernetes, of the extra `pipelines`")
pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]
CLAIMS = {"data": "ReadWriteMany", "runs": "ReadWriteOnce"}
IMAGE = "maskrcnn:1-cpu"  # of the Dockerfile, as images.py builds it
Json = dict[str, Any]


class Space:
    """A namespace with what k8s/base has for training, and two accounts: one with all rights, and the launcher's."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder, self.admin = f"check-{uuid.uuid4().hex[:8]}", folder, Path(os.environ["KUBECONFIG"])

    def kubectl(self, *words: str, text: str | None = None) -> str:
        command = ["kubectl", f"--kubeconfig={self.admin}", f"--namespace={self.name}", *words]
        done = subprocess.run(command, input=text, check=False, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def apply(self, kind: str, name: str, version: str = "v1", labels: Json | None = None, **fields: Any) -> None:
        document = {"apiVersion": version, "kind": kind, "metadata": {"name": name, "labels": labels or {}}, **fields}
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", text=json.dumps(document))

    @contextmanager
    def planted(self, kind: str, name: str, **fields: Any) -> Iterator[None]:
        """An object that is gone afterwards."""
        self.apply(kind, name, **fields)
        try:
            yield
        finally:
            self.kubectl("delete", kind, name)

    def level(self, level: str) -> None:
        """Set the pod-security level that the namespace enforces."""
        self.apply("Namespace", self.name, labels={"pod-security.kubernetes.io/enforce": level})

    def volume(self, claim: str, mode: str) -> None:
        """Make a claim and its volume; they are bound within half a minute."""
        volume, spec = f"{self.name}-{claim}", {"accessModes": [mode], "storageClassName": ""}
        of = {"namespace": self.name, "name": claim}
        source = {"capacity": {"storage": "1Gi"}, "claimRef": of, "hostPath": {"path": str(self.folder)}}
        self.apply("PersistentVolume", volume, spec=spec | source)
        resources = {"requests": {"storage": "1Gi"}}
        self.apply("PersistentVolumeClaim", claim, spec=spec | {"volumeName": volume, "resources": resources})

    def close(self) -> None:
        self.kubectl("delete", "namespace", self.name, "--wait=false", "--ignore-not-found")
        volumes = [f"{self.name}-{claim}" for claim in CLAIMS]
        self.kubectl("delete", "pv", *volumes, "--ignore-not-found", "--wait=false")

    @cached_property
    def launcher(self) -> Path:
        """Kubeconfig of the service account `launcher`."""
        config = json.loads(self.kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
        config["users"] = [{"name": "launcher", "user": {"token": self.kubectl("create", "token", "launcher").strip()}}]
        config["contexts"][0]["context"]["user"] = "launcher"
        path = self.folder / "launcher.kubeconfig"
        path.write_text(json.dumps(config))
        return path

    def words(self, *overrides: str) -> list[str]:
        return [
            *(f"cluster.namespace={self.name}", f"cluster.image={IMAGE}", "cluster.gpus_per_node=0", "cluster.cpu=1"),
            *("cluster.memory=256Mi", "cluster.shm=16Mi", *overrides),
        ]

    def check(self, *overrides: str, by: Path | None = None, from_pod: bool = False) -> list[Finding]:
        """What the check finds, by an account with all rights or by another one."""
        config = load_config(ROOT / "params.yaml", self.words(*overrides))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(by or self.admin))
            patch.delenv("MLFLOW_RUN_ID", raising=False)
            return pytorchjob.check(config, run_id="try", from_pod=from_pod, on_finding=print)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Space]:
    """The namespace of all tests here; each takes away what it plants."""
    if not os.environ.get("KUBECONFIG"):
        pytest.fail("KUBECONFIG: must name the kubeconfig of the cluster that `make cluster` starts, got nothing")
    folder = tmp_path_factory.mktemp("volumes")
    folder.chmod(0o777)  # the pods' user is another one, and no fsGroup applies to a folder of the node
    one = Space(folder)
    try:
        one.level("baseline")
        for file in ("launcher", "trainer"):
            one.kubectl("apply", "--server-side", "-f", str(ROOT / "k8s" / "base" / f"{file}.yaml"))
        for claim, mode in CLAIMS.items():
            one.volume(claim, mode)
        for claim in CLAIMS:
            one.kubectl("wait", "--for=jsonpath={.status.phase}=Bound", f"pvc/{claim}", "--timeout=90s")
        one.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
        yield one
    finally:
        one.close()


def of(found: list[Finding], subject: str) -> list[tuple[str, str]]:
    """Levels and texts of the findings about a subject."""
    return [(one.level, one.text) for one in found if one.subject == subject]


def faults(found: list[Finding]) -> list[str]:
    return [str(one).removeprefix("fault").strip() for one in found if one.level == "fault"]


def test_a_job_that_can_run_has_no_fault_whoever_asks(space: Space):
    found = space.check()
    assert {one.level for one in found} == {"ok"}
    by_launcher = space.check(by=space.launcher)
    assert [(one.level, one.subject) for one in by_launcher if one.level != "ok"] == [
        ("unknown", "nodes"),
        ("unknown", "dry run of a pod"),
    ]
    assert [one.subject for one in found] == [one.subject for one in by_launcher]
    assert space.kubectl("get", "pods,pytorchjobs.kubeflow.org", "-o", "name") == "", "nothing was created"


def test_an_account_without_the_role_is_shown_the_command_that_binds_it(space: Space):
    launcher = space.launcher
    space.kubectl("delete", "rolebinding", "launcher")
    lacking, dry_run = faults(space.check(by=launcher))
    assert lacking.startswith(
        "permissions: must be allowed to create pytorchjobs.kubeflow.org, get pytorchjobs.kubeflow.org, delete "
        f"pytorchjobs.kubeflow.org, list pods, list events, but system:serviceaccount:{space.name}:launcher is not; "
    )
    assert "403" in dry_run
    command = lacking.rpartition("; kubectl ")[2].replace("NAME", "launcher").split()
    space.kubectl(*command[2:])  # behind -n NAMESPACE
    assert faults(space.check(by=launcher)) == []


def test_a_restricted_namespace_refuses_the_init_container_of_workers(space: Space):
    space.level("restricted")
    try:
        assert faults(space.check("cluster.nodes=2", "cluster.volumes=['data:/workspace']")) == []
        namespace, pod = faults(
            space.check("cluster.nodes=2", "cluster.volumes=['data:/workspace']", "cluster.form=master_worker")
        )
    finally:
        space.level("baseline")
    assert "refuses the init container of cluster.form=master_worker; set cluster.form=elastic" in namespace
    assert 'violates PodSecurity "restricted:latest"' in pod


def test_a_quota_that_is_too_small_is_found(space: Space):
    with space.planted("ResourceQuota", "small", spec={"hard": {"requests.memory": "300Mi", "pods": "5"}}):
        space.kubectl("wait", "--for=jsonpath={.status.hard.pods}=5", "quota/small", "--timeout=60s")
        ((level, text),) = of(space.check("cluster.nodes=2", by=space.launcher), "quota small")
        assert (level, text.partition(" left")[0]) == (
            "fault",
            "requests.memory 512Mi needed, 300Mi of 300Mi",
        )
        assert faults(space.check(by=space.launcher)) == []
        quota, pod = faults(space.check("cluster.memory=512Mi"))
    assert quota.startswith("quota small: requests.memory 512Mi needed")
    assert "exceeded quota: small" in pod


def test_a_limit_range_that_the_pods_exceed_is_found(space: Space):
    with space.planted("LimitRange", "low", spec={"limits": [{"type": "Container", "max": {"memory": "128Mi"}}]}):
        limit, pod = faults(space.check())
    assert limit.startswith("limit range low: memory 256Mi must be at most 128Mi (Container)")
    assert "maximum memory usage per Container is 128Mi" in pod


def test_claims_that_are_missing_or_for_one_node_or_without_a_class_are_found(space: Space):
    mounts = "cluster.volumes=['absent:/workspace/data', 'runs:/workspace/runs']"
    missing = "claim absent: must exist (cluster.volumes), but does not; apply k8s/base or an overlay"
    assert faults(space.check(mounts)) == [missing]
    ((level, text),) = of(space.check("cluster.nodes=2", by=space.launcher), "claim runs")
    assert (level, text.partition(";")[0]) == (
        "warning",
        "Bound, must be ReadWriteMany for cluster.nodes=2, got ReadWriteOnce, which only pods on one node can mount",
    )
    wanted = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    with space.planted("PersistentVolumeClaim", "absent", spec=wanted | {"storageClassName": "no-such-class"}):
        time.sleep(2)  # until the event
        (fault,) = faults(space.check(mounts))
    assert fault.startswith("claim absent: Pending, since its storage class no-such-class does not exist: ")
    assert 'storageclass.storage.k8s.io "no-such-class" not found' in fault


def test_secrets_keys_and_accounts_that_are_missing_are_found(space: Space):
    words = ["cluster.secrets=[KEY=store/access-key]", "cluster.image_pull_secret=registry"]
    assert [fault.partition(":")[0] for fault in faults(space.check(*words))] == ["secret store", "secret registry"]
    other = {"stringData": {"other": "x"}}
    with space.planted("Secret", "store", **other), space.planted("Secret", "registry", **other):
        key, kind = faults(space.check(*words))
    assert key.startswith("secret store: must have the key access-key (cluster.secrets), got other")
    assert kind.startswith("secret registry: must be of type kubernetes.io/dockerconfigjson, got Opaque")
    login = {".dockerconfigjson": base64.b64encode(b'{"auths": {}}').decode()}
    with (
        space.planted("Secret", "store", stringData={"access-key": "x"}),
        space.planted("Secret", "registry", type="kubernetes.io/dockerconfigjson", data=login),
    ):
        assert faults(space.check(*words)) == []
        found = space.check(*words, by=space.launcher)
    assert of(found, "secret store") == [("unknown", "not allowed to look (get secrets)")]
    account, pod = faults(space.check("cluster.service_account=absent"))
    assert account.startswith("service account absent: must exist")
    assert 'serviceaccount "absent" not found' in pod


def test_a_request_that_no_node_can_hold_is_found(space: Space):
    (fault,) = faults(space.check("cluster.cpu=1000", "cluster.gpus_per_node=1"))
    room = "nodes: must have room for 1 pod of cpu 1000, memory 256Mi, nvidia.com/gpu 1, got room for 0"
    assert fault.startswith(room)
    assert "0 of nvidia.com/gpu" in fault
    (fault,) = faults(space.check("cluster.node_selector=['pool=absent']"))
    assert "has no label pool=absent (cluster.node_selector)" in fault


def test_a_namespace_a_queue_and_an_api_that_are_missing_are_found(space: Space):
    found = space.check("cluster.namespace=absent")
    assert of(found, "namespace absent") == [
        ("fault", "must exist, but does not; kubectl apply -k k8s/base, or an overlay")
    ]
    found = space.check("cluster.scheduler=kueue", "cluster.queue=absent")
    (queue,) = [text for text in faults(found) if text.startswith("queue")]
    assert "kueue" in queue
    volcano = faults(space.check("cluster.scheduler=volcano", "cluster.queue=absent"))
    assert volcano == ["api queues: scheduling.volcano.sh/v1beta1 must be served, but is not; install Volcano"]


def test_a_queue_of_kueue_must_be_active_select_the_namespace_and_hold_the_job(space: Space):
    version, name = "kueue.x-k8s.io/v1beta2", space.name
    words = ("cluster.scheduler=kueue", "cluster.queue=team")
    resources = [{"name": "cpu", "nominalQuota": "2"}, {"name": "memory", "nominalQuota": "400Mi"}]
    group = {"coveredResources": ["cpu", "memory"], "flavors": [{"name": name, "resources": resources}]}
    spec = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}, "resourceGroups": [group]}

    def queue_faults(*more: str) -> list[str]:
        return [fault for fault in faults(space.check(*words, *more)) if fault.startswith(("queue", "dry run:"))]

    with space.planted("LocalQueue", "team", version=version, spec={"clusterQueue": name}):
        space.kubectl("wait", "--for=condition=Active=false", "localqueue/team", "--timeout=60s")
        (fault,) = queue_faults()
        assert fault.startswith("queue team: must be active, got: ")
        with (
            space.planted("ResourceFlavor", name, version=version, spec={}),
            space.planted("ClusterQueue", name, version=version, spec=spec),
        ):
            space.kubectl("wait", "--for=condition=Active", "localqueue/team", "--timeout=60s")
            assert queue_faults() == []
            by_launcher = space.check(*words, by=space.launcher)
            assert of(by_launcher, "queue team") == [("ok", f"is active, in the ClusterQueue {name}")]
            (fault,) = queue_faults("cluster.nodes=2")
            assert "memory 512Mi is more than its quota of 400Mi" in fault
            space.apply(
                "ClusterQueue",
                name,
                version,
                spec={**spec, "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "other"}}},
            )
            (fault,) = queue_faults()
            assert "must select the namespace, got namespaceSelector {" in fault


def test_a_runtime_that_is_missing_is_found_by_the_webhook_too(space: Space):
    runtime, dry_run = faults(space.check("cluster.api=trainjob", "cluster.runtime=absent"))
    assert runtime.startswith("runtime: the ClusterTrainingRuntime absent must exist, but does not; ")
    assert dry_run.startswith("dry run: ")
    assert "cluster.runtime must name a runtime of this cluster" in dry_run
    (by_launcher,) = faults(space.check("cluster.api=trainjob", "cluster.runtime=absent", by=space.launcher))
    # Trainer's webhook refuses it, and Kueue's; whichever answers first is heard.
    assert "cluster.runtime must name a runtime of this cluster" in by_launcher


def test_the_command_ends_with_1_on_a_fault_and_counts(space: Space, tmp_path: Path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    environment = {**os.environ, "KUBECONFIG": str(space.launcher), "PYTHONPATH": str(ROOT)}

    def status(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "pipelines.cli", "pytorchjob", "--check", *space.words(*words)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
        return done.returncode, (done.stdout or done.stderr).splitlines()[-1]

    assert status() == (0, "8 ok, 0 warnings, 0 faults, 2 unknown")
    assert status("cluster.service_account=absent") == (1, "7 ok, 0 warnings, 1 fault, 2 unknown")


@pytest.fixture(scope="module")
def server(space: Space) -> Iterator[None]:
    """MLflow from the job's own image, and the network policies of k8s/base."""
    network = str(ROOT / "k8s" / "base" / "network.yaml")
    labels = {"app.kubernetes.io/name": "mlflow"}
    container = {
        "name": "mlflow",
        "image": IMAGE,
        "command": ["mlflow", "server", "--host=0.0.0.0", "--backend-store-uri=sqlite:////tmp/mlflow.db"],
        "args": ["--allowed-hosts=mlflow:5000", "--workers=1"],
        "workingDir": "/tmp",
        "readinessProbe": {"httpGet": {"path": "/health", "port": 5000}, "periodSeconds": 2, "timeoutSeconds": 10},
        "resources": {"requests": {"cpu": "90m", "memory": "300Mi"}},  # without any it has no part of a busy processor
    }
    service = {"selector": labels, "ports": [{"name": "http", "port": 5000}]}
    spec = {"containers": [container], "enableServiceLinks": False, "terminationGracePeriodSeconds": 1}
    with space.planted("Pod", "mlflow", labels=labels, spec=spec), space.planted("Service", "mlflow", spec=service):
        space.kubectl("apply", "--server-side", "-f", network)
        space.kubectl("wait", "--for=condition=Ready", "pod/mlflow", "--timeout=240s")
        yield


def from_pod(space: Space, *overrides: str) -> dict[str, tuple[str, str]]:
    """What the pod finds; it is gone afterwards."""
    found = {one.subject: (one.level, one.text) for one in space.check(*overrides, from_pod=True)}
    assert "maskrcnn-try-check" not in space.kubectl("get", "pods", "-o", "name")
    return {subject.removesuffix(" from a pod"): one for subject, one in found.items() if " from a pod" in subject}


def test_a_pod_sees_dns_mlflow_and_the_volumes_as_training_will(space: Space, server: None):
    found = from_pod(space, "cluster.tracking_uri=http://mlflow:5000")
    assert {level for level, _ in found.values()} == {"ok"}
    assert found["MLflow"] == ("ok", "http://mlflow:5000 answers")
    assert found["volume /workspace/runs"][1].startswith("writable, ")
    other_name = from_pod(space, f"cluster.tracking_uri=http://mlflow.{space.name}:5000")
    assert other_name["MLflow"][0] == "fault"
    assert "Invalid Host header" in other_name["MLflow"][1], "the name is not among --allowed-hosts"


def test_a_pod_sees_what_network_policies_close(space: Space, server: None):
    space.kubectl("delete", "networkpolicy", "tracking")
    (level, text) = from_pod(space)["MLflow"]  # timed out, or refused, as the network plugin has it
    assert (level, "check that MLflow runs, and that the network policies let" in text) == ("fault", True), text
    space.kubectl("delete", "networkpolicy", "dns")
    (level, text) = from_pod(space)["DNS"]
    assert (level, "Temporary failure in name resolution" in text) == ("fault", True), text


def test_a_pod_whose_image_or_secret_is_missing_says_so_and_goes(space: Space):
    for words, fault in (
        (["cluster.image=localhost/absent:1"], "ImagePullBackOff: "),
        (["cluster.secrets=[KEY=absent/key]"], 'CreateContainerConfigError: secret "absent" not found'),
    ):
        assert [text for text in faults(space.check(*words, from_pod=True)) if fault in text]
        assert "maskrcnn-try-check" not in space.kubectl("get", "pods", "-o", "name")


def test_a_check_that_is_cancelled_leaves_no_pod(space: Space, tmp_path: Path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [*space.words("cluster.image=localhost/absent:1", "cluster.stuck_timeout_s=100"), "--run-id", "try"]
    command = [sys.executable, "-m", "pipelines.cli", "pytorchjob", "--check-pod", *words]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    space.kubectl("wait", "--for=create", "pod/maskrcnn-try-check", "--timeout=60s")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "maskrcnn-try-check" not in space.kubectl("get", "pods", "-o", "name")
