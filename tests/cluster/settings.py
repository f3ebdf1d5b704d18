"""Addresses, versions and folders of the test cluster: one node, in namespaces of its own.

CACHE holds what is built once: programs, images, sources. STATE is a running cluster's, and goes with it.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("MASKRCNN_CLUSTER_CACHE") or Path.home() / ".cache" / "maskrcnn-cluster")
BIN, IMAGES, STATE = CACHE / "bin", CACHE / "images", CACHE / "state"
KUBECONFIG = STATE / "kubeconfig"
PID, READY = STATE / "node.pid", STATE / "ready"

NODE = "maskrcnn-node"
CGROUP = "maskrcnn-cluster"  # in every controller; all pods are below it
LINK = "maskrcnn0"  # this machine's end of the only wire to the node
HOST_IP, NODE_IP, WIRE_BITS = "10.213.0.1", "10.213.0.2", 30
POD_CIDR, SERVICE_CIDR = "10.214.0.0/16", "10.215.0.0/16"
API_IP, DNS_IP = "10.215.0.1", "10.215.0.10"  # the first service address is the API server's
SOCKET = "/run/containerd/containerd.sock"  # in the node's mount namespace
