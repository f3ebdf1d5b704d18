"""Writing a recipe to params.yaml."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from components.params import ConfigError, load_config, parse_config
from components.recipe import main, recipe_text, run
from components.runs import recipes
from components.runs.recipes import RECIPES, RecipeError, load_recipe, read_header, recipe_names

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "params.yaml"


def test_overrides_change_just_their_values(output: Path):
    run("shapes_demo", ["train.seed=3", "data.shapes.seed=4"], output=output)
    before, after = load_recipe("shapes_demo").flat(), load_config(output).flat()
    assert {key: value for key, value in after.items() if value != before[key]} == {
        "train.seed": 3,
        "data.shapes.seed": 4,
    }


def test_overrides_keep_comments_and_stand_in_the_command_on_top(output: Path):
    overrides = ["train.clip_grad_norm=5.0", "tracking.run_name='two  words\nand a line'"]
    run("shapes_demo", overrides, output=output)
    first, second, *lines = output.read_text().splitlines()
    assert first.startswith("# Written by: maskrcnn recipe shapes_demo train.clip_grad_norm=5.0 ")
    assert second == read_header("shapes_demo").splitlines()[0]
    assert "  clip_grad_norm: 5.0  # from scratch: a rare large gradient must not undo what was learned" in lines
    assert load_config(output) == load_recipe("shapes_demo", overrides)


@settings(max_examples=20, deadline=None)
@given(st.text(), st.lists(st.from_regex("[A-Z_]+=.*", fullmatch=True), max_size=2), st.floats(0, 1e30))
def test_any_value_is_read_back_as_it_was(text: str, env: list[str], number: float):
    overrides = [f"{key}={json.dumps(value)}" for key, value in (("tracking.run_name", text), ("cluster.env", env))]
    overrides += [f"train.clip_grad_norm={number!r}"]
    try:
        config = load_recipe("coco_tiny", overrides)
    except ConfigError:  # what YAML itself cannot say: half a surrogate pair
        assume(False)
    assert parse_config(recipe_text("coco_tiny", overrides)) == config


def test_text_that_yaml_would_read_as_something_else_is_quoted(output: Path):
    for text in (
        "off",
        "No",
        "1e5",
        "0x1F",
        "1:30",
        "null",
        "~",
        "a:",
        ".5",
        "",
        "two words",
        "#",
        "'",
        "☃",
        "a\u2028b",
    ):
        run("shapes_demo", [f"tracking.run_name={json.dumps(text)}"], output=output)
        for version in ((1, 1), (1, 2)):
            yaml = YAML(typ="safe", pure=True)
            yaml.version = version
            assert yaml.load(output)["tracking"]["run_name"] == text


def test_what_recipe_wrote_itself_is_overwritten(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    five, six = ["train.max_iters=5"], ["train.max_iters=6"]
    demo, tiny = "shapes_demo", "coco_tiny"
    for first, second in [
        ((demo, five), (demo, six)), ((demo, five), (demo, [])), ((demo, []), (demo, five)), ((demo, six), (tiny, [])),
        ((tiny, []), (demo, five)), ((demo, five), (demo, five)), ((tiny, ["data.raw_dir='a  b'"]), (tiny, [])),
    ]:  # fmt: skip
        output.unlink(missing_ok=True)
        run(*first, output=output)
        run(*second, output=output)
        assert output.read_text() == recipe_text(*second), (first, second)
    written = recipe_text(demo, five)
    for case, content in {
        "as checked out": (RECIPES.parent / "params.yaml").read_bytes(),
        "CRLF": written.replace("\n", "\r\n").encode(),
        "no newline at the end": written.rstrip("\n").encode(),
        "one more at the end": f"{written}\n".encode(),
        "by a version with other values": written_by_another_version(tmp_path, monkeypatch),
    }.items():
        output.write_bytes(content)
        run(demo, output=output)
        assert output.read_text() == recipe_text(demo), case


def written_by_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    with monkeypatch.context() as patch:
        patch.setattr(recipes, "RECIPES", tmp_path)
        (tmp_path / "shapes_demo.yaml").write_text("# An earlier header.\n\ntrain:\n  max_iters: 7\n")
        return recipe_text("shapes_demo").encode()


def test_what_has_been_edited_or_came_from_elsewhere_is_overwritten_by_force_alone(output: Path):
    written = recipe_text("shapes_demo", ["train.max_iters=5"])
    edited = (
        r"must be as `maskrcnn recipe shapes_demo train\.max_iters=\d` wrote it, but has been edited; it would be over"
    )
    foreign = "must be a file that `maskrcnn recipe` wrote, but its first line does not say so; it would be overwritten"
    for content, reason in {
        written.replace("max_iters: 5", "max_iters: 50"): edited,
        written.replace("# from scratch", "# from nothing"): edited,
        written.replace("# Hardware:  2", "# Hardware:  4"): edited,
        written.replace("train.max_iters=5", "train.max_iters=9"): edited,
        written.replace("train:\n", "train:\n\n"): edited,
        f"{written}# mine\n": edited,
        f"# mine\n{written}": foreign,
        written.partition("\n")[2]: foreign,
        "train:\n  max_iters: 5\n": foreign,
        "not YAML: [": foreign,
        "": foreign,
        "\udcff": foreign,  # not UTF-8
    }.items():
        output.write_text(content, encoding="utf-8", errors="surrogateescape")
        before = output.read_bytes()
        with pytest.raises(RecipeError, match=reason) as error:
            run("shapes_demo", output=output)
        assert str(error.value).startswith(f"{output}: ")
        assert str(error.value).endswith("Pass --force, or write elsewhere with --output FILE")
        assert output.read_bytes() == before, content
        main(["shapes_demo", "--output", str(output), "--force"])
        assert output.read_text() == recipe_text("shapes_demo")


def test_another_file_may_be_written_beside_an_edited_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("mine\n")
    with pytest.raises(SystemExit):
        main(["shapes_demo"])
    main(["shapes_demo", "--output", "new/folder/params.yaml"])
    assert Path("params.yaml").read_text() == "mine\n"
    assert Path("new/folder/params.yaml").read_text() == recipe_text("shapes_demo")
    with pytest.raises(RecipeError, match=r"new/folder: must be a file, is a folder; .*--output FILE"):
        run("shapes_demo", output=Path("new/folder"), force=True)


def test_a_pipe_is_written_to_without_being_read_and_gets_the_recipe_alone():
    command = [sys.executable, "-m", "components.recipe", "shapes_demo", "--output", "/dev/stdout"]
    piped = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert piped.stdout == recipe_text("shapes_demo")
    assert piped.stderr.startswith("/dev/stdout: shapes_demo; now run ")


def test_a_wrong_override_writes_nothing(output: Path):
    with pytest.raises(ConfigError):
        run("coco_tiny", ["train.sed=1"], output=output)
    assert not output.exists()


def test_the_list_has_every_recipe_with_its_hardware_time_and_ap(capsys: pytest.CaptureFixture[str]):
    main(["--list"])
    blocks = capsys.readouterr().out.strip().split("\n\n")
    assert [block.split("\n")[0] for block in blocks] == recipe_names()
    for block in blocks:
        _, purpose, hardware, time, ap = block.split("\n")
        assert purpose.strip()
        assert hardware.startswith("  Hardware: ")
        assert time.startswith("  Time: ")
        assert ap.startswith("  AP: ")
    fpn = next(block for block in blocks if block.startswith("mask_rcnn_r50_fpn_1x\n"))
    assert any(block.endswith("with MSRA's weights: 0.429, 0.386); not measured here") for block in blocks)  # two lines
    assert "8 GPUs of 16 GB" in fpn
    assert "6.5 h" in fpn
    assert "box 0.382, mask 0.347 (cited" in fpn
    assert "not measured here" in fpn


def test_a_recipe_that_is_not_finished_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(recipes, "RECIPES", tmp_path)
    (tmp_path / "draft.yaml").write_text("\ufeff# A draft.\n#\n# AP: 0.1\n")  # some editors begin files so
    (tmp_path / "empty.yaml").touch()
    main(["--list"])
    draft, empty = capsys.readouterr().out.split("\n\n")
    assert draft == "draft\n  A draft.\n  Hardware: not stated\n  Time:     not stated\n  AP:       0.1"
    assert empty.startswith("empty\n  not stated\n")


def test_the_command_line_writes_to_the_named_file(output: Path):
    main(["coco_tiny", "--output", str(output), "train.seed=9"])
    assert load_config(output).train.seed == 9


def test_warm_up_that_takes_all_of_training_is_a_warning(output: Path, capsys: pytest.CaptureFixture[str]):
    main(["coco_tiny", "--output", str(output)])
    assert "warning" not in capsys.readouterr().err
    main(["coco_tiny", "--output", str(output), "train.max_iters=10", "train.lr_steps=[]"])
    assert "warning: train.warmup_iters: 10 iterations of warm-up take all 10 of" in capsys.readouterr().err


def test_a_file_below_a_file_is_an_error_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_:
        main(["shapes_demo", "--output", f"{tmp_path}/file/below"])
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/file: File exists; a folder is needed there")
