"""The names of weights: ``ema``, ``model``, those of ``train.averages``, and ``power:SIGMA``."""

import re
from collections.abc import Iterable, Sequence

from sra_fast.config.schema import TrainConfig
from sra_fast.utils.checks import require_that
from sra_fast.utils.power_profile import LARGEST_ERROR, Profile, check_width, fit

EMA = "ema"
STUDENT = "model"
# begins the name of an average that is made from a run's snapshots
POWER = "power:"
# names that mean something else; `main` is what checkpoints call the EMA
TAKEN = (EMA, STUDENT, "main")
# snapshots that are thought of when a run is checked
MOST_PLANNED = 200
# a folder may have it: none of `.` and `..`, nor a hidden one
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)


def power_width(name: str) -> float | None:
    """SIGMA of ``power:SIGMA``; None for every other name of weights.

    Raises:
        ValueError: it is no width that a power function has.
    """
    if not name.startswith(POWER):
        return None
    try:
        width = float(name.removeprefix(POWER))
    except ValueError:
        raise ValueError(f"expected weights power:SIGMA, as power:0.1, got {name!r}") from None
    try:
        check_width(width)
    except ValueError as error:
        raise ValueError(f"weights {name}: {error}") from None
    return width


def check_averages(train: TrainConfig) -> None:
    """ValueError for averages that are not what their names or numbers should be."""
    for name, average in train.averages.items():
        option = f"train.averages.{name}"
        require_that(
            # in YAML `no` is a value and 1 a number, unless they stand in quotes
            isinstance(name, str) and NAME.fullmatch(name) is not None and name not in TAKEN,
            "expected names of train.averages as text of letters, digits and ._-, which begin "
            f"with a letter or a digit, and none of {', '.join(TAKEN)}, got {name!r}",
        )
        require_that(
            len(average.given) == 1,
            f"{option} needs decay or sigma_rel, one of them, got {average.given or 'neither'}",
        )
        decay = average.decay
        require_that(
            decay is None or 0 <= decay <= 1, f"{option}.decay must lie in [0, 1], got {decay}"
        )
        if average.sigma_rel is not None:
            try:
                check_width(average.sigma_rel)
            except ValueError as error:
                raise ValueError(f"{option}.sigma_rel: {error}") from None
    every = train.average_snapshots
    require_that(every >= 0, f"train.average_snapshots must not be negative, got {every}")
    require_that(
        not every or bool(power_averages(train)),
        f"train.average_snapshots {every} needs an average with sigma_rel in train.averages, as in "
        "{narrow: {sigma_rel: 0.05}, wide: {sigma_rel: 0.1}}",
    )


def power_averages(train: TrainConfig) -> list[str]:
    """The names of the power-function averages."""
    return [name for name, average in train.averages.items() if average.sigma_rel is not None]


def check_weights(option: str, name: str, train: TrainConfig) -> None:
    """ValueError unless a run has these weights at its end.

    Args:
        option: the one that names them, for the message.
        name: of the weights.
        train: configuration of the run.
    """
    width = power_width(name)
    if width is not None:
        require_that(
            train.average_snapshots > 0,
            f"{option} {name} is made from snapshots: it needs train.average_snapshots",
        )
        times = snapshot_times(train)
        widths = {train.averages[held].sigma_rel for held in power_averages(train)}
        held = [Profile(sigma_rel, t) for sigma_rel in widths if sigma_rel for t in times]
        check_made(f"{option} {name}", width, held, train.steps)
        return
    check_known(option, name, [EMA, STUDENT, *train.averages])


def snapshot_times(train: TrainConfig, after: int = 0) -> list[int]:
    """The steps of a run's snapshots, the last first; of very many a part.

    Args:
        train: configuration of the run; it stores snapshots.
        after: later ones than this step.
    """
    every = train.average_snapshots
    times = [*range(every, train.steps, every), train.steps]
    times = [time for time in times if time > after]
    # fewer snapshots make the error larger, and so many already make it small
    return times[:: -max(1, len(times) // MOST_PLANNED)]


def check_made(what: str, width: float, held: Sequence[Profile], end: float) -> None:
    """ValueError unless an average can be made from those that a run stores.

    Args:
        what: names it, for the message.
        width: of the average.
        held: those that are stored, no two alike.
        end: updates at the end of the run.
    """
    error = fit(held, Profile(width, end)).error
    require_that(
        error <= LARGEST_ERROR,
        f"{what} cannot be made from this run's snapshots: its profile would be wrong by "
        f"{error:.0%}, expected at most {LARGEST_ERROR:.0%}; two widths around it in train.averages, "
        "or more snapshots (train.average_snapshots), come nearer",
    )


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """ValueError, which lists the known weights, unless a name is one of them."""
    known = list(known)
    require_that(name in known, f"{what}: expected weights of {', '.join(known)}, got {name!r}")
