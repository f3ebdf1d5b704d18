"""HTTP server that knows as much of MLflow's protocol as a tracker needs, and whose artifact store misbehaves as a test
wants.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

PREFIX = "/api/2.0/mlflow/"


class FakeServer:
    """An MLflow server with one experiment. A context manager, which starts and stops it.

    `put` is called with the path of each uploaded file, and gives the status of the answer, 0 for none at all.
    """

    def __init__(
        self, put: Callable[[str], int] = lambda path: 200, *, multipart: bool = False, version: str = "3.0.0"
    ) -> None:
        self.put, self.multipart, self.version, self.is_away = put, multipart, version, False
        self.drips = False  # an answer never ends: a byte comes now and then, which no time limit of a read sees
        self.artifact_root = "mlflow-artifacts:"
        self.runs: dict[str, dict[str, Any]] = {}
        self.metrics: list[tuple[str, int]] = []  # name and step of each point
        self.asked: list[str] = []  # paths of uploads, and names of other calls, in order
        self.stored: dict[str, bytes] = {}
        self.stopping = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if fake.drips:
                    self.send_response(200)
                    self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    while fake.drips and not fake.stopping.wait(0.1):
                        self.wfile.write(b" ")
                    self.close_connection = True
                    return
                status, answer = fake.answer(self.command, self.path, content)
                if status == 0:
                    fake.stopping.wait()
                    self.close_connection = True
                    return
                body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("ETag", "part")
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, url: str, content: bytes) -> tuple[int, dict[str, Any] | str]:
        parts = urlsplit(url)
        if method == "PUT":
            name = parts.path.rpartition("/artifacts/")[2]
            self.asked.append(name)
            status = self.put(name)
            if status == 200:
                self.stored[name] = content
            return status, {}
        if "/mpu/create/" in parts.path:
            return 200, {
                "upload_id": "1",
                "credentials": [{"url": f"{self.url}/artifacts/part", "part_number": 1, "headers": {}}],
            }
        if parts.path.endswith("server-info"):
            return 200, {"multipart_uploads_enabled": self.multipart}
        if parts.path == "/version":
            return 200, self.version
        if self.is_away:
            return 503, {}
        name = parts.path.removeprefix(PREFIX)
        body = json.loads(content or b"{}")
        self.asked.append(f"{name} {body['status']}" if "status" in body else name)
        return self._call(name, body | {key: values[0] for key, values in parse_qs(parts.query).items()})

    def _call(self, name: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if name == "runs/create":
            run_id = f"{self.port}{len(self.runs) + 1:027x}"  # MLflow's client keeps one store for each id
            info = {"run_id": run_id, "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
            info["run_name"] = body["run_name"]
            info["artifact_uri"] = f"{self.artifact_root}/1/{run_id}/artifacts"
            self.runs[run_id] = {"info": info, "data": {}}
            return 200, {"run": self.runs[run_id]}
        if name == "experiments/get-by-name":
            return 200, {"experiment": {"experiment_id": "1", "name": "maskrcnn", "lifecycle_stage": "active"}}
        if name == "experiments/get":
            return 200, {"experiment": {"experiment_id": "1", "name": "maskrcnn", "lifecycle_stage": "active"}}
        if name == "runs/get" and body["run_id"] not in self.runs:
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}
        if name == "runs/get":
            return 200, {"run": self.runs[body["run_id"]]}
        if name == "runs/log-batch":
            self.metrics += [(metric["key"], metric.get("step", 0)) for metric in body.get("metrics", [])]
        if name == "runs/update":
            info = self.runs[body["run_id"]]["info"]
            info |= {key: value for key, value in body.items() if key in ("status", "run_name")}
        return 200, {}
