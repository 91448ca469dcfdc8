"""Where numbers and pictures of a run go besides ``stats.jsonl``: TensorBoard, wandb, a CSV file.

A logger registers itself in ``LOGGERS``; ``train.loggers`` names those that a run has. Rank 0 makes
them, and nothing that they get is on the device.
"""

import csv
import io
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sra_fast.config.schema import Config
from sra_fast.utils.files import plain, require, write_atomic, write_json
from sra_fast.utils.registry import LOGGERS
from sra_fast.utils.yaml_loader import write_config


def check_loggers(cfg: Config) -> None:
    """ValueError if ``train.loggers`` names one that does not exist or cannot work here."""
    for name in cfg.train.loggers:
        LOGGERS[name].check()


@dataclass(frozen=True)
class LoggedRun:
    """What a logger knows of its run when it opens.

    Attributes:
        folder: run folder.
        cfg: resolved configuration.
        start: optimizer steps already taken.
        rows: rows of ``stats.jsonl`` up to ``start``: what a resumed run has logged before.
    """

    folder: Path
    cfg: Config
    start: int
    rows: list[dict]


class RunLogger:
    """A place that numbers and pictures go to. What a logger does not override, it leaves out.

    It is made when training begins. A resumed run continues what is there, without the rows beyond
    the step that it resumes from.
    """

    @classmethod
    def check(cls) -> None:
        """ValueError if the logger cannot work here; called before GPU memory is used."""

    @classmethod
    def place(cls, folder: Path) -> str:
        """In words, where a user finds what it writes."""
        raise NotImplementedError

    def __init__(self, run: LoggedRun):
        pass

    def row(self, row: dict[str, float]) -> None:
        """Write a row of ``stats.jsonl``; its ``step`` is the number of optimizer steps taken."""

    def scores(self, scores: dict[str, float]) -> None:
        """Write scores of samples, a row of ``samples.jsonl``."""

    def picture(self, name: str, step: int, path: Path) -> None:
        """Show a PNG, such as a grid of samples, under a name."""

    def close(self) -> None:
        """Write what is pending."""


@LOGGERS.register("tensorboard")
class TensorBoard(RunLogger):
    """Events in ``tensorboard/``: scalars, pictures, and the configuration as text."""

    @classmethod
    def check(cls) -> None:
        require("tensorboard", "tensorboard", "train")

    @classmethod
    def place(cls, folder: Path) -> str:
        return f"tensorboard --logdir {folder}/tensorboard"

    def __init__(self, run: LoggedRun):
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.start + 1)
        text = write_config(plain(asdict(run.cfg)))
        # four spaces: TensorBoard reads Markdown, and this is its code
        code = "".join(f"    {line}\n" for line in text.splitlines())
        self.board.add_text("config", code, run.start)

    def row(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self.board.add_scalar(name, value, row["step"])

    def scores(self, scores: dict[str, float]) -> None:
        self.row(_below_samples(scores))

    def picture(self, name: str, step: int, path: Path) -> None:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        self.board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        self.board.close()


@LOGGERS.register("csv")
class Csv(RunLogger):
    """``stats.csv``: a line per row, a column per name, empty where a row has no such value."""

    @classmethod
    def place(cls, folder: Path) -> str:
        return "stats.csv"

    def __init__(self, run: LoggedRun):
        self.path = run.folder / "stats.csv"
        self.rows = list(run.rows)
        self.columns: list[str] = []
        self.file = None
        self._rewrite()

    def _rewrite(self) -> None:
        """Write all rows anew: at the start, and when a row brings a new column."""
        if self.file:
            self.file.close()
        # dict: in the order in which they appear
        self.columns = list(dict.fromkeys(["step", *(name for row in self.rows for name in row)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomic(self.path, lambda p: p.write_text(text.getvalue()))
        # open for the whole run
        self.file = open(self.path, "a", newline="")  # noqa: SIM115
        self.writer = csv.DictWriter(self.file, self.columns, lineterminator="\n")

    def row(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        if set(row) <= set(self.columns):
            self.writer.writerow(row)
            self.file.flush()
        else:
            self._rewrite()

    def close(self) -> None:
        self.file.close()


@LOGGERS.register("wandb")
class WeightsAndBiases(RunLogger):
    """A run of Weights & Biases; ``wandb.json`` in the run folder keeps its id.

    wandb's own variables apply: ``WANDB_MODE=offline``, ``WANDB_PROJECT`` (default ``sra-fast``),
    ``WANDB_ENTITY``. Steps that a resumed run takes again are in wandb twice, with equal values:
    its history cannot be cut.
    """

    @classmethod
    def check(cls) -> None:
        require("wandb", "wandb", "wandb")
        # rank 0 makes the logger: other machines need no login
        if int(os.environ.get("RANK", 0)) == 0:
            _check_login()

    @classmethod
    def place(cls, folder: Path) -> str:
        return "wandb"

    def __init__(self, run: LoggedRun):
        import wandb

        self.wandb = wandb
        file = run.folder / "wandb.json"
        if not file.exists():
            write_json(file, {"id": uuid.uuid4().hex[:12]})
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "sra-fast"),
                id=json.loads(file.read_text())["id"],
                resume="allow",
                name="/".join(run.folder.parts[-2:]),
                dir=str(run.folder),
                config=asdict(run.cfg),
                # it would replace stdout, and the summary is read from there
                settings=wandb.Settings(console="off"),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"train.loggers: wandb did not start ({error}); expected a login (`wandb login`), "
                "or WANDB_MODE=offline"
            ) from None
        # our own step: wandb drops values of a step that it has had, and a resumed run repeats some
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def row(self, row: dict[str, float]) -> None:
        self.run.log(dict(row))

    def scores(self, scores: dict[str, float]) -> None:
        self.row(_below_samples(scores))

    def picture(self, name: str, step: int, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path)), "step": step})

    def close(self) -> None:
        self.run.finish()


def _check_login() -> None:
    """ValueError if wandb's variables are wrong, or it would log in and has no key."""
    import wandb

    try:
        mode = wandb.setup().settings.mode
        # what it takes the mode from, or else online
        ready = mode in ("offline", "dryrun", "disabled") or wandb.login(prompt=False)
    # an invalid variable is a ValueError of several lines, a malformed key is wandb's own error
    except (ValueError, wandb.errors.Error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"train.loggers: wandb did not start ({reason})") from None
    if not ready:
        raise ValueError(
            "train.loggers: wandb has no API key; expected a login (`wandb login`), "
            "or WANDB_MODE=offline"
        )


def _below_samples(scores: dict[str, float]) -> dict[str, float]:
    """Scores under the names ``samples/NAME``, apart from those of training."""
    named = {f"samples/{name}": value for name, value in scores.items() if name != "step"}
    return {"step": scores["step"], **named}
