"""A small Kubernetes API server on loopback: jobs, pods, logs and events over plain HTTP, with faults on demand.

It keeps what it is sent, streams watches and logs, deletes in the background, and grants what k8s/base/launcher.yaml
grants: all else is 403. `operator(cluster, job)` plays the training operator: it is called in a thread of its own when
a job is created; `kubelet(cluster, pod)` when a pod is. Other objects are answered as they stand in `objects`.
"""

import copy
import json
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ruamel.yaml import YAML

LAUNCHER = Path(__file__).resolve().parents[3] / "k8s" / "base" / "launcher.yaml"
Json = dict[str, Any]


@cache
def granted() -> set[tuple[str, str, str]]:
    """(group, resource, verb) of the launcher's Role."""
    documents = YAML(typ="safe").load_all(LAUNCHER.read_text())
    rules = next(d for d in documents if d["kind"] == "Role")["rules"]
    return {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


KINDS = {"kubeflow.org/v1": "pytorchjobs", "trainer.kubeflow.org/v1alpha1": "trainjobs"}
SPACE = "/api/v1/namespaces/maskrcnn"


def healthy() -> dict[str, Json]:
    """Paths and answers of a cluster that k8s/base was applied to, as far as others than the launcher change them."""
    claim = {
        "spec": {"accessModes": ["ReadWriteMany"], "storageClassName": "shared"},
        "status": {"phase": "Bound", "accessModes": ["ReadWriteMany"]},
    }
    return {
        "/version": {"major": "1", "minor": "34+", "gitVersion": "v1.34.4"},
        **{f"/apis/{api}": {"kind": "APIResourceList", "resources": [{"name": name}]} for api, name in KINDS.items()},
        SPACE: {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "baseline"}}, "status": {}},
        f"{SPACE}/serviceaccounts/trainer": {"metadata": {"name": "trainer"}},
        **{
            f"{SPACE}/persistentvolumeclaims/{name}": {"metadata": {"name": name}, **copy.deepcopy(claim)}
            for name in ("data", "runs")
        },
        f"{SPACE}/resourcequotas": {"items": []},
        f"{SPACE}/limitranges": {"items": []},
    }


