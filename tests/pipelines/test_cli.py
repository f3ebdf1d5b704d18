"""The console script: quick to start, and it knows its stages."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipelines.cli import STAGES, main

ROOT = str(Path(__file__).resolve().parents[2])
IMPORTED_BY_RUN = (  # a stage imports these, if at all, once it runs
    "torch",
    "torchvision",
    "matplotlib",
    "scipy",
    "pycocotools.coco",
    "hotcoco",
    "PIL",
    "requests",
    "mlflow",
    "kfp",
    "kubernetes",
    "pandas",
    "sklearn",
)
HEAVY = ("torch", "torchvision", "pydantic", "mlflow", "numpy", "PIL", "rich", "ruamel", "dvc", "kfp")


def test_help_lists_every_stage_in_a_line(capsys: pytest.CaptureFixture[str]):
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for stage, purpose in STAGES.items():
        assert sum(line.split(maxsplit=1) == [stage, purpose] for line in lines) == 1


def test_no_word_at_all_is_help(capsys: pytest.CaptureFixture[str]):
    main([])
    assert "stages:" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from pipelines.cli import main; main(['--help']); print([m "
        "for m in sys.argv[1:] if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("word", "hint"), [("trian", "did you mean train?"), ("evalute", "did you mean evaluate?"), ("qq", "known: recipe")]
)
def test_an_unknown_stage_names_the_nearest(capsys: pytest.CaptureFixture[str], word: str, hint: str):
    with pytest.raises(SystemExit) as exit_:
        main([word])
    assert exit_.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_own_help(capsys: pytest.CaptureFixture[str], stage: str):
    with pytest.raises(SystemExit) as exit_:
        main([stage, "--help"])
    assert exit_.value.code == 0
    assert f"usage: maskrcnn {stage}" in capsys.readouterr().out


# Command lines that end with status 0 (--help) or 2, in a folder with params.yaml and nothing else, and a checkpoint
# that is there, of an evaluation.json without the file it names.
DOORS = (
    *((stage, "--help") for stage in STAGES),
    *((stage, "train.base_lrr=1") for stage in STAGES if stage not in ("compare", "import", "recipe", "pipeline")),
    *((stage, "--params", "none.yaml") for stage in STAGES if stage not in ("compare", "import", "recipe", "pipeline")),
    ("recipe", "shapes_demo", "train.base_lrr=1"),
    ("pipeline", "compile", "--output", "pipeline.yaml", "train.base_lrr=1"),
    ("import", "voc"),
    ("import", "voc", "none", "out"),
    ("import", "voc", "params.yaml", "out"),
    ("import", "voc", "evaluated", "params.yaml"),
    ("import", "voc", "evaluated", "evaluated/out"),
    ("import", "none", "evaluated", "out"),
    ("import", "voc", "evaluated", "out", "--val-fraction", "1.5"),
    ("prepare",),
    ("train",),
    ("evaluate",),
    ("evaluate", "--checkpoint", "none.pt"),
    ("predict",),
    ("evaluate", "--checkpoint", "empty.pt"),
    ("predict", "--checkpoint", "step.pt"),
    ("predict", "--checkpoint", "step.pt", "none.jpg"),
    ("export",),
    ("export", "--checkpoint", "none.pt"),
    ("export", "--checkpoint", "step.pt"),
    ("stability",),
    ("stability", "evaluate.skip_eval=true"),
    ("stability", "--seed", "2"),
    ("stability", "--summary"),
    ("register",),
    ("register", "evaluated"),
    ("report", "none"),
    ("compare", "none", "none"),
    ("benchmark", "none"),
)
_PROGRAM = """
import json, sys
from pipelines.cli import main
doors, heavy = json.loads(sys.argv[1])
for words in doors:
    try:
        main(words)
        status = 0
    except SystemExit as end:
        status = end.code
    imported = [name for name in heavy if name in sys.modules]
    wanted = 0 if "--help" in words else 2
    if imported or status != wanted:
        sys.exit(f"{words}: status {status}, imported {imported}")
"""


def test_help_and_mistakes_answer_before_anything_heavy_is_imported(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("data:\n  raw_dir: raw\n  prepared_dir: prepared\n")
    zipfile.ZipFile(tmp_path / "step.pt", "w").close()
    (tmp_path / "empty.pt").touch()
    (tmp_path / "evaluated").mkdir()
    evaluation = {"bbox": {"AP": 0.5}, "segm": {"AP": 0.5}, "checkpoint": "checkpoints/none.pt", "data_hash": "0"}
    (tmp_path / "evaluated" / "evaluation.json").write_text(json.dumps(evaluation))
    command = [sys.executable, "-c", _PROGRAM, json.dumps([DOORS, IMPORTED_BY_RUN])]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_SIGNALLED = """
import os, signal, sys
number, where = signal.Signals(int(sys.argv[1])), sys.argv[2]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "components.report":
            type("Made", (), {"field": self}) if where == "class" else os.kill(os.getpid(), number)

    def __set_name__(self, owner, name):  # Python 3.11 wraps its exceptions
        signal.raise_signal(number)

from pipelines.cli import main
if where == "stage":
    import components.report
    components.report.main = lambda words: os.kill(os.getpid(), number)
else:
    sys.meta_path.insert(0, Finder())
main(["report", "none"])
"""


_SIGNALLED_MODULE = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "components.params":
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("number", "status", "said"), [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "")]
)
@pytest.mark.parametrize("where", ["import", "class", "stage", "module"])
def test_a_signal_ends_a_stage_and_its_imports_with_its_status_and_without_a_traceback(
    tmp_path: Path, where: str, number: signal.Signals, status: int, said: str
):
    """As PID 1 of a container a signal without a handler would be lost."""
    command = [sys.executable, "-c", _SIGNALLED, str(int(number)), where]
    if where == "module":  # as DVC, torchrun and the image call it
        command = [sys.executable, "-m", "components.report", "none"]
        (tmp_path / "sitecustomize.py").write_text(_SIGNALLED_MODULE)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "SIGNAL": str(int(number))}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, said)


def test_a_stage_gets_the_words_after_its_name(capsys: pytest.CaptureFixture[str]):
    main(["recipe", "--list"])
    assert "shapes_demo" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--help", "recipe", "pytorchjob cluster.image=a/b:1 --dry-run"])
def test_output_that_nobody_reads_is_no_error(words: str):
    """As in `maskrcnn recipe | head -1`: it ends as programs in C do at SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipelines.cli", *words.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("recipe", "error: No space left on device; free some space"),
        ("--help", "error: the output cannot be written: No space left on device"),
        ("recipe --help", "error: the output cannot be written: No space left on device"),
    ],
)
def test_a_disk_that_cannot_take_the_output_is_one_error(words: str, error: str):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "pipelines.cli", *words.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr.startswith(error)) == (2, True), done.stderr
    assert done.stderr.count("\n") == 1
