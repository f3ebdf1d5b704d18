"""Steps skipped because losses or gradients were not finite: reported, counted, and too many in a row end a run."""

from rich.console import Console

from model.engine.late import LateValue
from model.engine.steps import Step
from model.errors import UserError


class DivergedError(UserError):
    """Losses or gradients were not finite for too many steps in a row."""


class SkippedSteps:
    """Count of skipped steps in a row. A step is read only after the next was started, so that the device never idles.

    Steps that float16's loss scale skips while it adapts neither count nor interrupt a row.
    """

    def __init__(self, at_most: int, console: Console) -> None:
        self.in_row = 0
        self._at_most, self._console = at_most, console
        self._unread: tuple[Step, LateValue] | None = None  # the last step, and whether it was skipped

    def add(self, step: Step) -> None:
        """Add a step that was started, and count the one before it.

        Raises:
            DivergedError: the one before it was the last that may be skipped.
        """
        unread, self._unread = self._unread, (step, LateValue(step.skipped))
        if unread is not None:
            self._count(*unread)

    def settle(self) -> None:
        """Wait for the last step, and count it.

        Raises:
            DivergedError: it was the last that may be skipped.
        """
        unread, self._unread = self._unread, None
        if unread is not None:
            self._count(*unread)

    def _count(self, step: Step, skipped: LateValue) -> None:
        if not skipped.item():
            self.in_row = 0
            return
        if not step.diverged.item():
            return
        self.in_row += 1
        values = {name: loss.item() for name, loss in step.losses.items()}
        details = f"step {step.number}: losses {values}, gradient norm {step.grad_norm.item()}, images {step.image_ids}"
        self._console.print(f"skipped, since not finite: {details}")
        if self.in_row >= self._at_most:
            raise DivergedError(
                f"training diverged: losses and gradients must be finite, got {self.in_row} steps in a row that are "
                f"not; last {details}. Lower train.base_lr, lengthen train.warmup_iters or set train.clip_grad_norm; "
                f"the weights are those of step {step.number - self.in_row}"
            )
