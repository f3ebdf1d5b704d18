"""The benchmark on networks so small that a step takes a blink; what it compares must be the same work."""

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from components import benchmark
from components.benchmarks import phases, scaling, steps
from components.benchmarks.case import NUM_CLASSES, Case, Measurement
from components.benchmarks.memory import PeakMemory
from components.benchmarks.network_steps import build_steps, network_steps
from components.benchmarks.process import BenchmarkError, in_fresh_process
from components.benchmarks.run_case import measure, take_turns
from components.benchmarks.twin import has_twin, torchvision_images, torchvision_targets, torchvision_twin
from components.benchmarks.workload import calibrate
from components.config import BenchmarkConfig, Config
from components.params import ConfigError, save_config
from model.config import DataConfig, ModelConfig, TrainConfig
from model.engine.graphs import WARMUP_STEPS
from model.network.mask_rcnn import MaskRCNN

CPU = torch.device("cpu")
FEW = {"roi_batch_size": 8, "rpn_post_nms_top_n_test": 8}  # RoIs of an image, where each is expensive


def small_model(**changes: object) -> ModelConfig:
    values = {
        "backbone": "resnet18",
        "weights": "none",
        "norm": "batch_norm",
        "fpn_channels": 32,
        "box_head_channels": 64,
        "mask_head_channels": 32,
        "rpn_post_nms_top_n_train": 300,
        "rpn_post_nms_top_n_test": 100,
        "roi_batch_size": 64,
    }
    return ModelConfig.model_validate(values | changes)


def small_case(**changes: object) -> Case:
    values = {
        "mode": "train",
        "networks": ("ours",),
        "dtype": "float32",
        "batch": 2,
        "height": 96,
        "width": 150,
        "warmup": 0,
        "steps": 2,
        "device": "cpu",
        "model": small_model(),
    }
    return Case.model_validate(values | changes)


def small_config(folder: Path) -> Config:
    return Config(
        data=DataConfig(
            min_sizes_px=(64,), max_size_px=96, eval_min_size_px=64, eval_max_size_px=96, buckets=((64, 96), (96, 64))
        ),
        model=small_model(),
        train=TrainConfig(output_dir=folder / "run", device="cpu"),
        benchmark=BenchmarkConfig(steps=3, warmup=1),
    ).model_copy(update={"tracking": Config().tracking.model_copy(update={"uri": f"sqlite:///{folder}/mlflow.db"})})


@pytest.mark.parametrize("norm", ["batch_norm", "frozen_batch_norm", "group_norm"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_twin_takes_our_weights_and_learns_the_same_layers(backbone: str, norm: str) -> None:
    config = small_model(backbone=backbone, norm=norm, freeze_stages=2)
    ours = MaskRCNN(config, NUM_CLASSES)
    twin = torchvision_twin(config, NUM_CLASSES)
    twin.load_state_dict(ours.state_dict())
    assert learnt(twin) == learnt(ours)


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "box"},
        {"box_head": "conv", "box_head_convs": 2, "norm": "group_norm", "box_head_conv_channels": 32},
        {"box_head": "conv", "box_head_convs": 1},
        {"box_head": "conv", "box_head_convs": 1, "head_norm": "sync_batch_norm", "rpn_convs": 2},
        {"mask_head_convs": 0},
    ],
)
def test_the_family_with_a_pyramid_has_a_twin(changes: dict[str, object]) -> None:
    config = small_model(**changes)
    ours, twin = MaskRCNN(config, NUM_CLASSES), torchvision_twin(config, NUM_CLASSES)
    differing = twin.load_state_dict(ours.state_dict())
    assert not differing.missing_keys
    assert not differing.unexpected_keys
    assert learnt(twin) == learnt(ours)


def test_bodies_that_are_no_resnets_have_no_twin() -> None:
    assert has_twin(small_model())
    assert not has_twin(small_model(backbone="swin_t"))
    assert not has_twin(small_model(stem_channels=32)), "torchvision has resnet18 in one width"


