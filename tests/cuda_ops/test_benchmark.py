import json
import re

import pytest
import torch

from cuda_ops import library
from cuda_ops.benchmark import Case, cases_of
from cuda_ops.benchmark.__main__ import main, measure

CPU = torch.device("cpu")
pytestmark = pytest.mark.parametrize("backend", ["reference"], indirect=True)  # the benchmark itself chooses


def test_contestants_take_turns_after_a_round_to_warm_up():
    calls: list[str] = []
    case = Case("case", lambda: calls.append("ours"), "other", lambda: calls.append("rival"))
    seconds = measure(case, CPU, repetitions=2)
    assert calls == ["ours", "ours", "rival"] * 3
    assert seconds.keys() == {"compiled", "reference", "rival"}
    assert all(value > 0 for value in seconds.values())


@pytest.mark.skipif(not library.HAS_CPU, reason="needs the compiled operators")
def test_one_operator_is_measured_by_its_name(capsys: pytest.CaptureFixture[str]):
    main(["box_iou", "--device", "cpu", "--repetitions", "1", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line).keys() == {"case", "rival_name", "compiled", "reference", "rival"}
    main(["box_iou", "--device", "cpu", "--repetitions", "1"])
    row = capsys.readouterr().out
    assert row.startswith("box_iou, 2,000 × 512 ")
    ours, reference, ratio = (float(number) for number in re.findall(r" ([\d.]+)(?: ms|×)", row)[:3])
    assert ours > 0
    assert ratio == pytest.approx(reference / ours, abs=0.1, rel=0.05)


def test_an_unknown_operator_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["iou"])
    assert capsys.readouterr().err.endswith(", got iou\n")


def test_torchvisions_proposals_are_those_of_all_levels_of_each_image():
    (case,) = cases_of("select_proposals", CPU)
    proposals = case.rival()
    assert isinstance(proposals, list)
    most = 4 * 2000 + 3 * 13 * 21  # the last level has fewer anchors than 2000; a few boxes are clipped to nothing
    assert all(most - 20 < len(boxes) <= most for boxes in proposals)
