"""What all cases share: the data, the arguments, the uninterrupted runs, and the verdicts."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import children
import numpy as np
from children import Ended, Hook
from states import State, committed, final_state, not_finite

from sra_fast.data.packed import LABELS, file_entry, shard_name
from sra_fast.training import saver

STEPS = 9
EVERY = 3
# a case that was meant to be interrupted and was not has ended like an uninterrupted run
SURVIVED = "survived"
REFUSED = "refused"
SILENT = "silent"
LOST = "lost"
EXECUTED = "executed"
VERDICTS = (SURVIVED, REFUSED, SILENT, LOST, EXECUTED)
BAD = (SILENT, LOST, EXECUTED)


@dataclass(frozen=True)
class Setting:
    """How a run is split and computed."""

    world: int = 1
    stage: int = 1
    precision: str = "fp32"
    extra: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        more = "".join(self.extra).replace("--", "_").replace(".", "")
        return f"{self.world}x{self.precision}_zero{self.stage}{more}"


# every stage, one to three processes, both precisions; bf16 is slow on a CPU
SETTINGS = [
    Setting(1, 0),
    Setting(2, 1),
    Setting(1, 1, "bf16"),
    Setting(2, 2),
    Setting(2, 3),
    Setting(3, 1),
    Setting(2, 0),
    Setting(3, 3),
]


@dataclass(frozen=True)
class Verdict:
    """How a case has ended, and what a reader needs to believe it."""

    name: str
    detail: str = ""


@dataclass
class Bench:
    """A folder with what the cases need, made once.

    Attributes:
        root: the folder.
        seconds: how long the uninterrupted run of a setting takes.
    """

    root: Path
    seconds: dict[str, float] = field(default_factory=dict)
    _states: dict[str, State] = field(default_factory=dict)

    def __post_init__(self):
        self.data = self.root / "data"
        if not self.data.exists():
            write_data(self.data)

    def arguments(self, out: Path, setting: Setting, *more: str) -> list[str]:
        """Arguments of train.py for a run of 9 steps with a checkpoint every 3."""
        model = "--model.name SiT-S/2 --model.hidden_size 32 --model.depth 4 --model.num_heads 2"
        align = "--align.student_layer 2 --align.teacher_layer 3"
        run = f"--train.steps {STEPS} --train.save_every {EVERY} --train.global_batch 12"
        quiet = "--train.log_every 1 --train.loggers [] --train.export [] --data.num_workers 0"
        # the folder of the data differs, the data do not
        return [
            *f"{model} {align} {run} {quiet} --data.path {self.data} --train.out {out}".split(),
            *("--train.precision", setting.precision, "--train.zero_stage", str(setting.stage)),
            *setting.extra,
            *more,
        ]

    def prepare(self, setting: Setting) -> None:
        """Make the uninterrupted run of a setting, and one that dies after its second checkpoint.

        Raises:
            RuntimeError: one of them does not end as it should.
        """
        place = self.root / "references" / setting.key
        done = place / "seconds"
        if done.exists():
            self.seconds[setting.key] = float(done.read_text())
            return
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        begun = time.monotonic()
        ended = self.run(place / "whole", setting)
        if not ended.complete:
            raise RuntimeError(f"the uninterrupted run of {setting} fails:\n{ended.log}")
        self.seconds[setting.key] = time.monotonic() - begun
        hook = dies_at("latest_written", save=2, rank=0, together=True)
        ended = self.run(place / "killed", setting, hook=hook)
        killed = place / "killed/000"
        if set(ended.codes) != {-signal.SIGKILL} or committed(killed) != [EVERY, 2 * EVERY]:
            raise RuntimeError(f"{setting} was not killed after step {2 * EVERY}:\n{ended.log}")
        done.write_text(str(self.seconds[setting.key]))

    def reference(self, setting: Setting) -> State:
        """What the uninterrupted run of a setting has come to."""
        if setting.key not in self._states:
            run = self.root / "references" / setting.key / "whole/000"
            self._states[setting.key] = final_state(run)
        return self._states[setting.key]

    def whole(self, setting: Setting) -> Path:
        """Folder of the uninterrupted run."""
        return self.root / "references" / setting.key / "whole/000"

    def killed(self, setting: Setting, out: Path) -> Path:
        """A run in ``out`` that was killed when its checkpoints of steps 3 and 6 were whole."""
        shutil.copytree(self.root / "references" / setting.key / "killed", out)
        return out / "000"

    def run(
        self, out: Path, setting: Setting, *more: str, hook: Hook | None = None, meanwhile=None
    ):
        """Train; see ``children.run``."""
        arguments = self.arguments(out, setting, *more)
        log = out.parent / f"{out.name}.log"
        return children.run(arguments, setting.world, log, hook, meanwhile)

    def resume(self, out: Path, setting: Setting, *more: str, hook: Hook | None = None) -> Ended:
        return self.run(out, setting, "--train.resume", "auto", *more, hook=hook)

    def judge(
        self,
        out: Path,
        setting: Setting,
        at_least: int | None,
        may_refuse: tuple[str, ...] = (),
        undo: Callable[[], None] | None = None,
        marker: Path | None = None,
        at_least_then: int | None = None,
    ) -> Verdict:
        """Resume with `auto` and compare what comes out with the uninterrupted run.

        Args:
            out: where the run lies.
            setting: of it.
            at_least: the step that the run must resume at, or a later one; None: it may begin anew.
            may_refuse: names of files; a refusal that names one of them is right. Empty: the run
                must go on.
            undo: what takes the damage back, after which a refused run must go on.
            marker: made by code that must not run.
            at_least_then: the step to resume at after ``undo``; default: ``at_least``.
        """
        ended = self.resume(out, setting)
        if marker is not None and marker.exists():
            return Verdict(EXECUTED, tail(ended))
        if ended.hung:
            return Verdict(LOST, f"hangs; {tail(ended)}")
        if ended.complete:
            return self.compare(out, setting, ended, at_least)
        refused = one_line(ended)
        if refused is None:
            return Verdict(LOST, f"exit codes {ended.codes}; {tail(ended)}")
        if not any(name in refused for name in may_refuse):
            return Verdict(LOST, f"a person is needed: {refused}")
        if undo is not None:
            undo()
            again = self.judge(out, setting, at_least_then or at_least)
            if again.name != SURVIVED:
                return Verdict(again.name, f"after a refusal and its cause's end: {again.detail}")
        return Verdict(REFUSED, refused)

    def compare(self, out: Path, setting: Setting, ended: Ended, at_least: int | None) -> Verdict:
        """The verdict on a run that has ended with exit code 0."""
        resumed = ended.resumed_at
        if at_least is not None and (resumed is None or resumed < at_least):
            return Verdict(LOST, f"resumed at step {resumed}, step {at_least} was committed")
        run = newest_run(out)
        try:
            state = final_state(run)
        except ValueError as error:
            return Verdict(SILENT, f"exit code 0, and {error}")
        if state is None:
            return Verdict(SILENT, "exit code 0, and no checkpoint")
        different = state.difference(self.reference(setting))
        if different is None:
            different = not_finite(run)
        if different is not None:
            return Verdict(SILENT, f"exit code 0, resumed at {resumed}, differs: {different}")
        return Verdict(SURVIVED, f"resumed at {resumed}")


def newest_run(out: Path) -> Path:
    """The run folder of the highest number."""
    return max(path for path in out.iterdir() if path.name.isdigit())


def one_line(ended: Ended) -> str | None:
    """The line of a refusal; None if this is none: another exit code, a traceback, several lines."""
    if ended.code != 2 or "Traceback" in ended.log:
        return None
    said = {line.partition(": ")[2] for line in ended.errors()}
    return said.pop() if len(said) == 1 else None


def tail(ended: Ended) -> str:
    """The last words of a run."""
    return " | ".join(ended.lines()[-3:])[-400:]


def dies_at(phase: str, save: int, rank: int, together: bool = False) -> Hook:
    """SIGKILL for one rank, or for all, at a phase of its ``save``-th checkpoint."""

    def hook(own: int) -> None:
        seen = [0]

        def at_phase(name: str) -> None:
            if name == "copied":
                seen[0] += 1
            if own == rank and name == phase and seen[0] == save:
                kill_all() if together else os.kill(os.getpid(), signal.SIGKILL)

        saver.at_phase = at_phase

    return hook


def kill_all() -> None:
    """SIGKILL for all ranks at once, as at the end of a machine."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


def write_data(root: Path, seed: int = 0) -> None:
    """48 moments [8, 4, 4] in shards of 20, packed as `preprocess` packs them."""
    rng = np.random.default_rng(seed)
    (root / "shards").mkdir(parents=True)
    sizes = (20, 20, 8)
    for number, size in enumerate(sizes):
        moments = rng.standard_normal((size, 8, 4, 4), dtype=np.float32)
        moments[:, 4:] = abs(moments[:, 4:]) / 10
        # as wide as a model expects after the usual scale
        np.save(root / shard_name(number), moments / 0.18215)
    np.save(root / LABELS, np.arange(sum(sizes), dtype=np.int64) % 10)
    shards = [
        {**file_entry(root, shard_name(number)), "images": size}
        for number, size in enumerate(sizes)
    ]
    index = {
        **{"version": 2, "kind": "moments", "shape": [8, 4, 4], "dtype": "float32"},
        **{"num_images": sum(sizes), "num_classes": 10, "vae": None, "shard_size": 20},
        **{"shards": shards, "labels": file_entry(root, LABELS)},
    }
    (root / "index.json").write_text(json.dumps(index))
