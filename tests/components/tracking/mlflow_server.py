"""MLflow servers of a test's own, on loopback: started, killed, started again; behind a proxy that is slow or loses
answers.

What a server holds is read back through its REST API alone.
"""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

START_S = 180
USER, PASSWORD = "admin", "a pass/word of 12"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`mlflow server` with artifacts of its own. A context manager, which starts and stops it."""

    def __init__(self, folder: Path, store: str = "", *, auth: bool = False) -> None:
        """`store` is a database URI, SQLite's in the folder by default; `auth` asks for USER and PASSWORD."""
        self.folder, self.port, self.auth = folder, free_port(), auth
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = store or f"sqlite:///{folder}/server.db"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "artifacts")]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_TRACKING")}
        environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        if self.auth:
            config = self.folder / "auth.ini"
            config.write_text(
                f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{self.folder}/users.db\n"
                f"admin_username = {USER}\nadmin_password = {PASSWORD}\n"
                "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
            )
            environment |= {"MLFLOW_AUTH_CONFIG_PATH": str(config), "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test"}
            command += ["--app-name", "basic-auth"]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._wait_until_it_answers()

    def kill(self) -> None:
        """As a crash does, with all of its processes."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def get(self, api: str, **query: str) -> dict[str, Any]:
        """An answer of the REST API; `api` is its path below /api/2.0/."""
        request = urllib.request.Request(f"{self.url}/api/2.0/{api}?{urllib.parse.urlencode(query)}")
        if self.auth:
            token = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def run(self, run_id: str) -> dict[str, Any]:
        return self.get("mlflow/runs/get", run_id=run_id)["run"]

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Every point of a metric: step and value, in order, as often as the server has it."""
        points = self.get("mlflow/metrics/get-history", run_id=run_id, metric_key=metric).get("metrics", [])
        return sorted((int(point.get("step", 0)), float(point["value"])) for point in points)

    def artifacts(self, run_id: str, folder: str = "") -> list[str]:
        files = self.get("mlflow/artifacts/list", run_id=run_id, path=folder).get("files", [])
        return sorted(file["path"] for file in files)

    def _wait_until_it_answers(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=10).close()
                return
            except OSError:
                log = (self.folder / "server.log").read_text(errors="replace")[-3000:]
                assert self.process.poll() is None, log
                assert time.monotonic() < deadline, log
                time.sleep(0.2)


class Proxy:
    """Passes requests on to a server, and its answers back after a delay; some answers are lost on the way."""

    def __init__(self, target: str, *, delay_s: float = 0.0, put_s: float = 0.0, lost: int = 0) -> None:
        """`put_s` is how long each file is held before it is passed on.

        `lost` is how many answers to log-batch, from the first one on, do not come back, though the server did what was
        asked.
        """
        proxy = self
        self.lost, self.requests = lost, 0
        self.puts: list[str] = []  # paths of files
        self.calls: list[
            tuple[float, str, bytes]
        ] = []  # time of arrival, last part of the path, content of other calls

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                proxy.requests += 1
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.command == "PUT":
                    proxy.puts.append(self.path.partition("/artifacts/")[2].partition("/artifacts/")[2])
                    time.sleep(put_s)
                else:
                    proxy.calls.append((time.time(), self.path.rpartition("/")[2], content))
                request = urllib.request.Request(target + self.path, content or None, method=self.command)
                for name in ("Content-Type", "Authorization"):
                    if name in self.headers:
                        request.add_header(name, self.headers[name])
                status, answer = _ask(request)
                time.sleep(delay_s)
                if "log-batch" in self.path and b'"metrics"' in content and proxy.lost > 0:
                    proxy.lost -= 1
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _ask(request: urllib.request.Request) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
