"""The kustomize tree: every manifest is known to the API and "restricted", and holds no secret; test_network.py has the
policies.
"""

import copy
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

from components.cluster.description import describe
from components.cluster.manifest import build
from components.params import load_config

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "k8s"
ALL_OVERLAYS = sorted(path.name for path in (TREE / "overlays").iterdir())
OVERLAYS = [name for name in ALL_OVERLAYS if name not in ("kserve", "serving")]  # those two come on top of another
Json = dict[str, Any]
by_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def read(text: str) -> list[Json]:
    return list(YAML(typ="safe").load_all(text))


@cache
def base() -> list[Json]:
    """The base, file by file, as kustomization.yaml lists it; no kustomize is needed for that. Only to be read."""
    files = read((TREE / "base" / "kustomization.yaml").read_text())[0]["resources"]
    return [document for file in files for document in read((TREE / "base" / file).read_text())]


@cache
def resolved(overlay: str) -> list[Json]:
    """An overlay as kubectl applies it. Only to be read."""
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl, which resolves overlays")
    command = ["kubectl", "kustomize", str(TREE / "overlays" / overlay)]
    return read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def find(documents: list[Json], kind: str, name: str) -> Json:
    return next(d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name))


def pod_specs(documents: list[Json]) -> dict[str, Json]:
    return {d["metadata"]["name"]: d["spec"]["template"]["spec"] for d in documents if "template" in d.get("spec", {})}


def launch_with(overlay: str) -> list[str]:
    """The overrides that an overlay's header says to launch with."""
    text = (TREE / "overlays" / overlay / "kustomization.yaml").read_text()
    joined = text.replace("\\\n#", "")
    (line,) = re.findall(r"^# Launch with: maskrcnn pytorchjob (.*)$", joined, flags=re.MULTILINE)
    return line.split()


def set_at(tree: Any, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


def test_the_base_lists_all_its_files():
    files = {path.name for path in (TREE / "base").iterdir()} - {"kustomization.yaml"}
    assert files == set(read((TREE / "base" / "kustomization.yaml").read_text())[0]["resources"])
    assert OVERLAYS == ["cpu-dev", "gpu", "kueue", "pipelines", "restricted", "volcano"]


def test_every_manifest_of_the_base_is_known_to_the_api(kubernetes_schema: ModuleType):
    assert [fault for document in base() for fault in kubernetes_schema.faults(document)] == []


@by_overlay
def test_every_manifest_of_an_overlay_is_known_to_the_api(kubernetes_schema: ModuleType, overlay: str):
    documents = resolved(overlay)
    assert [fault for document in documents for fault in kubernetes_schema.faults(document)] == []
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(names)) == len(names)
    left_out = {("Namespace", "maskrcnn"), ("NetworkPolicy", "default-deny")} if overlay == "pipelines" else set()
    assert set(names) >= {(document["kind"], document["metadata"]["name"]) for document in base()} - left_out
    assert not set(names) & left_out


def test_a_misspelt_field_at_any_depth_fails(kubernetes_schema: ModuleType):
    # Overlays have most of their documents in common.
    documents = {json.dumps(document): document for overlay in ALL_OVERLAYS for document in resolved(overlay)}
    # Maps whose keys are anyone's: labels, quantities, and what selects by them.
    free = {"labels", "matchLabels", "annotations", "limits", "requests", "hard", "capability", "nodeLabels"}
    checked = 0
    for document in documents.values():
        maps = free | ({"selector"} if document["kind"] == "Service" else set())
        for path in kubernetes_schema.field_paths(document):
            if maps & set(path[-2:-1]):
                continue
            wrong = copy.deepcopy(document)
            node: Any = wrong
            for key in path[:-1]:
                node = node[key]
            node[f"{path[-1]}x"] = node.pop(path[-1])
            assert kubernetes_schema.faults(wrong), (document["kind"], path)
            checked += 1
    assert checked > 1000


@by_overlay
def test_every_pod_is_restricted_and_has_no_token(kubernetes_schema: ModuleType, overlay: str):
    pods = pod_specs(resolved(overlay))
    assert set(pods) == {"mlflow", "postgres", "store"}
    for name, pod in pods.items():
        assert kubernetes_schema.violations(pod) == [], name
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["resources"]["limits"]["memory"]
            assert re.search(r":v?\d", container["image"]), "a version, not latest"


