"""Quotas, limit ranges, nodes and queues against a job's demand, as JSON of the API has them."""

from decimal import Decimal
from typing import Any

import pytest

from components.cluster.capacity import Demand, claim, limit_ranges, nodes, quotas
from components.cluster.queues import cluster_queue, selects

kubernetes = pytest.importorskip("kubernetes", reason="needs kubernetes, of the extra `pipelines`")
Json = dict[str, Any]
GIB = 2**30
DEMAND = Demand(
    2, {"cpu": Decimal(4), "memory": Decimal(8 * GIB), "nvidia.com/gpu": Decimal(1)}, "pytorchjobs.kubeflow.org"
)


def parse(text: str) -> Decimal:
    return kubernetes.utils.parse_quantity(text)


def quota(hard: Json, used: Json | None = None, **spec: Any) -> list[str]:
    item = {"metadata": {"name": "q"}, "spec": spec, "status": {"hard": hard, "used": used or {}}}
    return [f"{one.level} {one.text}" for one in quotas([item], DEMAND, parse)]


@pytest.mark.parametrize(
    ("hard", "used", "found"),
    [
        ({"requests.cpu": "8"}, {}, "ok requests.cpu 8 needed, 8 of 8 left"),
        ({"cpu": "8500m"}, {"cpu": "1"}, "fault cpu 8 needed, 7.5 of 8.5 left"),
        ({"limits.memory": "16Gi"}, {"limits.memory": "1Mi"}, "fault limits.memory 16Gi needed, 16383Mi of 16Gi left"),
        ({"requests.nvidia.com/gpu": "2"}, {}, "ok requests.nvidia.com/gpu 2 needed, 2 of 2 left"),
        ({"pods": "5"}, {"pods": "4"}, "fault pods 2 needed, 1 of 5 left"),
        ({"count/pytorchjobs.kubeflow.org": "3"}, {"count/pytorchjobs.kubeflow.org": "3"},
         "fault count/pytorchjobs.kubeflow.org 1 needed, 0 of 3 left"),
        ({"count/secrets": "1"}, {"count/secrets": "1"}, "ok does not count anything of the job"),
        ({"requests.ephemeral-storage": "1Gi"}, {}, "warning wants pods to state requests.ephemeral-storage, which"),
    ],
)  # fmt: skip
def test_a_quota_must_hold_the_whole_job(hard: Json, used: Json, found: str):
    assert quota(hard, used)[0].startswith(found)


def test_quotas_of_other_pods_do_not_count():
    full = ({"pods": "1"}, {"pods": "1"})
    assert quota(*full, scopes=["BestEffort"]) == []
    assert quota(*full, scopes=["Terminating"]) == []
    assert quota(*full, scopes=["NotTerminating", "NotBestEffort"])[0].startswith("fault pods 2 needed")
    priority = {"matchExpressions": [{"scopeName": "PriorityClass", "operator": "In", "values": ["high"]}]}
    assert quota(*full, scopeSelector=priority) == ["unknown whether its scope PriorityClass has the job's pods"]


def test_a_limit_range_binds_pods_and_containers_but_not_claims():
    def judged(kind: str, **rule: Json) -> list[str]:
        item = {"metadata": {"name": "l"}, "spec": {"limits": [{"type": kind, **rule}]}}
        return [one.level for one in limit_ranges([item], DEMAND, parse)]

    assert judged("Container", max={"cpu": "4"}) == ["ok"]
    assert judged("Container", max={"cpu": "3500m"}) == ["fault"]
    assert judged("Pod", max={"memory": "7Gi"}) == ["fault"]
    assert judged("Pod", min={"memory": "9Gi"}) == ["fault"]
    assert judged("PersistentVolumeClaim", max={"memory": "1Mi"}) == ["ok"]


def node(name: str, cpu: str = "8", gpu: str = "1", ready: str = "True", **spec: Any) -> Json:
    allocatable = {"cpu": cpu, "memory": "32Gi", "nvidia.com/gpu": gpu}
    conditions = [{"type": "MemoryPressure", "status": "False"}, {"type": "Ready", "status": ready}]
    labels = {"pool": "train"}
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": spec,
        "status": {"allocatable": allocatable, "conditions": conditions},
    }


def taint(value: str = "", effect: str = "NoSchedule") -> Json:
    return {"key": "gpu", "effect": effect} | ({"value": value} if value else {})


