"""The NetworkPolicies as kubectl applies them: they let through what must pass, on each kind of
cluster, and no more.
"""

import ipaddress
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[2]
TREE = ROOT / "k8s"
SERVING = ("kserve", "serving")  # on top of another overlay
OVERLAYS = sorted(path.name for path in (TREE / "overlays").iterdir() if path.name not in SERVING)
COMPONENTS = sorted(path.name for path in (TREE / "components").iterdir())
NAME, COMPONENT = "app.kubernetes.io/name", "app.kubernetes.io/component"
OF_A_PIPELINE = "pipelines.kubeflow.org/v2_component"
LABELS = {
    "trainer": {NAME: "maskrcnn", COMPONENT: "trainer"},
    "launcher": {NAME: "maskrcnn", COMPONENT: "launcher"},
    "download": {NAME: "maskrcnn", COMPONENT: "download"},
    "server": {NAME: "maskrcnn", COMPONENT: "server"},
    "step": {NAME: "maskrcnn", COMPONENT: "launcher", OF_A_PIPELINE: "true"},
    "driver": {OF_A_PIPELINE: "true"},  # what Kubeflow Pipelines runs between the steps
    "mlflow": {NAME: "mlflow"},
    "postgres": {NAME: "postgres"},
    "store": {NAME: "store"},
    "stranger": {NAME: "stranger"},
}
OURS = set(LABELS) - {"stranger"}
Json = dict[str, Any]
# The labels of a pod beside ours, or an address in another namespace or outside the cluster: (namespace, IP), and the
# labels of its pod, if any.
Place = dict[str, str] | tuple[str, str] | tuple[str, str, dict[str, str]]
OUTSIDE: Place = ("", "203.0.113.7")
by_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def policies(folder: Path) -> list[Json]:
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl, which resolves overlays")
    text = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout
    documents = list(YAML(typ="safe").load_all(text))
    assert not [document for document in documents if document["kind"] == "ConfigMap"], "parameters are not applied"
    return [document for document in documents if document["kind"] == "NetworkPolicy"]


@cache
def resolved(overlay: str) -> list[Json]:
    """The policies of the base or of an overlay. Only to be read."""
    return policies(TREE / (overlay if overlay == "base" else f"overlays/{overlay}"))


def spec_of(documents: list[Json], name: str) -> Json:
    return next(document["spec"] for document in documents if document["metadata"]["name"] == name)


def matches(selector: Json, labels: dict[str, str]) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    listed = all(labels.get(expression["key"]) in expression["values"] for expression in expressions)
    return listed and selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(peer: Json, theirs: Place) -> bool:
    assert set(peer) <= {"podSelector", "namespaceSelector"} or set(peer) == {"ipBlock"}, "what this test understands"
    if isinstance(theirs, dict):
        return "namespaceSelector" not in peer and "podSelector" in peer and matches(peer["podSelector"], theirs)
    namespace, address, labels = theirs if len(theirs) == 3 else (*theirs, {})
    if "ipBlock" in peer:
        return ipaddress.ip_address(address) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    is_there = matches(peer.get("namespaceSelector", {}), {"kubernetes.io/metadata.name": namespace})
    return "namespaceSelector" in peer and is_there and matches(peer.get("podSelector", {}), labels)


def passes(
    documents: list[Json], kind: str, ours: dict[str, str], theirs: Place, port: int, protocol: str = "TCP"
) -> bool:
    """Whether the policies about a pod let traffic of one direction pass; without any, all does."""
    about = [
        document["spec"]
        for document in documents
        if kind in document["spec"]["policyTypes"] and matches(document["spec"]["podSelector"], ours)
    ]
    peers = {"Ingress": "from", "Egress": "to"}[kind]
    return not about or any(
        (peers not in rule or any(is_peer(peer, theirs) for peer in rule[peers]))
        and ("ports" not in rule or (protocol, port) in [(p["protocol"], p["port"]) for p in rule["ports"]])
        for spec in about
        for rule in spec.get(kind.lower(), [])
    )


def gets_out(documents: list[Json], who: str, theirs: Place, asked: set[tuple[int, str]]) -> set[tuple[int, str]]:
    """The (port, protocol) by which a pod reaches a place."""
    return {way for way in asked if passes(documents, "Egress", LABELS[who], theirs, *way)}


