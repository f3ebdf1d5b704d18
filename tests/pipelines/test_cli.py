"""The console script: quick to start, and it knows its stages."""

import subprocess
import sys

import pytest

from pipelines.cli import STAGES, main

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
    program = "import sys; from pipelines.cli import main; main(['--help']); print([m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("word", "told"), [("trian", "did you mean train?"), ("evalute", "did you mean evaluate?"), ("qq", "known: recipe")]
)
def test_an_unknown_stage_names_the_nearest(capsys: pytest.CaptureFixture[str], word: str, told: str):
    with pytest.raises(SystemExit) as exit_:
        main([word])
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_its_own_help(capsys: pytest.CaptureFixture[str], stage: str):
    with pytest.raises(SystemExit) as exit_:
        main([stage, "--help"])
    assert exit_.value.code == 0
    assert f"usage: maskrcnn {stage}" in capsys.readouterr().out


def test_a_stage_gets_the_words_after_its_name(capsys: pytest.CaptureFixture[str]):
    main(["recipe", "--list"])
    assert "shapes_demo" in capsys.readouterr().out
