"""Reasons why pods wait or ended, from the API's JSON alone."""

from typing import Any

from components.cluster.failures import find_failures, since, waiting_reason

Json = dict[str, Any]
JOB, POD = "maskrcnn-try-1", "maskrcnn-try-1-worker-0"


def warning(reason: str, message: str, *, name: str = POD, at: int = 1, **about: str) -> Json:
    time = f"2026-01-01T00:00:{at:02d}Z"
    return {"reason": reason, "message": message, "lastTimestamp": time, "involvedObject": {"name": name, **about}}


def pod(phase: str = "Pending", uid: str = "", **status: Any) -> Json:
    return {"metadata": {"name": POD, **({"uid": uid} if uid else {})}, "status": {"phase": phase, **status}}


def texts(pods: list[Json], events: list[Json], nodes: int = 1) -> list[str]:
    return [failure.text for failure in find_failures(JOB, pods, events, nodes)]


def ended(code: int, reason: str = "Error") -> str:
    """The text about a container that ended so."""
    state = {"terminated": {"exitCode": code, "reason": reason, "finishedAt": "2026-01-01T00:00:00Z"}}
    return texts([pod("Failed", containerStatuses=[{"name": "pytorch", "state": state}])], [])[0]


def test_every_warning_about_a_pending_pod_is_a_reason_in_order_of_time():
    events = [
        warning("FailedAttachVolume", "Multi-Attach error for volume pvc-1", at=4),
        warning("FailedMount", "MountVolume.SetUp failed: timed out", at=2),
        warning("FailedCreatePodSandBox", "no IP addresses available", at=3),
        warning("SomethingNew", "of a later version of Kubernetes", at=5),
        {"involvedObject": {"name": POD}, "eventTime": "2026-01-01T00:00:06.000000Z"},  # no reason and no message
        warning("FailedMount", "another's", name=f"{POD}0"),
    ]
    mount, sandbox, attach, new, bare = texts([pod()], events)
    assert mount.startswith(f"pod {POD}: FailedMount: MountVolume.SetUp failed: timed out; check cluster.volumes")
    assert attach.startswith(
        f"pod {POD}: FailedAttachVolume: Multi-Attach error for volume pvc-1; check that no other node"
    )
    assert "FailedCreatePodSandBox: no IP addresses available; check the network plugin" in sandbox
    assert new == f"pod {POD}: SomethingNew: of a later version of Kubernetes"
    assert bare == f"pod {POD}: warning: no message"
    assert texts([pod("Running")], events) == []


def test_an_unschedulable_pod_is_reported_once_and_no_more_when_it_is_scheduled():
    events = [warning("FailedScheduling", "0/3 nodes are available")]
    condition = {"type": "PodScheduled", "status": "False", "message": "no nodes"}
    assert texts([pod(conditions=[condition])], events)[0].startswith(f"pod {POD}: unschedulable: 0/3 nodes")
    assert len(texts([pod(conditions=[condition])], events)) == 1
    assert texts([pod(conditions=[{**condition, "status": "True"}])], events) == []
    assert texts([pod()], events) == [f"pod {POD}: FailedScheduling: 0/3 nodes are available"]


def test_the_advice_about_an_unschedulable_pod_follows_the_schedulers_words():
    for words, advice in {
        '0/1 nodes are available: persistentvolumeclaim "results" not found. not found': "check cluster.volumes, and",
        "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims": "check cluster.volumes, and",
        "0/2 nodes are available: 2 node(s) had volume node affinity conflict": "check cluster.volumes, and",
        "0/1 nodes are available: 1 Insufficient cpu": "check cluster.gpus_per_node, cpu, memory",
    }.items():
        condition = {"type": "PodScheduled", "status": "False", "message": words}
        assert advice in texts([pod(conditions=[condition])], [])[0]


def test_a_stuck_container_is_reported_once_and_not_by_the_kubelets_warnings_too():
    waiting = {"reason": "ErrImagePull", "message": "no such image"}
    stuck = pod(containerStatuses=[{"name": "pytorch", "state": {"waiting": waiting}}])
    events = [
        warning("Failed", 'Failed to pull image "a": no such image'),
        warning("Failed", "Error: ErrImagePull"),
        warning("BackOff", 'Back-off pulling image "a"'),
        warning("FailedMount", "another matter"),
    ]
    told, mount = texts([stuck], events)
    assert told.startswith(f"pod {POD}: ErrImagePull: no such image; check cluster.image")
    assert "FailedMount: another matter" in mount
    assert len(texts([pod()], events)) == 4, "no state says it yet"


