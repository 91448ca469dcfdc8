"""Mean and deviation of every channel, summed up part by part."""

import numpy as np
import torch
from torch import Tensor


class Statistics:
    """Mean and deviation per channel of what is written, in float64.

    Of moments they are those of the latents that would be drawn: the variance of the means and the
    mean of the variances.

    Args:
        channels: of a row: 2C for moments.
        moments: whether rows are means and standard deviations.
    """

    def __init__(self, channels: int, moments: bool):
        self.moments = moments
        self.count = 0
        self.sum = torch.zeros(channels // 2 if moments else channels, dtype=torch.float64)
        self.square = self.sum.clone()

    def update(self, rows: Tensor) -> None:
        """Add rows ``[B, channels, ...]``."""
        # row by row: a whole batch of features in float64 takes six times as long (CPU), and the
        # sums would depend on its size
        for row in rows.flatten(2):
            values = row.double()
            square = values.square()
            if self.moments:
                values = values.chunk(2)[0]
                mean_square, variance = square.chunk(2)
                square = mean_square + variance
            self.count += values.shape[1]
            self.sum += values.sum(1)
            self.square += square.sum(1)

    def as_json(self) -> dict:
        return {"count": self.count, "sum": self.sum.tolist(), "square": self.square.tolist()}

    @staticmethod
    def combine(parts: list[dict]) -> dict | None:
        """``{"mean": [..], "std": [..]}`` over the parts, in their order; None without a value."""
        count = sum(part["count"] for part in parts)
        if not count:
            return None
        mean = np.sum([part["sum"] for part in parts], axis=0) / count
        square = np.sum([part["square"] for part in parts], axis=0) / count
        std = np.sqrt(np.maximum(square - mean**2, 0))
        return {"mean": mean.tolist(), "std": std.tolist()}
