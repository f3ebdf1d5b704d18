"""A report of runs: everything that they hold, what they lack, and nothing from outside."""

import importlib.util
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from components import evaluate, report
from components.config import Config
from components.params import load_config, save_config
from components.runs.files import read_run
from components.runs.identity import deciding
from components.runs.journal import Journal
from components.runs.recipes import load_recipe, nearest_recipe
from model.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
VOID = {"meta", "link", "img", "br", "hr", "line", "i", "wbr"}
# Words of tables that are spread over lines.
BROKEN_WORDS = r"""() => {
  const found = [], nodes = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (nodes.nextNode()) {
    const node = nodes.currentNode, range = document.createRange();
    if (!node.parentElement.closest("th, td, caption")) continue;
    for (const word of node.data.matchAll(/[\p{L}\p{N}]+/gu)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map((one) => one.top)).size > 1) found.push(word[0]);
    }
  }
  return found;
}"""
# Whether a table scrolls, and how far its rows' names then are from its left edge.
SCROLLED_TABLES = r"""() => [...document.querySelectorAll(".scroll")].map((box) => {
  box.scrollLeft = 1e5;
  const left = (element) => element.getBoundingClientRect().left;
  return [box.scrollLeft > 0, Math.round(left(box.querySelector("tbody th")) - left(box))];
})"""


class Page(HTMLParser):
    """What a page holds; fails where an element is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []  # element, attribute, value
        self.cells: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if set(self.open) & {"td", "th"}:
            self.cells.append(data)


def save_run(config: Config, checkpoint: str, run_dir: Path, seed: int = 0) -> Path:
    """A finished run on real images: evaluated, with a journal of 30 steps; not benchmarked."""
    train = config.train.model_copy(update={"output_dir": run_dir, "seed": seed})
    config = config.model_copy(update={"train": train})
    run_dir.mkdir(parents=True)
    save_config(config, run_dir / "config.yaml")
    journal = Journal(run_dir / "log.jsonl")
    for step in range(1, 31):
        journal.append(step, {"loss/total": 3 / step, "loss/mask": 1 / step, "time/step_s": 0.5, "time/data_s": 0.1})
    evaluate.run(config, checkpoint=checkpoint)
    return run_dir


@pytest.fixture(scope="module")
def run_dir(trained_run: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = str(trained_run.train.output_dir / "checkpoints" / "step_0000007.pt")
    return save_run(trained_run, checkpoint, tmp_path_factory.mktemp("report") / "first")


@pytest.fixture(scope="module")
def written(run_dir: Path) -> report.ReportResult:
    return report.run([run_dir], output=run_dir / "report.html", pictures=1)


@pytest.fixture(scope="module")
def page(written: report.ReportResult) -> Page:
    return Page(written.html.read_text())


def test_the_page_needs_nothing_beside_itself(written: report.ReportResult, page: Page) -> None:
    text = written.html.read_text()
    assert written.html.stat().st_size < 5_000_000
    loaded = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert all(value.startswith(("data:", "#")) for value in loaded)
    assert not re.search(r"@import|url\((?!data:)|fetch\(|XMLHttpRequest|WebSocket|import\(", text)


def test_every_score_stands_in_both_files(run_dir: Path, written: report.ReportResult, page: Page) -> None:
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    markdown = written.markdown.read_text()
    for task in ("bbox", "segm"):
        for name, value in evaluation[task].items():
            shown = "–" if value is None else f"{value:.3f}"
            assert shown in page.cells
            assert re.search(rf"^\| {name} \|.* {shown} \|", markdown, re.MULTILINE)
    assert set(evaluation["per_class"]) <= set(page.cells)


def test_values_of_the_configuration_stand_as_in_the_parameter_file(written: report.ReportResult) -> None:
    markdown = written.markdown.read_text()
    rows = dict(re.findall(r"^\| ([a-z_]+\.[a-z_.]+) \| (.*) \|$", markdown, re.MULTILINE))
    shown = [rows[key] for key in ("model.backbone", "model.freeze_stages", "data.val_images")]
    assert shown == ["resnet50 | resnet18", "2 | –", '"" | val2017']  # of the nearest recipe, and of the run
    assert "The runs have the same configuration." not in markdown, "there is one"
    assert re.search(r"80 classes: .*toothbrush\.$", markdown, re.MULTILINE), "all of them"


def test_the_first_table_has_the_last_step_and_the_time_of_all(written: report.ReportResult) -> None:
    assert re.search(r"^\| first \|.* 30 \| 15 s \|$", written.markdown.read_text(), re.MULTILINE)


def test_charts_and_pictures_are_named_for_those_who_do_not_see_them(page: Page) -> None:
    names = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert "total loss: first ends at 0.1" in names
    # Two logged losses; precision over recall of boxes and masks at three IoUs; F1, precision, recall, calibration.
    assert len(names) == 2 + 6 + 4
    described = [value for tag, name, value in page.attributes if tag == "img" and name == "alt"]
    matrix = "Colours are shares of a row. Confusion matrix at each class's best threshold"
    assert matrix in described
    described.remove(matrix)
    assert len(described) in (1, 2)  # there is no best image where nothing was found
    assert all(re.search(r"\.(jpg|png): F1 \d\.\d\d", text) for text in described)


def test_links_lead_to_chapters(page: Page) -> None:
    targets = {value for _, name, value in page.attributes if name == "id"}
    links = {value for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert links
    assert {link.removeprefix("#") for link in links} <= targets


def test_what_is_missing_is_said_and_how_to_get_it(written: report.ReportResult) -> None:
    markdown = written.markdown.read_text()
    assert "first has no benchmark; run `maskrcnn benchmark`." in markdown
    assert "benchmark.json is not there: `maskrcnn benchmark` writes it." in markdown


def test_the_commands_at_the_end_make_the_run_again(run_dir: Path, written: report.ReportResult) -> None:
    """The recipe with the overrides is the run's configuration, in all that decides a result."""
    line = re.search(r"^maskrcnn recipe (\w+) (.*)$", written.markdown.read_text(), re.MULTILINE)
    assert line is not None
    again = load_recipe(line[1], shlex.split(line[2]))
    assert deciding(again.flat()) == deciding(load_config(run_dir / "config.yaml").flat())
    assert again.train.output_dir == run_dir
    assert again.data.raw_dir == load_config(run_dir / "config.yaml").data.raw_dir