@pytest.mark.parametrize(
    "changes",
    [
        {"features": "c4", "box_head": "res5", "box_pool_size": 4, "mask_pool_size": 4, "mask_head_convs": 0, **FEW},
        {"task": "proposals"},
    ],
)
def test_what_torchvision_cannot_build_is_timed_alone(
    tmp_path: Path, changes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(tmp_path).model_copy(update={"model": small_model(**changes)})
    assert {case.networks for case in steps.plan(config)} == {("ours",)}
    assert "torchvision has no equivalent network" in caplog.text
    for mode in ("train", "inference"):
        measured = measure(small_case(mode=mode, model=config.model, steps=1))
        assert len(measured.step_s["ours"]) == 1
    report = phases.measure(config)
    assert sum(report["phases"].values()) == pytest.approx(report["step_s"], rel=0.5)
    assert ("box head" in report["phases"]) == (config.model.task != "proposals")


def learnt(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_twin_detects_the_same_in_about_as_many_candidates_as_a_trained_network_has() -> None:
    model = small_model(conventions="torchvision")
    case = small_case(mode="inference", width=160, model=model)  # no padding, so that both see the same frame
    ours = MaskRCNN(case.model, NUM_CLASSES)
    batch = calibrate(ours, case, CPU)
    twin = torchvision_twin(case.model, NUM_CLASSES)
    twin.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        detections = ours.eval()(batch)
        theirs = twin.eval()(torchvision_images(batch))
    for n, found in enumerate(theirs):
        count = int(detections.num_detections[n])
        assert count == len(found["scores"]) > 20
        torch.testing.assert_close(detections.scores[n, :count], found["scores"], atol=1e-4, rtol=0)


def test_training_has_positives_to_learn_from() -> None:
    case = small_case()
    model = MaskRCNN(case.model, NUM_CLASSES)
    batch = calibrate(model, case, CPU)
    assert batch.targets is not None
    assert batch.targets.num_gt.tolist() == [7, 7]
    with torch.no_grad():
        features = model.backbone(model.normalize(batch))
        proposals, _ = model.rpn(features, batch)
        rois = model.roi_heads.sample(proposals, batch.targets, batch.seeds)
    positives = (rois.labels > 0).sum(1)
    assert (positives >= 14).all(), "seven are the ground truth itself; proposals must be among them too"


def test_masks_for_torchvision_fill_the_boxes_of_the_outlines() -> None:
    case = small_case()
    batch = calibrate(MaskRCNN(case.model, NUM_CLASSES), case, CPU)
    images, targets = torchvision_images(batch), torchvision_targets(batch)
    assert [tuple(image.shape) for image in images] == [(3, 96, 150)] * 2
    for target in targets:
        assert target["masks"].shape == (7, 96, 150)
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            rows, columns = mask.nonzero().T
            extent = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (extent - box).abs().max() <= 3


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_all_networks_are_stepped_and_timed(mode: str) -> None:
    measured = measure(
        small_case(mode=mode, networks=("ours", "torchvision", "torchvision NHWC"), warmup=1, steps=2, steps_per_wait=2)
    )
    counts = {name: len(times) for name, times in measured.step_s.items()}
    assert counts == {"ours": 2, "torchvision": 2, "torchvision NHWC": 2}
    assert all(time_s > 0 for times in measured.step_s.values() for time_s in times)


def test_bfloat16_runs_in_bfloat16() -> None:
    kinds: set[torch.dtype] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if "conv" in str(func):
                kinds.add(result.dtype)
            return result

    with Watch():
        measure(small_case(mode="inference", dtype="bfloat16", steps=1))
    assert torch.bfloat16 in kinds


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux, from whose /proc resident memory is read"
)
def test_peak_memory_sees_what_was_freed_again_but_not_what_came_before() -> None:
    def peaks() -> tuple[float, float, float]:
        memory = PeakMemory(CPU)
        torch.ones(64, 2**20).sum()  # 256 MiB, freed at once
        first = memory.peak_mib()
        memory.forget_peak()
        forgotten = memory.peak_mib()
        torch.ones(32, 2**20).sum()
        last = memory.peak_mib()
        return first or 0.0, forgotten or 0.0, last or 0.0

    def is_right(first: float, forgotten: float, last: float) -> bool:
        return first > 200 and forgotten < 100 and 100 < last < 200

    seen = [peaks()]
    while (
        not is_right(*seen[-1]) and len(seen) < 5
    ):  # the system may take back pages of files, resident ones, meanwhile
        seen.append(peaks())
    assert is_right(*seen[-1]), seen


def test_detection_is_timed_without_cudnns_search_as_users_run_it() -> None:
    searches: dict[str, set[bool]] = {"inference": set(), "train": set()}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            searches[mode].add(torch.backends.cudnn.benchmark)
            return func(*args, **(kwargs or {}))

    for mode in searches:
        (step,) = build_steps(small_case(mode=mode), CPU).values()
        with Watch():
            step()
    assert searches == {"inference": {False}, "train": {True}}


def test_determinism_is_priced_in_our_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, torchvision's RoIAlign would refuse it."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    config = small_config(Path())
    settings = config.model_copy(update={"train": config.train.model_copy(update={"deterministic": True})})
    assert [case.deterministic for case in (steps.plan(config)[0], steps.plan(settings)[0])] == [False, True]
    seen: dict[str, set[tuple[bool, bool]]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            state = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
            seen.setdefault(name, set()).add(state)
            return func(*args, **(kwargs or {}))

    try:
        callables = build_steps(small_case(networks=("ours", "torchvision"), deterministic=True), CPU)
        for name in ("ours", "torchvision", "ours"):
            with Watch():
                callables[name]()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == {"ours": {(True, False)}, "torchvision": {(False, True)}}


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux, from whose /proc resident memory is read"
)
def test_memory_of_the_warm_up_does_not_count() -> None:
    sizes = iter([768, 768, 256, 4])  # MiB of each step

    def step() -> None:
        torch.ones(next(sizes), 2**18).sum()

    case = small_case(networks=("ours",), warmup=2, steps=2)
    peak_mib = take_turns({"ours": step}, case, CPU, PeakMemory(CPU)).peak_memory_mib
    assert peak_mib is not None
    assert 128 < peak_mib < 512


def test_figures_reach_the_report_mlflow_and_the_terminal(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path)
    save_config(small_config(tmp_path), tmp_path / "params.yaml")
    benchmark.main(["train", "benchmark.batch_sizes=[1]", "benchmark.torchvision=false", "train.deterministic=true"])
    report = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    (ours,) = report["steps"]["cases"]
    assert (ours["model"], ours["mode"], ours["batch"], ours["height"], ours["width"]) == ("ours", "train", 1, 64, 96)
    assert 0 < ours["step_s"]["median"] <= ours["step_s"]["p90"] <= ours["step_s"]["p99"]
    assert ours["images_per_s"] == pytest.approx(1 / ours["step_s"]["median"])
    assert ours["ratio_to_torchvision"] is None
    assert [ours[name] for name in ("compile", "cuda_graph", "deterministic")] == [False, False, True]
    assert ours["peak_memory_mib"] > 5
    shown = {"train": {name: ours[name] for name in ("images_per_s", "peak_memory_mib")}}
    assert json.loads((tmp_path / "run" / "speed.json").read_text()) == shown
    assert report["hardware"]["cores"] >= 1
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        metrics = dict(database.execute("select key, value from latest_metrics").fetchall())
    assert metrics["throughput/train_float32_batch1_images_per_s"] == ours["images_per_s"]
    assert metrics["memory/train_float32_batch1_peak_mib"] == ours["peak_memory_mib"]
    assert [name for name in metrics if name.startswith("throughput/")] == [
        "throughput/train_float32_batch1_images_per_s"
    ]
    assert "train float32 ×1" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "channels_last"), [("torchvision", False), ("torchvision NHWC", True)])
