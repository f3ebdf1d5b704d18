"""The commit of a result: dirty means code that is not committed."""

import subprocess
from pathlib import Path

import pytest

from components.runs.environment import git_commit, run_tags


def test_dirty_means_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        return subprocess.run(["git", *identity, *words], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    for name in ("params.yaml", "dvc.lock", "README.md", ".dvc/config", "setup.py", "code/a.py", "code/a.cu"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("1")
    git("add", ".")
    git("commit", "--quiet", "--message", "a")
    commit = git("rev-parse", "HEAD")
    for name in ("params.yaml", "dvc.lock", "README.md", ".dvc/config", "code/untracked.py"):
        Path(name).write_text("2")
    monkeypatch.chdir("code")  # and in a folder of the repository
    assert git_commit() == commit
    for name in ("a.py", "a.cu", "../setup.py"):
        Path(name).write_text("2")
        assert git_commit() == f"{commit}-dirty"
        assert run_tags()["dirty"] == "true"
        git("checkout", "--quiet", name)
    Path("a.py").unlink()
    assert git_commit() == f"{commit}-dirty"


def test_an_experiment_of_dvc_can_be_found_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    assert "dvc.exp_name" not in run_tags()
    monkeypatch.setenv("DVC_EXP_NAME", "sober-otter")
    assert run_tags()["dvc.exp_name"] == "sober-otter"
