"""Writing a recipe to params.yaml."""

from pathlib import Path

import pytest

from components.params import ConfigError, load_config
from components.recipe import main, recipe_text, run
from components.runs.recipes import RecipeError, load_recipe, recipe_names


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


def test_overrides_keep_comments_and_are_told_on_top(output: Path):
    run("shapes_demo", ["train.seed=3"], output=output)
    first, second = output.read_text().splitlines()[:2]
    assert first == "# shapes_demo with train.seed=3"
    assert second == recipe_text("shapes_demo").splitlines()[0]


def test_one_recipe_may_replace_another(output: Path):
    run("shapes_demo", output=output)
    run("coco_tiny", output=output)
    assert load_config(output).train.output_dir == Path("runs/coco_tiny")


def test_what_the_user_changed_is_not_overwritten(output: Path):
    run("shapes_demo", output=output)
    output.write_text(output.read_text() + "# mine\n")
    with pytest.raises(RecipeError, match="--force"):
        run("coco_tiny", output=output)
    assert output.read_text().endswith("# mine\n")
    run("coco_tiny", output=output, force=True)
    assert "# mine" not in output.read_text()


def test_writing_the_same_twice_is_no_change(output: Path):
    run("shapes_demo", ["train.seed=3"], output=output)
    written = output.read_text()
    run("shapes_demo", ["train.seed=3"], output=output)
    assert output.read_text() == written


def test_an_unknown_recipe_names_the_nearest(output: Path):
    with pytest.raises(RecipeError, match="did you mean coco_tiny"):
        run("coco_tinny", output=output)
    assert not output.exists()


def test_a_path_is_no_recipe(output: Path):
    with pytest.raises(RecipeError, match="is not a recipe"):
        run("../recipes/coco_tiny", output=output)


def test_a_wrong_override_writes_nothing(output: Path):
    with pytest.raises(ConfigError):
        run("coco_tiny", ["train.sed=1"], output=output)
    assert not output.exists()


def test_the_list_tells_every_recipe_with_its_hardware_time_and_ap(capsys: pytest.CaptureFixture[str]):
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
    assert "8 GPUs of 16 GB" in fpn
    assert "6.5 h" in fpn
    assert "box 0.382, mask 0.347 (cited" in fpn
    assert "not measured here" in fpn


def test_the_command_line_writes_where_it_is_told(output: Path):
    main(["coco_tiny", "--output", str(output), "train.seed=9"])
    assert load_config(output).train.seed == 9
