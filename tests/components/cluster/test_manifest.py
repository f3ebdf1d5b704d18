"""From configuration to a manifest: what is refused before a cluster is asked, and that what is emitted is valid and
restricted.
"""

import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ruamel.yaml import YAML

from components.cluster.description import describe, job_name
from components.cluster.manifest import DIGEST, build, digest, to_yaml
from components.cluster.rules import ManifestError, check
from components.config import Config, canonical
from components.params import ConfigError, build_config, load_config, parse_yaml

ROOT = Path(__file__).resolve().parents[3]
FULL = [
    "cluster.nodes=4", "cluster.gpus_per_node=2", "cluster.secrets=[KEY=store/access-key]",
    "cluster.env=['NCCL_DEBUG=a=b']",
    "cluster.node_selector=['nvidia.com/gpu.product=H100']", "cluster.image_pull_secret=registry",
    "cluster.tolerations=['nvidia.com/gpu:NoSchedule', 'pool=train:NoExecute']",
    "cluster.volumes=['data:/workspace/data:ro', 'runs:/workspace/runs']",
]  # fmt: skip
FORMS = {
    "elastic": [*FULL, "cluster.min_nodes=2", "train.batch_size=24"],
    "one node": [],
    "cpu": ["cluster.gpus_per_node=0", "cluster.processes_per_node=2"],
    "kueue": ["cluster.api=pytorchjob", "cluster.scheduler=kueue", "cluster.queue=team"],
    "volcano": ["cluster.scheduler=volcano", "cluster.queue=team", "cluster.nodes=2"],
    "master and workers": [*FULL, "cluster.form=master_worker"],
    "TrainJob": [*FULL, "cluster.api=trainjob"],
    "TrainJob, kueue": [
        "cluster.scheduler=kueue",
        "cluster.queue=team",
        "cluster.env=[EMPTY=]",
        "cluster.tolerations=['pool=:NoExecute']",
        "cluster.memory=65536Mi",
        "cluster.shm=8192Mi",
    ],
}
by_form = pytest.mark.parametrize("overrides", FORMS.values(), ids=FORMS)


@cache
def default_values() -> dict[str, Any]:
    return parse_yaml((ROOT / "params.yaml").read_text(), "params.yaml")


@cache
def config(*overrides: str) -> Config:
    return build_config(copy.deepcopy(default_values()), ["cluster.image=registry/maskrcnn:1", *overrides])