def test_two_runs_stand_side_by_side_with_their_difference_first(
    trained_run: Config, run_dir: Path, tmp_path: Path
) -> None:
    checkpoint = str(trained_run.train.output_dir / "checkpoints" / "step_0000007.pt")
    second = save_run(trained_run, checkpoint, tmp_path / "second", seed=5)
    text = report.run([run_dir, second], output=tmp_path / "both.html", pictures=0).markdown.read_text()
    assert "What difference does train.seed make between first and second?" in text
    assert "| between the runs | first | second |\n|---|---:|---:|\n| train.seed | 0 | 5 |" in text
    assert "| AP50 |" in text
    page = Page((tmp_path / "both.html").read_text())
    lines = [value for tag, name, value in page.attributes if (tag, name) == ("polyline", "data-name")]
    assert lines.count("first") == lines.count("second") == 12
    assert not [tag for tag, _, _ in page.attributes if tag == "img"]


def test_runs_on_different_data_are_compared_under_a_warning(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `maskrcnn compare` refuses them: on top of the page, at each chapter with scores, and in the terminal."""
    cases = {
        "scored": ({"data_hash": "0" * 64}, 7),
        "counted": ({"max_detections": 300}, 7),
        "taught": ({"train_data_hash": "1" * 64}, 1),
        "same": ({}, 0),
    }
    for name, (values, _) in cases.items():
        shutil.copytree(run_dir, tmp_path / name)
        path = tmp_path / name / "evaluation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    data_hash, warned = json.loads((run_dir / "evaluation.json").read_text())["data_hash"][:12], {}
    for name, (_, count) in cases.items():
        html = tmp_path / "page.html"
        report.main([str(run_dir), str(tmp_path / name), "--pictures", "0", "--output", str(html)])
        warned[name] = capsys.readouterr().err
        pages = html.read_text(), html.with_suffix(".md").read_text()
        assert [text.count("Warning:") for text in pages] == [count] * 2
        assert all(warned[name].removeprefix("warning: ").strip() in text for text in pages)
    assert "scores must not be compared" in warned["scored"]
    assert f"first on 4 images, data_hash {data_hash}; scored on 4 images, data_hash 000000000000." in warned["scored"]
    assert "as many detections per image and class in all runs: first 100; counted 300." in warned["counted"]
    assert "trained on different data" in warned["taught"]
    assert "taught on data_hash 111111111111." in warned["taught"]
    assert warned["same"] == ""


def test_lines_of_tables_break_within_names_not_within_words(written: report.ReportResult) -> None:
    html = written.html.read_text()
    for text in ("data.<wbr>prepared_<wbr>dir", "train.<wbr>base_lr", ">0.02<"):
        assert text in html
    rules = re.findall(r"([^{}]*)\{([^{}]*)\}", html.partition("</style>")[0])
    assert not [rule for selector, rule in rules if re.search(r"\bt[hd]\b", selector) and "anywhere" in rule]


def test_a_run_that_has_but_a_benchmark_gets_a_page(tmp_path: Path) -> None:
    case = {
        "mode": "train",
        "model": "ours",
        "dtype": "float32",
        "batch": 2,
        "height": 64,
        "width": 64,
        "images_per_s": 3.0,
    }
    case |= {"step_s": {"median": 0.6, "p90": 0.7, "p99": 0.8}, "peak_memory_mib": None, "ratio_to_torchvision": None}
    hardware = {"cpu": "some cpu", "cores": 4, "gpu": "", "gpus": 0}
    (tmp_path / "bare").mkdir()
    content = {"hardware": hardware, "versions": {"torch": "2.15"}, "commit": None, "steps": {"cases": [case]}}
    (tmp_path / "bare" / "benchmark.json").write_text(json.dumps(content))
    text = report.run([tmp_path / "bare"], output=tmp_path / "page.html").markdown.read_text()
    assert "some cpu, 4 cores" in text
    assert "No run has been evaluated" in text
    assert "No run has logged a training step." in text
    Page((tmp_path / "page.html").read_text())


@pytest.mark.parametrize(
    ("kinds", "headline"),
    [
        ({"bbox": {"AP": 0.25, "AP50": 0.5}}, "| box AP | box AP50 |"),
        ({"proposals": {"AR1000": 0.25}}, "| proposals AR1000 |"),
    ],
)
def test_a_model_without_masks_is_reported_by_what_it_has(
    run_dir: Path, tmp_path: Path, kinds: dict[str, dict[str, float]], headline: str
) -> None:
    """As evaluation leaves it of Faster R-CNN, and of an RPN alone."""
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "plots")
    (tmp_path / "run" / "inference" / "segm.json").unlink()
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    full = {kind: evaluation.pop(kind) for kind in ("bbox", "segm")}
    per_class = {name: {"bbox": of_class["bbox"]} for name, of_class in evaluation["per_class"].items()}
    for kind, scores in kinds.items():
        evaluation[kind] = full.get(kind, {}) | scores
    evaluation["per_class"] = per_class if "bbox" in kinds else {}
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(evaluation))
    result = report.run([tmp_path / "run"], output=tmp_path / "page.html", pictures=1)
    text = result.markdown.read_text()
    assert ("<img" in result.html.read_text()) == ("bbox" in kinds)
    assert headline in text
    assert "0.250" in text
    assert "mask" not in text.partition("## Configuration")[0]
    assert ("box: AP50" in text) == ("bbox" in kinds)  # kinds of error


def test_other_data_in_the_same_place_are_not_taken_for_those_evaluated(run_dir: Path, tmp_path: Path) -> None:
    """As a run without its data: scores stay, pictures and kinds of error go."""
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_hash": "0" * 64}))
    text = report.run([tmp_path / "run"], output=tmp_path / "page.html").markdown.read_text()
    assert "The evaluated data (000000000000) are not in" in text
    assert "ΔAP50" not in text
    assert "| AP50 |" in text


def test_a_journal_that_is_being_written_is_read_and_left_as_it_is(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "live")
    journal = tmp_path / "live" / "log.jsonl"
    journal.write_text(journal.read_text() + '{"step": 31, "ti')
    before = journal.read_bytes()
    assert read_run(tmp_path / "live").training[-1].step == 30
    assert journal.read_bytes() == before


def test_a_name_cannot_break_out_of_the_page(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "<script>alert(1)<&")
    html = report.run(
        [tmp_path / "<script>alert(1)<&"], output=tmp_path / "page.html", question="<b>?"
    ).html.read_text()
    assert "<script>alert" not in html
    assert "<b>?" not in html
    Page(html)


def test_an_unchanged_recipe_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save_config(load_recipe("coco2014_r50_fpn_1x_bs64"), tmp_path / "run" / "config.yaml")
    near = nearest_recipe(read_run(tmp_path / "run").config)
    assert (near.recipe, near.changes) == ("coco2014_r50_fpn_1x_bs64", {})


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nowhere"], "does not exist"),
        (["params.yaml"], "must be the folder of a run (train.output_dir), but is a file"),
        (["."], "must hold a run"),
        (["RUN", "RUN"], "different names"),
        (["RUN", "--output", "page.pdf"], "must end with .html"),
        (["RUN", "--pictures", "-1"], "0 or more"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], reason: str
) -> None:  # fmt: skip
    save_config(Config(), tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        report.main([str(run_dir) if word == "RUN" else word for word in words])
    assert end.value.code == 2
    assert reason in capsys.readouterr().err


def test_no_run_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one run"):
        report.run([], output=tmp_path / "page.html")


def load_screenshots() -> Any:
    pytest.importorskip("playwright", reason="needs playwright, of the extra `dev`, which drives the browser")
    spec = importlib.util.spec_from_file_location("screenshots", REPOSITORY / "docs" / "screenshots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_browser_opens_the_page_without_a_word_or_a_request(written: report.ReportResult) -> None:
    screenshots = load_screenshots()
    if (path := screenshots.find_browser()) is None:
        pytest.skip("needs Chromium, and none is on PATH")
    with screenshots.browser_of(path) as browser, screenshots.opened_report(browser, written.html) as (page, facts):
        readout = screenshots.hover_over_a_chart(page)
        assert re.fullmatch(r"at \d+\nfirst  [\d.]+", readout)
        assert (facts.console, facts.requests) == ([], [])
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing reaches out of it
            assert page.evaluate(BROKEN_WORDS) == [], width
            tables = page.evaluate(SCROLLED_TABLES)
            assert any(scrolls for scrolls, _ in tables) == (width == 390)
            assert {distance for _, distance in tables} == {0}


def test_named_runs_and_the_tables_need_no_parameter_file(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    for document in ("README.md", "docs/results.md"):
        shutil.copy(REPOSITORY / document, tmp_path / document)
    monkeypatch.chdir(tmp_path)
    report.main([str(run_dir), "--pictures", "0", "--output", "page.html"])
    assert (tmp_path / "page.html").is_file()
    report.main(["--readme"])
    assert "Not measured yet" in (tmp_path / "README.md").read_text()


def test_options_without_an_effect_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, told in (
        (["--readme", "--output", "page.html"], "--output: must not go with --readme"),
        (["--readme", "--question", "Why?"], "--question: must not go with --readme"),
        (["--readme", "--pictures", "2"], "--pictures: must not go with --readme"),
        (["--readme", "--params", "mine.yaml"], "--params: must not go with --readme"),
        (["run", "--params", "mine.yaml"], "--params: must not go with a RUN"),
        (["run", "train.seed=1"], "train.seed=1: must not go with a RUN"),
    ):
        with pytest.raises(SystemExit) as end:
            report.main(words)
        assert end.value.code == 2
        assert told in capsys.readouterr().err, words