def test_torchvisions_convolutions_run_in_either_memory_format(name: str, channels_last: bool) -> None:
    case = small_case(networks=(name,))
    ours = MaskRCNN(case.model, NUM_CLASSES).to_device(CPU)
    step = network_steps(case, ours, calibrate(ours, case, CPU))[name]
    layouts: set[bool] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.convolution.default and args[1].shape[2] > 1 and len(result):
                layouts.add(result.is_contiguous(memory_format=torch.channels_last))
            return result

    with Watch():
        step()
    assert layouts == {channels_last}


def test_ratios_are_to_the_faster_of_torchvisions_memory_formats() -> None:
    def row(median_s: float, memory_mib: float | None) -> dict[str, object]:
        return {"step_s": {"median": median_s}, "peak_memory_mib": memory_mib}

    assert steps.plan(small_config(Path()))[0].networks == ("ours", "torchvision", "torchvision NHWC")
    rows = [row(0.3, 100.0), row(0.6, 400.0), row(0.5, 200.0)]
    first = steps.ratios(rows[0], rows[1])
    assert first == {"ratio_to_torchvision": 0.5, "memory_ratio_to_torchvision": 0.25}
    assert steps.with_ratios(rows)[0] == rows[0] | {
        "ratio_to_torchvision": 0.6,
        "memory_ratio_to_torchvision": 0.5,
    }
    assert steps.with_ratios(rows[:1])[0]["ratio_to_torchvision"] is None


def test_graphed_steps_are_timed_after_their_capture() -> None:
    config = small_config(Path())
    graphed = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": True})})
    assert {case.warmup for case in steps.plan(config)} == {1}
    assert {case.warmup for case in steps.plan(graphed)} == {WARMUP_STEPS + 1}


def test_memory_of_graphed_steps_is_taken_after_a_replay() -> None:
    graphed, plain = small_case(cuda_graph=True), small_case()
    of_graph = steps.alone(graphed, "ours")
    assert (of_graph.warmup, of_graph.steps) == (WARMUP_STEPS + 1, 1)
    for case in (steps.alone(graphed, "torchvision"), steps.alone(plain, "ours")):
        assert (case.warmup, case.steps) == (0, 2)


