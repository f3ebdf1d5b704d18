"""`maskrcnn pytorchjob --check` against a server on loopback, by the real client: each fault, and what is said of it."""

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from components import pytorchjob
from components.cluster.findings import Finding
from components.config import Config
from components.params import load_config

pytest.importorskip("kubernetes", reason="needs kubernetes, of the extra `pipelines`")
ROOT = Path(__file__).resolve().parents[3]
NAME = "maskrcnn-try-1"
SPACE = "/api/v1/namespaces/maskrcnn"
KUEUE = "/apis/kueue.x-k8s.io"
QUEUE = ("cluster.scheduler=kueue", "cluster.queue=team")
Make = Callable[..., Any]  # see make_cluster in ../conftest.py
Json = dict[str, Any]


@cache
def config(*overrides: str) -> Config:
    words = ["cluster.image=registry/maskrcnn:1", "cluster.poll_s=1", "cluster.api_timeout_s=1", *overrides]
    return load_config(ROOT / "params.yaml", words)


def check(*overrides: str, from_pod: bool = False) -> list[Finding]:
    return pytorchjob.check(config(*overrides), run_id="try-1", from_pod=from_pod)


def of(found: list[Finding], *levels: str) -> list[str]:
    """Subjects and texts of the findings of these levels."""
    return [f"{one.subject}: {one.text}" for one in found if one.level in levels]