@pytest.mark.parametrize(
    ("second", "pod", "why"),
    [
        (node("b"), {}, ""),
        (node("b", cpu="3900m"), {}, "b has only 3.9 of cpu"),
        (node("b", gpu="0"), {}, "b has only 0 of nvidia.com/gpu"),
        (node("b", ready="Unknown"), {}, "b is not ready"),
        (node("b", unschedulable=True), {}, "b is cordoned"),
        (node("b", taints=[taint()]), {}, "b has the taint gpu:NoSchedule (cluster.tolerations)"),
        (node("b", taints=[taint("x", "NoExecute")]), {}, "b has the taint gpu=x:NoExecute (cluster.tolerations)"),
        (node("b", taints=[taint(effect="PreferNoSchedule")]), {}, ""),
        (node("b", taints=[taint("x")]), {"tolerations": [{"key": "gpu", "operator": "Exists"}]}, ""),
        (node("b", taints=[taint("x")]), {"tolerations": [{"key": "gpu", "value": "y", "effect": "NoSchedule"}]},
         "b has the taint gpu=x:NoSchedule (cluster.tolerations)"),
        (node("b", taints=[taint()]), {"tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoExecute"}]},
         "b has the taint gpu:NoSchedule (cluster.tolerations)"),
        (node("b"), {"nodeSelector": {"pool": "train"}}, ""),
    ],
)  # fmt: skip
def test_each_pod_needs_a_node(second: Json, pod: Json, why: str):
    finding, fitting = nodes([node("a"), second], DEMAND, pod, parse)
    assert (finding.level, fitting) == (("fault", 1) if why else ("ok", 2))
    assert why in finding.text


def test_one_large_node_holds_several_pods_and_a_selector_that_none_has_is_named():
    finding, fitting = nodes([node("a", gpu="2")], DEMAND, {}, parse)
    assert (finding.level, fitting) == ("ok", 1)
    finding, fitting = nodes([node(name) for name in "abcde"], DEMAND, {"nodeSelector": {"pool": "other"}}, parse)
    assert (finding.level, fitting) == ("fault", 0)
    assert "a has no label pool=other (cluster.node_selector); " in finding.text
    assert "c has no label pool=other (cluster.node_selector); and 2 more; request less" in finding.text


@pytest.mark.parametrize(
    ("modes", "read_only", "pods", "fitting", "level"),
    [
        (["ReadWriteMany"], False, 2, None, "ok"),
        (["ReadOnlyMany", "ReadWriteMany"], False, 2, 2, "ok"),
        (["ReadOnlyMany"], True, 2, 2, "ok"),
        (["ReadOnlyMany"], False, 1, 1, "fault"),
        (["ReadWriteOnce"], False, 1, 9, "ok"),
        (["ReadWriteOnce"], False, 2, 1, "ok"),
        (["ReadWriteOnce"], False, 2, 2, "fault"),
        (["ReadWriteOnce"], False, 2, None, "warning"),
        (["ReadWriteOncePod"], False, 2, 1, "fault"),
    ],
)
def test_a_claim_must_be_mountable_by_all_pods(
    modes: list[str], read_only: bool, pods: int, fitting: int | None, level: str
):
    found = {"spec": {"accessModes": ["ReadWriteMany"]}, "status": {"accessModes": modes}}
    assert claim(found, read_only=read_only, pods=pods, fitting_nodes=fitting)[0] == level


def queue(gpus: str = "2", names: str = "cpu memory nvidia.com/gpu", flavors: int = 1, **spec: Any) -> Json:
    quotas = {"cpu": "8", "memory": "16Gi", "nvidia.com/gpu": gpus}
    resources = [{"name": name, "nominalQuota": quotas[name]} for name in names.split()]
    group = {"coveredResources": names.split(), "flavors": [{"name": "f", "resources": resources}] * flavors}
    return {"metadata": {"name": "all"}, "spec": {"namespaceSelector": {}, "resourceGroups": [group], **spec}}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (queue(), "is active, and its quota is large enough for 2 × cpu 4, memory 8Gi, nvidia.com/gpu 1"),
        (queue("1"), "nvidia.com/gpu 2 is more than its quota of 1; request less"),
        (queue("1", flavors=2), "is active"),
        (queue("1", cohortName="all"), "is active"),
        (queue(names="cpu memory"), "nvidia.com/gpu must be among its coveredResources, but is not"),
        (queue(stopPolicy="Hold"), "must be active, got: it is stopped (stopPolicy Hold)"),
        (queue(namespaceSelector=None), "must select the namespace, got namespaceSelector none"),
        (queue(namespaceSelector={"matchLabels": {"team": "b"}}), "must select the namespace, got namespaceSelector {"),
        (queue(namespaceSelector={"matchLabels": {"team": "a"}}), "is active"),
    ],
)
def test_a_cluster_queue_must_take_the_namespace_and_hold_the_job(found: Json, text: str):
    finding = cluster_queue(found, DEMAND, {"team": "a"}, parse)
    assert finding.text.startswith(text)
    assert (finding.level == "ok") == text.startswith("is active")


def test_label_selectors():
    labels = {"team": "a"}
    for operator, values, key, expected in (
        ("In", ["a", "b"], "team", True),
        ("NotIn", ["a"], "team", False),
        ("NotIn", ["a"], "other", True),
        ("Exists", [], "team", True),
        ("DoesNotExist", [], "team", False),
    ):
        assert selects({"matchExpressions": [{"key": key, "operator": operator, "values": values}]}, labels) == expected
