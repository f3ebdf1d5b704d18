"""The job's command and environment, run as the pods would run them: two nodes of one process train on this machine.

What the operators add to the environment is spelt out here from their sources: `setPodEnv` and the elastic generator of
the training operator 1.9, `EnforceMLPolicy` of Trainer 2.3. In place of the cluster's DNS, the leading pod's name is
127.0.0.1.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from components import download, prepare, train
from components.cluster.description import describe
from components.cluster.manifest import build
from components.config import Config
from components.params import load_config

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
STEPS = 20
Json = dict[str, Any]


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pods' working folder: data prepared, and the image's own params.yaml, which is another one."""
    root = tmp_path_factory.mktemp("workspace")
    config = tiny(root, "unused", f"data.raw_dir={root}/data/raw", f"data.prepared_dir={root}/data/prepared")
    download.run(config)
    prepare.run(config)
    (root / "params.yaml").write_text("train: {max_iters: 7}\n")
    return root


def tiny(root: Path, name: str, *overrides: str) -> Config:
    """What the pods train: folders are theirs, relative to the working folder."""
    cluster = [
        f"cluster.working_dir={root}", f"cluster.volumes=['data:{root}/data', 'runs:{root}/runs']", "cluster.image=a",
        "cluster.nodes=2", "cluster.gpus_per_node=0", "cluster.env=[OMP_NUM_THREADS=1]",
    ]  # fmt: skip
    folders = ("data.raw_dir=data/raw", "data.prepared_dir=data/prepared", f"train.output_dir=runs/{name}")
    return load_config(Path(__file__).parents[1] / "smooth.yaml", [*folders, *cluster, *overrides])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def injected(job: Json, node: int, port: int) -> dict[str, str]:
    """What the operator adds for a node; the leading pod is 127.0.0.1."""
    spec = job["spec"]
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pet_master = {f"PET_{name}": value for name, value in master.items()}
    if job["kind"] == "TrainJob":
        trainer = spec["trainer"]
        counts = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"])}
        return {**counts, "PET_NODE_RANK": str(node), **pet_master}
    common = {"PYTHONUNBUFFERED": "1", "PET_NPROC_PER_NODE": spec["nprocPerNode"]}
    elastic = spec.get("elasticPolicy")
    if elastic is None:
        nodes = sum(replica["replicas"] for replica in spec["pytorchReplicaSpecs"].values())
        ranks = {"WORLD_SIZE": str(nodes * int(spec["nprocPerNode"])), "RANK": str(node), "PET_NODE_RANK": str(node)}
        return {**common, **master, **pet_master, **ranks, "PET_NNODES": str(nodes)}
    return {
        **common,
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}",
        "PET_RDZV_BACKEND": elastic["rdzvBackend"],
        "PET_NNODES": f"{elastic['minReplicas']}:{elastic['maxReplicas']}",
        "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        "PET_RDZV_CONF": ",".join(f"{conf['key']}={conf['value']}" for conf in elastic["rdzvConf"]),
    }


def container(job: Json, node: int) -> Json:
    """The container that a node runs."""
    if job["kind"] == "TrainJob":
        return job["spec"]["trainer"]
    replicas = job["spec"]["pytorchReplicaSpecs"]
    role = "Master" if "Master" in replicas and node == 0 else "Worker"
    return replicas[role]["template"]["spec"]["containers"][0]


def start(job: Json, node: int, port: int, root: Path) -> subprocess.Popen:
    """One pod, in its working folder, with no other environment than its own."""
    ours = container(job, node)
    env = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {variable["name"]: variable["value"] for variable in ours["env"]}
    env |= injected(job, node, port)
    command = [word.replace("$$(", "$(") for word in ours["command"]]
    log = (root / f"{job['metadata']['name']}-{node}.log").open("a")
    return subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


@contextmanager
def pods(job: Json, port: int, root: Path) -> Iterator[list[subprocess.Popen]]:
    """Both nodes; whatever is still there at the end is killed with all that it began."""
    running = [start(job, node, port, root) for node in (0, 1)]
    try:
        yield running
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def losses(root: Path, name: str) -> list[dict[str, float]]:
    path = root / "runs" / name / "log.jsonl"
    lines = [json.loads(line)["metrics"] for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if k.startswith("loss/")} for line in lines if "loss/total" in line]


def said(root: Path, job: Json) -> str:
    return "\n".join(path.read_text() for path in sorted(root.glob(f"{job['metadata']['name']}-*.log")))


@pytest.fixture(scope="module")
def alone(volume: Path) -> list[dict[str, float]]:
    """The losses of one process with the whole batch."""
    folders = [f"data.prepared_dir={volume}/data/prepared", f"train.output_dir={volume}/runs/alone"]
    train.run(tiny(volume, "alone", *folders), skip_test=True)
    return losses(volume, "alone")


def assert_learnt_the_same(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(got) == STEPS
    assert max(abs(a[name] - b[name]) for a, b in zip(expected, got, strict=True) for name in a) < 1e-5


@pytest.mark.parametrize(
    "overrides",
    [[], ["cluster.form=master_worker"], ["cluster.api=trainjob"]],
    ids=["elastic", "master and worker", "TrainJob"],
)
def test_two_nodes_train_as_one_process_does(volume: Path, alone: list[dict[str, float]], overrides: list[str]):
    name = "-".join(["job", *(word.partition("=")[2] for word in overrides)])
    job = build(describe(tiny(volume, name, *overrides), name, skip_test=True))
    with pods(job, free_port(), volume) as running:
        statuses = [process.wait(timeout=300) for process in running]
    assert statuses == [0, 0], said(volume, job)
    assert_learnt_the_same(losses(volume, name), alone)


def test_an_evicted_node_comes_back_and_training_goes_on(volume: Path, alone: list[dict[str, float]]):
    """SIGTERM to one node saves a checkpoint; its survivor fails, and both begin anew as the operator and the kubelet
    have it.
    """
    job = build(describe(tiny(volume, "evicted"), "evicted", skip_test=True))
    port, failures = free_port(), []
    with pods(job, port, volume) as running:
        while len(losses(volume, "evicted")) < 3:
            assert [process.poll() for process in running] == [None, None], said(volume, job)
            time.sleep(0.02)
        running[1].terminate()
        while [process.poll() for process in running] != [0, 0]:
            for node, process in enumerate(running):
                if process.poll():
                    failures.append(node)
                    running[node] = start(job, node, port, volume)
            assert len(failures) < job["spec"]["runPolicy"]["backoffLimit"], said(volume, job)
            time.sleep(0.1)
    assert set(failures) == {0, 1}
    text = said(volume, job)
    assert "saved step" in text
    assert "continuing from" in text
    assert_learnt_the_same(losses(volume, "evicted"), alone)