@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        ("trainer", "trainer", 29500, True),
        ("trainer", "trainer", 41234, True),
        ("trainer", "mlflow", 5000, True),
        ("trainer", "store", 8333, True),
        ("launcher", "mlflow", 5000, True),
        ("mlflow", "postgres", 5432, True),
        ("mlflow", "store", 8333, True),
        ("trainer", "postgres", 5432, False),
        ("trainer", "mlflow", 22, False),
        ("launcher", "trainer", 29500, False),
        ("mlflow", "trainer", 29500, False),
        ("stranger", "mlflow", 5000, False),
        ("stranger", "trainer", 29500, False),
        ("stranger", "stranger", 80, False),
        ("store", "postgres", 5432, False),
    ],
)
def test_the_network_lets_through_what_must_pass_and_no_more(source: str, target: str, port: int, allowed: bool):
    ours, theirs, documents = LABELS[source], LABELS[target], resolved("base")
    is_let_through = passes(documents, "Egress", ours, theirs, port) and passes(
        documents, "Ingress", theirs, ours, port
    )
    assert is_let_through is allowed


API = {(443, "TCP"), (6443, "TCP"), (8443, "TCP"), (16443, "TCP")}
WEB = {(80, "TCP"), (443, "TCP")}
# (port, protocol) by which a pod gets out of the namespace, to anywhere; beside that, names are resolved by all.
OUT: dict[str, set[tuple[int, str]]] = {
    "trainer": set(), "launcher": API, "download": WEB, "server": set(), "step": API | WEB, "driver": API | WEB,
    "mlflow": set(), "postgres": set(), "store": set(),
}  # fmt: skip
ASKED = {
    (port, protocol)
    for port in (22, 53, 80, 443, 5000, 5353, 6443, 8333, 8443, 16443, 29500)
    for protocol in ("TCP", "UDP")
}
DNS = {(53, "TCP"), (53, "UDP")}
RESOLVERS: dict[Place, set[tuple[int, str]]] = {
    ("kube-system", "10.0.0.9"): DNS,
    ("", "169.254.20.10"): DNS,  # NodeLocal DNSCache, by default and by Kubespray
    ("", "169.254.25.10"): DNS,
    ("openshift-dns", "10.0.0.9"): {(5353, "TCP"), (5353, "UDP")},
}


@by_overlay
def test_pods_get_out_of_the_namespace_by_the_ports_that_they_need_alone(overlay: str):
    documents, namespace = resolved(overlay), "kubeflow" if overlay == "pipelines" else "maskrcnn"
    assert {policy["metadata"]["namespace"] for policy in documents} == {namespace}
    for who, ports in OUT.items():
        assert gets_out(documents, who, OUTSIDE, ASKED) == ports, who
        assert gets_out(documents, who, ("", "169.254.169.254"), ASKED) == ports, "the cloud's metadata are no resolver"
        for resolver, ways in RESOLVERS.items():
            assert gets_out(documents, who, resolver, ASKED) == ports | ways, (who, resolver)
        is_pipeline = who in ("step", "driver")
        assert gets_out(documents, who, ("kubeflow", "10.0.0.9"), ASKED) == (ASKED if is_pipeline else ports), who
    is_free = gets_out(documents, "stranger", OUTSIDE, ASKED) == ASKED
    assert is_free is (overlay == "pipelines"), "others of Kubeflow Pipelines' own namespace are not ours to bind"


@by_overlay
def test_training_alone_reaches_the_status_server_of_kubeflow_trainer_and_nothing_else_there(overlay: str):
    documents, asked = resolved(overlay), ASKED | {(10443, "TCP"), (9443, "TCP")}
    for namespace in ("kubeflow-system", "kubeflow"):
        # Labels of its Deployment in the manifests and in the chart.
        for name in ("trainer", "kubeflow-trainer"):
            manager = (namespace, "10.0.0.9", {NAME: name, COMPONENT: "manager"})
            assert gets_out(documents, "trainer", manager, asked) == {(10443, "TCP")}
        assert gets_out(documents, "trainer", (namespace, "10.0.0.9", {COMPONENT: "store"}), asked) == set()
        assert (10443, "TCP") not in gets_out(documents, "launcher", manager, asked)
    assert gets_out(documents, "trainer", ("team-b", "10.0.0.9", {COMPONENT: "manager"}), asked) == set()


@by_overlay
@pytest.mark.parametrize("serving", SERVING)
def test_a_served_model_is_asked_by_labelled_pods_alone_and_asks_mlflow_alone(overlay: str, serving: str):
    documents, server = resolved(overlay) + resolved(serving), LABELS["server"]
    for where in ("maskrcnn", "shop"):
        asker: Place = (where, "10.0.0.9", {"maskrcnn-client": "true"})
        ways = {way for way in ASKED | {(8080, "TCP")} if passes(documents, "Ingress", server, asker, *way)}
        assert ways == {(8080, "TCP")}
        assert not passes(documents, "Ingress", server, (where, "10.0.0.9", {NAME: "shop"}), 8080)
    assert not passes(documents, "Ingress", server, OUTSIDE, 8080)
    assert not passes(documents, "Ingress", server, LABELS["trainer"], 8080)
    assert gets_out(documents, "server", LABELS["mlflow"], ASKED) == {(5000, "TCP")}
    assert passes(documents, "Ingress", LABELS["mlflow"], server, 5000)
    assert gets_out(documents, "server", LABELS["postgres"], ASKED) == set()
    assert gets_out(documents, "server", LABELS["trainer"], ASKED) == set()


