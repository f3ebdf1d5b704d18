"""Reading recipes: what they inherit, and what is refused."""

from pathlib import Path

import pytest

from components.config import Config
from components.params import ConfigError
from components.runs import recipes
from components.runs.recipes import Nearest, RecipeError, load_recipe, nearest_recipe, read_header, read_recipe
from model.errors import UserError

BASE = """# The base.
#
# Command: none

data:
  source: custom  # images of one's own
  buckets: [[800, 1344], [1344, 800]]
  shapes:
    seed: 3  # nested

train:
  base_lr: 0.01  # slow
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    monkeypatch.setattr(recipes, "RECIPES", folder)
    (folder / "base.yaml").write_text(BASE)
    (tmp_path / "outside.yaml").write_text(BASE)
    return folder


def test_a_recipe_has_the_defaults_but_for_what_it_states(folder: Path):
    recipe = read_recipe("base")
    defaults = Config().flat()
    assert {key: value for key, value in recipe.config.flat().items() if value != defaults[key]} == {
        "data.source": "custom",
        "data.buckets": [[800, 1344], [1344, 800]],
        "data.shapes.seed": 3,
        "train.base_lr": 0.01,
        "stability.output_dir": "runs/base_stability",
    }
    assert recipe.header == "# The base.\n#\n# Command: none\n"


def test_values_and_their_comments_come_from_all_that_a_recipe_extends(folder: Path):
    (folder / "middle.yaml").write_text("# Middle.\nextends: base\ntrain:\n  base_lr: 0.02\n  seed: 7  # lucky\n")
    (folder / "last.yaml").write_text("# Last.\n\nextends: middle\n\ndata: {workers: 5}\n")
    recipe = read_recipe("last")
    config = recipe.config
    assert (config.data.source, config.train.base_lr, config.train.seed) == ("custom", 0.02, 7)
    assert (config.data.shapes.seed, config.data.workers) == (3, 5)
    # What was said of a value goes with the value.
    assert recipe.comments == {
        "data.source": "images of one's own",
        "data.shapes.seed": "nested",
        "train.seed": "lucky",
    }
    assert recipe.header == "# Last.\n"


def test_a_study_lies_in_a_folder_of_its_own_recipe(folder: Path):
    (folder / "named.yaml").write_text("# Named.\nextends: base\nstability:\n  output_dir: elsewhere\n  parallel: 2\n")
    (folder / "last.yaml").write_text("# Last.\nextends: named\n")
    studies = {name: load_recipe(name).stability for name in ("named", "last")}
    assert {name: (str(study.output_dir), study.parallel) for name, study in studies.items()} == {
        "named": ("elsewhere", 2),
        "last": ("runs/last_stability", 2),
    }


def test_overrides_go_before_a_recipes_values_and_leave_the_recipe_as_it_is(folder: Path):
    recipe = read_recipe("base")
    assert recipe.overridden(["data.shapes.seed=4", "train.base_lr=1"]).data.shapes.seed == 4
    assert recipe.config.data.shapes.seed == 3
    with pytest.raises(
        ConfigError, match=r"^override 'train\.sead=1': train\.sead: unknown key; did you mean train\.seed\?"
    ):
        load_recipe("base", ["train.sead=1"])


WRONG = {
    "extends: bose": r"other\.yaml: extends: must be the name of a recipe, got 'bose'; did you mean base\?",
    "extends: [base]": r"other\.yaml: extends: must be the name of a recipe, got \['base'\]",
    "extends:": r"other\.yaml: extends: must be the name of a recipe, got None",
    "extends: ../outside": r"other\.yaml: extends: must be the name of a recipe, got '\.\./outside'",
    "extends: other": r"other\.yaml: extends: must not lead back to the recipe itself, got other → other",
    "extends: round": r"round\.yaml: extends: must not lead back to the recipe itself, got other → round → other",
    "extends: wrong": r"wrong\.yaml: train\.base_lr: .* greater than 0, got -1",
    "extends: base\ntrain:\n  baes_lr: 1": r"other\.yaml: train\.baes_lr: unknown key; did you mean train\.base_lr\?",
    "evaluate:\n  min_bbox_ap: 0.3": r"other\.yaml: evaluate\.min_bbox_ap: unknown key; did you mean evaluate\.target",
    "extends: base\ndata: 5": r"other\.yaml: data: .*got 5",
    "extends: base\ndata:": r"other\.yaml: data: .*got None",
    "extends: base\nexpends: base": r"other\.yaml: expends: unknown key",
    "train:\n  seed: one": r"other\.yaml: train\.seed: .*got 'one'",
    "train:\n  seed: 1\n  seed: 2": r"other\.yaml: not YAML",
    "- 1": r"other\.yaml: must hold sections .*, got a",
}


def test_what_a_recipe_gets_wrong_is_reported_with_file_and_key(folder: Path):
    (folder / "round.yaml").write_text("extends: other\n")
    (folder / "wrong.yaml").write_text("train:\n  base_lr: -1\n")
    for text, reason in WRONG.items():
        (folder / "other.yaml").write_text(f"# A recipe.\n\n{text}\n")
        with pytest.raises(UserError, match=reason):
            read_recipe("other")


def test_a_recipe_that_is_not_utf8_is_told(folder: Path):
    (folder / "other.yaml").write_bytes(b"# Caf\xe9.\n")
    for read in (read_recipe, read_header):
        with pytest.raises(ConfigError, match=r"other\.yaml: not YAML: 'utf-8'"):
            read("other")


def test_an_unknown_recipe_names_the_nearest(folder: Path):
    for name, reason in {
        "bases": "did you mean base?",
        "../outside": "known: base",
        "": "known: base",
        "qqq": "known: base",
    }.items():
        with pytest.raises(RecipeError) as error:
            read_recipe(name)
        assert f"{name!r} is not a recipe; " in str(error.value)
        assert reason in str(error.value)


def test_a_configuration_is_described_by_its_recipe_and_what_differs():
    overrides = ["train.base_lr=0.007", "train.output_dir=elsewhere", "tracking.enabled=false"]
    near = nearest_recipe(load_recipe("coco_tiny", overrides).flat())
    assert near == Nearest("coco_tiny", {"train.base_lr": (0.02, 0.007)})
