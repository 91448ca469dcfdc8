"""What is wrong with single steps: updates that were skipped, losses and features that explode.

A row of the log brings the values of every step since the last one (``training/step_values.py``),
so all of this is noticed a row or two late, and costs the steps themselves nothing. Each process
looks at its own images.
"""

import logging
import math
from collections import deque
from collections.abc import Iterable
from statistics import median

import torch

from sra_fast.config.schema import Config
from sra_fast.data.order import ShuffledBatches
from sra_fast.data.training_data import TrainingData
from sra_fast.training.step_values import Table

log = logging.getLogger("sra_fast")

# steps that a running median is of, and how many it needs to say anything
WINDOW = 200
ENOUGH = 20
# images that a message names
SHOWN = 8
# what is compared with its running median
WATCHED = ("loss", "student_norm", "teacher_norm")


class RollBack(Exception):
    """Training goes back to the last checkpoint, and leaves out the images up to a step.

    Attributes:
        bad_step: 0-based optimizer step, the last one whose images are left out.
    """

    def __init__(self, bad_step: int):
        super().__init__(f"back to the last checkpoint, without the images up to step {bad_step}")
        self.bad_step = bad_step


class StepWatch:
    """Looks at the steps of this process and says what is wrong with them.

    Args:
        cfg: configuration: ``train.on_nan``, ``skip_limit``, ``spike``, ``on_spike``.
        stream: which images are in which step.
        data: training set, which knows where an image lies.
        rank: of this process.
        shift: data positions that earlier rollbacks have left out.

    Attributes:
        flags: what all processes have to agree on: ``diverged`` (1: the run stops) and
            ``roll_back`` (the last bad step and one, 0: none).
    """

    def __init__(
        self, cfg: Config, stream: ShuffledBatches, data: TrainingData, rank: int, shift: int = 0
    ):
        self.train = cfg.train
        self.stream = stream
        self.data = data
        self.rank = rank
        self.shift = shift
        self.history = {name: deque(maxlen=WINDOW) for name in WATCHED}
        # the last step with a spike, by name: one warning for spikes in one step after the other
        self.last_spike: dict[str, int] = {}
        self.in_a_row = 0
        # (updates skipped in a row, steps done) when that stopped the run
        self.diverged: tuple[int, int] | None = None
        self.flags = {"diverged": 0, "roll_back": 0}

    def look(self, tables: Iterable[Table]) -> None:
        """Look at the values of the steps that have arrived."""
        losses: dict[int, list[tuple[int, float]]] = {}
        skipped: dict[int, bool] = {}
        for table in tables:
            columns = dict(zip(table.names, table.values.T.tolist(), strict=True))
            for name in WATCHED:
                for (step, micro_step), value in zip(table.at, columns.get(name, ()), strict=False):
                    self._compare(name, value, step, micro_step)
                    if name == "loss":
                        losses.setdefault(step, []).append((micro_step, value))
            for (step, _), value in zip(table.at, columns.get("skipped", ()), strict=False):
                skipped[step] = value > 0
        for step in sorted(skipped):
            self._count(step, skipped[step], losses.get(step, []))

    def _count(self, step: int, skipped: bool, losses: list[tuple[int, float]]) -> None:
        """Take note of whether a step's update was skipped."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            return
        bad = [(micro_step, loss) for micro_step, loss in losses if not math.isfinite(loss)]
        for micro_step, loss in bad:
            log.warning(
                "step %d, rank %d: the loss is %s; %s",
                step + 1,
                self.rank,
                loss,
                self._not_finite(step, micro_step),
            )
        if self.rank == 0:
            where = "" if bad else f"; {self._images(step, 0)} and those of other processes"
            log.warning(
                "step %d: its update was skipped, the gradients are not finite%s", step + 1, where
            )
        if self.train.on_nan == "stop" or self.in_a_row >= self.train.skip_limit:
            self.flags["diverged"] = 1
            self.diverged = self.diverged or (self.in_a_row, step + 1)
        elif self.train.on_nan == "rollback":
            self.flags["roll_back"] = step + 1

    def _compare(self, name: str, value: float, step: int, micro_step: int) -> None:
        """Warn of a value that is far beyond its running median."""
        history = self.history[name]
        # what is not finite is skipped, which is said elsewhere
        if not self.train.spike or not math.isfinite(value):
            return
        usual = median(history) if len(history) >= ENOUGH else math.inf
        if value > self.train.spike * usual:
            if step - self.last_spike.get(name, -2) > 1:
                self._warn_of_spike(name, value, usual, step, micro_step)
            self.last_spike[name] = step
        # spikes too: what stays high is the new normal
        history.append(value)

    def _warn_of_spike(
        self, name: str, value: float, usual: float, step: int, micro_step: int
    ) -> None:
        log.warning(
            "step %d, rank %d: %s %.4g is %.0f times its running median %.4g; %s",
            step + 1,
            self.rank,
            name,
            value,
            value / usual,
            usual,
            self._images(step, micro_step),
        )
        if name == "loss" and self.train.on_spike == "rollback":
            self.flags["roll_back"] = step + 1

    def _numbers(self, step: int, micro_step: int) -> list[int]:
        return self.stream.numbers(step + self.shift, micro_step)

    def _images(self, step: int, micro_step: int) -> str:
        """The images of a micro-step of this process, the first few by name."""
        return self._named(self._numbers(step, micro_step))

    def _named(self, numbers: list[int]) -> str:
        more = len(numbers) - SHOWN
        text = ", ".join(self.data.locate(number) for number in numbers[:SHOWN])
        return f"{text} and {more} more" if more > 0 else text

    def _not_finite(self, step: int, micro_step: int) -> str:
        """Which images of a micro-step are not finite as they are stored; all, if none is."""
        numbers = self._numbers(step, micro_step)
        images, *_ = self.data.__getitems__(numbers)
        finite = torch.as_tensor(images).flatten(1).isfinite().all(1).tolist()
        bad = [number for number, fine in zip(numbers, finite, strict=True) if not fine]
        if bad:
            return f"not finite: {self._named(bad)}"
        return self._images(step, micro_step)