RESTRICTED = {
    "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
    "containers": [
        {"name": "a", "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}
    ],
}
INNER = ("containers", 0, "securityContext")


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("hostNetwork",), True, "hostNetwork"),
        (("securityContext", "runAsNonRoot"), False, "runAsNonRoot"),
        (("securityContext", "runAsUser"), 0, "runAsUser"),
        (("securityContext", "seccompProfile"), {"type": "Unconfined"}, "seccompProfile"),
        ((*INNER, "allowPrivilegeEscalation"), None, "allowPrivilegeEscalation"),
        ((*INNER, "capabilities"), {}, "drop ALL"),
        ((*INNER, "capabilities", "add"), ["SYS_ADMIN"], "NET_BIND_SERVICE"),
        ((*INNER, "privileged"), True, "privileged"),
        (("containers", 0, "ports"), [{"containerPort": 1, "hostPort": 1}], "hostPort"),
        (("volumes",), [{"name": "v", "hostPath": {"path": "/"}}], "hostPath"),
        # What the training operator adds to workers beside a master.
        (("initContainers",), [{"name": "init-pytorch", "image": "alpine:3.10"}], "init-pytorch"),
    ],
)
def test_the_check_of_restricted_finds_each_breach(kubernetes_schema: ModuleType, path: tuple, value: Any, reason: str):
    assert kubernetes_schema.violations(RESTRICTED) == []
    pod = copy.deepcopy(RESTRICTED)
    set_at(pod, path, value)
    assert any(reason in violation for violation in kubernetes_schema.violations(pod))


def test_secrets_are_named_and_never_written():
    for path in TREE.rglob("*.yaml"):
        assert not [document for document in read(path.read_text()) if document.get("kind") == "Secret"], path
    variables = [variable for pod in pod_specs(base()).values() for variable in pod["containers"][0].get("env", [])]
    for variable in variables:
        if re.search("PASSWORD|SECRET|KEY|TOKEN", variable["name"]):
            assert "valueFrom" in variable, variable["name"]
    keys = {variable["valueFrom"]["secretKeyRef"]["key"] for variable in variables if "valueFrom" in variable}
    header = (TREE / "base" / "kustomization.yaml").read_text()
    assert set(re.findall(r"--from-literal=([a-z-]+)=", header)) == keys, "the header tells how to make them all"


def test_the_launcher_cannot_read_secrets_nor_change_pods():
    for rule in find(base(), "Role", "launcher")["rules"]:
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert not {"secrets", "pods/exec", "roles", "serviceaccounts"} & set(rule["resources"])
        assert rule["apiGroups"] != [""] or set(rule["verbs"]) <= {"get", "list"}
    assert find(base(), "RoleBinding", "launcher")["subjects"] == [{"kind": "ServiceAccount", "name": "launcher"}]
    assert not [document for document in base() if document["kind"].startswith("ClusterRole")]


def test_the_trainers_account_has_no_token_and_no_role():
    assert find(base(), "ServiceAccount", "trainer")["automountServiceAccountToken"] is False
    subjects = [subject["name"] for d in base() if d["kind"] == "RoleBinding" for subject in d["subjects"]]
    assert "trainer" not in subjects


def test_policies_go_by_labels_that_pods_have():
    pod = read((TREE / "job" / "pod.yaml").read_text())[0]
    labels = {"app.kubernetes.io/name": "maskrcnn", "app.kubernetes.io/component": "trainer"}
    assert labels.items() <= pod["metadata"]["labels"].items()
    for name in ("mlflow", "postgres", "store"):
        owner = next(d for d in base() if d["kind"] in ("Deployment", "StatefulSet") and d["metadata"]["name"] == name)
        labels = {"app.kubernetes.io/name": name}
        assert owner["spec"]["template"]["metadata"]["labels"] == labels
        assert owner["spec"]["selector"]["matchLabels"] == labels
        service = find(base(), "Service", name)
        assert service["spec"]["selector"] == labels
        ports = [port["containerPort"] for port in owner["spec"]["template"]["spec"]["containers"][0]["ports"]]
        assert [port["port"] for port in service["spec"]["ports"]] == ports


def test_mlflow_answers_to_its_own_names_alone():
    args = pod_specs(base())["mlflow"]["containers"][0]["args"]
    (hosts,) = (arg.removeprefix("--allowed-hosts=").split(",") for arg in args if arg.startswith("--allowed-hosts="))
    assert "mlflow:5000" in hosts, "the Host header of cluster.tracking_uri"
    assert "*" not in hosts