def node(name: str, **allocatable: str) -> Json:
    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    has = {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1", **allocatable}
    return {"metadata": {"name": name}, "spec": {}, "status": {**ready, "allocatable": has}}


def show_nodes(cluster: Any, *nodes: Json) -> None:
    """Let the account list nodes."""
    cluster.granted.add(("", "nodes", "list"))
    cluster.objects["/api/v1/nodes"] = {"metadata": {}, "items": [*nodes]}


def test_a_cluster_that_would_run_the_job_has_no_fault_and_nothing_is_created(make_cluster: Make):
    cluster = make_cluster()
    found = check()
    assert of(found, "fault", "warning") == []
    assert of(found, "unknown") == [
        "nodes: not allowed to look (list nodes)",
        "dry run of a pod: not allowed to look (create pods)",
    ]
    server = found[0].text
    assert server.startswith("Kubernetes v1.34.4 at http://127.0.0.1:")
    assert server.endswith(", as system:serviceaccount:maskrcnn:me")
    assert str(next(one for one in found if one.subject == "claim data")) == "ok       claim data: Bound, ReadWriteMany"
    cluster.granted |= {("", "pods", "create")}
    show_nodes(cluster, node("a"))
    assert {one.level for one in check()} == {"ok"}
    assert (cluster.jobs, cluster.pods, cluster.deletions) == ({}, {}, [])


def test_missing_permissions_are_named_with_the_command_that_gives_them(make_cluster: Make):
    cluster = make_cluster()
    cluster.granted -= {("kubeflow.org", "pytorchjobs", "delete"), ("", "events", "list"), ("", "pods/log", "get")}
    bind = "; kubectl -n maskrcnn create rolebinding NAME --role=launcher --serviceaccount=maskrcnn:me"
    found = check()
    lacking = "must be allowed to delete pytorchjobs.kubeflow.org, list events, but system:serviceaccount:maskrcnn:me"
    assert of(found, "fault") == [f"permissions: {lacking} is not{bind}"]
    loss = "not allowed to get pods/log: without it, rank 0's log is missing"
    assert of(found, "warning") == [f"permissions: {loss}{bind}"]


@pytest.mark.parametrize(
    ("path", "answer", "fault"),
    [
        ("/apis/kubeflow.org/v1", None,
         "api pytorchjobs: kubeflow.org/v1 must be served, but is not; install training operator 1.9 or later"),
        ("/apis/kubeflow.org/v1", {"resources": [{"name": "tfjobs"}]},
         "api pytorchjobs: kubeflow.org/v1 must be served, but is not; install training operator 1.9 or later"),
        (SPACE, None, "namespace maskrcnn: must exist, but does not; kubectl apply -k k8s/base, or an overlay"),
        (SPACE, {"metadata": {}, "status": {"phase": "Terminating"}},
         "namespace maskrcnn: is being deleted; wait until it is gone, then create it again"),
        (f"{SPACE}/serviceaccounts/trainer", None,
         "service account trainer: must exist, or no pod is created; kubectl apply -k k8s/base, or set "
         "cluster.service_account"),
        (f"{SPACE}/persistentvolumeclaims/data", None,
         "claim data: must exist (cluster.volumes), but does not; apply k8s/base or an overlay"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_what_makes_it(make_cluster: Make, path: str, answer: Json | None, fault: str):
    cluster = make_cluster()
    cluster.objects.pop(path)
    cluster.objects |= {path: answer} if answer else {}
    assert of(check(), "fault") == [fault]


def test_a_server_that_is_away_or_wants_a_login_ends_the_check(make_cluster: Make, monkeypatch: pytest.MonkeyPatch):
    cluster = make_cluster()
    kubeconfig = Path(os.environ["KUBECONFIG"])
    kubeconfig.write_text(kubeconfig.read_text().replace("t0ken", "old"))
    (refused,) = check()
    assert refused.level == "fault"
    assert refused.text.endswith(": 401 Unauthorized; log in again, or mount a service account's token")
    cluster.server.shutdown()
    cluster.server.server_close()
    began_s = time.monotonic()
    (away,) = check(from_pod=True)
    assert away.level == "fault"
    assert "Connection refused" in away.text
    assert "Check its address in the kubeconfig" in away.text
    assert time.monotonic() - began_s < 5


@pytest.mark.parametrize(("nodes", "is_refused"), [(1, False), (2, True)])
def test_a_restricted_namespace_takes_no_init_container(make_cluster: Make, nodes: int, is_refused: bool):
    cluster = make_cluster()
    cluster.objects[SPACE]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] = "restricted"
    assert of(check(), "fault") == []
    found = check("cluster.form=master_worker", f"cluster.nodes={nodes}")
    assert [fault.partition(":")[0] for fault in of(found, "fault")] == ["namespace maskrcnn"] * is_refused


def test_secrets_and_their_keys_are_looked_at_where_they_may_be(make_cluster: Make):
    cluster = make_cluster()
    words = ("cluster.secrets=[A=store/user, B=store/key]", "cluster.image_pull_secret=registry")
    unknown = of(check(*words), "unknown")
    assert "secret store: not allowed to look (get secrets)" in unknown
    assert "secret registry: not allowed to look (get secrets)" in unknown
    cluster.granted.add(("", "secrets", "get"))
    assert [fault.partition(",")[0] for fault in of(check(*words), "fault")] == [
        "secret store: must exist (cluster.secrets)",
        "secret registry: must exist (cluster.image_pull_secret)",
    ]
    cluster.objects[f"{SPACE}/secrets/store"] = {"data": {"key": "eA=="}, "type": "Opaque"}
    cluster.objects[f"{SPACE}/secrets/registry"] = {"type": "Opaque"}
    assert of(check(*words), "fault") == [
        "secret store: must have the key user (cluster.secrets), got key; change it, or cluster.secrets",
        "secret registry: must be of type kubernetes.io/dockerconfigjson, got Opaque; change it, or "
        "cluster.image_pull_secret",
    ]
    cluster.objects[f"{SPACE}/secrets/store"]["data"]["user"] = "eA=="
    cluster.objects[f"{SPACE}/secrets/registry"]["type"] = "kubernetes.io/dockerconfigjson"
    assert of(check(*words), "fault") == []


def test_a_claim_without_a_volume_is_judged_by_its_class(make_cluster: Make):
    cluster = make_cluster()
    claim = cluster.objects[f"{SPACE}/persistentvolumeclaims/data"]
    claim["status"] = {"phase": "Pending"}
    (text,) = of(check(), "warning")  # classes may not be read
    assert text.startswith("claim data: Pending: it must have a volume, or get one from class shared; ")
    about = {"kind": "PersistentVolumeClaim", "name": "data"}
    cluster.events = [{"involvedObject": about, "message": "no volume plugin matched", "type": "Warning"}]
    (text,) = of(check(), "fault")
    assert "from class shared: no volume plugin matched; kubectl describe pvc" in text
    cluster.granted.add(("storage.k8s.io", "storageclasses", "get"))
    (text,) = of(check(), "fault")
    assert text.startswith("claim data: Pending, since its storage class shared does not exist: no volume plugin")
    path = "/apis/storage.k8s.io/v1/storageclasses/shared"
    cluster.objects[path] = {"volumeBindingMode": "WaitForFirstConsumer"}
    assert of(check(), "fault", "warning") == []
    claim["spec"].pop("storageClassName")
    assert of(check(), "fault") == [
        "claim data: Pending, since it has no storage class: no volume plugin matched; kubectl get storageclass"
    ]
    claim["status"]["phase"] = "Lost"
    assert of(check(), "fault") == ["claim data: its volume is gone; delete it, and apply k8s/base or an overlay"]


def test_a_claim_for_one_node_is_a_fault_with_two_nodes_that_pods_may_run_on(make_cluster: Make):
    cluster = make_cluster()
    claim = cluster.objects[f"{SPACE}/persistentvolumeclaims/runs"]
    claim["status"]["accessModes"] = ["ReadWriteOnce"]
    assert of(check(), "fault", "warning") == []
    (text,) = of(check("cluster.nodes=2"), "warning")
    assert text.startswith(
        "claim runs: Bound, must be ReadWriteMany for cluster.nodes=2, got ReadWriteOnce, which only pods on one node"
    )
    show_nodes(cluster, node("a", **{"nvidia.com/gpu": "2", "cpu": "16"}))
    assert of(check("cluster.nodes=2"), "fault", "warning") == []
    show_nodes(cluster, node("a"), node("b"))
    assert [text.partition(":")[0] for text in of(check("cluster.nodes=2"), "fault")] == ["claim runs"]


def test_a_quota_counts_a_job_that_exists_as_perhaps_its_own(make_cluster: Make):
    cluster = make_cluster()
    hard, used = {"requests.nvidia.com/gpu": "1"}, {"requests.nvidia.com/gpu": "1"}
    quota = {"metadata": {"name": "gpus"}, "spec": {}, "status": {"hard": hard, "used": used}}
    cluster.objects[f"{SPACE}/resourcequotas"]["items"] = [quota]
    assert [text.partition(":")[0] for text in of(check(), "fault")] == ["quota gpus"]
    cluster.jobs[NAME] = pytorchjob.make_manifest(config(), run_id="try-1")
    found = check()
    assert of(found, "fault") == []
    assert of(found, "warning")[0].endswith("; maskrcnn-try-1 may hold a part of it itself")
    assert f"job {NAME}: exists; launching follows it" in of(found, "ok")
    (text,) = of(check("cluster.cpu=4"), "fault")
    assert text.startswith(f"job {NAME}: already exists with another image, command or resources; ")
    cluster.jobs[NAME]["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
    assert any("has failed or is being deleted; launching replaces it" in text for text in of(check(), "ok"))


def test_the_dry_run_shows_an_operator_that_is_too_old_and_warnings(make_cluster: Make):
    cluster = make_cluster()
    cluster.unknown_fields = {"elasticPolicy"}
    (text,) = of(check(), "fault")
    assert text == (
        'dry run: 400 strict decoding error: unknown field "spec.elasticPolicy"; the operator of this cluster is too '
        "old: cluster.api=pytorchjob needs training operator 1.9 or later"
    )
    cluster.unknown_fields, cluster.warnings = set(), ["it is deprecated"]
    assert of(check(), "warning") == ["dry run: the job is accepted, with: it is deprecated"]
    cluster.warnings = []
    cluster.faults = [("create", "pytorchjobs", 500, "failed calling webhook: connection refused")] * 9
    (text,) = of(check(), "fault")
    assert text.startswith("dry run: ")
    assert "failed calling webhook" in text


def test_a_queue_is_found_and_must_take_the_job(make_cluster: Make):
    cluster = make_cluster()
    cluster.objects["/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/torch-distributed"] = {}
    needs_kueue = "queue: kueue.x-k8s.io must be served as v1beta2 or v1beta1, got none; install Kueue 0.17 or later"
    assert of(check(*QUEUE), "fault") == [needs_kueue]
    cluster.objects[KUEUE] = {"versions": [{"version": "v1beta1"}, {"version": "v1beta2"}]}
    missing = "queue team: the LocalQueue must exist in maskrcnn, but does not; apply k8s/overlays/kueue, or set "
    assert of(check(*QUEUE), "fault") == [f"{missing}cluster.queue"]
    conditions = [{"type": "Active", "status": "False", "reason": "Stopped", "message": "ClusterQueue all is inactive"}]
    queue = {"metadata": {"name": "team"}, "spec": {"clusterQueue": "all"}, "status": {"conditions": conditions}}
    cluster.objects[f"{KUEUE}/v1beta2/namespaces/maskrcnn/localqueues/team"] = queue
    assert of(check(*QUEUE), "fault") == [
        "queue team: must be active, got: ClusterQueue all is inactive; kubectl -n maskrcnn describe localqueue team"
    ]
    conditions[0] = {"type": "Active", "status": "True"}
    found = check(*QUEUE)
    assert of(found, "fault") == []
    assert "queue all (ClusterQueue): not allowed to look (get clusterqueues)" in of(found, "unknown")
    assert "runtime: not allowed to look (get clustertrainingruntimes)" in of(found, "unknown")
    cluster.suspends = False
    for words, integration in (
        (QUEUE, "trainer.kubeflow.org/trainjob"),
        ((*QUEUE, "cluster.api=pytorchjob"), "kubeflow.org/pytorchjob"),
    ):
        (text,) = of(check(*words), "fault")
        assert text.startswith(
            f"dry run: Kueue must suspend the job, but leaves it alone; enable its integration {integration} "
        )


def test_a_missing_runtime_or_queue_of_the_whole_cluster_is_found_by_those_who_may_look(make_cluster: Make):
    cluster = make_cluster()
    cluster.granted |= {
        ("trainer.kubeflow.org", "clustertrainingruntimes", "get"),
        ("scheduling.volcano.sh", "queues", "get"),
    }
    (text,) = of(check("cluster.api=trainjob"), "fault")
    assert text.startswith("runtime: the ClusterTrainingRuntime torch-distributed must exist, but does not; ")
    volcano = ("cluster.scheduler=volcano", "cluster.queue=team")
    assert of(check(*volcano), "fault") == [
        "api queues: scheduling.volcano.sh/v1beta1 must be served, but is not; install Volcano"
    ]
    cluster.objects["/apis/scheduling.volcano.sh/v1beta1"] = {"resources": [{"name": "queues"}]}
    assert of(check(*volcano), "fault") == [
        "queue team: must exist, but does not; apply k8s/overlays/volcano, or set cluster.queue"
    ]
    queue = {"metadata": {"name": "team"}, "status": {"state": "Closed"}}
    cluster.objects["/apis/scheduling.volcano.sh/v1beta1/queues/team"] = queue
    assert of(check(*volcano), "fault") == ["queue team: must be Open, got Closed; vcctl queue operate -a open"]


def test_the_command_prints_each_finding_and_ends_with_1_on_a_fault(
    make_cluster: Make, capsys: pytest.CaptureFixture[str]
):
    cluster = make_cluster()
    words = ["--params", str(ROOT / "params.yaml"), "--check", "cluster.image=registry/maskrcnn:1"]
    for status, last in ((0, "8 ok, 0 warnings, 0 faults, 2 unknown"), (1, "7 ok, 0 warnings, 1 fault, 2 unknown")):
        with pytest.raises(SystemExit) as end:
            pytorchjob.main(words)
        assert end.value.code == status
        *lines, summary = capsys.readouterr().out.splitlines()
        assert summary.startswith(last)
        assert [line for line in lines if line.startswith("fault")] == [
            line for line in lines if "service account" in line and status
        ]
        cluster.objects.pop(f"{SPACE}/serviceaccounts/trainer", None)
