"""Collecting what the processes of a run have computed."""

import torch
import torch.distributed as dist
from torch import Tensor


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
