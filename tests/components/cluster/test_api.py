"""Calls of the Kubernetes API by the real client against a server on loopback: answers, refusals, outages."""

import json
import threading
import time
from collections.abc import Callable
from functools import cache
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from components.cluster.api import ClusterError, JobApi
from components.cluster.manifest import Manifest
from components.config import Config
from components.params import load_config
from components.pytorchjob import make_manifest

pytest.importorskip("kubernetes", reason="needs kubernetes, of the extra `pipelines`")
ROOT = Path(__file__).resolve().parents[3]
Make = Callable[..., Any]  # see make_cluster in conftest.py


@cache
def config(*overrides: str) -> Config:
    return load_config(ROOT / "params.yaml", ["cluster.image=registry/maskrcnn:1", "cluster.poll_s=1", *overrides])


def manifest(*overrides: str) -> Manifest:
    return make_manifest(config(*overrides), run_id="try-1")


def refusal(*overrides: str) -> str:
    """The error where no job can be created."""
    with pytest.raises(ClusterError) as error:
        JobApi(config(*overrides).cluster).create(manifest(*overrides))
    return str(error.value)


def test_a_job_is_created_once_found_and_deleted(make_cluster: Make):
    cluster = make_cluster()
    api, job = JobApi(config().cluster), manifest()
    name = job["metadata"]["name"]
    assert api.get(name) is None
    assert api.create(job)
    assert not api.create(job)
    assert (api.get(name) or {})["spec"] == job["spec"]
    assert api.delete(name)
    assert api.delete(name), "that it is gone already is no error"
    assert cluster.jobs == {}


FORBIDDEN = {  # words of API servers → what the advice names
    'pytorchjobs.kubeflow.org is forbidden: User "system:serviceaccount:maskrcnn:me" '
    'cannot create resource "pytorchjobs" in API '
    'group "kubeflow.org" in the namespace "maskrcnn"': "k8s/base/launcher.yaml",
    'pytorchjobs.kubeflow.org is forbidden: User "system:anonymous" cannot create resource "pytorchjobs"': "log in",
    'pytorchjobs.kubeflow.org "a" is forbidden: exceeded quota: jobs, '
    "requested: count/pytorchjobs.kubeflow.org=1, used: "
    "count/pytorchjobs.kubeflow.org=4, limited: count/pytorchjobs.kubeflow.org=4": "describe resourcequota",
    'pods "a" is forbidden: failed quota: compute: must specify limits.cpu': "describe resourcequota",
    (
        'admission webhook "validate.kyverno.svc-fail" denied the request: cannot use images of registry'
    ): "admission policy",
    (
        "pytorchjobs \"a\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied request: no"
    ): "admission policy",
    (
        'pytorchjobs "a" is forbidden: unable to create new content in '
        "namespace maskrcnn because it is being terminated"
    ): "is gone",
    (
        'pods "a" is forbidden: violates PodSecurity "restricted:latest": allowPrivilegeEscalation != false '
        '(container "init-pytorch" must set securityContext.allowPrivilegeEscalation=false)'
    ): "cluster.form=elastic",
    (
        'pods "a" is forbidden: error looking up service account maskrcnn/absent: serviceaccount "absent" not found'
    ): "cluster.service_account",
    "admission webhook \"vtrainjob.kb.io\" denied the request: runtime 'absent' not found": "cluster.runtime must name",
    "<html>blocked by the proxy</html>": "blocked by the proxy",
}


def test_a_403_is_refused_with_the_way_out_of_its_cause(make_cluster: Make):
    cluster = make_cluster()
    for words, advice in FORBIDDEN.items():
        cluster.faults += [("create", "pytorchjobs", 403, words)]
        message = refusal()
        assert "create pytorchjobs in maskrcnn: 403" in message
        assert advice in message.partition(words)[2] or advice in words, message
        assert ("launcher.yaml" in message) == ("launcher.yaml" in advice), message
    assert cluster.jobs == {}


NO_RIGHTS = 'pytorchjobs.kubeflow.org "a" is forbidden: User "me" cannot get resource "pytorchjobs" in API group'


def test_a_server_that_has_restarted_has_time_to_load_its_rules(make_cluster: Make):
    cluster = make_cluster()
    api, job = JobApi(config().cluster), manifest()
    api.create(job)
    cluster.faults += [("get", "pytorchjobs", 403, NO_RIGHTS)] * 2
    assert api.get(job["metadata"]["name"]) is not None
    assert cluster.faults == []