def test_the_defaults_of_cluster_name_what_the_base_has():
    cluster, documents = load_config(ROOT / "params.yaml").cluster, base()
    assert find(documents, "Namespace", cluster.namespace)
    assert find(documents, "ServiceAccount", cluster.service_account)
    for volume in cluster.volumes:
        assert find(documents, "PersistentVolumeClaim", volume.split(":")[0])
    service = find(documents, "Service", "mlflow")
    assert cluster.tracking_uri == f"http://mlflow:{service['spec']['ports'][0]['port']}"


@by_overlay
def test_the_job_that_an_overlay_is_for_is_valid_there(kubernetes_schema: ModuleType, overlay: str):
    config = load_config(ROOT / "params.yaml", ["cluster.image=registry/maskrcnn:1", *launch_with(overlay)])
    job, documents = build(describe(config, "try-1")), resolved(overlay)
    assert kubernetes_schema.faults(job) == []
    assert find(documents, "ServiceAccount", "trainer")["metadata"]["namespace"] == config.cluster.namespace
    if overlay != "pipelines":  # whose namespace is that of Kubeflow Pipelines
        level = find(documents, "Namespace", "maskrcnn")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        assert level == ("restricted" if overlay == "restricted" else "baseline")
    for replica in job["spec"].get("pytorchReplicaSpecs", {}).values():  # none in the TrainJob for Kueue
        assert kubernetes_schema.violations(replica["template"]["spec"]) == []
    if config.cluster.queue:
        kind = {"kueue": "LocalQueue", "volcano": "Queue"}[config.cluster.scheduler]
        assert find(documents, kind, config.cluster.queue)


def test_beside_kubeflow_pipelines_its_steps_may_launch():
    documents = resolved("pipelines")
    assert {d["metadata"]["namespace"] for d in documents} == {"kubeflow"}
    subjects = find(documents, "RoleBinding", "launcher")["subjects"]
    assert [(s["name"], s["namespace"]) for s in subjects] == [
        ("launcher", "kubeflow"),
        ("pipeline-runner", "kubeflow"),
    ]


def test_the_job_that_prepares_data_is_restricted_and_puts_them_where_training_looks(kubernetes_schema: ModuleType):
    (job,) = read((TREE / "prepare.yaml").read_text())
    assert kubernetes_schema.faults(job) == []
    pod, config = job["spec"]["template"]["spec"], load_config(ROOT / "params.yaml")
    assert kubernetes_schema.violations(pod) == []
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    claims = {
        volume["persistentVolumeClaim"]["claimName"]: volume["name"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert {f"{claim}:{mounts[name]}" for claim, name in claims.items()} <= set(config.cluster.volumes)
    assert container["workingDir"] == config.cluster.working_dir
    assert find(base(), "ServiceAccount", pod["serviceAccountName"])
    labels = job["spec"]["template"]["metadata"]["labels"]
    for policy in ("download", "tracking"):
        assert find(base(), "NetworkPolicy", policy)["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_job_that_prepares_data_hands_overrides_to_both_stages(tmp_path: Path):
    (job,) = read((TREE / "prepare.yaml").read_text())
    stand_in = tmp_path / "maskrcnn"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    after_tini = [*command[command.index("--") + 1 :], "data.source=coco2017", "data.raw_dir=data/raw/a b"]
    output = subprocess.run(
        after_tini, env={"PATH": f"{tmp_path}:/bin:/usr/bin"}, capture_output=True, text=True, check=True
    ).stdout
    overrides = "data.source=coco2017 data.raw_dir=data/raw/a b"
    assert output.splitlines() == [f"download {overrides}", f"prepare {overrides}"]


def test_overlays_change_what_they_say():
    small, shared = (
        {d["metadata"]["name"]: d["spec"] for d in resolved(overlay) if d["kind"] == "PersistentVolumeClaim"}
        for overlay in ("cpu-dev", "gpu")
    )
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "5Gi"}}}
    assert small == {"data": claim, "runs": claim}
    assert {spec["storageClassName"] for spec in shared.values()} == {"shared-ssd"}
    assert shared["runs"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("overlay", ["cpu-dev", "pipelines"])
def test_on_one_machine_the_servers_leave_the_cores_to_training(overlay: str):
    """A node of two cores, with its own pods, must hold them and a training pod of one core."""
    pods = pod_specs(resolved(overlay))
    requests = {name: spec["containers"][0]["resources"]["requests"]["cpu"] for name, spec in pods.items()}
    assert requests == {"mlflow": "50m", "postgres": "50m", "store": "50m"}