def manifest(*overrides: str, run_id: str = "try-1") -> dict[str, Any]:
    return build(describe(config(*overrides), run_id))


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods' specs as the operator makes them: a TrainJob's are the runtime's own with the job's patches."""
    if job["kind"] == "PyTorchJob":
        return [replica["template"]["spec"] for replica in job["spec"]["pytorchReplicaSpecs"].values()]
    node = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"][0]
    pod, trainer = copy.deepcopy(node["template"]["spec"]["template"]["spec"]), job["spec"]["trainer"]
    pod["containers"][0] |= {"image": trainer["image"], "env": trainer["env"], "resources": trainer["resourcesPerNode"]}
    return [pod]


@by_form
def test_every_form_is_valid_and_restricted(kubernetes_schema: ModuleType, overrides: list[str]):
    job = manifest(*overrides)
    assert kubernetes_schema.faults(job) == []
    check(job)
    for pod in pods(job):
        assert kubernetes_schema.violations(pod) == []


@pytest.mark.parametrize("name", ["elastic", "TrainJob"])
def test_a_misspelt_field_at_any_depth_fails(kubernetes_schema: ModuleType, name: str):
    job = manifest(*FORMS[name])
    # Whose keys are anyone's; roles are the webhook's business.
    free = {"labels", "annotations", "limits", "requests", "nodeSelector", "pytorchReplicaSpecs"}
    paths = [path for path in kubernetes_schema.field_paths(job) if not free & set(path[-2:-1])]
    assert len(paths) > 80
    for path in paths:
        wrong = copy.deepcopy(job)
        node: Any = wrong
        for key in path[:-1]:
            node = node[key]
        node[f"{path[-1]}x"] = node.pop(path[-1])
        assert kubernetes_schema.faults(wrong), path


@by_form
def test_a_pod_can_checkpoint_in_peace_and_uses_its_memory(overrides: list[str]):
    for pod in pods(manifest(*overrides)):
        container = pod["containers"][0]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["terminationGracePeriodSeconds"] == 120
        env = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "110"
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert {mounted["shm"], mounted["tmp"]} == {"/dev/shm", "/tmp"}
        assert set(mounted) == set(volumes)


def test_both_apis_say_the_same_of_one_description():
    ours, theirs = (manifest(*FULL, f"cluster.api={api}") for api in ("pytorchjob", "trainjob"))
    pod, trainer = pods(ours)[0]["containers"][0], theirs["spec"]["trainer"]
    assert (trainer["image"], [*trainer["command"], *trainer["args"]]) == (pod["image"], pod["command"])
    assert trainer["resourcesPerNode"] == pod["resources"]
    assert trainer["env"] == [{"name": "PYTHONUNBUFFERED", "value": "1"}, *pod["env"]]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (4, 2)
    assert ours["spec"]["nprocPerNode"] == "2"
    for name in ("volumes", "nodeSelector", "tolerations", "serviceAccountName", "securityContext"):
        assert pods(ours)[0][name] == pods(theirs)[0][name]


def test_an_elastic_job_has_workers_alone_and_a_small_number_of_restarts():
    spec = manifest(*FORMS["elastic"])["spec"]
    assert {role: replica["replicas"] for role, replica in spec["pytorchReplicaSpecs"].items()} == {"Worker": 4}
    elastic = spec["elasticPolicy"]
    assert (elastic["minReplicas"], elastic["maxReplicas"], elastic["maxRestarts"]) == (2, 4, 0)
    policy = spec["runPolicy"]
    assert (policy["cleanPodPolicy"], policy["backoffLimit"]) == ("Running", 12)
    assert policy["activeDeadlineSeconds"] == 3600 + 604800
    assert policy["ttlSecondsAfterFinished"] == 86400


# Pointers in the Go types, whose `false` and 0 stay; of all other fields Go clients leave the zero value out.
POINTERS = {
    "allowPrivilegeEscalation", "automountServiceAccountToken", "enableServiceLinks", "maxRestarts", "backoffLimit",
}  # fmt: skip


@by_form
def test_no_field_has_a_value_that_an_update_by_a_controller_would_leave_out_or_rewrite(
    kubernetes_schema: ModuleType, overrides: list[str]
):
    """Kueue reads a TrainJob into Go types and writes it back: a field that changes so must not be immutable."""
    job = manifest(*overrides, "cluster.restarts=0")
    for path in kubernetes_schema.field_paths(job):
        value: Any = job
        for key in path:
            value = value[key]
        assert value or path[-1] in POINTERS, path
        if path[-2:-1] in (("limits",), ("requests",)) or path[-1] == "sizeLimit":
            assert value == canonical(value), path


def test_a_quantity_in_other_words_makes_no_other_job():
    one, same = (
        describe(config(*words), "x")
        for words in (["cluster.memory=32Gi", "cluster.cpu=8"], ["cluster.memory=32768Mi", "cluster.cpu=8000m"])
    )
    assert build(one) == build(same)
    assert digest(one) == digest(same)


def test_a_variable_is_set_once_and_as_the_user_says():
    for api in ("pytorchjob", "trainjob"):
        words = [
            "cluster.env=[HOME=/there, PYTHONUNBUFFERED=0, TORCH_ELASTIC_SHUTDOWN_TIMEOUT=5]",
            f"cluster.api={api}",
        ]
        env = pods(manifest(*words))[0]["containers"][0]["env"]
        values = {variable["name"]: variable["value"] for variable in env}
        assert len(values) == len(env), "the API server refuses a list with two of one name"
        assert (values["HOME"], values["PYTHONUNBUFFERED"], values["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) == (
            "/there",
            "0",
            "5",
        )


def test_a_command_that_is_longer_than_a_train_job_allows_goes_on_in_its_arguments():
    job = describe(config(*FORMS["TrainJob, kueue"]), "x")
    for number in (100, 128, 129, 256):
        words = tuple(f"train.key_{i}=1" for i in range(number))
        trainer = build(replace(job, command=words))["spec"]["trainer"]
        assert (*trainer["command"], *trainer.get("args", [])) == words
        assert ("args" in trainer) == (number > 128), "an empty list would be left out by Go clients"
    with pytest.raises(ManifestError, match=r"spec.trainer.args: must have at most 128 items, got 129"):
        build(replace(job, command=(*words, "a")))


def test_a_master_counts_as_a_node():
    spec = manifest(*FORMS["master and workers"])["spec"]
    numbers = {role: replica["replicas"] for role, replica in spec["pytorchReplicaSpecs"].items()}
    assert numbers == {"Master": 1, "Worker": 3}
    assert "elasticPolicy" not in spec
    assert list(manifest("cluster.form=master_worker")["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def test_queues_are_named_where_their_schedulers_look():
    kueue, volcano = manifest(*FORMS["kueue"]), manifest(*FORMS["volcano"])
    assert kueue["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert volcano["spec"]["runPolicy"]["schedulingPolicy"] == {"queue": "team", "minAvailable": 2}


def test_the_command_carries_every_value_that_training_reads(tmp_path: Path):
    configured = config(
        "train.base_lr=0.5", "tracking.run_name='yes'", "data.train_images='$(HOME) a: b'", "train.lr_steps=[7, 9]"
    )
    command = describe(configured, "x", skip_test=True).command
    launcher = ("tini", "--", "python", "-m", "components.launch", "-m", "components.train", "--skip-test")
    assert command[: len(launcher)] == launcher
    expanded = [word.replace("$$(", "$(") for word in command[len(launcher) :]]  # what Kubernetes makes of it
    (tmp_path / "params.yaml").write_text("train: {base_lr: 1.0}\n")  # the image's own
    got = load_config(tmp_path / "params.yaml", expanded)
    assert (got.data, got.model, got.train, got.evaluate) == (
        configured.data,
        configured.model,
        configured.train,
        configured.evaluate,
    )
    assert got.tracking == configured.tracking


def test_pods_get_the_experiment_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    names = ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID")
    for given, words, expected in (
        (("team", "7"), [], ("team", "7")),
        (("", "7"), [], (None, "7")),
        (("team", "7"), ["cluster.env=[MLFLOW_EXPERIMENT_NAME=of the pods]"], ("of the pods", None)),
        (("team", ""), ["cluster.secrets=[MLFLOW_EXPERIMENT_ID=store/id]"], (None, None)),
        (("team", "7"), ["tracking.enabled=false"], (None, None)),
    ):
        for name, value in zip(names, given, strict=True):
            monkeypatch.setenv(name, value)
        env = dict(describe(config(*words), "x").env)
        assert tuple(env.get(name) for name in names) == expected, (given, words)


def test_secrets_are_named_and_never_written():
    text = to_yaml(
        manifest("tracking.uri=https://me:hunter2@mlflow", "cluster.secrets=[MLFLOW_TRACKING_PASSWORD=mlflow/password]")
    )
    assert "hunter2" not in text
    assert {"name": "mlflow", "key": "password"} in [
        env["valueFrom"]["secretKeyRef"]
        for env in YAML(typ="safe").load(text)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"][
            "containers"
        ][0]["env"]
        if "valueFrom" in env
    ]


def test_yaml_is_read_back_as_the_manifest():
    job = manifest(*FULL)
    assert YAML(typ="safe").load(to_yaml(job)) == job
    assert to_yaml(manifest(*FULL)) == to_yaml(job)


@pytest.mark.parametrize(
    "run_id", ["try-1", "a" * 200, "2024-11-24T10:00", "Über/seed=3", "-", "a_b", "0123456789abcdef" * 2]
)
def test_a_run_id_gives_one_valid_name(run_id: str):
    name = job_name(run_id)
    assert len(name) <= 50
    check({**manifest(), "metadata": {"name": name}})
    assert name == job_name(run_id)


def test_other_run_ids_give_other_names():
    ids = ["a_b", "a-b", "A-b", "a" * 200, "a" * 201, "a--b"]
    assert len({job_name(run_id) for run_id in ids}) == len(ids)


def test_how_long_one_waits_makes_no_other_job():
    jobs = [
        describe(config(*words), "x")
        for words in ([], ["cluster.poll_s=3", "cluster.run_timeout_s=9"], ["cluster.cpu=4"])
    ]
    assert digest(jobs[0]) == digest(jobs[1]) != digest(jobs[2])
    assert build(jobs[0])["metadata"]["annotations"][DIGEST] == digest(jobs[0])


def test_whatever_trains_otherwise_makes_another_job():
    changes = (
        [], ["train.base_lr=0.5"], ["data.min_sizes_px=[96]", "data.max_size_px=128"],
        ["cluster.image=registry/maskrcnn:2"], ["cluster.env=[A=1]"],
        ["cluster.env=[A=2]"], ["cluster.memory=17Gi"], ["cluster.secrets=[KEY=store/access-key]"],
        ["cluster.restarts=1"],
    )  # fmt: skip
    jobs = [describe(config(*words), "x") for words in changes] + [describe(config(), "y")]
    jobs += [describe(config(), "x", skip_test=True), describe(config(), "x", mlflow_run_id="abc")]
    assert len({digest(job) for job in jobs}) == len(jobs)
    assert digest(describe(config(), "x")) == digest(jobs[0])


@by_form
def test_a_node_that_fails_begins_anew(overrides: list[str]):
    """OnFailure: an exit code of 1, as torchrun ends with on the nodes that a lost one leaves behind, is not final."""
    job = manifest(*overrides)
    if job["kind"] == "PyTorchJob":
        assert {replica["restartPolicy"] for replica in job["spec"]["pytorchReplicaSpecs"].values()} == {"OnFailure"}
    for pod in pods(job):
        assert "restartPolicy" not in pod, "it is the operator's to set"


def test_without_restarts_no_container_begins_anew():
    (replica,) = manifest("cluster.restarts=0")["spec"]["pytorchReplicaSpecs"].values()
    assert replica["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.output_dir=/elsewhere"], "train.output_dir: must lie on a volume, got /elsewhere"),
        (["cluster.volumes=['runs:/workspace/runs']"], "data.prepared_dir: must lie on a volume"),
        (["cluster.volumes=['data:/workspace:ro']"], "train.output_dir: must be writable"),
        (["cluster.nodes=3"], "must be a multiple of the number of processes, got 3: 1 on each of 3 nodes"),
        (["cluster.nodes=4", "cluster.min_nodes=2"], "got 3: 1 on each of 3 nodes (cluster.nodes, cluster.min_nodes)"),
        (["cluster.env=[RANK=1]"], "cluster.env: must not set RANK"),
        (["cluster.env=[A=1]", "cluster.secrets=[A=s/k]"], "must set a variable only once, got A twice"),
        (["cluster.tracking_uri=sqlite:///mlflow.db"], "cluster.tracking_uri: must be a server that pods can reach"),
        (["cluster.tracking_uri=http://me:pw@mlflow"], "cluster.tracking_uri: must not contain a password"),
    ],
)
def test_what_pods_could_not_do_is_refused(overrides: list[str], reason: str):
    with pytest.raises(ConfigError) as error:
        manifest(*overrides)
    assert reason in str(error.value)
    assert ":pw@" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["cluster.min_nodes=2"], "min_nodes must be at most nodes, got 2 > 1"),
        (["cluster.shm=32Gi"], "shm must be less than memory"),
        (["cluster.queue=team"], "queue must be named for kueue and volcano, and for them alone"),
        (["cluster.scheduler=kueue"], "queue must be named"),
        (["cluster.api=trainjob", "cluster.form=master_worker"], "form must be elastic with api: trainjob"),
        (
            ["cluster.scheduler=kueue", "cluster.queue=q", "cluster.form=master_worker"],
            "form must be elastic with api: auto and scheduler: kueue, since a TrainJob has no other; got "
            "master_worker; api: pytorchjob has it",
        ),
        (
            ["cluster.scheduler=kueue", "cluster.queue=q", "cluster.min_nodes=1"],
            "got 1 with form: elastic, api: auto and scheduler: kueue",
        ),
        (["cluster.api=trainjob", "cluster.scheduler=volcano", "cluster.queue=q"], "scheduler must not be volcano"),
        (["cluster.form=master_worker", "cluster.min_nodes=1"], "min_nodes must be 0 but for an elastic PyTorchJob"),
        (
            ["cluster.memory=32GB"],
            "cluster.memory: must be whole bytes with a unit of Kubernetes, such as 512Mi or 32Gi, got '32GB'",
        ),
        (["cluster.cpu=500m"], "cluster.cpu: must be whole cores"),
        (["cluster.memory=1Gi", "cluster.shm=1024Mi"], "shm must be less than memory"),
        (["cluster.secrets=[KEY=value]"], "cluster.secrets"),
        (["cluster.namespace=My_Space"], "cluster.namespace"),
        (["cluster.volumes=[data]"], "cluster.volumes"),
        (["cluster.pending_timeout_s=0"], "cluster.pending_timeout_s"),
    ],
)
def test_a_section_that_disagrees_with_itself_is_refused(overrides: list[str], reason: str):
    with pytest.raises(ConfigError) as error:
        config(*overrides)
    assert reason in str(error.value)


def test_kueue_gets_a_train_job_unless_the_api_is_named():
    queue, kinds = ["cluster.scheduler=kueue", "cluster.queue=team"], {}
    for api in ("auto", "pytorchjob", "trainjob"):
        kinds[api] = [manifest(f"cluster.api={api}", *words)["kind"] for words in ([], queue)]
    assert kinds == {
        "auto": ["PyTorchJob", "TrainJob"],
        "pytorchjob": ["PyTorchJob", "PyTorchJob"],
        "trainjob": ["TrainJob", "TrainJob"],
    }
    assert manifest("cluster.api=auto") == manifest("cluster.api=pytorchjob"), "one job, however its API was chosen"


def changed(job: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The job with one field set, or taken away where the value is None."""
    job = json.loads(json.dumps(job))
    *way, last = path.split(".")
    node: Any = job
    for key in way:
        node = node[int(key)] if key.isdigit() else node.setdefault(key, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return job


WORKER = "spec.pytorchReplicaSpecs.Worker"


@pytest.mark.parametrize(
    ("form", "path", "value", "reason"),
    [
        ("elastic", "metadata.name", "1st", "metadata.name: must be a DNS-1035 label"),
        ("elastic", "metadata.name", "a" * 64, "at most 63"),
        ("elastic", "metadata.name", "a.b", "got 'a.b'"),
        ("elastic", f"{WORKER}.template.spec.containers.0.image", "",
         "[Worker].template.spec.containers[0].image: must be set"),
        ("elastic", f"{WORKER}.template.spec.containers.0.name", "node", "one must be named pytorch, got ['node']"),
        ("elastic", f"{WORKER}.template.spec.containers", [], "one must be named pytorch, got []"),
        ("elastic", f"{WORKER}.replicas", 0, "[Worker].replicas: must be at least 1, got 0"),
        ("elastic", "spec.nprocPerNode", 8, "spec.nprocPerNode: must be a string"),
        ("elastic", "spec.elasticPolicy.nProcPerNode", 8,
         "nProcPerNode: must not be set together with spec.nprocPerNode"),
        ("elastic", WORKER, None, "spec.pytorchReplicaSpecs[Worker]: must be set with spec.elasticPolicy"),
        ("elastic", "spec.pytorchReplicaSpecs", {}, "spec.pytorchReplicaSpecs: must have Master, Worker, or both"),
        ("elastic", "spec.pytorchReplicaSpecs.Chief", {}, "spec.pytorchReplicaSpecs[Chief]: must be Master or Worker"),
        ("elastic", "spec.runPolicy.managedBy", "me", "spec.runPolicy.managedBy: must be one of"),
        ("master and workers", "spec.pytorchReplicaSpecs.Master.replicas", 2, "[Master].replicas: must be 1, got 2"),
        ("master and workers", "spec.pytorchReplicaSpecs.Master.replicas", None,
         "[Master].replicas: must be 1, got None"),
        ("TrainJob", "spec.trainer.env", [{"name": "PET_NNODES", "value": "1"}],
         "spec.trainer.env: must not set PET_NNODES"),
        ("TrainJob", "spec.runtimeRef.name", "", "spec.runtimeRef.name: must name a runtime"),
        ("TrainJob", "spec.trainer.image", "", "spec.trainer.image: must be set"),
        ("TrainJob", "spec.trainer.numProcPerNode", "auto", "must be an integer, got 'auto'"),
    ],
)  # fmt: skip
def test_the_webhooks_rules(form: str, path: str, value: Any, reason: str):
    with pytest.raises(ManifestError) as error:
        check(changed(manifest(*FORMS[form]), path, value))
    assert reason in str(error.value)


def test_a_missing_image_is_reported_with_its_key():
    with pytest.raises(ManifestError, match=r"set cluster\.image=REGISTRY/NAME:TAG"):
        manifest("cluster.image=")
