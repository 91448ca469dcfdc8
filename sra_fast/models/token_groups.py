"""Images whose tokens belong to groups, each group with a noise level of its own.

Self-Flow (arXiv 2603.06507) gives an image two times, and each token one of them. Attention may
stay inside a group (arXiv 2607.02508, attention separation).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# lengths of the runs of tokens that attend among themselves: of all images, or of each
Segments = tuple[int, ...] | tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TokenGroups:
    """Which group each token of B images belongs to.

    A network computes one conditioning per image and group, and each token takes that of its group:
    G vectors per image, not T.

    Attributes:
        index: ``[B, T]`` integers in [0, G), the group of each token in the network's sequence.
        order: ``[B, T]`` int64, which patch of the image each token of the sequence is; None: the
            sequence has the image's own order.
        segments: lengths of the runs of the sequence inside which attention stays, of all images or
            of each; None: every token attends to all.
    """

    index: Tensor
    order: Tensor | None = None
    segments: Segments | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.index)

    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors, for a CUDA graph."""
        return (self.index,) if self.order is None else (self.index, self.order)

    def with_tensors(self, index: Tensor, order: Tensor | None = None) -> "TokenGroups":
        """The same segments with other tensors: the inverse of ``tensors``."""
        return TokenGroups(index, order, self.segments)

    def select(self, images: Tensor) -> "TokenGroups":
        """The groups of some of the images, ``[b]`` int64; all images must have the same
        segments.
        """
        assert self.segments is None or isinstance(self.segments[0], int)
        order = None if self.order is None else self.order[images]
        return TokenGroups(self.index[images], order, self.segments)

    def arrange(self, tokens: Tensor) -> Tensor:
        """``[B or 1, T, ...]`` in the image's order -> ``[B, T, ...]`` in the sequence's."""
        if self.order is None:
            return tokens
        return _gather(tokens.expand(len(self.order), *tokens.shape[1:]), self.order)

    def restore(self, tokens: Tensor) -> Tensor:
        """The inverse of ``arrange``."""
        if self.order is None:
            return tokens
        # where each patch lies in the sequence
        return _gather(tokens, self.order.argsort(1))

    def per_token(self, values: Tensor) -> Tensor:
        """``[B, G, ...]`` values of the groups -> ``[B, T, ...]`` of the tokens, in the image's
        order.
        """
        return self.restore(_gather(values, self.index.long()))

    def mean(self, values: Tensor) -> Tensor:
        """``[B, G, ...]`` values of the groups -> ``[B, ...]``, the mean over those groups that the
        image has tokens of: the time of a group without tokens says nothing about it.
        """
        numbers = torch.arange(values.shape[1], device=self.index.device)
        present = (self.index[:, :, None] == numbers).any(1)
        present = present.view(*present.shape, *[1] * (values.dim() - 2))
        return torch.where(present, values, 0).sum(1) / present.sum(1)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Row ``index[b, i]`` of ``rows[b]`` at ``[b, i]``."""
    index = index.view(*index.shape, *[1] * (rows.dim() - 2))
    return torch.take_along_dim(rows, index.expand(-1, -1, *rows.shape[2:]), dim=1)
