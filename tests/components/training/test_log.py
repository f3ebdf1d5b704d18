"""Lines of the training log: medians of the last window, means of the whole run."""

import pytest
import torch

from components.training.log import SmoothedValue, TrainingLog
from model.engine.steps import Step


def test_a_value_is_the_median_of_its_window_and_the_mean_of_all():
    value = SmoothedValue(3)
    for one in (10.0, 2.0, 4.0, 3.0):
        value.update(one)
    assert (value.median, value.mean, str(value)) == (3.0, 4.75, "3.0000 (4.7500)")


def step(number: int, *, loss: float = 1.0, step_s: float = 2.0, skipped: bool = False) -> Step:
    values = {"a": torch.tensor(loss), "b": torch.tensor(2 * loss)}
    fields = {"losses": values, "grad_norm": torch.tensor(0.5), "skipped": torch.tensor(float(skipped))}
    fields |= {"diverged": torch.tensor(0.0)}
    return Step(**fields, number=number, image_ids=[], learning_rate=0.02, data_s=0.5, step_s=step_s)


def test_a_line_has_the_window_and_the_run_so_far_and_skipped_steps_have_no_loss():
    log, sent = TrainingLog(2, 10, 4), []
    log.add([step(1, loss=1.0), step(2, loss=100.0, skipped=True)], lambda metrics, number: sent.append(number))
    line = log.add([step(3, loss=2.0), step(4, loss=6.0, step_s=4.0)], lambda metrics, number: sent.append(metrics))
    start = "eta: 0:00:15  iter: 4  loss: 12.0000 (9.0000)  loss_a: 4.0000 (3.0000)  loss_b: 8.0000 (6.0000)"
    assert line.startswith(f"{start}  time: 3.0000 (2.5000)  data: 0.5000 (0.5000)  lr: 0.020000  max mem: ")
    assert sent[:2] == [1, 2]
    names = ("loss/a", "loss/b", "loss/total", "grad_norm", "skipped", "learning_rate", "time/step_s", "time/data_s")
    assert [sent[3][name] for name in names] == pytest.approx([6, 12, 18, 0.5, 0, 0.02, 4, 0.5])
    assert sent[3]["throughput/images_per_s"] == 1.0
    assert TrainingLog(2, 10, 4).eta_s(3) is None
