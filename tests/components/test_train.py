"""The train stage: exact resume after SIGKILL, what a run leaves, early stops, errors."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console

from components import download, evaluate, prepare, train
from components.config import Config
from components.evaluation.score import evaluate_model
from components.params import ConfigError, load_config, save_config
from components.runs.result import read_result, require_final
from components.training import loop
from components.training.checks import check_learnable
from components.training.skips import DivergedError
from model.data.annotations import ImageRecord, Instance
from model.data.index import CocoIndex, IndexedImage, images_location, write_index
from model.engine.checkpoint import load_model, read_checkpoint, save_checkpoint
from model.engine.pointers import find_checkpoint, last_checkpoint
from model.engine.steps import Step
from model.errors import UserError
from model.network.mask_rcnn import MaskRCNN
from model.scoring.coco import CocoEvaluation

TINY = Path(__file__).with_name("tiny.yaml")
STEPS = 5


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 12 + 4 generated images, and room for runs."""
    root = tmp_path_factory.mktemp("train")
    config = small_config(root, "unused")
    download.run(config)
    prepare.run(config)
    return root


def small_config(root: Path, name: str, *overrides: str) -> Config:
    folders = (f"data.raw_dir={root}/raw", f"data.prepared_dir={root}/prepared", f"train.output_dir={root}/{name}")
    short = (f"train.max_iters={STEPS}", "train.lr_steps=[4]", "train.checkpoint_period=2")
    return load_config(TINY, [*folders, *short, *overrides])


