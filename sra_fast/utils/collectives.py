"""What the processes of a run do together: collect what they have computed, and fail alike."""

import logging
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger("sra_fast")


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Rows ``[counts[rank], ...]`` of every rank, in the order of the ranks, on each;
    collective.
    """
    if len(counts) == 1:
        return rows
    # all_gather takes equal shapes only
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    return torch.cat([part[:count] for part, count in zip(everyone, counts, strict=True)])


def share_of(count: int, rank: int, world: int) -> range:
    """The share of ``count`` things that a rank gets: neighbours, in the order of the ranks."""
    return range(count * rank // world, count * (rank + 1) // world)


def gathered(value, group: "dist.ProcessGroup | None" = None) -> list:
    """The value of every rank, in the order of the ranks, on each; collective.

    Args:
        value: something that can be pickled.
        group: of these processes; None: of all.
    """
    world = dist.get_world_size(group)
    if world == 1:
        return [value]
    values: list = [None] * world
    dist.all_gather_object(values, value, group=group)
    return values


def reason(error: Exception) -> str:
    """What went wrong, in words: the text of an OSError or a ValueError, which is meant for a user;
    in front of that of any other, its type.
    """
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def agreed(
    work: Callable,
    ranks: Container[int] | None = None,
    group: "dist.ProcessGroup | None" = None,
    line_of: Callable[[Exception], str] = reason,
    raises: type[Exception] | None = None,
) -> list:
    """Do some work, and go on only if no rank has failed in it; collective.

    A rank that ends alone leaves the others waiting in the next collective operation. Here it tells
    them first, whatever it has failed with, and all raise the same line: that of the first rank
    that has failed. If that was a fault of the program, the line does not show where: the rank that
    has it logs the traceback, before anybody ends.

    KeyboardInterrupt and SystemExit are no errors of the work: they end their process at once, and
    the others wait until whoever has sent them ends these, too.

    Args:
        work: called without arguments, with no collective operation in it. What it returns is sent
            to every rank, so it must be something that can be pickled.
        ranks: those that do the work; None: all of them.
        group: of the processes that take part; None: all.
        line_of: makes the line of an error, on the rank that has it.
        raises: type of the error that all raise; None: that of the list below.

    Returns:
        What ``work`` has returned on every rank, in the order of the ranks; None for those that
        have not done it.

    Raises:
        ValueError: for an OSError or a ValueError, which a user can do something about.
        torch.OutOfMemoryError: for one.
        RuntimeError: for any other Exception, which is a fault of the program.
    """
    value = None
    error = None
    fault = None
    if ranks is None or dist.get_rank(group) in ranks:
        try:
            value = work()
        except Exception as caught:
            error = caught
            fault = _fault_of(caught, line_of)
    outcomes = gathered((value, fault), group)
    first = next((fault for _, fault in outcomes if fault is not None), None)
    if first is not None:
        failure = (raises or first.kind)(first.line)
        failure.of_all_ranks = dist.get_world_size(group) == dist.get_world_size()
        raise failure from error
    return [value for value, _ in outcomes]


def of_all_ranks(error: BaseException) -> bool:
    """Whether every process has raised this error: ``agreed`` has told them."""
    return getattr(error, "of_all_ranks", False)


@dataclass(frozen=True)
class _Fault:
    """What a rank tells the others of its error; the error itself may not be picklable."""

    kind: type[Exception]
    line: str


def _fault_of(error: Exception, line_of: Callable[[Exception], str]) -> _Fault:
    kind = _kind_of(error)
    _log_traceback(error)
    try:
        return _Fault(kind, line_of(error))
    except Exception as another:
        # the others wait for this rank, also if it finds no words
        _log_traceback(another)
        return _Fault(kind, reason(error))


def _log_traceback(error: Exception) -> None:
    if _kind_of(error) is RuntimeError:
        log.error("a fault of the program on rank %d", dist.get_rank(), exc_info=error)


def _kind_of(error: Exception) -> type[Exception]:
    if isinstance(error, (OSError, ValueError)):
        return ValueError
    if isinstance(error, torch.OutOfMemoryError):
        return torch.OutOfMemoryError
    return RuntimeError
