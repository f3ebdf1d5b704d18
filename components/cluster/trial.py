"""Trials of a job: dry runs, which only the API server's admission sees, and a pod that looks from inside.

The pod has the job's labels, image, account, environment and volumes, but small resources and the program `probe.py`.
It is deleted before `look_from_a_pod` returns or raises, and ends by itself if this process is killed.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.cluster.api import ClusterError, JobApi
from components.cluster.description import Description
from components.cluster.failures import Failure, find_failures, since, waiting_reason
from components.cluster.findings import Finding
from components.cluster.log import LogCutError
from components.cluster.manifest import Manifest, build, pod_template

Json = dict[str, Any]
_DRY: dict[str, str] = {"dryRun": "All", "fieldValidation": "Strict"}
_INIT_CONTAINER = {"name": "init-pytorch", "image": "alpine:3.10"}  # the operator's, for pod security
_SMALL = {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
_GONE_S = 60  # until a deleted pod is gone


def dry_run(api: JobApi, job: Description, path: str) -> Finding:
    """Send the job to the API server's validation and webhooks, under a name of its own, and store nothing.

    Args:
        path: of the namespace's jobs.
    """
    manifest, subject = _renamed(build(job), job), "dry run"
    answer = api.request("POST", path, manifest, query=_DRY)
    if answer.status >= 400:
        advice = api.advice(answer.status, answer.message)
        return Finding("fault", subject, f"{answer.status} {answer.message}{f'; {advice}' if advice else ''}")
    spec = answer.body["spec"]
    if job.cluster.scheduler == "kueue" and not (spec.get("suspend") or spec.get("runPolicy", {}).get("suspend")):
        kind = f"{manifest['apiVersion'].split('/')[0]}/{manifest['kind'].lower()}"
        text = f"Kueue must suspend the job, but leaves it alone; enable its integration {kind} (since Kueue 0.19 that "
        return Finding("fault", subject, f"{text}of PyTorchJobs is off by default), and check that Kueue runs")
    if answer.warnings:
        return Finding("warning", subject, f"the job is accepted, with: {'; '.join(answer.warnings)}")
    return Finding("ok", subject, "the job is accepted")


def dry_run_of_a_pod(api: JobApi, job: Description, *, has_init_container: bool) -> Iterator[Finding]:
    """Send a pod of the job to admission, which knows pod security, quotas and policies, and store nothing.

    Args:
        has_init_container: the training operator adds its own to pods of this job.
    """
    pod, subject = _pod(job), "dry run of a pod"
    if has_init_container:
        pod["spec"]["initContainers"] = [_INIT_CONTAINER]
    answer = api.request("POST", f"/api/v1/namespaces/{job.cluster.namespace}/pods", pod, query=_DRY)
    if answer.status == 403 and " cannot create resource " in answer.message:
        yield Finding("unknown", subject, "not allowed to look (create pods)")
    elif "does not support dry run" in answer.message:
        yield Finding("unknown", subject, answer.message)
    elif answer.status >= 400:
        advice = api.advice(answer.status, answer.message)
        yield Finding("fault", subject, f"{answer.status} {answer.message}{f'; {advice}' if advice else ''}")
    elif answer.warnings:
        yield Finding("warning", subject, f"accepted, with: {'; '.join(answer.warnings)}")
    else:
        yield Finding("ok", subject, "accepted")


def look_from_a_pod(api: JobApi, job: Description) -> list[Finding]:
    """Start a pod that looks up MLflow's address, asks MLflow, and looks at the volumes; return what it found.

    It has `cluster.stuck_timeout_s` for all of it.
    """
    subject, pods = "pod", f"/api/v1/namespaces/{job.cluster.namespace}/pods"
    pod = _probing(job)
    name = pod["metadata"]["name"]
    created = api.request("POST", pods, pod)
    if created.status == 409:  # a check that was killed has left it
        _delete(api, f"{pods}/{name}")
        created = api.request("POST", pods, pod)
    if created.status == 403 and " cannot create resource " in created.message:
        return [Finding("unknown", subject, "not allowed to look (create pods)")]
    if created.status >= 400:
        advice = api.advice(created.status, created.message)
        return [Finding("fault", subject, f"{created.status} {created.message}{f'; {advice}' if advice else ''}")]
    try:
        found = _follow(api, f"{pods}/{name}")
    finally:
        is_gone = _delete(api, f"{pods}/{name}")
    if not is_gone:
        text = f"{name} is marked as deleted, but still there; kubectl -n {job.cluster.namespace} describe pod {name}"
        found.append(Finding("warning", subject, text))
    return found


def _renamed(manifest: Manifest, job: Description) -> Manifest:
    """Manifest under a name that no job has."""
    manifest["metadata"]["name"] = f"{job.name}-check"
    return manifest


def _pod(job: Description) -> Manifest:
    """Pod of the job, as the operator would make it."""
    template = pod_template(job)
    template["metadata"]["namespace"] = job.cluster.namespace
    pod = {"apiVersion": "v1", "kind": "Pod", **template}
    pod["spec"]["restartPolicy"] = "OnFailure"
    return _renamed(pod, job)


def _probing(job: Description) -> Manifest:
    pod, cluster = _pod(job), job.cluster
    volumes = [volume.split(":") for volume in cluster.volumes]
    asked = {
        "uri": dict(job.env).get("MLFLOW_TRACKING_URI", ""),
        "volumes": [[path, not mode] for _, path, *mode in volumes],
    }
    program = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    pod["spec"] |= {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": cluster.stuck_timeout_s,
        "terminationGracePeriodSeconds": 1,
    }
    words = ("tini", "--", "python", "-c", program, json.dumps(asked))
    pod["spec"]["containers"][0] |= {
        "command": [word.replace("$(", "$$(") for word in words],  # Kubernetes would expand $(NAME)
        "resources": _SMALL,
    }
    return pod


def _follow(api: JobApi, path: str) -> list[Finding]:
    """Wait for the probe's end, and read what it found from its log."""
    until_s, failures = time.monotonic() + api.cluster.stuck_timeout_s, list[Failure]()
    while True:
        pod = api.request("GET", path)
        if pod.status != 200:
            return [Finding("fault", "pod", f"must end, but is gone: {pod.status} {pod.message}")]
        name, phase = pod.body["metadata"]["name"], pod.body.get("status", {}).get("phase")
        events = since(api.events(), pod.body["metadata"]["creationTimestamp"])
        failures = find_failures(name, [pod.body], events)
        if phase in ("Succeeded", "Failed"):
            found = _read(api, name)
            return found if found and phase == "Succeeded" else [*found, *_reasons(failures, "ended without a result")]
        # A pull that failed once is tried again; the others change only when someone changes something.
        stuck = [one for one in failures if one.kind == "stuck" and "ErrImagePull:" not in one.text]
        if stuck:
            return _reasons(stuck, "")
        if time.monotonic() > until_s:
            why = f"did not end within cluster.stuck_timeout_s={api.cluster.stuck_timeout_s}: "
            return _reasons(failures, why + waiting_reason([pod.body], 1))
        time.sleep(min(1, api.cluster.poll_s))


def _reasons(failures: list[Failure], otherwise: str) -> list[Finding]:
    return [Finding("fault", "pod", failure.text) for failure in failures] or [Finding("fault", "pod", otherwise)]


def _read(api: JobApi, name: str) -> list[Finding]:
    """Findings in the probe's log; each of its lines is JSON behind a time stamp."""
    found = []
    try:
        log = b"".join(api.read_log(name, "pytorch", since_s=None, follow=False)).decode(errors="replace")
    except LogCutError as error:
        return [Finding("unknown", "pod", f"its log cannot be read: {error}")]
    for line in log.splitlines():
        try:
            found.append(Finding(**json.loads(line.partition(" ")[2])))
        except (ValueError, TypeError):
            continue  # a warning of a library
    return found


def _delete(api: JobApi, path: str) -> bool:
    """Delete a pod; return False if it is still there after a while."""
    until_s = time.monotonic() + _GONE_S
    try:
        while api.request("DELETE", path, query={"gracePeriodSeconds": "1"}).status != 404:
            if time.monotonic() > until_s:
                return False
            time.sleep(min(1, api.cluster.poll_s))
    except ClusterError:
        return False
    return True
