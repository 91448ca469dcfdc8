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
from sra_fast.utils.registry import TARGETS

log = logging.getLogger("sra_fast")

# steps that a running median is of, and how many it needs to say anything
WINDOW = 200
ENOUGH = 20
# images that a message names, and skipped steps that one row of the log may bring lines about
SHOWN = 8
MOST_LINES = 5
# what is compared with its running median
NORMS = ("student_norm", "teacher_norm", "student_norm2", "teacher_norm2")
# the loss is watched as a whole; where a target's part of it may be negative, so that nothing can be
# said of its size, only the denoising loss
LOSSES = ("loss", "denoise")
WATCHED = (*LOSSES, *NORMS)


class RollBack(Exception):
    """Training goes back to the last checkpoint, and leaves out the images up to a step.

    Attributes:
        bad_step: 0-based optimizer step, the last one whose images are left out.
    """

    def __init__(self, bad_step: int):
        super().__init__(f"back to the last checkpoint, without the images up to step {bad_step}")
        self.bad_step = bad_step


class History:
    """The usual size of losses and feature norms: what they were in the last steps.

    It outlives a rollback and is read again when a run is resumed: a median that began anew would
    know nothing for some steps, and the next spike would pass.
    """

    def __init__(self):
        # name -> (0-based step, value)
        self.values: dict[str, deque[tuple[int, float]]] = {
            name: deque(maxlen=WINDOW) for name in WATCHED
        }

    def read(self, rows: list[dict]) -> None:
        """Take the rows of the log of an earlier part of the run, each for all of its steps."""
        before = 0
        for row in rows:
            steps = range(max(before, row["step"] - WINDOW), row["step"])
            before = row["step"]
            for name in WATCHED:
                value = row.get(name, math.nan)
                if math.isfinite(value):
                    self.values[name].extend((step, value) for step in steps)

    def forget(self, step: int) -> None:
        """Drop the values of a 0-based step and those after it."""
        for name, values in self.values.items():
            kept = [(at, value) for at, value in values if at < step]
            self.values[name] = deque(kept, maxlen=WINDOW)

    def usual(self, name: str) -> float | None:
        """The running median; None as long as it means nothing."""
        values = self.values[name]
        usual = median(value for _, value in values) if len(values) >= ENOUGH else 0.0
        return usual if usual > 0 else None


class StepWatch:
    """Looks at the steps of this process and says what is wrong with them.

    Args:
        cfg: configuration: ``train.on_nan``, ``skip_limit``, ``spike``, ``on_spike``.
        stream: which images are in which step.
        data: training set, which knows where an image lies.
        rank: of this process.
        shift: data positions that earlier rollbacks have left out.
        history: of the run so far.

    Attributes:
        flags: what all processes have to agree on: ``diverged`` (1: the run stops) and
            ``roll_back`` (the last bad step and one, 0: none).
        diverged: (updates skipped in a row, steps done) when that stopped the run.
    """

    def __init__(
        self,
        cfg: Config,
        stream: ShuffledBatches,
        data: TrainingData,
        rank: int,
        shift: int,
        history: History,
    ):
        self.train = cfg.train
        kinds = [TARGETS[align.target] for align in cfg.alignments.values()]
        self.loss = LOSSES[any(kind.may_be_negative for kind in kinds)]
        self.stream = stream
        self.data = data
        self.rank = rank
        self.shift = shift
        self.history = history
        # the last step with a spike, by name: one warning for spikes in one step after the other
        self.last_spike: dict[str, int] = {}
        self.in_a_row = 0
        self.diverged: tuple[int, int] | None = None
        self.flags = {"diverged": 0, "roll_back": 0}

    def look(self, tables: Iterable[Table]) -> None:
        """Look at the values of the steps that have arrived."""
        # (step, micro-step) -> the values of its names: steps with and without alignment come in
        # different tables
        found: dict[tuple[int, int], dict[str, float]] = {}
        for table in tables:
            for at, values in zip(table.at, table.values.tolist(), strict=True):
                found.setdefault(at, {}).update(zip(table.names, values, strict=True))
        skipped: list[int] = []
        losses: dict[int, list[tuple[int, float]]] = {}
        for (step, micro_step), values in sorted(found.items()):
            for name in (self.loss, *NORMS):
                if name in values:
                    self._compare(name, values[name], step, micro_step)
            if "loss" in values:
                losses.setdefault(step, []).append((micro_step, values["loss"]))
            if "skipped" in values:
                self.in_a_row = self.in_a_row + 1 if values["skipped"] else 0
                if values["skipped"]:
                    skipped.append(step)
                    self._decide(step)
        for step in skipped[:MOST_LINES]:
            self._say_skipped(step, losses.get(step, []))
        if len(skipped) > MOST_LINES and self.rank == 0:
            log.warning(
                "%d more updates were skipped up to step %d",
                len(skipped) - MOST_LINES,
                skipped[-1] + 1,
            )

    def _decide(self, step: int) -> None:
        """What follows an update that was skipped."""
        if self.train.on_nan == "rollback":
            # how often training goes back is limited elsewhere
            self._roll_back(step)
        elif self.train.on_nan == "stop" or self.in_a_row >= self.train.skip_limit:
            self.flags["diverged"] = 1
            self.diverged = self.diverged or (self.in_a_row, step + 1)

    def _roll_back(self, step: int) -> None:
        self.flags["roll_back"] = max(self.flags["roll_back"], step + 1)

    def _say_skipped(self, step: int, losses: list[tuple[int, float]]) -> None:
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

    def _compare(self, name: str, value: float, step: int, micro_step: int) -> None:
        """Warn of a value that is far beyond its running median."""
        # what is not finite is skipped, which is said elsewhere
        if not self.train.spike or not math.isfinite(value):
            return
        usual = self.history.usual(name)
        if usual is not None and value > self.train.spike * usual:
            if step - self.last_spike.get(name, -2) > 1:
                self._warn_of_spike(name, value, usual, step, micro_step)
            self.last_spike[name] = step
            if name == self.loss and self.train.on_spike == "rollback":
                self._roll_back(step)
        # spikes too: what stays high is the new normal
        self.history.values[name].append((step, value))

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