class Cluster:
    """The state behind the API, and the faults that are yet to come."""

    def __init__(self, operator: Callable[["Cluster", str], None] | None = None) -> None:
        self.operator = operator
        self.kubelet: Callable[[Cluster, str], None] | None = None
        self.granted = {*granted()}
        self.objects = healthy()
        self.suspends = True  # Kueue's webhook takes the jobs of a queue
        self.warnings: list[str] = []  # in the answer to a create
        self.changed = threading.Condition(threading.RLock())
        self.jobs: dict[str, Json] = {}
        self.pods: dict[str, Json] = {}
        self.events: list[Json] = []
        self.workloads: list[Json] = []  # of Kueue
        self.kueue_version = "v1beta2"
        self.logs: dict[str, list[bytes]] = {}
        self.log_cuts: list[int] = []  # bytes after which the next log streams break off
        self.history: list[tuple[int, str, Json]] = []  # version, kind of change, the job
        self.oldest = 0  # versions up to it have expired
        # verb, resource, status, perhaps the server's words; a status of 0 drops the connection
        self.faults: list[tuple[Any, ...]] = []
        self.unknown_fields: set[str] = set()  # of a job's spec, in an older version of the operator's API
        self.used: set[tuple[str, str, str]] = set()
        self.calls: list[tuple[str, str]] = []
        self.looks = 0  # lists of pods that were sent
        self.lines_sent = 0  # of logs, again after a cut
        self.deletions: list[Json] = []
        self.deletion_s = 0.0
        self.is_open = True
        self._stamp = datetime(2026, 1, 1, tzinfo=UTC)
        self._version = 100
        cluster = self

        class Handler(_Handler):
            state = cluster

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()

    def close(self) -> None:
        with self.changed:
            self.is_open = False
            self.changed.notify_all()
        self.server.shutdown()
        self.server.server_close()

    def kubeconfig(self, folder: Path) -> Path:
        url = f"http://127.0.0.1:{self.server.server_address[1]}"
        path = folder / "kubeconfig"
        config = {
            "clusters": [{"name": "stub", "cluster": {"server": url}}],
            "users": [{"name": "me", "user": {"token": "t0ken"}}],
            "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "me"}}],
            "current-context": "stub",
        }
        path.write_text(json.dumps(config))
        return path

    # What operators in tests wait for

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds, which is asked for anew after each request and change."""
        with self.changed:
            assert self.changed.wait_for(lambda: condition() or not self.is_open, timeout=60), "nothing came of it"

    def wait_for_a_look(self) -> None:
        """Wait until the launcher has seen the pods as they are now."""
        looks = self.looks
        self.wait(lambda: self.looks > looks)

    # What the operator and the kubelet do

    def change(self, name: str, kind: str = "MODIFIED") -> None:
        """A new version of the job; every watcher gets it."""
        with self.changed:
            self._version += 1
            self.jobs[name]["metadata"]["resourceVersion"] = str(self._version)
            self.history.append((self._version, kind, json.loads(json.dumps(self.jobs[name]))))
            if kind == "DELETED":
                del self.jobs[name]
            self.changed.notify_all()

    def set_condition(self, name: str, kind: str, message: str = "") -> None:
        with self.changed:
            conditions = self.jobs[name].setdefault("status", {}).setdefault("conditions", [])
            conditions.append({"type": kind, "status": "True", "reason": f"Job{kind}", "message": message})
            self.change(name)

    def pod(self, job: str, role: str = "worker", index: int = 0, **status: Any) -> str:
        """Set a pod's status, making the pod where it is not there."""
        name = f"{job}-{role}-{index}"
        labels = {
            "training.kubeflow.org/job-name": job,
            "training.kubeflow.org/replica-type": role,
            "training.kubeflow.org/replica-index": str(index),
        }
        if index == 0:
            labels["training.kubeflow.org/job-role"] = "master"
        with self.changed:
            metadata = {"name": name, "labels": labels}
            self.pods[name] = {"metadata": metadata, "status": status}
            self.logs.setdefault(name, [])
            self.changed.notify_all()
        return name

    def running(self, job: str, role: str = "worker", index: int = 0, **container: Any) -> str:
        status = {"name": "pytorch", "state": {"running": {}}, "restartCount": 0, **container}
        return self.pod(job, role, index, phase="Running", containerStatuses=[status])

    def ended(self, job: str, code: int, reason: str = "Error", index: int = 0, at: int = 0) -> None:
        terminated = {"exitCode": code, "reason": reason, "finishedAt": f"2026-01-01T00:00:{at:02d}Z"}
        status = {"name": "pytorch", "state": {"terminated": terminated}, "restartCount": 0}
        self.pod(job, index=index, phase="Failed" if code else "Succeeded", containerStatuses=[status])

    def log(self, pod: str, *lines: str, at_once: bool = False) -> None:
        """Append lines; `at_once` gives all of them one stamp."""
        with self.changed:
            for line in lines:
                if not at_once or line is lines[0]:
                    self._stamp += timedelta(milliseconds=1)
                stamp = self._stamp.strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
                self.logs[pod].append(f"{stamp} {line}\n".encode())
            self.changed.notify_all()

    def remove(self, name: str) -> None:
        with self.changed:
            for pod in [pod for pod in self.pods if pod.startswith(f"{name}-")]:
                del self.pods[pod]
            if name in self.jobs:
                self.change(name, "DELETED")

    def is_following(self, pod: str) -> bool:
        return pod in self.pods and "running" in self.pods[pod]["status"].get("containerStatuses", [{}])[0].get(
            "state", {}
        )

    def start_deletion(self, name: str, options: Json) -> None:
        self.deletions.append({"name": name, **options})
        self.change(name, "DELETED")
        threading.Timer(self.deletion_s, self.remove, [name]).start()  # its pods


