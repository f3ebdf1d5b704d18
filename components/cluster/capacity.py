"""Capacity for a job: quotas, limit ranges, nodes, and the claims that its pods mount.

The functions judge the API's JSON; `preflight.py` fetches it. Amounts are numbers of cores, bytes and devices.
Sources: Kubernetes' quota evaluator of pods, LimitRanger, and the scheduler's filters NodeResourcesFit and
TaintToleration.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from components.cluster.findings import Finding, Level

Json = dict[str, Any]
Parse = Callable[[str], Decimal]
_MUST_BE_SET = ("cpu", "memory", "ephemeral-storage")  # with a quota on one, pods that do not state it are refused
_NOT_OURS = ("BestEffort", "Terminating", "CrossNamespacePodAffinity")  # scopes of quotas
_OURS = ("NotBestEffort", "NotTerminating")


@dataclass(frozen=True)
class Demand:
    """Resources that a job needs."""

    pods: int
    each: Mapping[str, Decimal]  # resources of one pod; requests equal limits
    jobs: str  # resource and group of the job, as quotas count objects

    def of(self, key: str) -> Decimal | None:
        """Total of a quota's key, such as requests.cpu; None if the job has none of it, or it is not known here."""
        if key in ("pods", "count/pods"):
            return Decimal(self.pods)
        if key == f"count/{self.jobs}":
            return Decimal(1)
        resource = key.removeprefix("requests.").removeprefix("limits.")
        return self.each[resource] * self.pods if resource in self.each else None

    def __str__(self) -> str:
        return ", ".join(f"{name} {show(name, amount)}" for name, amount in self.each.items())


def show(resource: str, amount: Decimal) -> str:
    """Write an amount; bytes in the largest unit that keeps them whole, Gi or Mi, and else in Mi."""
    if not resource.endswith(("memory", "storage")):
        return f"{amount.normalize():f}"
    return f"{amount // 2**30}Gi" if amount % 2**30 == 0 else f"{round(amount / 2**20, 1).normalize():f}Mi"


def quotas(found: Iterable[Json], demand: Demand, parse: Parse) -> Iterable[Finding]:
    """Judge whether the job fits in what is left of each ResourceQuota."""
    for quota in found:
        subject, status = f"quota {quota['metadata']['name']}", quota.get("status", {})
        hard = status.get("hard") or quota["spec"].get("hard", {})
        used = {key: parse(value) for key, value in status.get("used", {}).items()}
        scopes = _scopes(quota["spec"])
        if set(scopes) & {*_NOT_OURS}:
            continue
        if other := set(scopes) - {*_OURS}:
            yield Finding("unknown", subject, f"whether its scope {', '.join(sorted(other))} has the job's pods")
            continue
        faults: list[str] = []
        unset: list[str] = []
        fits: list[str] = []
        for key, limit in ((key, parse(value)) for key, value in hard.items()):
            needed, left = demand.of(key), limit - used.get(key, Decimal(0))
            if needed is None and key.removeprefix("requests.").removeprefix("limits.") in _MUST_BE_SET:
                unset.append(key)
            elif needed is not None:
                text = f"{key} {show(key, needed)} needed, {show(key, left)} of {show(key, limit)} left"
                (fits if needed <= left else faults).append(text)
        if faults:
            advice = "request less (section cluster), wait for other jobs to end, or have it raised"
            yield Finding("fault", subject, f"{'; '.join(faults)}; {advice}")
        if unset:
            text = f"wants pods to state {', '.join(unset)}, which the job's do not"
            yield Finding("warning", subject, f"{text}; a LimitRange with a default must add it")
        if not faults:
            yield Finding("ok", subject, "; ".join(fits) or "does not count anything of the job")


def _scopes(spec: Json) -> list[str]:
    expressions = spec.get("scopeSelector", {}).get("matchExpressions", [])
    return [*spec.get("scopes", []), *(expression["scopeName"] for expression in expressions)]


def limit_ranges(found: Iterable[Json], demand: Demand, parse: Parse) -> Iterable[Finding]:
    """Judge whether a pod of the job is within each LimitRange."""
    for limits in found:
        faults = []
        for rule in limits["spec"]["limits"]:
            if rule["type"] not in ("Pod", "Container"):
                continue
            for name, amount in demand.each.items():
                most, least = rule.get("max", {}).get(name), rule.get("min", {}).get(name)
                if most is not None and amount > parse(most):
                    faults.append(f"{name} {show(name, amount)} must be at most {most} ({rule['type']})")
                if least is not None and amount < parse(least):
                    faults.append(f"{name} {show(name, amount)} must be at least {least} ({rule['type']})")
        subject = f"limit range {limits['metadata']['name']}"
        if faults:
            advice = "change cluster.cpu, memory or gpus_per_node, or have it changed"
            yield Finding("fault", subject, f"{'; '.join(faults)}; {advice}")
        else:
            yield Finding("ok", subject, "the job's pods are within it")


