"""API resources of the launcher: the kinds of jobs, and the permissions that launching and looking need.

k8s/base/launcher.yaml grants exactly `launching` and LOOKING.
"""

from dataclasses import dataclass

from components.config import ClusterConfig

KUEUE = "kueue.x-k8s.io"
KUEUE_VERSIONS = ("v1beta2", "v1beta1")  # the second before Kueue 0.15


@dataclass(frozen=True)
class JobKind:
    """API of a kind of job."""

    group: str
    version: str
    plural: str
    pod_label: str  # of the job's pods; its value is the job's name
    operator: str  # what serves the API, in the version that the job needs


JOB_KINDS = {
    "pytorchjob": JobKind(
        "kubeflow.org", "v1", "pytorchjobs", "training.kubeflow.org/job-name", "training operator 1.9 or later"
    ),
    "trainjob": JobKind(
        "trainer.kubeflow.org",
        "v1alpha1",
        "trainjobs",
        "jobset.sigs.k8s.io/jobset-name",
        "Kubeflow Trainer 2.3 or later (cluster.api=pytorchjob needs the training operator instead)",
    ),
}


@dataclass(frozen=True)
class Permission:
    """One verb on one resource of a namespace."""

    verb: str
    group: str  # empty: the core API
    resource: str  # with a subresource after a slash
    loss: str = ""  # what is missing without it; empty: jobs cannot be launched

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{f'.{self.group}' if self.group else ''}"


def launching(cluster: ClusterConfig) -> tuple[Permission, ...]:
    """Permissions that `maskrcnn pytorchjob` uses."""
    job = JOB_KINDS[cluster.job_api]
    queue = (Permission("list", KUEUE, "workloads", "the reason why the queue has not admitted a job"),)
    return (
        *(Permission(verb, job.group, job.plural) for verb in ("create", "get", "delete")),
        Permission("watch", job.group, job.plural, f"up to cluster.poll_s={cluster.poll_s} until a change is seen"),
        Permission("list", "", "pods"),
        Permission("get", "", "pods/log", "rank 0's log"),
        Permission("list", "", "events"),
        *(queue if cluster.scheduler == "kueue" else ()),
    )


# Permissions that `maskrcnn pytorchjob --check` uses besides. What it may not look at, it says so and leaves out.
LOOKING = (
    Permission("get", "", "namespaces"),
    Permission("get", "", "serviceaccounts"),
    Permission("get", "", "persistentvolumeclaims"),
    Permission("list", "", "resourcequotas"),
    Permission("list", "", "limitranges"),
    Permission("get", KUEUE, "localqueues"),
)