def test_a_right_that_is_missing_is_reported_after_that_time_and_before_it_if_nothing_was_allowed(make_cluster: Make):
    cluster = make_cluster()
    cluster.faults += [("get", "pytorchjobs", 403, NO_RIGHTS)] * 100
    api = JobApi(config("cluster.api_timeout_s=1").cluster)
    with pytest.raises(ClusterError, match=r"bind the Role of k8s/base/launcher\.yaml"):
        api.get("a")
    assert len(cluster.faults) == 99
    api.create(manifest())
    with pytest.raises(ClusterError, match=r"bind the Role of k8s/base/launcher\.yaml"):
        api.get("a")
    assert 90 < len(cluster.faults) < 99


def test_fields_that_an_older_operator_would_drop_are_refused_with_the_version_that_is_needed(make_cluster: Make):
    cluster = make_cluster()
    cluster.unknown_fields = {"runtimePatches", "elasticPolicy"}
    message = refusal("cluster.api=trainjob")
    assert 'unknown field "spec.runtimePatches"; the operator of this cluster is too old' in message
    assert "cluster.api=trainjob needs Kubeflow Trainer 2.3 or later" in message
    assert "needs training operator 1.9 or later" in refusal("cluster.api=pytorchjob")
    assert cluster.jobs == {}


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "log in again"), (422, "a fault on demand"), (404, "kubectl apply -k k8s/base")]
)
def test_a_refusal_is_reported_at_once(make_cluster: Make, status: int, reason: str):
    cluster = make_cluster()
    cluster.faults += [("create", "pytorchjobs", status)]
    assert reason in refusal()
    assert cluster.calls == [("create", "pytorchjobs")]


def test_a_missing_namespace_is_reported(make_cluster: Make):
    make_cluster()
    assert 'namespaces "elsewhere" not found' in refusal("cluster.namespace=elsewhere")


def test_a_server_that_is_away_is_waited_for_just_so_long(make_cluster: Make):
    make_cluster().close()
    began = time.monotonic()
    assert "cluster.api_timeout_s=1" in refusal("cluster.api_timeout_s=1")
    assert 1 <= time.monotonic() - began < 10


def test_a_create_whose_answer_is_lost_is_tried_again(make_cluster: Make):
    cluster = make_cluster()
    cluster.faults += [("create", "pytorchjobs", 500), ("create", "pytorchjobs", 0)]
    assert JobApi(config().cluster).create(manifest())
    assert cluster.calls == [("create", "pytorchjobs")] * 3
    assert len(cluster.jobs) == 1


def test_a_token_file_that_ends_with_a_line_end_is_used(make_cluster: Make, tmp_path: Path):
    make_cluster()
    (tmp_path / "token").write_text("t0ken\n")
    path = tmp_path / "kubeconfig"
    kubeconfig = json.loads(path.read_text())
    kubeconfig["users"][0]["user"] = {"tokenFile": str(tmp_path / "token")}
    path.write_text(json.dumps(kubeconfig))
    assert JobApi(config().cluster).create(manifest())


def test_a_certificate_by_a_ca_that_the_kubeconfig_does_not_name_is_reported_at_once(
    make_cluster: Make, tls: ModuleType, tmp_path: Path
):
    cluster = make_cluster()
    ca_file, context = tls.authority(tmp_path)
    secure = ThreadingHTTPServer(("127.0.0.1", 0), cluster.server.RequestHandlerClass)
    tls.secure(secure, context)
    threading.Thread(target=secure.serve_forever, daemon=True, kwargs={"poll_interval": 0.05}).start()
    path = tmp_path / "kubeconfig"
    kubeconfig = json.loads(path.read_text())
    kubeconfig["clusters"][0]["cluster"] = {"server": f"https://127.0.0.1:{secure.server_port}"}
    path.write_text(json.dumps(kubeconfig))
    assert "the kubeconfig's certificate-authority must have signed" in refusal("cluster.api_timeout_s=1")
    assert cluster.jobs == {}
    kubeconfig["clusters"][0]["cluster"]["certificate-authority"] = str(ca_file)
    path.write_text(json.dumps(kubeconfig))
    assert JobApi(config().cluster).create(manifest())
    secure.shutdown()
    secure.server_close()


def test_an_absent_context_is_reported(make_cluster: Make):
    make_cluster()
    assert "cluster.context: production cannot be used" in refusal("cluster.context=production")
