"""Train on Kubernetes: submit a PyTorchJob (or a TrainJob), follow it to its end, and report why it failed if it does.

    maskrcnn pytorchjob cluster.image=registry/maskrcnn:1 cluster.nodes=2 cluster.gpus_per_node=8 --dry-run
    maskrcnn pytorchjob --check    # asks the cluster whether it would run the job

The job's name comes from the run id, so the same command finds the same job: it follows one that runs or has succeeded,
and replaces one that failed, which continues from its last checkpoint. Rank 0's log is printed here. SIGTERM and Ctrl-C
delete the job. If this process is killed, or nobody reads its output any more (`| head`), the job continues.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO

from components.cli import parse, stage_parser, user_errors
from components.cluster.api import ClusterError, JobApi
from components.cluster.description import Description, default_run_id, describe, job_name
from components.cluster.findings import Finding, summary
from components.cluster.log import LogFollower
from components.cluster.manifest import DIGEST, RUN_ID, Manifest, build, to_yaml
from components.cluster.preflight import Preflight
from components.cluster.trial import look_from_a_pod
from components.cluster.watch import Follower, JobFailedError, JobGivenUpError, JobTimeoutError, condition
from components.config import Config
from components.launch import STATUS_OF_SIGTERM, handled

_LOG_END_S = 30
_CHECK_S = 20  # without an answer of the API server, if it is only asked
_TRIES = 3  # attempts to create a job while others create or delete it


@dataclass(frozen=True)
class PyTorchJobResult:
    """Result of a successful training on a cluster."""

    name: str
    namespace: str
    run_id: str
    was_adopted: bool  # True if an earlier command started the job
    seconds: float  # time spent following the job


def run(config: Config, *, run_id: str = "", skip_test: bool = False, out: TextIO | None = None) -> PyTorchJobResult:
    """Train `config` on the cluster and wait for the end.

    Args:
        run_id: determines the job's name; if empty, `MLFLOW_RUN_ID` or a digest of the configuration is used.
        skip_test: do not evaluate after training.
        out: stream for rank 0's log and the job's progress; None is stdout.

    Raises:
        ConfigError, ManifestError: if the job could not run with this configuration.
        ClusterError: if the API server cannot be reached or refuses a request.
        JobFailedError: if the job failed or was deleted by someone else.
        JobTimeoutError: if the job took too long; it is deleted then.
        JobGivenUpError: if a TrainJob failed more often than `cluster.restarts` allows; it is deleted then.
        SystemExit: with status 143 on SIGTERM, after deleting the job.
    """
    began_s = time.monotonic()
    manifest = make_manifest(config, run_id=run_id, skip_test=skip_test)
    name, cluster = manifest["metadata"]["name"], config.cluster
    api = JobApi(cluster)

    def write(text: str) -> None:
        print(text, file=out or sys.stdout, flush=True)

    def say(text: str) -> None:
        write(f"[{manifest['kind']}] {text}")

    with _signals_raise() as received:
        try:
            was_adopted = _submit(api, manifest, say)
            _follow(api, name, say, write, received)
        except (JobGivenUpError, KeyboardInterrupt, SystemExit) as error:
            reason = "cancelled"
            if isinstance(error, JobGivenUpError):
                reason = "timed out" if isinstance(error, JobTimeoutError) else "it fails again and again"
            with suppress(OSError):  # Kubeflow's launcher, which reads this output, ends at once at SIGTERM
                say(f"{name} is being deleted: {reason}")
            is_gone = api.delete(name)
            with suppress(OSError):
                say(f"{name} is deleted" if is_gone else f"{name} is marked as deleted, its pods are still ending")
            raise
    say(f"{name} succeeded")
    run_id = manifest["metadata"]["annotations"][RUN_ID]
    return PyTorchJobResult(name, cluster.namespace, run_id, was_adopted, time.monotonic() - began_s)


def withdraw(config: Config, run_ids: Iterable[str]) -> list[str]:
    """Delete the jobs of some run ids, of which those that have ended are kept, and return the names of the others.

    Raises:
        ClusterError: if the API server cannot be reached or refuses a request.
    """
    api = JobApi(config.cluster)
    jobs = {name: api.get(name) for name in map(job_name, run_ids)}
    active = [name for name, job in jobs.items() if job and not condition(job, "Succeeded", "Complete", "Failed")]
    api.delete(*active)
    return active


def check(
    config: Config,
    *,
    run_id: str = "",
    skip_test: bool = False,
    from_pod: bool = False,
    on_finding: Callable[[Finding], None] | None = None,
) -> list[Finding]:
    """Ask the cluster whether it would run the job of `config`, and submit nothing.

    Args:
        run_id, skip_test: as for `run`.
        from_pod: also start a pod of the job's image, which looks at MLflow and the volumes; it is deleted at the end.
        on_finding: called with each finding as it is found.

    Returns:
        All findings. The job could run if none is a fault.

    Raises:
        ConfigError, ManifestError: if the job could not run with this configuration.
        ClusterError: if there is no usable kubeconfig.
        SystemExit: with status 143 on SIGTERM, after deleting the pod.
    """
    job = _describe(config, run_id=run_id, skip_test=skip_test)
    build(job)
    cluster = config.cluster
    api = JobApi(cluster.model_copy(update={"api_timeout_s": min(cluster.api_timeout_s, _CHECK_S)}))
    found: list[Finding] = []

    def add(finding: Finding) -> None:
        found.append(finding)
        if on_finding:
            on_finding(finding)

    for finding in Preflight(api, job).findings():
        add(finding)
    if from_pod and found[0].level != "fault":  # else nothing answers
        with _signals_raise() as received:
            for finding in look_from_a_pod(api, job):
                add(finding)
            received.check()
    return found


def make_manifest(config: Config, *, run_id: str = "", skip_test: bool = False) -> Manifest:
    """Make the manifest that `run` submits.

    Raises:
        ConfigError, ManifestError: if the job could not run with this configuration.
    """
    return build(_describe(config, run_id=run_id, skip_test=skip_test))


def _describe(config: Config, *, run_id: str, skip_test: bool = False) -> Description:
    mlflow_run_id = os.environ.get("MLFLOW_RUN_ID", "")
    run_id = run_id or mlflow_run_id or default_run_id(config)
    return describe(config, run_id, mlflow_run_id=mlflow_run_id, skip_test=skip_test)


def _submit(api: JobApi, manifest: Manifest, say: Callable[[str], None]) -> bool:
    """Create the job, or adopt an existing one of its name; return True if adopted."""
    name = manifest["metadata"]["name"]
    for _ in range(_TRIES):
        if api.create(manifest):
            say(f"{name} created in namespace {manifest['metadata']['namespace']}")
            return False
        present = api.get(name)
        if present is None:
            continue  # it was deleted between the two calls
        failed = condition(present, "Failed")
        if failed or present["metadata"].get("deletionTimestamp"):
            say(f"{name} exists and {'has failed' if failed else 'is being deleted'}; replacing it")
            api.delete(name)
            continue
        if present["metadata"].get("annotations", {}).get(DIGEST) != manifest["metadata"]["annotations"][DIGEST]:
            raise ClusterError(
                f"{name}: already exists with another image, command or resources; wait for its end, delete it, or "
                "set another --run-id"
            )
        say(f"{name} already exists; following it")
        return True
    raise ClusterError(
        f"{name}: must be deleted before it can start again, but still exists; check why its pods do not end"
    )


def _follow(
    api: JobApi, name: str, say: Callable[[str], None], write: Callable[[str], None], received: "_Received"
) -> None:
    log = LogFollower(api.read_log, write, max_pause_s=api.cluster.poll_s)
    wait_s = 0  # time to wait for the end of the log, only after the job has ended

    def on_pods(pods: list[dict[str, Any]]) -> None:
        received.check()
        log.offer(pods)

    try:
        Follower(api, api.cluster, say).follow(name, on_pods)
        wait_s = _LOG_END_S
    except JobFailedError as error:
        wait_s = 0 if isinstance(error, JobTimeoutError) else _LOG_END_S
        raise
    finally:
        if not log.finish(wait_s) and wait_s:
            say("the end of rank 0's log could not be read")


class _Received:
    """Signals, which raise an exception: SystemExit at the first SIGTERM, unless Ctrl-C came before; later ones are
    ignored, so that the job is deleted.

    Python drops an exception that is raised within the finalizer of an object, such as an answer of the API server.
    `check` raises it then.
    """

    def __init__(self) -> None:
        self._first = 0

    def on_signal(self, number: int, _: object) -> None:
        is_first, self._first = not self._first, self._first or number
        if number == signal.SIGINT:
            raise KeyboardInterrupt  # a second one ends the wait for the deletion, which continues
        if is_first:
            raise SystemExit(STATUS_OF_SIGTERM)

    def check(self) -> None:
        """Raise the exception of the first signal, if there was one."""
        if self._first:
            raise KeyboardInterrupt if self._first == signal.SIGINT else SystemExit(STATUS_OF_SIGTERM)


@contextmanager
def _signals_raise() -> Iterator[_Received]:
    received = _Received()
    with handled((signal.SIGTERM, signal.SIGINT), received.on_signal):
        yield received


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `maskrcnn pytorchjob`."""
    parser = stage_parser("pytorchjob", __doc__)
    parser.add_argument(
        "--run-id", default="", help="run id, which determines the job's name (MLFLOW_RUN_ID, or a digest)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the manifest without submitting it")
    parser.add_argument(
        "--check", action="store_true", help="ask the cluster whether it would run the job; status 1 if it would not"
    )
    parser.add_argument(
        "--check-pod",
        action="store_true",
        help="--check, and start a pod of the image for a moment, which looks at DNS, MLflow and the volumes",
    )
    parser.add_argument("--skip-test", action="store_true", help="do not evaluate after training")
    with user_errors():
        args, config = parse(parser, argv)
        if args.dry_run:
            print(to_yaml(make_manifest(config, run_id=args.run_id, skip_test=args.skip_test)), end="")
        elif args.check or args.check_pod:
            found = check(
                config,
                run_id=args.run_id,
                skip_test=args.skip_test,
                from_pod=args.check_pod,
                on_finding=lambda one: print(one, flush=True),
            )
            print(summary(found))
            sys.exit(any(finding.level == "fault" for finding in found))
        else:
            run(config, run_id=args.run_id, skip_test=args.skip_test)


if __name__ == "__main__":
    main()
