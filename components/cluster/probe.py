"""Probe that runs in a pod of the job's image, as `python -c`: the address of MLflow, MLflow itself, and the volumes.

Each finding is a line of JSON: level, subject, text. It needs the standard library, and MLflow's command for MLflow.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

_CONNECT_S, _ASK_S = 10, 90


def say(level: str, subject: str, text: str) -> None:
    """Write a finding."""
    print(json.dumps({"level": level, "subject": subject, "text": text}), flush=True)


def look_up(uri: str) -> bool:
    """Look up the server's name and connect to it; return True unless that fails."""
    parts = urlsplit(uri)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return True  # by a proxy, which looks it up
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    except OSError as error:
        advice = "check cluster.tracking_uri, that its Service exists, and that the network policies open DNS"
        say("fault", "DNS from a pod", f"{host}: {error}; {advice}")
        return False
    say("ok", "DNS from a pod", f"{host} is {', '.join(addresses)}")
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except OSError as error:
        advice = "check that MLflow runs, and that the network policies let the pods reach it"
        say("fault", "MLflow from a pod", f"{host}:{port}: {error}; {advice}")
        return False
    return True


def ask_mlflow(uri: str) -> None:
    """Ask MLflow for experiments with its own client, as training does."""
    env = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    command = [sys.executable, "-m", "mlflow", "experiments", "search"]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except subprocess.TimeoutExpired:
        say("fault", "MLflow from a pod", f"{uri}: no answer within {_ASK_S} s; is it up?")
        return
    if done.returncode == 0:
        say("ok", "MLflow from a pod", f"{uri} answers")
    else:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        say("fault", "MLflow from a pod", f"{uri}: {last}; see the log of the server, and --allowed-hosts")


def look_at_volume(path: str, must_write: bool) -> None:
    """Read a mounted folder, and write to it where training would."""
    subject = f"volume {path} from a pod"
    try:
        next(Path(path).iterdir(), None)
        if must_write:
            with tempfile.NamedTemporaryFile(prefix=".maskrcnn-check-", dir=path) as file:
                file.write(b"checked")
        free = shutil.disk_usage(path).free
    except OSError as error:
        advice = "user 1000 or group 1000 must be allowed to; k8s/prepare.yaml gives the volume to that group"
        say("fault", subject, f"{error.strerror or error}; {advice}")
    else:
        say("ok", subject, f"{'writable' if must_write else 'readable'}, {free / 2**30:.1f} GiB free")


def main() -> None:
    """Look at what the argument names: {"uri": of MLflow or empty, "volumes": [[path, is written to], …]}."""
    asked = json.loads(sys.argv[1])
    if asked["uri"] and look_up(asked["uri"]):
        ask_mlflow(asked["uri"])
    for path, must_write in asked["volumes"]:
        look_at_volume(path, must_write)


if __name__ == "__main__":
    main()