def obstacle(node: Json, demand: Demand, pod: Json, parse: Parse) -> str:
    """Reason why a node could not hold a pod of the job even if nothing else ran there; empty if there is none."""
    spec, labels = node.get("spec", {}), node["metadata"].get("labels", {})
    conditions = node.get("status", {}).get("conditions", [])
    if not any(one["type"] == "Ready" and one["status"] == "True" for one in conditions):
        return "is not ready"
    if spec.get("unschedulable"):
        return "is cordoned"
    wanted = pod.get("nodeSelector", {})
    if missing := [f"{key}={value}" for key, value in wanted.items() if labels.get(key) != value]:
        return f"has no label {', '.join(missing)} (cluster.node_selector)"
    for taint in spec.get("taints", []):
        if taint["effect"] != "PreferNoSchedule" and not any(_tolerates(t, taint) for t in pod.get("tolerations", [])):
            value = f"={taint['value']}" if taint.get("value") else ""
            is_condition = taint["key"].startswith("node.kubernetes.io/")  # disk-pressure, for one
            key = "kubectl describe node" if is_condition else "cluster.tolerations"
            return f"has the taint {taint['key']}{value}:{taint['effect']} ({key})"
    has = _allocatable(node, parse)
    short = [
        f"{show(name, has.get(name, Decimal(0)))} of {name}"
        for name, amount in demand.each.items()
        if has.get(name, Decimal(0)) < amount
    ]
    return f"has only {', '.join(short)}" if short else ""


def _tolerates(toleration: Json, taint: Json) -> bool:
    same = toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", "")
    return (
        toleration.get("effect") in (None, "", taint["effect"])
        and toleration.get("key") in (None, "", taint["key"])
        and same
    )


def _allocatable(node: Json, parse: Parse) -> dict[str, Decimal]:
    return {name: parse(amount) for name, amount in node.get("status", {}).get("allocatable", {}).items()}


def nodes(found: list[Json], demand: Demand, pod: Json, parse: Parse) -> tuple[Finding, int]:
    """Judge whether the nodes could hold the job's pods if they were empty.

    Args:
        pod: spec of the job's pods.

    Returns:
        The finding, and the number of nodes that could hold a pod.
    """
    obstacles = {node["metadata"]["name"]: obstacle(node, demand, pod, parse) for node in found}
    fitting = [node for node in found if not obstacles[node["metadata"]["name"]]]
    room = sum(
        min(int(_allocatable(node, parse)[name] // amount) for name, amount in demand.each.items()) for node in fitting
    )
    wanted = f"{_counted(demand.pods, 'pod')} of {demand}"
    if room >= demand.pods:
        text = f"{len(fitting)} of {len(found)} can hold pods, {room} if nothing else runs; the job has {wanted}"
        return Finding("ok", "nodes", text), len(fitting)
    reasons = [f"{name} {reason}" for name, reason in obstacles.items() if reason]
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    text = f"must have room for {wanted}, got room for {room} on {_counted(len(found), 'node')}, if nothing else runs"
    why = f": {'; '.join(reasons[:3])}{more}" if reasons else ""
    advice = "request less (section cluster) or change the nodes, unless an autoscaler adds some"
    return Finding("fault", "nodes", f"{text}{why}; {advice}"), len(fitting)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def claim(found: Json, *, read_only: bool, pods: int, fitting_nodes: int | None) -> tuple[Level, str]:
    """Judge the access modes of a claim: a level, and why.

    Args:
        read_only: the job mounts it so.
        fitting_nodes: number of nodes that could hold a pod of the job; None if it is not known.
    """
    modes = found.get("status", {}).get("accessModes") or found["spec"].get("accessModes", [])
    held = f"got {', '.join(modes)}"
    if "ReadWriteMany" in modes or (read_only and "ReadOnlyMany" in modes):
        return "ok", ", ".join(modes)
    if modes == ["ReadOnlyMany"]:
        return "fault", f"must be writable, {held}; mount it with :ro in cluster.volumes, or use another claim"
    if pods == 1:
        return "ok", ", ".join(modes)
    many = f"must be ReadWriteMany for cluster.nodes={pods}, {held}"
    if "ReadWriteOnce" not in modes:  # ReadWriteOncePod
        return "fault", f"{many}, which a single pod can mount; use a storage class with ReadWriteMany"
    if fitting_nodes == 1:
        return "ok", f"{', '.join(modes)}; enough, since one node holds all pods"
    level: Level = "fault" if fitting_nodes else "warning"
    return level, (
        f"{many}, which only pods on one node can mount; use a storage class with ReadWriteMany, or cluster.nodes=1"
    )