PARAMETERS = {
    "dns-address": "10.96.0.53/32",
    "dns-port": "1053",
    "api-port": "7443",
    "tracking-namespace": "ml",
    "tracking-address": "198.51.100.0/24",
    "tracking-port": "8080",
}


def written(folder: Path, *, resources: list[str], components: list[str], **parameters: str) -> Path:
    """An overlay of somebody's own, outside the tree: the example of docs/kubeflow.md with other values."""
    kustomization, network = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "kubeflow.md").read_text(), re.DOTALL)
    yaml = YAML(typ="safe", pure=True)
    mine, values = yaml.load(kustomization), yaml.load(network)
    prefix = os.path.relpath(TREE, folder)
    mine["resources"] = [f"{prefix}/overlays/{name}" for name in resources] + ["network.yaml"]
    mine["components"] = [f"{prefix}/components/{name}" for name in components]
    values["data"] = parameters
    for name, content in {"kustomization": mine, "network": values}.items():
        with (folder / f"{name}.yaml").open("w") as stream:
            yaml.dump(content, stream)
    return folder


@pytest.mark.parametrize("overlay", ["cpu-dev", "pipelines"])
def test_an_overlay_of_ones_own_opens_what_its_parameters_name_and_no_more(tmp_path: Path, overlay: str):
    folder = written(tmp_path.resolve(), resources=[overlay], components=COMPONENTS, **PARAMETERS)
    documents, asked = policies(folder), ASKED | {(p, q) for p in (1053, 7443, 8080) for q in ("TCP", "UDP")}
    for policy in documents:
        ports = [port["port"] for rule in policy["spec"].get("egress", []) for port in rule.get("ports", [])]
        assert all(isinstance(port, int) and port for port in ports), "text would be the name of a port"
    for who, ports in OUT.items():
        api = ports | ({(7443, "TCP")} if ports >= API else set())
        assert gets_out(documents, who, OUTSIDE, asked) == api, who
        assert gets_out(documents, who, ("", "10.96.0.53"), asked) == api | {(1053, "TCP"), (1053, "UDP")}, who
        tracking = api | ({(8080, "TCP")} if LABELS[who].get(NAME) == "maskrcnn" else set())
        for server in (("ml", "10.0.0.9"), ("", "198.51.100.20")):
            assert gets_out(documents, who, server, asked) == tracking, (who, server)


def test_each_component_works_alone_and_misses_its_parameters(tmp_path: Path):
    assert COMPONENTS == ["api-port", "dns-address", "tracking-address", "tracking-namespace"]
    for component in COMPONENTS:
        text = (TREE / "components" / component / "kustomization.yaml").read_text()
        names = re.findall(r"fieldPath: data\.(\S+)", text)
        parameters = {name: PARAMETERS[name] for name in names}
        assert names, "each has parameters"
        assert set(re.findall(r"[a-z]+-[a-z]+(?=[ ,:.])", text.split("apiVersion")[0])) >= set(names), (
            "its header has all"
        )
        folder = written(tmp_path.resolve(), resources=["cpu-dev"], components=[component], **parameters)
        assert policies(folder) != resolved("cpu-dev")
        folder = written(tmp_path.resolve(), resources=["cpu-dev"], components=[component], other="1")
        with pytest.raises(subprocess.CalledProcessError) as error:
            policies(folder)
        assert f"`data.{names[0]}` is missing" in error.value.stderr


def test_beside_kubeflow_pipelines_no_pod_but_ours_is_bound():
    for policy in resolved("pipelines"):
        selector = policy["spec"]["podSelector"]
        keys = {*selector.get("matchLabels", {}), *(e["key"] for e in selector.get("matchExpressions", []))}
        assert keys, f"{policy['metadata']['name']} would bind every pod of the namespace"
        assert keys <= {NAME, COMPONENT, OF_A_PIPELINE}
    names = spec_of(resolved("pipelines"), "dns")["podSelector"]["matchExpressions"][0]["values"]
    assert set(names) == {LABELS[who][NAME] for who in OURS - {"driver"}}
    egress = [spec_of(resolved("pipelines"), name)["egress"] for name in ("dns", "dns-pipeline")]
    assert egress[0] == egress[1]