class _Handler(BaseHTTPRequestHandler):
    state: Cluster
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer is one packet: a second one would wait 40 ms for the acknowledgement of the first

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        self._serve("get")

    def do_POST(self) -> None:
        self._serve("create")

    def do_DELETE(self) -> None:
        self._serve("delete")

    def _serve(self, verb: str) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        match = re.fullmatch(
            r"/(?:api|apis/([^/]+))/v1\w*(?:/namespaces/([^/]+))?/([^/]+)(?:/([^/]+))?(?:/(log))?", url.path
        )
        if match is None:
            self._review(url.path, body)
            return
        group, namespace, resource, name, sub = match.groups()
        if resource.startswith("self") and verb == "create":
            self._review(url.path, body)
            return
        resource = f"{resource}/{sub}" if sub else resource
        if verb == "get" and name is None:
            verb = "watch" if query.get("watch") else "list"
        with self.state.changed:
            self.state.calls.append((verb, resource))
            self.state.changed.notify_all()
        if self._fault(verb, resource):
            return
        if (group or "", resource, verb) not in self.state.granted:
            self._refuse(403, f'{resource} is forbidden: User "me" cannot {verb} resource "{resource}"')
        elif self.headers.get("Authorization") != "Bearer t0ken":
            self._refuse(401, "Unauthorized")
        elif namespace not in ("maskrcnn", None):
            self._refuse(404, f'namespaces "{namespace}" not found')
        else:
            self.state.used.add((group or "", resource, verb))
            kind = f"_{resource.split('/')[-1]}" if sub or (resource == "pods" and verb != "list") else "_object"
            is_handled = resource in {*KINDS.values(), "pods", "pods/log", "events", "workloads"}
            try:
                if is_handled:
                    getattr(self, f"_{verb}{kind}")(resource, name, query, body)
                else:
                    self._look(url.path)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    def _look(self, path: str) -> None:
        """Answer with what stands in `objects`."""
        if path in self.state.objects:
            self._answer(self.state.objects[path])
        else:
            self._refuse(404, f"{path} not found")

    def _review(self, path: str, body: Json) -> None:
        """Answer what every account may ask that has logged in: versions, who it is, and what it may."""
        if self.headers.get("Authorization") != "Bearer t0ken":
            self._refuse(401, "Unauthorized")
        elif path.endswith("/selfsubjectreviews"):
            user = {"username": "system:serviceaccount:maskrcnn:me"}
            self._answer({**body, "status": {"userInfo": user}}, 201)
        elif path.endswith("/selfsubjectaccessreviews"):
            asked = body["spec"]["resourceAttributes"]
            assert asked["namespace"] == "maskrcnn"
            resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
            allowed = (asked["group"], resource, asked["verb"]) in self.state.granted
            self._answer({**body, "status": {"allowed": allowed}}, 201)
        else:
            self._look(path)

    def _fault(self, verb: str, resource: str) -> bool:
        with self.state.changed:
            fault = next((f for f in self.state.faults if f[:2] == (verb, resource)), None)
            if fault is None:
                return False
            self.state.faults.remove(fault)
            self.state.changed.notify_all()
        if fault[2]:
            self._refuse(fault[2], *(fault[3:] or ["a fault on demand"]))
        else:
            self.close_connection = True
            self.connection.close()
        return True

    def _refuse(self, status: int, message: str) -> None:
        self._answer({"kind": "Status", "code": status, "message": message, "reason": "Stub"}, status)

    def _answer(self, value: Json, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for warning in self.state.warnings if status == 201 else ():
            self.send_header("Warning", f'299 - "{warning}"')
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _create_object(self, resource: str, _: None, query: Json, body: Json) -> None:
        state, name = self.state, body["metadata"]["name"]
        with state.changed:
            if name in state.jobs:
                self._refuse(409, f'{resource} "{name}" already exists')
                return
            unknown = sorted(state.unknown_fields & body["spec"].keys())
            if unknown and query.get("fieldValidation") == "Strict":
                self._refuse(400, f'strict decoding error: unknown field "spec.{unknown[0]}"')
                return
            if query.get("dryRun") == "All":
                self._answer(self._suspended(body), 201)
                return
            for field in unknown:  # as a server does that is not asked to be strict
                del body["spec"][field]
            body["metadata"]["uid"] = f"uid-of-{name}"
            body["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
            state.jobs[name] = body
            state.change(name, "ADDED")
        self._answer(body, 201)
        if state.operator:
            threading.Thread(target=state.operator, args=[state, name], daemon=True).start()

    def _suspended(self, body: Json) -> Json:
        """The job as Kueue's webhook returns it."""
        if self.state.suspends and "kueue.x-k8s.io/queue-name" in body["metadata"]["labels"]:
            (body["spec"]["runPolicy"] if body["kind"] == "PyTorchJob" else body["spec"])["suspend"] = True
        return body

    def _create_pods(self, resource: str, _: None, query: Json, body: Json) -> None:
        state, name = self.state, body["metadata"]["name"]
        if query.get("dryRun") != "All":
            with state.changed:
                if name in state.pods:
                    self._refuse(409, f'pods "{name}" already exists')
                    return
                body["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
                state.pods[name], state.logs[name] = {**body, "status": {"phase": "Pending"}}, []
            if state.kubelet:
                state.kubelet(state, name)
        self._answer(body, 201)

    def _get_pods(self, resource: str, name: str, query: Json, body: Json) -> None:
        with self.state.changed:
            pod = json.loads(json.dumps(self.state.pods.get(name)))
        if pod is None:
            self._refuse(404, f'pods "{name}" not found')
        else:
            self._answer(pod)

    def _delete_pods(self, resource: str, name: str, query: Json, body: Json) -> None:
        with self.state.changed:
            gone = self.state.pods.pop(name, None)
        if gone is None:
            self._refuse(404, f'pods "{name}" not found')
        else:
            self._answer(gone)

    def _get_object(self, resource: str, name: str, query: Json, body: Json) -> None:
        with self.state.changed:
            job = json.loads(json.dumps(self.state.jobs.get(name)))
        if job is None:
            self._refuse(404, f'{resource} "{name}" not found')
        else:
            self._answer(job)

    def _delete_object(self, resource: str, name: str, query: Json, body: Json) -> None:
        with self.state.changed:
            if name not in self.state.jobs:
                self._refuse(404, f'{resource} "{name}" not found')
                return
            self.state.start_deletion(name, {**query, **body})
        self._answer({"kind": "Status", "status": "Success"})

    def _list_object(self, resource: str, _: None, query: Json, body: Json) -> None:
        if resource == "workloads" and f"/{self.state.kueue_version}/" not in self.path:
            self._refuse(404, "the server could not find the requested resource")
            return
        with self.state.changed:
            state = self.state
            items = {"pods": list(state.pods.values()), "events": state.events, "workloads": state.workloads}[resource]
            self.state.looks += resource == "pods"
            self.state.changed.notify_all()
        if resource == "pods":
            key, value = query["labelSelector"].split("=")
            items = [pod for pod in items if pod["metadata"]["labels"].get(key) == value]
        elif resource == "workloads":
            assert query["labelSelector"].startswith("kueue.x-k8s.io/job-uid=uid-of-")
        else:
            assert query["fieldSelector"] == "type=Warning", "what the events here are"
        self._answer({"kind": "List", "items": items})

    def _watch_object(self, resource: str, _: None, query: Json, body: Json) -> None:
        state, version = self.state, int(query["resourceVersion"])
        name = query["fieldSelector"].removeprefix("metadata.name=")
        until_s = time.monotonic() + float(query["timeoutSeconds"])
        self._begin_stream("application/json")
        if version < state.oldest:
            gone = {
                "kind": "Status",
                "code": 410,
                "reason": "Expired",
                "message": f"too old resource version: {version}",
            }
            self._chunk(json.dumps({"type": "ERROR", "object": gone}).encode() + b"\n")
            self._chunk(b"")
            return
        while state.is_open and time.monotonic() < until_s:
            with state.changed:
                new = [h for h in state.history if h[0] > version and h[2]["metadata"]["name"] == name]
                if not new:
                    state.changed.wait(until_s - time.monotonic())
            for at, kind, job in new:
                version = at
                self._chunk(json.dumps({"type": kind, "object": job}).encode() + b"\n")
        self._chunk(b"")

    def _get_log(self, resource: str, name: str, query: Json, body: Json) -> None:
        state, sent, sent_bytes = self.state, 0, 0
        assert query["timestamps"] == "True"
        if name not in state.logs or (not state.logs[name] and name not in state.pods):
            self._refuse(404, f'pods "{name}" not found')
            return
        cut = state.log_cuts.pop(0) if state.log_cuts else None
        self._begin_stream("text/plain")
        while True:
            with state.changed:
                lines = state.logs[name][sent:]
                is_over = query["follow"] != "True" or not state.is_following(name) or not state.is_open
                if not lines and not is_over:
                    state.changed.wait(1)
            for line in lines:
                if cut is not None and sent_bytes + len(line) > cut:
                    self._chunk(line[: cut - sent_bytes])
                    self.close_connection = True
                    self.connection.close()
                    return
                self._chunk(line)
                sent, sent_bytes = sent + 1, sent_bytes + len(line)
                with state.changed:
                    state.lines_sent += 1
                    state.changed.notify_all()
            if not lines and is_over:
                break
        self._chunk(b"")

    def _begin_stream(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()