def losses(run_dir: Path) -> list[dict[str, float]]:
    """The journal's losses, step by step."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line["metrics"].items() if name.startswith("loss/")} for line in lines]


def journal_length(run_dir: Path) -> int:
    path = run_dir / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def unbroken(shapes: Path) -> Path:
    config = small_config(shapes, "unbroken")
    train.run(config, skip_test=True)
    return config.train.output_dir


def assert_kills_change_nothing(
    shapes: Path, unbroken: Path, start_ranks: Callable[..., Any], name: str, kills: int
) -> None:
    """Kill training, in a process of its own, as soon as its journal has some length, and go on, several times."""
    config = small_config(shapes, name)
    run_dir = config.train.output_dir
    params = shapes / f"{name}.yaml"
    save_config(config, params)
    dice = random.Random(0)
    for _ in range(kills):
        saved = last_checkpoint(run_dir) if run_dir.exists() else None
        after_lines = dice.randint(1, STEPS)
        ranks = start_ranks(1, "train", "--skip-test", "--params", str(params))
        (process,) = ranks.processes
        while journal_length(run_dir) < after_lines and process.is_alive():
            time.sleep(0.005)
        process.kill()
        assert ranks.wait()[0] in (0, -signal.SIGKILL), ranks.output()
        now = last_checkpoint(run_dir)
        assert saved is None or (now is not None and saved.name <= now.name), "a checkpoint was lost"
    train.run(config, skip_test=True)
    assert losses(run_dir) == losses(unbroken)
    ours, theirs = (read_checkpoint(d / "checkpoints" / f"step_{STEPS:07d}.pt") for d in (run_dir, unbroken))
    assert all(torch.equal(ours["model"][name], value) for name, value in theirs["model"].items())


def test_two_kills_change_no_bit_of_the_losses(shapes: Path, unbroken: Path, start_ranks: Callable[..., Any]) -> None:
    assert len(losses(unbroken)) == STEPS
    assert_kills_change_nothing(shapes, unbroken, start_ranks, "killed_twice", kills=2)


@pytest.mark.slow
def test_ten_kills_in_a_row_change_no_bit_of_the_losses(
    shapes: Path, unbroken: Path, start_ranks: Callable[..., Any]
) -> None:
    assert_kills_change_nothing(shapes, unbroken, start_ranks, "killed_ten_times", kills=10)


def test_a_run_leaves_what_it_promises(unbroken: Path) -> None:
    left = {path.relative_to(unbroken).as_posix() for path in unbroken.rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json", "log.jsonl", "metrics.csv", "last_checkpoint"} <= left
    assert {f"checkpoints/step_{step:07d}.pt" for step in (2, 4, 5)} <= left
    names = losses(unbroken)[0]
    assert set(names) == {f"loss/{n}" for n in ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask", "total")}


def test_the_folder_of_a_new_run_outlasts_a_power_cut(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = set(), os.fsync

    def watched(descriptor: int) -> None:
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", watched)
    loop.Training(small_config(shapes, "new/run"), torch.device("cpu"), Console(quiet=True))
    assert {shapes.stat().st_ino, (shapes / "new").stat().st_ino} <= synced  # folders that now hold a new name


def test_the_log_line_has_median_and_mean(shapes: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(shapes, "logged", "train.max_iters=2", "train.log_period=2", "train.lr_steps=[1]")
    train.run(config, skip_test=True)
    number = r"\d+\.\d{4} \(\d+\.\d{4}\)"
    assert re.search(
        (
            rf"eta: 0:00:00  iter: 2  loss: {number}  loss_objectness: {number}.*time: "
            rf"{number}  data: {number}  lr: 0\.\d{{6}}  max mem: \d+"
        ),
        capsys.readouterr().out,
    )


def test_a_finished_run_is_not_trained_again(shapes: Path, unbroken: Path) -> None:
    before = last_checkpoint(unbroken)
    assert before is not None
    stamp = before.stat().st_mtime_ns
    result = train.run(small_config(shapes, "unbroken"), skip_test=True)
    assert result.step == STEPS
    assert before.stat().st_mtime_ns == stamp
    assert len(losses(unbroken)) == STEPS


def test_another_configuration_moves_the_old_run_aside(shapes: Path, fake_store: ModuleType) -> None:
    with fake_store.FakeServer() as server:
        tracked = ("train.lr_steps=[1]", "tracking.enabled=true", f"tracking.uri={server.url}")
        first = train.run(small_config(shapes, "moved", "train.max_iters=1", *tracked), skip_test=True)
        old = first.checkpoint.read_bytes()
        changed = small_config(shapes, "moved", "train.max_iters=2", "train.base_lr=0.001", *tracked)
        train.run(changed, skip_test=True)
        assert [run["info"]["run_name"] for run in server.runs.values()] == ["moved.old-1", "moved"]
    assert (shapes / "moved.old-1" / "checkpoints" / first.checkpoint.name).read_bytes() == old
    assert len(losses(shapes / "moved")) == 2


def test_training_starts_from_a_run_by_its_folder_or_its_pointer(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = train.run(small_config(shapes, "base", "train.max_iters=1", "train.lr_steps=[]"), skip_test=True)
    for number, word in enumerate((base.run_dir, base.run_dir / "last_checkpoint", base.checkpoint)):
        words = (f"model.weights={word}", "train.max_iters=1", "train.lr_steps=[]", "train.seed=5")
        train.run(small_config(shapes, f"from{number}", *words), skip_test=True)
        assert f"weights: {base.checkpoint}" in capsys.readouterr().out.replace("\n", "")
    first, *others = [losses(shapes / f"from{number}") for number in range(3)]
    assert others == [first, first]
    for word, told in (
        ("best_checkpoint", "has no best checkpoint"),
        ("checkpoints", r"run's folder, got .*is neither"),
    ):
        with pytest.raises(UserError, match=told):
            train.run(small_config(shapes, "none", f"model.weights={base.run_dir / word}"), skip_test=True)


def test_a_run_stays_in_its_place_if_the_one_that_would_replace_it_cannot_begin(shapes: Path) -> None:
    short = small_config(shapes, "stays", "train.max_iters=1", "train.lr_steps=[]")
    first = train.run(short, skip_test=True)
    (shapes / "no_weights.pth").write_bytes(b"")
    for words in ((f"model.weights={shapes}/no_weights.pth",), ("train.optimizer=adamw", "train.apex=required")):
        with pytest.raises(UserError):
            train.run(small_config(shapes, "stays", *words), skip_test=True)
    assert last_checkpoint(first.run_dir) == first.checkpoint
    assert not (shapes / "stays.old-1").exists()


def test_a_run_stays_in_its_place_if_an_image_cannot_be_read_before_the_first_step_of_the_next(
    shapes: Path, without: Callable[[Path], AbstractContextManager[None]]
) -> None:
    first = train.run(small_config(shapes, "rests", "train.max_iters=1", "train.lr_steps=[]"), skip_test=True)
    config = small_config(shapes, "rests", "train.base_lr=0.001")
    path = CocoIndex.open(config.data.prepared_dir, "val").image_path(0)
    with without(path), pytest.raises(UserError, match="is gone since"):
        train.run(config, skip_test=True)
    assert last_checkpoint(first.run_dir) == first.checkpoint
    assert not (shapes / "rests.old-1").exists()


def test_warm_up_that_takes_all_of_training_is_a_warning(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for warmup_iters, warnings in ((1, 1), (0, 0)):
        words = ("train.max_iters=1", "train.lr_steps=[]", f"train.warmup_iters={warmup_iters}")
        train.run(small_config(shapes, f"warm_{warmup_iters}", *words), skip_test=True)
        text = "warning: train.warmup_iters: 1 iterations of warm-up take all 1 of training"
        assert capsys.readouterr().out.count(text) == warnings


def test_a_longer_run_continues_a_shorter_one(shapes: Path) -> None:
    train.run(small_config(shapes, "longer", "train.max_iters=1"), skip_test=True)
    train.run(small_config(shapes, "longer", "train.max_iters=2"), skip_test=True)
    assert len(losses(shapes / "longer")) == 2
    assert not (shapes / "longer.old-1").exists()


def test_a_finished_run_takes_over_new_settings_of_evaluation(shapes: Path) -> None:
    short = ("train.max_iters=1", "train.lr_steps=[1]")
    train.run(small_config(shapes, "reevaluated", *short), skip_test=True)
    result = train.run(small_config(shapes, "reevaluated", *short, "data.eval_min_size_px=32"), skip_test=True)
    assert read_checkpoint(result.checkpoint)["config"]["data"]["eval_min_size_px"] == 32
    assert len(losses(result.run_dir)) == 1


def test_training_stops_at_the_target_and_keeps_the_best(shapes: Path) -> None:
    """An epoch is 6 steps. The target is so low that whatever the first evaluation scores above nothing reaches it."""
    config = small_config(
        shapes, "target", "evaluate.every_epoch=true", "evaluate.target_bbox_ap=1e-9", "train.max_iters=60",
        "model.score_threshold=0.001", "train.checkpoint_period=100", "train.warmup_iters=10", "train.lr_steps=[50]",
    )  # fmt: skip
    result = train.run(config, skip_test=True)
    assert result.reached_target
    assert result.step % 6 == 0
    assert result.step < 60
    assert find_checkpoint(result.run_dir, "best_checkpoint") is not None
    again = train.run(config, skip_test=True)
    assert again.step == result.step


def test_patience_ends_training_across_a_break_and_the_best_checkpoint_is_the_result(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch is 3 steps, which at this rate change no score: only the first evaluation finds a better AP."""
    words = (
        "train.max_iters=0", "train.lr_steps=[]", "train.lr_epochs=[1]", "train.batch_size=4", "train.base_lr=1e-9",
        "evaluate.every_epoch=true", "train.patience=2", "train.checkpoint_period=100",
    )  # fmt: skip
    first = train.run(small_config(shapes, "patient", *words, "train.epochs=2"), skip_test=True)
    assert "2 epochs of 3 iterations: 6 iterations, learning rate lowered after 3" in capsys.readouterr().out
    assert (first.step, first.checkpoint.name) == (6, "step_0000003.pt")
    patient = small_config(shapes, "patient", *words, "train.epochs=9")
    last = train.run(patient)
    assert (last.step, last.checkpoint) == (9, first.checkpoint)
    assert "2 evaluations without an AP above" in capsys.readouterr().out
    result = read_result(first.run_dir)
    assert result.evaluation["checkpoint"] == "checkpoints/step_0000003.pt"
    require_final(result)
    # The run says what its result is, whatever the parameter file does.
    impatient = patient.model_copy(update={"train": patient.train.model_copy(update={"patience": 0})})
    assert evaluate.run(impatient).checkpoint == "checkpoints/step_0000003.pt"
    assert train.run(patient, skip_test=True).step == 9
    longer = patient.model_copy(update={"train": patient.train.model_copy(update={"patience": 3})})
    assert train.run(longer, skip_test=True).step == 12


