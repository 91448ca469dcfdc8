"""Says which process of a run stalls, and where.

When one process hangs, all others wait for it in a collective operation, and nothing tells which one
it is. Every process therefore notes where it is, a thread tells the others through the store of the
process group, and after some minutes without a step one line names the process that does not follow.
"""

import json
import logging
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

log = logging.getLogger("sra_fast")

# seconds between two looks; a process that was not heard of for some of them is silent
PERIOD = 5.0
SILENT_PERIODS = 4
PREFIX = "watchdog"


@dataclass(frozen=True)
class Place:
    """Where a process is: the ``count``-th phase of a step."""

    step: int = 0
    count: int = 0
    phase: str = "start"

    def __str__(self) -> str:
        return f"step {self.step}, phase {self.phase}"


@dataclass
class Heard:
    """What this process knows of another one, in seconds of its own clock."""

    place: Place
    beat: int
    at: float


class Watchdog:
    """Watches the steps of all processes, as long as the context is open.

    The training loop calls ``at``, which assigns one attribute. A thread sends this process's place
    every few seconds and reads those of the others; if the store does not answer it waits, and the
    loop does not. Rank 0 speaks, or the lowest rank that is heard of. Making one is not collective.

    Args:
        minutes: without a step anywhere, after which a line is logged; then after twice as long, and
            so on. 0: never, and no thread is started.
        rank, world: this process and their number; default: those of the process group.
        period: seconds between two looks.
    """

    def __init__(
        self,
        minutes: float,
        rank: int | None = None,
        world: int | None = None,
        period: float = PERIOD,
    ):
        self.minutes = minutes
        self.rank = dist.get_rank() if rank is None else rank
        self.world = dist.get_world_size() if world is None else world
        # a stall of seconds, as in a test, needs more looks
        self.period = min(period, minutes * 60 / (2 * SILENT_PERIODS)) if minutes else period
        self._place = Place()
        self._heard: dict[int, Heard] = {}
        self._began = time.monotonic()
        # when the store last answered
        self._answered = self._began
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    def at(self, step: int, phase: str) -> None:
        """This process begins ``phase`` of the optimizer step ``step``: all ranks the same phases."""
        place = self._place
        count = place.count + 1 if step == place.step else 0
        self._place = Place(step, count, phase)

    def __enter__(self) -> "Watchdog":
        if self.minutes:
            # two threads: a store that does not answer must not keep the other one from speaking
            targets = [self._judge]
            if self.world > 1:
                self._store = _own_store()
                targets.append(self._talk)
            for target in targets:
                thread = threading.Thread(target=target, name="watchdog", daemon=True)
                thread.start()
                self._threads.append(thread)
        return self

    def __exit__(self, *error) -> None:
        self._closing.set()
        for thread in self._threads:
            # a thread that is stuck in a call of the store does not keep the run from ending
            thread.join(2.0)

    def _talk(self) -> None:
        """Send this process's place and read the others', until the store is gone."""
        beat = 0
        try:
            while not self._closing.wait(self.period if beat else 0):
                beat += 1
                place = self._place
                told = json.dumps([beat, place.step, place.count, place.phase])
                self._store.set(str(self.rank), told)
                for rank in self._watched():
                    self._listen(rank)
                self._answered = time.monotonic()
        except Exception:
            # the process that holds the store has ended: the training notices that itself
            return

    def _watched(self) -> list[int]:
        """The ranks that this one reads: all for the one that speaks, else rank 0 only."""
        if self.rank and not self._is_silent(0):
            return [0]
        return [rank for rank in range(self.world) if rank != self.rank]

    def _listen(self, rank: int) -> None:
        if not self._store.check([str(rank)]):
            return
        beat, step, count, phase = json.loads(self._store.get(str(rank)))
        known = self._heard.get(rank)
        if known is None or known.beat != beat:
            self._heard[rank] = Heard(Place(step, count, phase), beat, time.monotonic())

    def _is_silent(self, rank: int) -> bool:
        known = self._heard.get(rank)
        since = self._began if known is None else known.at
        return time.monotonic() - since > SILENT_PERIODS * self.period

    def _judge(self) -> None:
        """Notice that no step is taken, and say so at doubling intervals."""
        steps = {}
        changed = self._began
        next_line = self.minutes * 60
        while not self._closing.wait(self.period):
            now = time.monotonic()
            places = {rank: known.place for rank, known in dict(self._heard).items()}
            places[self.rank] = self._place
            # of ranks that were known before: to hear of another one is no progress
            seen = {rank: place.step for rank, place in places.items()}
            if any(seen[rank] != step for rank, step in steps.items()):
                changed = now
                next_line = self.minutes * 60
            steps = seen
            if now - changed >= next_line:
                next_line *= 2
                silent = self._silent()
                if all(rank in silent for rank in range(self.rank)):
                    log.warning(stall_line(now - changed, places, silent))

    def _silent(self) -> set[int]:
        """The ranks of those that this one reads that are not heard of.

        If the store does not answer, the process that holds it does not, which is rank 0.
        """
        if self.world == 1:
            return set()
        if time.monotonic() - self._answered > SILENT_PERIODS * self.period:
            return {0} if self.rank else set()
        return {rank for rank in self._watched() if self._is_silent(rank)}


def _own_store() -> dist.Store:
    """The process group's store through a connection of its own: one thread's call blocks another's."""
    store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(PREFIX, store.clone())


def stall_line(waited: float, places: dict[int, Place], silent: set[int]) -> str:
    """The line about a run without a step.

    Args:
        waited: seconds since the last step.
        places: of every rank that was heard of.
        silent: ranks that are not heard of any more; without a place: never.
    """
    parts = []
    if silent:
        parts += _grouped(
            {rank: places.get(rank) for rank in silent},
            ("has not been heard of", "have not been heard of"),
        )
    living = {rank: place for rank, place in places.items() if rank not in silent}
    furthest = max((place.step, place.count) for place in living.values())
    behind = {r: p for r, p in living.items() if (p.step, p.count) < furthest}
    if behind and not silent:
        parts += _grouped(behind, ("is in", "are in"))
        living = {rank: place for rank, place in living.items() if rank not in behind}
    waits = ("waits in", "wait in") if silent or behind else ("is in", "are in")
    parts += _grouped(living, waits)
    minutes = waited / 60
    for_long = f"{minutes:.0f} min" if minutes >= 1 else f"{waited:.0f} s"
    return f"no step for {for_long}: {'; '.join(parts)}"


def _grouped(places: dict[int, Place | None], verbs: tuple[str, str]) -> list[str]:
    """``ranks 0, 2-7 wait in step 13, phase gradients`` for every place that some ranks share."""
    ranks: dict[Place | None, list[int]] = {}
    for rank in sorted(places):
        ranks.setdefault(places[rank], []).append(rank)
    words = []
    for place, members in sorted(ranks.items(), key=lambda item: item[1]):
        verb = verbs[len(members) > 1]
        since = " since" if verb.endswith("heard of") else ""
        where = f"{since} {place}" if place is not None else ""
        words.append(f"rank{'s' * (len(members) > 1)} {_ranges(members)} {verb}{where}")
    return words


def _ranges(numbers: list[int]) -> str:
    """``[0, 2, 3, 4]`` -> ``0, 2-4``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
