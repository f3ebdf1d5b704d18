"""The GPU session (.ci/gpu): what it needs, and that its summary can be pasted into a document."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

# Run in a process of its own, where these cannot be imported.
COLLECT = """
import sys
import time
for name in ("mlflow", "kfp", "kfp_server_api", "dvc", "kubernetes", "kubeflow"):
    sys.modules[name] = None
import components.benchmark, components.download, components.prepare, components.train
import components.benchmarks.measures, components.datasets.coco, components.datasets.preparation
import components.evaluation.checkpoint, components.training.tracked
import pytest
sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


def test_the_tests_for_a_gpu_and_the_stages_need_neither_mlflow_nor_kfp():
    done = subprocess.run([sys.executable, "-c", COLLECT], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "tests/model/engine/test_steps_gpu.py" in done.stdout
    assert "tests/cuda_ops/test_multilevel_roi_align.py" in done.stdout
    assert "tests/components" not in done.stdout


def summary_of(out: Path) -> str:
    command = [sys.executable, str(REPOSITORY / ".ci" / "gpu" / "summary.py"), str(out)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "GIT_DIR": str(out / "no repository")}
    environment.pop("MASKRCNN_COMMIT", None)
    smi = out / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 570.1, 700.00 W\n")
    smi.chmod(0o755)
    environment["PATH"] = f"{smi.parent}:{environment['PATH']}"
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_summary_of_a_session_is_tables(tmp_path: Path):
    """The session's smoke found a fault, its figures are of one network, its demo ended in the middle of a write."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "train_bf16").mkdir()
    (tmp_path / "steps.txt").write_text(
        "smoke | failed, status 1 | 12 | 40\ntrain_bf16 | ok | 30 | 70\n"
        "gather_bf16 | ok | 9 | 79\ndemo_float32 | ok | 3 | 82\n"
    )
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "benchmark.json").write_text("no step wrote this")
    (tmp_path / "logs" / "smoke.txt").write_text("ok   box_iou 0.1 s\nFAIL batched_nms 0.2 s differs\n1 failures\n")
    (tmp_path / "logs" / "tests_model.txt").write_text("FAILED tests/a.py::b\n== 1 failed, 8 passed in 3 s ==\n")
    row = {"mode": "train", "model": "ours", "dtype": "bfloat16", "batch": 16, "height": 800}
    row |= {"width": 1344, "images_per_s": 250.0, "step_s": {"median": 0.064, "p90": 0.07, "p99": 0.07}}
    row |= {"peak_memory_mib": 9000.0, "ratio_to_torchvision": 0.25}
    theirs = row | {"model": "torchvision NHWC", "images_per_s": 62.5, "step_s": {"median": 0.256}}
    report = {"backbone": "resnet50", "hardware": {"cpu": "a cpu", "cores": 16, "gpu": "NVIDIA X", "gpus": 1}}
    report |= {"commit": "abcdef0" + 33 * "0", "steps": {"cases": [row, theirs]}}
    (tmp_path / "train_bf16" / "benchmark.json").write_text(json.dumps(report))
    gathered = report | {"steps": {"cases": [row | {"images_per_s": 300.0}]}}
    (tmp_path / "gather_bf16").mkdir()
    (tmp_path / "gather_bf16" / "benchmark.json").write_text(json.dumps(gathered))
    operator = {"case": "box_iou", "rival_name": "torchvision", "compiled": 0.001, "reference": 0.002, "rival": 0.004}
    (tmp_path / "operators.jsonl").write_text(json.dumps(operator) + "\n")
    (tmp_path / "evaluation_demo_float32.json").write_text('{"bbox": {"AP"')
    summary = summary_of(tmp_path)
    assert "| smoke | failed, status 1 | 12 | 40 |" in summary
    assert "- FAIL batched_nms 0.2 s differs\n- 1 failures" in summary
    assert "- tests_model: FAILED tests/a.py::b\n- tests_model: 1 failed, 8 passed in 3 s" in summary
    assert "| 1 × NVIDIA X | 16 | bfloat16 | 250 | – | 0.064 s | 9000 MiB | 0.25 |" in summary
    scatters, gathers = summary.split("### Training, RoIAlign's gradient gathered")
    assert "| bfloat16 | 300 |" in gathers
    assert "| bfloat16 | 300 |" not in scatters
    assert "| train bfloat16 ×16 | channels-last | 62.5 | 256.00 ms |" in summary
    assert "| box_iou | 1.000 ms | 2.000 ms | torchvision 4.000 ms | 4.0× |" in summary
    assert "### Demo\n\nCannot be read: JSONDecodeError" in summary
    assert "Sanitizers" not in summary
    assert "A dry run" not in summary
    assert "commit unknown, " in summary  # outside git
    assert " (driver 570.1, 700.00 W), " in summary


def interpreter(folder: Path, cases: str) -> str:
    """An interpreter of Python but for the cases, which are those of a shell's `case` of all arguments.

    It has no torch, which would take seconds to import.
    """
    path = folder / "interpreter"
    packages = Path(tempfile.mkdtemp(dir=folder.parent))
    (packages / "torch.py").write_text("raise ImportError('this interpreter has none')")
    lines = ["#!/bin/sh", f'case "$*" in\n{cases}\nesac', f'export PYTHONPATH="$PYTHONPATH:{packages}"']
    path.write_text("\n".join([*lines, f'exec {sys.executable} "$@"\n']))
    path.chmod(0o755)
    return str(path)


def call(
    script: str, *arguments: str, folder: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [str(REPOSITORY / ".ci" / "gpu" / script), *arguments]
    settings = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=120, check=False)


def refused(script: str, *arguments: str, **environment: str) -> str:
    done = call(script, *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    return done.stderr


def test_what_the_session_does_not_know_ends_it_before_anything_runs(tmp_path: Path):
    out = {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    assert refused("session", "--dyr", **out) == "error: the only option is --dry, got --dyr\n"
    assert refused("session", "--dry", ONLY="smoke\nnonsense", **out).endswith("phases_bf16 , got nonsense\n")
    for text in ("08", "0", "1.5", "abc", "-3"):
        must = f"error: SESSION_S must be a whole number of seconds, 1 to 999999, got {text}\n"
        assert refused("session", "--dry", SESSION_S=text, **out) == must
    must = "error: PYTHON must be Python 3.11 or newer, got /nowhere/python\n"
    assert refused("session", "--dry", **out | {"PYTHON": "/nowhere/python"}) == must
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    for variable in ("OUT", "TMPDIR"):
        path = str(tmp_path / "file" / "folder")
        must = f"error: {variable} must be a folder that can be written, got {path}\n"
        assert refused("session", "--dry", **out | {variable: path}) == must


def test_a_kit_replaces_nothing_but_a_kit(tmp_path: Path):
    python = {"PYTHON": interpreter(tmp_path, '*"pip download"*) exit 1 ;;')}  # were it to go so far
    for held in ("wheels/mine.whl", "thesis", "MADE_BY_MAKE_KIT/thesis"):
        path = tmp_path / held.replace("/", " ") / held
        path.parent.mkdir(parents=True)
        path.write_text("years of work")
        assert "must be new, empty or a kit" in refused("make_kit", str(tmp_path / held.replace("/", " ")), **python)
        assert "must be new, empty or a kit" in refused("make_kit", str(path), **python)
        assert path.read_text() == "years of work"
    assert "must be in a folder that can be written" in refused("make_kit", "/proc/nowhere/kit", **python)
    assert "takes one FOLDER, got --help" in refused("make_kit", "--help", **python)
    assert "must be an interpreter with pip" in refused("make_kit", PYTHON="/bin/false")
    assert "must be 3.11 to 3.14, got 2.7" in refused("make_kit", PYTHON_VERSION="2.7", **python)


def test_a_kit_is_made_where_the_caller_stands_and_one_that_cannot_be_made_leaves_the_one_before(tmp_path: Path):
    download = 'while [ $1 != -d ]; do shift; done; mkdir -p "$2"; touch "$2/$WHEEL"; exit $STATUS ;;'
    settings = {"PYTHON": interpreter(tmp_path, f'*"pip download"*) {download}'), "PREBUILT": "0"}

    def make(folder: str, wheel: str, status: int = 0) -> bool:
        return call("make_kit", folder, folder=tmp_path, WHEEL=wheel, STATUS=str(status), **settings).returncode == 0

    def wheels() -> list[str]:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["interpreter", "kit", "link"]
        return [path.name for path in (tmp_path / "kit" / "wheels").iterdir()]

    (tmp_path / "link").symlink_to("kit")  # to nothing as yet
    assert make("link", "one.whl")
    assert wheels() == ["one.whl"]
    assert not make("kit", "two.whl", status=1)
    assert wheels() == ["one.whl"]
    assert make("kit", "three.whl")
    assert wheels() == ["three.whl"]
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "kit" / "thesis").write_text("years of work")
    assert not make("kit", "four.whl")
    assert (tmp_path / "kit" / "thesis").exists()


def test_a_session_repeats_figures_of_an_earlier_one_only_where_some_steps_alone_are_asked_for(tmp_path: Path):
    """With an interpreter that does nothing but the summary, in a folder that also holds what no step writes."""
    out = tmp_path / "out"
    old = {"profile.md": "kernels of last week", "logs/smoke.txt": "FAIL of last week"}
    old |= {"steps.txt": "profile_bf16 | ok | 1 | 1\n"}
    old |= dict.fromkeys(("operators.jsonl", "train_bf16/benchmark.json", "evaluation_demo_float32.json"), "{}")
    foreign = ("thesis.md", "tests_model/benchmark.json", "mine/benchmark.json", "train_bf16/last_checkpoint")
    settings = {
        "PYTHON": interpreter(tmp_path, '*"import sys"* | *summary.py*) ;; *) exit 1 ;;'),
        "OUT": "out",
        "KIT": "none",
    }

    def fill() -> None:
        for name, text in {**old, **dict.fromkeys(foreign, "")}.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text)

    fill()
    done = call("session", "--dry", folder=tmp_path, **settings)
    assert done.returncode == 1
    assert "these steps failed or timed out: library smoke " in done.stderr
    assert "last week" not in done.stdout
    assert "no figure below is a result" in done.stdout
    for name in ("profile.md", "operators.jsonl", "train_bf16/benchmark.json", "evaluation_demo_float32.json"):
        assert not (out / name).exists() or not (out / name).read_text()
    assert all((out / name).exists() for name in foreign)
    fill()
    done = call("session", "--dry", folder=tmp_path, ONLY="smoke operators", **settings)
    assert done.returncode == 1
    assert "kernels of last week" in done.stdout
    assert "FAIL of last week" not in done.stdout
    assert (out / "operators.jsonl").read_text() == ""
    assert all((out / name).exists() for name in (*foreign, "profile.md", "train_bf16/benchmark.json"))
    lines = (out / "steps.txt").read_text().splitlines()
    assert lines[0] == "profile_bf16 | ok | 1 | 1"
    assert lines[1].startswith("ONLY=smoke operators | ")
    assert "Steps below the last row with ONLY ran in this call." in done.stdout


def test_figures_name_the_commit_without_git_too(tmp_path: Path):
    """Of a checkout that another user owns, then without .git beside the kit that was made in it, then of a changed
    file.
    """
    root, download = tmp_path / "checkout", 'while [ $1 != -d ]; do shift; done; mkdir -p "$2"; exit ;;'
    shutil.copytree(REPOSITORY / ".ci" / "gpu", root / ".ci" / "gpu")
    for name in (".ci/locked", "requirements.lock"):
        shutil.copy(REPOSITORY / name, root / name)
    (root / ".gitignore").write_text("build\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "All"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    commit_case = '*summary.py*) git describe --always --abbrev=40 || echo "$MASKRCNN_COMMIT"; exit ;;'
    cases = f'*"pip download"*) {download} {commit_case} *"import sys"* | *"-m pip"*) ;; *) exit 1 ;;'
    settings = {**os.environ, "PYTHON": interpreter(tmp_path, cases), "PREBUILT": "0", "ONLY": "smoke"}
    settings |= {"GIT_CEILING_DIRECTORIES": str(tmp_path), "MASKRCNN_COMMIT": ""}

    def commit_of(*command: str, **environment: str) -> str:
        script = [str(root / ".ci" / "gpu" / command[0]), *command[1:]]
        done = subprocess.run(script, env=settings | environment, capture_output=True, text=True, check=False)
        return done.stdout.splitlines()[-1]

    commit_of("make_kit")
    assert commit_of("session", "--dry", KIT="none", GIT_TEST_ASSUME_DIFFERENT_OWNER="1") == commit
    shutil.rmtree(root / ".git")
    assert commit_of("session", "--dry") == commit
    (root / ".ci" / "gpu" / "wheels.txt").write_text("")
    assert commit_of("session", "--dry") == f"{commit}-dirty"
    assert commit_of("session", "--dry", MASKRCNN_COMMIT="mine") == "mine"


def test_steps_side_by_side_end_with_the_session(tmp_path: Path):
    out, steps = tmp_path / "out", "tests_model tests_operators demo_float32"
    waiting = f"*'-m pytest'* | *components.download*) echo $$ >> {tmp_path}/pids; exec sleep 300 ;;"
    python = interpreter(tmp_path, f'{waiting} *"import sys"* | *summary.py*) ;; *) exit 0 ;;')
    settings = {**os.environ, "OUT": str(out), "PYTHON": python, "ONLY": steps, "KIT": "none"}
    command = [str(REPOSITORY / ".ci" / "gpu" / "session"), "--dry"]
    with subprocess.Popen(command, env=settings, stdout=subprocess.DEVNULL) as session:
        until, pids = time.monotonic() + 60, []
        while len(pids) < 3 and time.monotonic() < until:
            time.sleep(0.1)
            pids = (tmp_path / "pids").read_text().split() if (tmp_path / "pids").exists() else []
        assert len(pids) == 3
        session.terminate()
        assert session.wait(60) == 143
    until = time.monotonic() + 20  # a process that has ended is listed until its new parent has noticed
    while (left := [pid for pid in pids if Path("/proc", pid).exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
    ends = {line.split(" | ")[0] for line in (out / "steps.txt").read_text().splitlines() if "| interrupted |" in line}
    assert ends == set(steps.split())


def test_a_terminated_session_ends_at_once_and_says_where_it_was(tmp_path: Path):
    out = tmp_path / "out"
    python = interpreter(tmp_path, '*"from cuda_ops"*) exec sleep 300 ;;')
    environment = {**os.environ, "OUT": str(out), "PYTHON": python, "ONLY": "library", "KIT": "none"}
    session = subprocess.Popen(
        [str(REPOSITORY / ".ci" / "gpu" / "session"), "--dry"], env=environment, stdout=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 120
        while not (out / "logs" / "library.txt").exists() and time.monotonic() < until:
            time.sleep(0.1)
        session.terminate()
        assert session.wait(120) == 143  # within a second, but for the summary
    finally:
        session.kill()
    assert (out / "steps.txt").read_text().splitlines()[-1].startswith("library | interrupted |")