def test_divergence_is_named_with_step_and_images(shapes: Path) -> None:
    config = small_config(shapes, "diverged", "train.base_lr=1e30", "train.warmup_iters=0", "train.clip_grad_norm=0")
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_nonfinite_steps": 2})})
    with pytest.raises(DivergedError, match=r"(?s)2 steps in a row.*step \d.*images \[.*base_lr"):
        train.run(config, skip_test=True)
    journal = [json.loads(line) for line in (config.train.output_dir / "log.jsonl").read_text().splitlines()]
    assert [line["metrics"]["skipped"] for line in journal][-2:] == [1, 1], "the journal has the steps that led there"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.norm=frozen_batch_norm", r"model\.norm: .* pre-trained weights"),
        ("model.head_norm=frozen_batch_norm", r"model\.head_norm: .* got model\.weights=none"),
        ("model.freeze_stages=2", "must be 0"),
    ],
)
def test_what_cannot_learn_is_refused(shapes: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        train.run(small_config(shapes, "refused", override), skip_test=True)
    assert not (shapes / "refused").exists()


def test_copy_paste_of_boxes_without_masks_is_refused(tmp_path: Path) -> None:
    box = Instance(1, (0, 0, 9, 9), [], is_crowd=False, was_clipped=False, has_mask=False)
    write_index(
        tmp_path / "train", [IndexedImage(ImageRecord(1, "", 64, 64), False, [box])], categories={1: "a"}, data_hash="",
        origin=images_location(tmp_path, Path(), tmp_path),
    )  # fmt: skip
    index = CocoIndex.open(tmp_path, "train")
    check_learnable(small_config(tmp_path, "boxes", "model.task=box"), index)
    with pytest.raises(
        ConfigError, match=r"data\.augment\.copy_paste: needs a mask for each instance.*set it to 0, got 0\.5"
    ):
        check_learnable(small_config(tmp_path, "boxes", "model.task=box", "data.augment.copy_paste=0.5"), index)


def test_layer_norm_learns_from_scratch_whatever_the_norm_of_resnets(shapes: Path) -> None:
    config = small_config(
        shapes, "unused", "model.backbone=swin_t", "model.norm=frozen_batch_norm", "model.stem_channels=64"
    )
    check_learnable(config, CocoIndex.open(config.data.prepared_dir, "train"))


def test_seeds_give_different_runs(shapes: Path, unbroken: Path) -> None:
    config = small_config(shapes, "seed1", "train.seed=1", "train.max_iters=1")
    train.run(config, skip_test=True)
    assert losses(config.train.output_dir)[0] != losses(unbroken)[0]


def test_adamw_and_the_average_of_weights_resume_exactly_and_the_average_is_evaluated(shapes: Path) -> None:
    adamw = ("train.optimizer=adamw", "train.base_lr=1e-3", "train.weight_decay=0.05")

    def averaged(name: str, *overrides: str) -> Config:
        short = ("train.max_iters=2", "train.checkpoint_period=100")  # each checkpoint has 200 MB
        return small_config(shapes, name, "train.ema_decay=0.5", *short, *adamw, *overrides)

    whole, halves = averaged("average"), averaged("average_halved", "train.max_iters=1")
    for config in (whole, halves, averaged("average_halved")):
        train.run(config, skip_test=True)
    paths = [config.train.output_dir / "checkpoints" / "step_0000002.pt" for config in (whole, halves)]
    one, other = (read_checkpoint(path) for path in paths)
    assert all(torch.equal(other["average"][name], value) for name, value in one["average"].items())
    for number, kept in one["optimizer"]["state"].items():
        assert set(kept) == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(other["optimizer"]["state"][number][name], value) for name, value in kept.items())
    assert any(not torch.equal(one["model"][name], value) for name, value in one["average"].items())
    network = load_model(paths[0], torch.device("cpu")).model.state_dict()
    assert all(torch.equal(network[name], one["average"].get(name, value)) for name, value in one["model"].items())


