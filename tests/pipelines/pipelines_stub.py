"""A small server of Kubeflow Pipelines (v2beta1) on loopback: pipelines, versions, experiments and runs, with faults on
demand.

It keeps what it is sent. `faults` are answers that go before all else, in order: an HTTP status, "hang" or "cut". A run
takes the states of `states`, one at each look, and stays in the last.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]
ROOT = "/apis/v2beta1"


class Kubeflow:
    """The state behind the API."""

    def __init__(self) -> None:
        self.url = ""
        self.token = ""  # that a caller must have; empty asks for none
        self.namespaces: set[str] | None = None  # None: a server of one user, which knows none
        self.pipelines: list[Json] = []
        self.versions: list[Json] = []
        self.texts: dict[str, str] = {}  # by version
        self.experiments: list[Json] = []
        self.runs: list[Json] = []
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]
        self.tasks: list[Json] = []  # of every run
        self.was_cancelled = False
        self.nodes: list[Json] = []  # of every run's workflow, which the older API serves
        self.logs: dict[str, str] = {}  # by pod, likewise
        self.is_ui = False  # the web UI answers, as with a port-forward to it: it serves logs at a path of its own
        self.faults: list[int | str | tuple[str, bytes]] = []  # or a page: its content type and bytes
        self.before: Any = None  # called with method and path before each answer
        self.headers: list[Any] = []  # of each request
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, query

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> tuple[int, Json]:
        """Status and content."""
        if self.namespaces is not None and path in ("/experiments", "/pipelines", "/pipelines/upload"):
            scope = body if isinstance(body, dict) else query
            if scope.get("namespace") not in self.namespaces:
                return 404, {"message": "namespace not found"}
        if method == "GET" and re.fullmatch(r"/runs/[^/]+", path):
            return self._look(path.rsplit("/", 1)[1])
        lists = {"/pipelines": self.pipelines, "/experiments": self.experiments}
        if method == "GET" and path in lists:
            return 200, {path[1:]: _filtered(lists[path], query)}
        if method == "GET" and path.endswith("/versions"):
            own = [version for version in self.versions if version["pipeline_id"] == path.split("/")[2]]
            return 200, {"pipeline_versions": _filtered(own, query)}
        if method == "POST" and self._is_there(path, query, body):
            return 409, {"error": "Failed to create what exists", "message": "conflict"}
        if method == "POST" and path == "/pipelines/upload":
            pipeline = {"pipeline_id": f"p{len(self.pipelines)}", "display_name": query["name"]}
            self.pipelines.append(pipeline)
            self._add_version(pipeline["pipeline_id"], query["name"], body)  # as the server does
            return 200, pipeline
        if method == "POST" and path == "/pipelines/upload_version":
            return 200, self._add_version(query["pipelineid"], query["name"], body)
        if method == "POST" and path == "/experiments":
            self.experiments.append({**body, "experiment_id": f"e{len(self.experiments)}"})
            return 200, self.experiments[-1]
        if method == "POST" and path == "/runs":
            self.runs.append({**body, "run_id": f"r{len(self.runs)}"})
            return 200, self.runs[-1]
        return 404, {"message": f"no such path: {method} {path}"}

    def _is_there(self, path: str, query: dict[str, str], body: Any) -> bool:
        """Whether a name is taken already."""
        if path == "/experiments":
            return body["display_name"] in [item["display_name"] for item in self.experiments]
        items = {"/pipelines/upload": self.pipelines, "/pipelines/upload_version": self.versions}.get(path, [])
        return query.get("name") in [item["display_name"] for item in items]

    def _add_version(self, pipeline_id: str, name: str, text: Any) -> Json:
        version = {"pipeline_id": pipeline_id, "pipeline_version_id": f"v{len(self.versions)}", "display_name": name}
        self.versions.append(version)
        self.texts[version["pipeline_version_id"]] = text
        return version

    def _look(self, run_id: str) -> tuple[int, Json]:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        history = [{"state": "CANCELING"}] if self.was_cancelled else []
        details = {"task_details": self.tasks}
        return 200, {"run_id": run_id, "state": state, "state_history": history, "run_details": details}

    def answer_older(self, path: str, query: dict[str, str]) -> tuple[str, bytes] | None:
        """Content type and content, as version 2.17 answers: a log that is not there comes with status 200, too."""
        if self.nodes and re.fullmatch(r"/apis/v1beta1/runs/[^/]+", path):
            nodes = {node["id"]: node for node in self.nodes}
            manifest = json.dumps({"metadata": {"namespace": "kubeflow"}, "status": {"nodes": nodes}})
            content = json.dumps({"pipeline_runtime": {"workflow_manifest": manifest}})
            return "application/json", content.encode()
        if self.is_ui and path == "/k8s/pod/logs" and query["podnamespace"] == "kubeflow":
            return "text/html", self.logs.get(query["podname"], "").encode()
        if match := not self.is_ui and re.fullmatch(r"/apis/v1alpha1/runs/[^/]+/nodes/([^/]+)/log", path):
            return "text/plain", self.logs.get(match[1], '{"error_message":"BadRequestError: no such pod"}').encode()
        return None


def _filtered(items: list[Json], query: dict[str, str]) -> list[Json]:
    predicates = json.loads(query.get("filter", "{}")).get("predicates", [])
    return [item for item in items if all(item[p["key"]] == p["stringValue"] for p in predicates)]


@contextmanager
def serve(kubeflow: Kubeflow, secure: Callable[[ThreadingHTTPServer], None] | None = None) -> Iterator[Kubeflow]:
    """The server of a state, at `kubeflow.url`; `secure` lets it speak TLS."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def _handle(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kubeflow.headers.append(self.headers)
            kubeflow.requests.append((self.command, parts.path, query))
            fault = kubeflow.faults.pop(0) if kubeflow.faults else 0
            if fault == "hang":
                time.sleep(1.5)
            if fault in ("hang", "cut"):
                self.close_connection = True
            elif isinstance(fault, tuple):
                self._send_bytes(502 if b"502" in fault[1] else 200, *fault)
            elif fault:
                self._send(int(fault), {"message": "a fault on demand"})
            elif kubeflow.token and self.headers.get("authorization") != f"Bearer {kubeflow.token}":
                self._send(401, {"message": "Unauthenticated"})
            elif older := kubeflow.answer_older(parts.path, query):
                self._send_bytes(200, *older)
            elif not parts.path.startswith(ROOT):
                self._send(404, {"message": "page not found"})
            else:
                if kubeflow.before:
                    kubeflow.before(self.command, parts.path.removeprefix(ROOT))
                self._send(*kubeflow.answer(self.command, parts.path.removeprefix(ROOT), query, self._body(raw)))

        def _body(self, raw: bytes) -> Any:
            kind = self.headers.get("Content-Type", "")
            if kind.startswith("multipart/"):
                message = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw)
                return message.get_payload()[0].get_payload(decode=True).decode()
            return json.loads(raw) if raw else None

        def _send(self, status: int, content: Json) -> None:
            self._send_bytes(status, "application/json", json.dumps(content).encode())

        def _send_bytes(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = _handle  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if secure:
        secure(server)
    kubeflow.url = f"http{'s' if secure else ''}://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
    try:
        yield kubeflow
    finally:
        server.shutdown()
        server.server_close()