@pytest.mark.slow
def test_ratios_are_ours_over_torchvisions() -> None:
    ours, theirs = steps.measure_case(small_case(networks=("ours", "torchvision"), batch=1))
    assert (ours["model"], theirs["model"]) == ("ours", "torchvision")
    assert ours["ratio_to_torchvision"] == pytest.approx(ours["step_s"]["median"] / theirs["step_s"]["median"])
    assert ours["memory_ratio_to_torchvision"] == pytest.approx(ours["peak_memory_mib"] / theirs["peak_memory_mib"])


def test_plan_is_every_combination() -> None:
    config = small_config(Path())
    many = BenchmarkConfig(batch_sizes=(1, 2), dtypes=("float32", "bfloat16"), height_px=64, torchvision=False)
    cases = steps.plan(config.model_copy(update={"benchmark": many}))
    assert len(cases) == 2 * 2 * 2
    assert {(case.height, case.width, case.networks) for case in cases} == {(64, 96, ("ours",))}


def test_phases_of_float32_are_not_those_of_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have been set to use TF32, or to repeat every bit."""
    products = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [each.fp32_precision for each in products]
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        for each in products:
            each.fp32_precision = "tf32"
        phases.measure(small_config(tmp_path))
        assert [each.fp32_precision for each in products] == ["ieee", "ieee"]
        assert torch.backends.cudnn.benchmark
    finally:
        for each, precision in zip(products, before, strict=True):
            each.fp32_precision = precision


def test_phases_make_up_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = phases.measure(small_config(tmp_path))
    assert capsys.readouterr().out == "", "the caller prints the table"
    assert set(report["phases"]) >= {"body", "fpn", "rpn", "box head", "mask head", "backward", "optimizer"}
    assert all(seconds > 0 for name, seconds in report["phases"].items() if name != "rest")
    # Medians of parts need not add up to the median of the whole, but nearly do.
    assert sum(report["phases"].values()) == pytest.approx(report["step_s"], rel=0.3)
    assert phases.table(report).row_count == len(report["phases"]) + 2


def test_the_floor_counts_the_products_of_forward_and_backward() -> None:
    """Of a network whose every layer learns, backward has twice the products of forward, less the gradient of the
    image.
    """
    case = small_case(model=small_model(freeze_stages=0))
    model = MaskRCNN(case.model, NUM_CLASSES)
    batch = calibrate(model, case, CPU)
    with FlopCounterMode(display=False) as forward:
        losses = model.train()(batch)
    with FlopCounterMode(display=False) as backward:
        sum(losses.values()).backward()
    assert 1.5 < backward.get_total_flops() / forward.get_total_flops() < 2.0


def test_scaling_compares_processes_with_one(
    tmp_path: Path, start_ranks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process is forked with torch loaded; two are started as ever, with torchrun."""

    def forked_if_alone(case: Case, *, threads: int) -> Measurement:
        if case.processes > 1:
            return in_fresh_process(case, threads=threads)
        ranks = start_ranks(1, "benchmarks.run_case", case.model_dump_json(), threads=threads)
        assert ranks.wait() == [0], ranks.output()
        return Measurement.model_validate_json(ranks.output().splitlines()[-1])

    monkeypatch.setattr(scaling, "in_fresh_process", forked_if_alone)
    config = small_config(tmp_path)
    config = config.model_copy(update={"benchmark": config.benchmark.model_copy(update={"steps": 1, "warmup": 0})})
    report = scaling.measure(config)
    for kind, batches in (("weak", [2, 2]), ("strong", [4, 2])):
        one, two = report[kind]
        assert (one["processes"], two["processes"]) == (1, 2)
        assert [one["batch_per_process"], two["batch_per_process"]] == batches
        assert one["efficiency"] == 1
        assert two["speedup"] == pytest.approx(two["images_per_s"] / one["images_per_s"])
    assert report["weak"][1]["step_s"] == report["strong"][1]["step_s"], "the same measurement"
    assert report["weak"][0]["step_s"] != report["strong"][0]["step_s"], "another batch, measured on its own"
    assert scaling.metrics(report)["throughput/weak_scaling_2_images_per_s"] == report["weak"][1]["images_per_s"]
    assert scaling.table(report).row_count == 4


def test_numbers_of_processes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    config = small_config(tmp_path).model_copy(update={"benchmark": BenchmarkConfig(processes=(2, 3))})
    with pytest.raises(ConfigError, match=r"benchmark\.processes: each must divide the largest, 3, got 2"):
        scaling.measure(config)


def test_word_that_is_no_mode_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_config(small_config(tmp_path), tmp_path / "params.yaml")
    with pytest.raises(SystemExit) as end:
        benchmark.main(["training"])
    assert end.value.code == 2
    assert "any of train, inference, phases, scaling, loader, evaluator" in capsys.readouterr().err


def test_failure_of_a_case_has_its_reason() -> None:
    with pytest.raises(BenchmarkError, match="no_such_device"):
        in_fresh_process(small_case(device="no_such_device", processes=2))
