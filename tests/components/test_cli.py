"""What all stages' command lines share."""

import errno
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from rich.table import Table

from components.cli import parse, stage_parser, terminal, user_errors
from components.params import ConfigError
from model.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def params(tmp_path: Path) -> str:
    (tmp_path / "params.yaml").write_text("train:\n  seed: 1\n")
    return str(tmp_path / "params.yaml")


def test_overrides_may_stand_among_options(params: str):
    parser = stage_parser("train", "…")
    parser.add_argument("--skip-test", action="store_true")
    args, config = parse(parser, ["train.seed=5", "--skip-test", "--params", params, "data.workers=0"])
    assert args.skip_test
    assert (config.train.seed, config.data.workers) == (5, 0)


def test_without_overrides_the_file_stands(params: str):
    assert parse(stage_parser("train", "…"), ["--params", params])[1].train.seed == 1


def test_params_yaml_here_is_the_default(params: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(params).parent)
    assert parse(stage_parser("train", "…"), [])[1].train.seed == 1


def test_operands_and_overrides_are_told_apart(params: str):
    parser = stage_parser("predict", "…", operands="IMAGE")
    args, config = parse(parser, ["a.jpg", "train.seed=5", "--params", params, "dir/b=c.jpg", "./x.y=z.jpg"])
    assert args.operands == ["a.jpg", "dir/b=c.jpg", "./x.y=z.jpg"]
    assert args.overrides == ["train.seed=5"]
    assert config.train.seed == 5


def test_an_empty_argument_is_not_the_current_folder(params: str, capsys: pytest.CaptureFixture[str]):
    for words in (["--params", params, ""], ["--params", "", "a.jpg"]):
        with pytest.raises(SystemExit) as end:
            parse(stage_parser("predict", "…", operands="IMAGE"), words)
        assert end.value.code == 2
        assert 'the current folder is "."' in capsys.readouterr().err


def test_help_explains_operands_apart_from_overrides():
    text = stage_parser("predict", "…", operands="IMAGE", operands_help="images, or folders").format_help()
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    assert ["IMAGE", "images, or folders"] in lines
    assert any(line[0] == "section.key=value" and line[1].startswith("overrides of") for line in lines if line)


def test_a_stage_without_operands_refuses_them(params: str):
    with pytest.raises(ConfigError, match=r"must be section\.key=value"):
        parse(stage_parser("train", "…"), ["--params", params, "a.jpg"])


def test_a_users_error_is_one_message_and_status_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_, user_errors():
        raise UserError("image 3 is missing")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: image 3 is missing\n"


def test_an_error_of_ours_keeps_its_traceback():
    with pytest.raises(ValueError, match="ours"), user_errors():
        raise ValueError("ours")


def test_what_the_operating_system_refuses_is_one_message_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").touch()
    refused: dict[str, Callable[[], object]] = {
        f"{tmp_path}/file: File exists; a folder is needed": (tmp_path / "file").mkdir,
        f"{tmp_path}/file/below: Not a directory; a folder is needed": (tmp_path / "file" / "below").touch,
        f"{tmp_path}: Is a directory; a file is needed": lambda: tmp_path.write_text(""),
        f"{tmp_path}/gone: No such file or directory; check that it is spelt": (tmp_path / "gone").read_text,
        f"{tmp_path}/a/b: No such file or directory; check": lambda: (tmp_path / "file").rename(tmp_path / "a" / "b"),
        "No space left on device; free some space": lambda: Path("/dev/full").write_text("text"),
    }
    for message, action in refused.items():
        with pytest.raises(SystemExit) as exit_, user_errors():
            action()
        assert exit_.value.code == 2, message
        assert capsys.readouterr().err.startswith(f"error: {message}"), message


def test_a_librarys_error_that_names_nothing_of_the_system_keeps_its_traceback():
    with pytest.raises(OSError, match="cannot identify"), user_errors():
        raise OSError("cannot identify image file")


def test_a_pipe_that_breaks_elsewhere_is_an_error(capsys: pytest.CaptureFixture[str]):
    """Here standard output is read."""
    with pytest.raises(SystemExit) as exit_, user_errors():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe", "mlflow")
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: mlflow: Broken pipe")


def test_the_terminal_says_that_nobody_reads_it():
    """Rich itself ends the process with status 1."""
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), os.fdopen(writer, "w") as unread, pytest.raises(BrokenPipeError):
        terminal(file=unread).print("text")


def test_a_limit_that_would_end_torch_without_a_message_is_named():
    """Not set in this process, which would have no addresses either."""
    for limit, said in ((3_000_000, "warning: `ulimit -v` is 2929 MiB, but torch reserves"), (20_000_000, "error: ")):
        shell = f"ulimit -v {limit}; exec {sys.executable} -m components.report none"
        done = subprocess.run(["sh", "-c", shell], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr.startswith(said)) == (2, True), done.stderr


def test_an_interrupt_ends_quietly(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_, user_errors():
        raise KeyboardInterrupt
    assert exit_.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_terminal_prints_text_of_users_as_it_is(capsys: pytest.CaptureFixture[str]):
    text = "bolt [m4] [/m4] [red]x[/red] :car: 5"
    table = Table("class", text)
    table.add_row(text, text)
    terminal(width=200).print(text)
    terminal(width=200).print(table)
    assert capsys.readouterr().out.count(text) == 4


def test_no_other_file_makes_a_terminal():
    """Another console would take square brackets in names of classes and paths for markup."""
    root = Path(__file__).parents[2]
    files = [path for floor in ("components", "pipelines", "model") for path in (root / floor).rglob("*.py")]
    assert [
        path.name for path in files if re.search(r"\b(Console|Terminal)\(|\bfrom rich import print", path.read_text())
    ] == ["cli.py"]


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("train", "GOMP_SPINCOUNT", "1000"),
        ("evaluate", "GOMP_SPINCOUNT", "1000"),
        ("predict", "OMP_WAIT_POLICY", "passive"),
    ],
)
def test_threads_do_not_spin_for_long_unless_the_user_says_so(
    stage: str, name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reads the variables when it is imported, so each stage sets them before."""
    command = importlib.import_module(f"components.{stage}")
    words = ["photo.jpg"] if stage == "predict" else []
    monkeypatch.chdir(tmp_path)  # where nothing is to be trained, evaluated or predicted
    (tmp_path / "params.yaml").write_text("{}")
    monkeypatch.delitem(sys.modules, "torch")
    for given, expected in (({}, {name: value}), (own := {"OMP_WAIT_POLICY": "active"}, own)):
        for variable in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            monkeypatch.setenv(variable, "")  # so that it is restored
            monkeypatch.delenv(variable)
        for variable, wish in given.items():
            monkeypatch.setenv(variable, wish)
        with pytest.raises(SystemExit):
            command.main(words)
        assert {v: os.environ[v] for v in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if v in os.environ} == expected
