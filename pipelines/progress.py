"""Messages about a run while it is followed: changes of each step, why one waits, and the end of a failed one's log.

A server of Kubeflow Pipelines lists the nodes of its workflow engine, and only one in six of them is a step: each step
has a driver before it, an executor below it, and a retry around each. Why a pod waits or failed, and its log, are
served by the older API only (v1beta1 and v1alpha1), so they are printed where they are served. Seen with Kubeflow
Pipelines 2.17 and Argo Workflows 4.0.
"""

import re
import time
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML

from pipelines.server import Server

_PATIENCE_S = 60.0  # before asking why a pod waits
_LOG_LINES = 20
_LINE_LENGTH = 300
_TRY = re.compile(r"\(\d+\)$")  # at the end of a node's name
# Lines of Kubeflow's launcher, among them its input as indented JSON, and of Argo.
_NOISE = re.compile(r"""[IW]\d{4} \d\d:\d\d:\d\d|time=|\[KFP Executor|[{}]|\s+["{}\]]""")
_FAILURES = {"Failed", "Error"}
_STARTS = {"", "PodInitializing", "ContainerCreating"}  # messages of pods that start, and wait for nothing


def step_names(text: str) -> set[str]:
    """Names of the steps of a compiled pipeline: its tasks that run a container."""
    spec = next(iter(YAML(typ="safe", pure=True).load_all(text)))
    components = spec["components"]
    dags = [component["dag"] for component in (spec["root"], *components.values()) if "dag" in component]
    return {
        name
        for dag in dags
        for name, task in dag["tasks"].items()
        if "executorLabel" in components[task["componentRef"]["name"]]
    }


class Progress:
    """Messages about one run."""

    def __init__(self, server: Server, run_id: str, steps: set[str]) -> None:
        self._server, self._run_id, self._steps = server, run_id, steps
        self._states: dict[str, str] = {}  # state of each task
        self._ids: dict[str, list[str]] = {}  # tasks by name: a study has one for each seed
        self._reported: set[tuple[str, str]] = set()  # pods that wait, and why
        self._pending_since_s: float | None = None

    def look(self, run: Any) -> None:
        """Print what has changed since the last look."""
        tasks = _tasks(run)
        for task in tasks:
            if task.display_name in self._steps and task.state and self._states.get(task.task_id) != task.state:
                self._states[task.task_id] = task.state
                print(f"{self._name(task)}: {task.state}", flush=True)
        if not any(task.state == "PENDING" for task in tasks):
            self._pending_since_s = None
            return
        now_s = time.monotonic()
        self._pending_since_s = now_s if self._pending_since_s is None else self._pending_since_s
        if now_s - self._pending_since_s >= _PATIENCE_S:
            self._pending_since_s = now_s
            self._print_what_waits()

    def end(self, run: Any) -> bool:
        """Print how the run ended; return True if it succeeded."""
        self.look(run)
        # Version 2.17 calls a cancelled run a failed one.
        was_cancelled = any(status.state == "CANCELING" for status in run.state_history or [])
        is_ours = was_cancelled and run.state == "FAILED"
        print(f"the run has ended: {run.state}{' (it was cancelled)' if is_ours else ''}", flush=True)
        if run.state == "SUCCEEDED":
            return True
        nodes = self._server.nodes(self._run_id)
        for node in _pods(nodes, _FAILURES):
            print(f"{self._owner(node, nodes)} failed: {node.get('message') or 'no reason is known'}", flush=True)
            for line in [] if was_cancelled else self._end_of_log(node):
                print(f"  {line}", flush=True)
        print(f"logs: {self._server.link('runs', self._run_id)}", flush=True)
        return False

    def _name(self, task: Any) -> str:
        ids = self._ids.setdefault(task.display_name, [])
        if task.task_id not in ids:
            ids.append(task.task_id)
        number = ids.index(task.task_id) + 1
        return f"{task.display_name} {number}" if number > 1 else str(task.display_name)

    def _print_what_waits(self) -> None:
        nodes = self._server.nodes(self._run_id)
        for node in _pods(nodes, {"Pending"}):
            reason = (node["id"], node.get("message", ""))
            if reason[1] not in _STARTS and reason not in self._reported:
                self._reported.add(reason)
                print(f"{self._owner(node, nodes)} waits: {reason[1]}", flush=True)

    def _owner(self, node: dict[str, Any], nodes: dict[str, Any]) -> str:
        """The step that a pod belongs to, or else the node's own name."""
        at: dict[str, Any] | None = node
        while at:
            name = _TRY.sub("", at["displayName"])
            for step in (name, name.removesuffix("-driver")):
                if step in self._steps:
                    return step
            at = nodes.get(at.get("boundaryID", ""))
        return str(node["displayName"])

    def _end_of_log(self, node: dict[str, Any]) -> list[str]:
        workflow, _, number = node["id"].rpartition("-")
        log = self._server.log(self._run_id, f"{workflow}-{node['templateName']}-{number}", node["namespace"])
        lines = [line[:_LINE_LENGTH] for line in log.splitlines() if line.strip() and not _NOISE.match(line)]
        return lines[-_LOG_LINES:]


def _pods(nodes: dict[str, Any], phases: set[str]) -> Iterator[dict[str, Any]]:
    found = [node for node in nodes.values() if node.get("type") == "Pod" and node.get("phase") in phases]
    yield from sorted(found, key=lambda node: (str(node.get("startedAt")), node["id"]))


def _tasks(run: Any) -> list[Any]:
    details = run.run_details.task_details if run.run_details else None
    return sorted(details or [], key=lambda task: (str(task.start_time), task.display_name or "", task.task_id))
