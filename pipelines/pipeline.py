"""Kubeflow Pipelines: `maskrcnn pipeline compile | submit | run-local | manifest`.

  compile    write the pipeline as a file that Kubeflow Pipelines takes
  submit     upload the pipeline where it is new or has changed, and run it; --wait follows it to its end
  run-local  run the same pipeline on this machine, without a cluster
  manifest   print the training job that the pipeline would submit

--pipeline training (the default): download, prepare, train, evaluate, predict, benchmark, register.
--pipeline stability: the same training from each of stability.seeds, and a table.
`maskrcnn pipeline <action> --help` shows an action's options.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from types import ModuleType

from components.cli import parse, path_argument, stage_parser, user_errors
from model.errors import UserError
from pipelines import PIPELINES

_SUMMARIES = {
    "compile": "Write the pipeline as a file that Kubeflow Pipelines takes.",
    "submit": (
        "Upload the pipeline where it is new or has changed, and run it.\n\n"
        "The token is that of KF_PIPELINES_TOKEN, or of the file that --token-file or KF_PIPELINES_SA_TOKEN_PATH "
        "names; it may be none.\n"
        "Over https, the certificates of --ca-file, REQUESTS_CA_BUNDLE, CURL_CA_BUNDLE, SSL_CERT_FILE or SSL_CERT_DIR "
        "are trusted instead of those of public CAs.\n"
        "HTTPS_PROXY, HTTP_PROXY and NO_PROXY apply, but not to localhost.\n"
        "With --wait the status is 0 if the run succeeded, 1 if it did not, 2 if that could not be learned in time."
    ),
    "run-local": "Run the pipeline on this machine by kfp's local runner, training in train.processes processes.",
    "manifest": "Print the training job that the pipeline would submit; in a pipeline, its name ends with the id of "
    "the run.",
}


def _seconds(word: str) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be 0 or more seconds, got {word}")
    return seconds


def _parser(action: str) -> argparse.ArgumentParser:
    parser = stage_parser(f"pipeline {action}", _SUMMARIES[action])
    if action != "manifest":
        parser.add_argument("--pipeline", choices=PIPELINES, default=PIPELINES[0], help="pipeline (%(default)s)")
    if action == "compile":
        parser.add_argument(
            "--output", type=path_argument, required=True, metavar="FILE", help="the file to write, as YAML"
        )
    if action == "submit":
        parser.add_argument(
            "--endpoint", default="", metavar="URL", help="address of Kubeflow Pipelines (KF_PIPELINES_ENDPOINT)"
        )
        parser.add_argument(
            "--namespace", default="", metavar="NS", help="namespace of the experiment, for multi-user servers"
        )
        parser.add_argument("--experiment", default="", metavar="NAME", help="experiment (tracking.experiment)")
        parser.add_argument(
            "--service-account", default="", metavar="NAME", help="service account of the steps (the server's default)"
        )
        parser.add_argument("--token-file", type=path_argument, metavar="FILE", help="a file with the token")
        parser.add_argument(
            "--ca-file",
            type=path_argument,
            metavar="FILE",
            help="certificates of the CA that the server's is signed by, as PEM; or a folder of such files",
        )
        parser.add_argument("--wait", action="store_true", help="follow the run to its end")
        parser.add_argument(
            "--timeout", type=_seconds, default=0.0, metavar="S", help="with --wait: give up after S seconds (never)"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `maskrcnn pipeline`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: maskrcnn pipeline <action> [options] [section.key=value …]\n\n{__doc__.strip()}")
        sys.exit(0)
    with user_errors():
        if words[0] not in _SUMMARIES:
            raise UserError(f"pipeline: must be one of {', '.join(_SUMMARIES)}, got {words[0]!r}")
        args, config = parse(_parser(words[0]), words[1:])
        if words[0] == "manifest":
            from components.cluster.manifest import to_yaml
            from components.pytorchjob import make_manifest

            print(to_yaml(make_manifest(config, skip_test=True)), end="")
            return
        if words[0] == "submit" and args.timeout and not args.wait:
            raise UserError("--timeout: must go with --wait, since nothing is waited for without it; add --wait")
        status = _run(words[0], args)
    sys.exit(status)


def _run(action: str, args: argparse.Namespace) -> int:
    """The status to end with."""
    compile_ = _import_compile()
    request = compile_.Request(args.pipeline, args.params, args.overrides)
    if action == "compile":
        text = compile_.compile_pipeline(request)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text, encoding="utf-8")
        print(
            f"{args.output}: the pipeline {args.pipeline}; upload it in the user interface, or `maskrcnn pipeline "
            "submit`"
        )
        return 0
    if action == "run-local":
        from pipelines.run_local import run_local

        return run_local(request)
    from pipelines.submit import Server, submit

    server = Server(args.endpoint, args.token_file, args.namespace, ca_file=args.ca_file)
    return submit(
        request,
        server,
        experiment=args.experiment,
        service_account=args.service_account,
        wait=args.wait,
        timeout_s=args.timeout,
    )


def _import_compile() -> ModuleType:
    try:
        from pipelines import compile
    except ImportError as error:
        if (error.name or "").split(".")[0] != "kfp":
            raise
        raise UserError("kfp: is not installed; pip install 'maskrcnn-mlops[pipelines]'") from error
    return compile


if __name__ == "__main__":
    main()