def test_failures_that_differ_by_generated_names_and_numbers_alone_are_the_same():
    def key(name: str, used: int) -> str:
        message = f'Error creating: pods "{name}" is forbidden: exceeded quota: team, used: pods={used}'
        (failure,) = find_failures(JOB, [], [warning("FailedCreate", message, name=f"{JOB}-node-0", kind="Job")])
        return failure.key

    assert key(f"{JOB}-node-0-0-pllg2", 1) == key(f"{JOB}-node-0-0-4d6g4", 12)
    assert key(f"{JOB}-node-0-0-pllg2", 1) != key(f"{JOB}-other-0-0-pllg2", 1)


def test_warnings_about_an_earlier_pod_or_job_of_the_same_name_are_left_out():
    events = [warning("FailedMount", "old", uid="a"), warning("FailedMount", "new", uid="b")]
    (text,) = texts([pod(uid="b")], events)
    assert ": new" in text
    series = {**warning("A", "", at=0), "lastTimestamp": None, "series": {"lastObservedTime": "2026-01-01T00:00:07.9Z"}}
    untimed = {"involvedObject": {"name": POD}}
    kept = [warning("A", "", at=8), warning("A", "", at=7), series, untimed]
    assert since([warning("A", "", at=6), *kept], "2026-01-01T00:00:07Z") == kept
    assert since(kept, "") == kept


def test_warnings_about_the_claims_that_a_pending_pod_mounts_are_reasons():
    volumes = [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}, {"name": "tmp", "emptyDir": {}}]
    events = [
        warning("ProvisioningFailed", 'storageclass "fast" not found', name="data", kind="PersistentVolumeClaim"),
        warning("ProvisioningFailed", "of another claim", name="other", kind="PersistentVolumeClaim"),
        warning("Unhealthy", "of a pod that is called so", name="data", kind="Pod"),
    ]
    waiting = {**pod(), "spec": {"volumes": volumes}}
    assert texts([waiting], events) == [f'pod {POD}: claim data: ProvisioningFailed: storageclass "fast" not found']
    assert texts([{**pod("Running"), "spec": {"volumes": volumes}}], events) == []


def test_pods_that_are_missing_are_reported_with_their_number():
    events = [
        warning("FailedCreatePod", "exceeded quota: gpus", name=JOB, kind="PyTorchJob"),
        warning("BackOff", "of a pod that is gone", at=2, kind="Pod"),
    ]
    assert texts([], events) == ["no pod was created: exceeded quota: gpus"]
    assert texts([pod("Running")], events, nodes=2) == ["only 1 of 2 pods were created: exceeded quota: gpus"]
    assert texts([pod("Running")], events) == []


def test_exit_codes_say_what_they_mean():
    meanings = {
        1: "one of torchrun's processes failed", 2: "an error of the configuration or the data",
        126: "the command cannot be run", 127: "the image has no tini, or no python",
        132: "ended by SIGILL: the image was built for processors", 134: "ended by SIGABRT: a library gave up",
        135: "ended by SIGBUS: /dev/shm or a volume was full; raise cluster.shm",
        137: "ended by SIGKILL: the node was out of memory",
        139: "ended by SIGSEGV: a crash in compiled code", 143: "ended by SIGTERM, after a checkpoint was saved",
        129: "ended by SIGHUP", 130: "ended by SIGINT", 136: "ended by SIGFPE", 138: "ended by signal 10",
        159: "ended by SIGSYS",
    }  # fmt: skip
    for code, meaning in meanings.items():
        assert f"container pytorch ended with exit code {code}, {meaning}" in ended(code)
    for code in (3, 128, 193, 255):
        assert ended(code) == f"pod {POD}: container pytorch ended with exit code {code}"
    assert "exit code 128 (StartError)" in ended(128, "StartError")
    assert "exit code 137 (ContainerStatusUnknown), ended by SIGKILL" in ended(137, "ContainerStatusUnknown")


def test_without_a_warning_the_state_of_the_pods_is_the_reason():
    assert "0 of 2 pods were created; check that Kubeflow's operator runs" in waiting_reason([], 2)
    creating = {"name": "pytorch", "state": {"waiting": {"reason": "ContainerCreating"}}}
    assert waiting_reason([pod(containerStatuses=[creating])], 1) == (
        f"pod {POD}: ContainerCreating, and no warning says why"
    )
    assert waiting_reason([pod()], 1) == "pods are Pending, and no warning says why"
