"""Where the patches lie that a position table is of."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from sra_fast.models.layers import sincos_line


def grid_positions(table: Tensor) -> tuple[int, float, float] | None:
    """The side of the grid, its start and its step, if a table is ``sincos_pos_embed`` of them.

    Args:
        table: ``[1, T, D]``, of any float dtype, to which it may have been rounded.

    Returns:
        None: the table is no such function.
    """
    if table.dim() != 3 or not table.is_floating_point() or table.shape[2] % 4:
        return None
    side = math.isqrt(table.shape[1])
    if table.shape[:2] != (1, side**2) or side == 0:
        return None
    rounding = max(1e-5, torch.finfo(table.dtype).eps)
    columns, rows = table.float().view(side, side, -1).chunk(2, dim=2)
    for start, step in _candidates(table, side):
        line = sincos_line(side, table.shape[2], start, step).float()
        # one axis at a time: the table of a large grid would be large
        errors = columns - line, rows - line[:, None]
        # a NaN is no small error
        if all(error.abs().max() <= rounding for error in errors):
            return side, start, step
    return None


def _candidates(table: Tensor, side: int):
    """Start and step: those of nearly all tables, then what the table shows."""
    yield 0.0, 1.0
    if not table.isfinite().all():
        return
    half = table.shape[2] // 2
    first, last = (_position(table[0, column, :half]) for column in (0, side - 1))
    found = first, (last - first) / (side - 1) if side > 1 else 1.0
    # nobody chose 0.33333328
    start, step = (float(Fraction(value).limit_denominator(100)) for value in found)
    yield start, step
    yield found


def _position(code: Tensor) -> float:
    """The position of which these are the sines and the cosines, ``[D/2]``."""
    sines, cosines = code.double().chunk(2)
    angles = torch.atan2(sines, cosines).tolist()
    count = len(angles)
    position = 0.0
    # from the lowest frequency, of which no position is a whole period, to the highest, which is
    # the most precise
    for i in reversed(range(count)):
        frequency = 10000.0 ** (-i / count)
        periods = round((position * frequency - angles[i]) / (2 * math.pi))
        position = (angles[i] + 2 * math.pi * periods) / frequency
    return position
