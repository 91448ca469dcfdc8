"""What ends or interrupts training: agreed by all processes, at the same step, without a device
sync.
"""

import logging
import time

from sra_fast.config.schema import Config
from sra_fast.training.agreement import Agreement
from sra_fast.training.endings import Diverged
from sra_fast.training.saver import Saver
from sra_fast.training.signals import Stopped, StopSignals
from sra_fast.training.step_watch import RollBack, StepWatch
from sra_fast.training.trainer import Trainer

log = logging.getLogger("sra_fast")

# what the processes tell each other
FLAGS = ("stop", "save", "failed", "diverged", "roll_back")


class Control:
    """Decides after every step whether training stops, goes back, or writes a checkpoint.

    Args:
        trainer: of the run.
        saver: writes the checkpoints.
        watch: looks at single steps.
        stop: open signals that end the run early; None: nothing does.

    Making one is collective.

    Attributes:
        asked: code of the signal that ends the run after this step; 0: it goes on.
        due: a checkpoint is due.
    """

    def __init__(self, trainer: Trainer, saver: Saver, watch: StepWatch, stop: StopSignals | None):
        self.cfg: Config = trainer.cfg
        self.trainer = trainer
        self.saver = saver
        self.watch = watch
        self.stop = stop
        self.agreement = Agreement(FLAGS)
        self.saved_at = time.monotonic()
        self.asked = 0
        self.due = False

    def __enter__(self) -> "Control":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error) -> None:
        # these end the training of all processes: the save that has begun is finished. After any
        # other error one of them may be gone, and the saver knows how long to wait
        if kind is None or issubclass(kind, (RollBack, Stopped)):
            self.saver.wait()
        self.agreement.close()

    def after_step(self, done: int) -> None:
        """Called by every process after ``done`` steps.

        Raises:
            FloatingPointError: too many updates were skipped in a row.
            RollBack: training has to go back.
            Exception: what a save has failed with.
        """
        self.agreement.tell(**self._flags())
        decided = self.agreement.step(done)
        if decided is not None:
            self._act(decided, done)
        train = self.cfg.train
        if done % train.save_every == 0 or done == train.steps:
            self.due = True

    def agree_now(self, done: int) -> None:
        """Act on what any process has noticed up to this step; collective, and waits for all.

        Raises:
            As ``after_step``.
        """
        self.agreement.tell(**self._flags())
        self._act(self.agreement.now(), done)

    def _flags(self) -> dict[str, int]:
        """What this process has to say, zero for nothing."""
        minutes = self.cfg.train.save_minutes
        late = minutes and time.monotonic() - self.saved_at > 60 * minutes
        return {
            "stop": self.stop.code if self.stop is not None else 0,
            # one clock is enough
            "save": int(bool(late) and self.trainer.rank == 0),
            "failed": int(self.saver.error is not None),
            **self.watch.flags,
        }

    def _act(self, decided: dict[str, int], done: int) -> None:
        """Act on what all processes have agreed on."""
        if decided["failed"]:
            self._raise_error(done)
        if decided["diverged"]:
            raise self.diverged(done)
        if decided["roll_back"]:
            raise RollBack(decided["roll_back"] - 1)
        # a run that is through ends by itself
        if decided["stop"] and done < self.cfg.train.steps:
            self.asked = decided["stop"]
            self.due = True
        if decided["save"]:
            self.due = True

    def _raise_error(self, done: int) -> None:
        """Raise what the last save has failed with; weights that are not finite may be left
        behind.
        """
        self.saver.wait()
        error = self.saver.error
        assert error is not None
        if isinstance(error, FloatingPointError) and self.cfg.train.on_nan == "rollback":
            log.warning("%s", error)
            self.saver.error = None
            raise RollBack(done - 1)
        raise error

    @property
    def taken(self) -> int:
        """Updates taken since training began, in earlier runs too; waits for the device."""
        return int(self.trainer.guard.counts[0])

    @property
    def skipped_in_a_row(self) -> int:
        """Updates skipped since the last that was taken, the same on every process; waits for the
        device.
        """
        return int(self.trainer.guard.counts[2])

    def is_last(self, done: int) -> bool:
        """Whether training ends after this step."""
        return bool(self.asked) or done == self.cfg.train.steps

    def saved(self) -> None:
        """A checkpoint has been begun."""
        self.due = False
        self.saved_at = time.monotonic()

    def finish(self, done: int) -> None:
        """Wait for the last save.

        Raises:
            Exception: what it has failed with.
        """
        self.saver.wait()
        if self.saver.error is not None:
            self._raise_error(done)

    def diverged(self, done: int) -> Diverged:
        """The error of a run whose gradients do not become finite again.

        All processes raise it, so the save that has begun is finished first: it may be the checkpoint
        to resume.
        """
        self.saver.wait()
        step = self.saver.parent
        if step is None:
            stands = "there is no checkpoint yet: begin anew with"
        else:
            stands = f"the checkpoint of step {step} is whole: resume it with"
        # noticed a row or two late: other updates may have been taken since
        skipped, up_to = self.watch.diverged or (self.skipped_in_a_row, done)
        updates = "1 update was" if skipped == 1 else f"{skipped} updates in a row were"
        return Diverged(
            f"gradients not finite: {updates} skipped up to step {up_to}; {stands} a smaller "
            "optim.lr or align.weight, unless the lines above blame images"
        )