def test_a_resumed_run_goes_on_with_the_micro_batch_after_the_last(shapes: Path) -> None:
    """Statistics of batch norms, which each micro-batch changes, and their averages come back to the bit, too."""
    halved = ("train.accumulation_steps=2", "train.batch_size=4", "train.ema_decay=0.5")
    halved += ("model.norm=batch_norm", "model.head_norm=batch_norm")
    for name, max_iters in (("accumulated", 2), ("accumulated_halved", 1), ("accumulated_halved", 2)):
        train.run(small_config(shapes, name, f"train.max_iters={max_iters}", *halved), skip_test=True)
    assert len(losses(shapes / "accumulated_halved")) == 2
    assert losses(shapes / "accumulated_halved") == losses(shapes / "accumulated")
    one, other = (
        read_checkpoint(shapes / name / "checkpoints" / "step_0000002.pt")
        for name in ("accumulated", "accumulated_halved")
    )
    for part in ("model", "average"):
        assert "roi_heads.mask_head.0.1.running_var" in one[part]
        assert all(torch.equal(other[part][name], value) for name, value in one[part].items())
    statistics = [name for name in one["average"] if name.endswith("running_var")]
    assert any(not torch.equal(one["model"][name], one["average"][name]) for name in statistics)


def test_other_training_data_begin_another_run(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ("train.max_iters=1", "train.lr_steps=[1]")
    first = train.run(small_config(shapes, "fewer", *one), skip_test=True)
    fewer = small_config(shapes, "fewer", *one, f"data.prepared_dir={shapes}/fewer_prepared", "data.train_limit=6")
    prepare.run(fewer)
    again = train.run(fewer, skip_test=True)
    output = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "starting anew" in output
    assert "(it was made with other training data)" in output
    assert (shapes / "fewer.old-1" / "checkpoints" / first.checkpoint.name).is_file()
    hashes = [
        read_checkpoint(run / "checkpoints" / again.checkpoint.name)["data_hash"]
        for run in (shapes / "fewer.old-1", shapes / "fewer")
    ]
    assert hashes[0] != hashes[1]


def test_a_run_that_is_longer_than_wanted_is_another(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.yaml would say train.max_iters=1 of a network of two steps."""
    train.run(small_config(shapes, "longer", "train.max_iters=2"), skip_test=True)
    again = train.run(small_config(shapes, "longer", "train.max_iters=1"), skip_test=True)
    assert "(it was made with 2 iterations, more than 1)" in " ".join(capsys.readouterr().out.split())
    assert (again.step, again.checkpoint.name) == (1, "step_0000001.pt")
    assert (shapes / "longer.old-1" / "checkpoints" / "step_0000002.pt").is_file()


def test_a_resumed_run_remembers_its_best_ap(shapes: Path) -> None:
    """An epoch is 6 steps; no network of 12 scores what the checkpoint of the first says it scored."""
    words = ("evaluate.every_epoch=true", "train.checkpoint_period=100", "model.score_threshold=0.001")
    first = train.run(small_config(shapes, "best", "train.max_iters=6", *words), skip_test=True)
    assert read_checkpoint(first.checkpoint)["best_ap"] >= 0
    save_checkpoint(first.run_dir, first.step, {**read_checkpoint(first.checkpoint), "best_ap": 0.99})
    last = train.run(small_config(shapes, "best", "train.max_iters=12", *words), skip_test=True)
    assert last.step == 12
    assert find_checkpoint(first.run_dir, "best_checkpoint") == first.checkpoint
    assert read_checkpoint(last.checkpoint)["best_ap"] == 0.99


def test_an_epochs_evaluation_is_of_the_average_of_weights(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[dict[str, torch.Tensor]] = []

    def watched(model: MaskRCNN, config: Config) -> CocoEvaluation:
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate_model(model, config)

    monkeypatch.setattr(loop, "evaluate_model", watched)
    words = ("train.ema_decay=0.5", "evaluate.every_epoch=true", "train.max_iters=6", "train.lr_steps=[5]")
    state = read_checkpoint(train.run(small_config(shapes, "average_evaluated", *words), skip_test=True).checkpoint)
    (seen,) = evaluated
    assert all(torch.equal(seen[name], value) for name, value in state["average"].items())
    assert any(not torch.equal(state["model"][name], value) for name, value in state["average"].items())


def test_only_skips_in_a_row_end_a_run_and_they_are_counted_across_a_break(shapes: Path) -> None:
    config = small_config(shapes, "skips", "train.max_nonfinite_steps=2", "train.max_iters=20")
    console = Console(quiet=True)

    def step(number: int, *, skipped: bool, diverged: bool) -> Step:
        values = {"losses": {"mask": torch.tensor(float("nan"))}, "grad_norm": torch.tensor(0.0)}
        flags = {"skipped": torch.tensor(float(skipped)), "diverged": torch.tensor(float(diverged))}
        return Step(**values, **flags, number=number, image_ids=[5], learning_rate=0.1, data_s=0.0, step_s=1.0)

    def feed(run: loop.Training, *flags: tuple[bool, bool]) -> None:
        for skipped, diverged in flags:
            run.step += 1
            run.skips.add(step(run.step, skipped=skipped, diverged=diverged))

    good, scaling, bad = (False, False), (True, False), (True, True)
    run = loop.Training(config, torch.device("cpu"), console)
    feed(run, bad, good, bad, scaling, scaling, good, bad)
    run.save()  # which reads the last step too
    assert read_checkpoint(run.run_dir / "checkpoints" / "step_0000007.pt")["nonfinite_in_row"] == 1
    resumed = loop.Training(config, torch.device("cpu"), console)
    feed(resumed, bad)
    with pytest.raises(DivergedError, match=r"got 2 steps in a row.*step 8.*images \[5\].*weights are those of step 6"):
        resumed.save()
