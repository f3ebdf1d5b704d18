"""Runs a program on behalf of the cluster's scripts: with the cluster's own programs and kubeconfig, or an error."""

import os
import subprocess
import sys

from settings import BIN, KUBECONFIG


def run(*words: str, text: str | None = None) -> str:
    """Return what a program prints; `text` is its input. If it fails, the script ends with its message."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin", "KUBECONFIG": str(KUBECONFIG)}
    done = subprocess.run(words, input=text, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(words)} ended with status {done.returncode}: {done.stderr or done.stdout}")
    return done.stdout
