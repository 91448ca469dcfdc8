"""What a network is told besides the noisy image and the time, as one object.

A conditioning travels from the data set through the loop, the objective and the sampler to the
network's embedder. Nothing in between knows what it is; today it is class labels. It can be
replaced by "nothing", for classifier-free guidance (arXiv 2207.12598).
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sra_fast.utils.registry import CONDITIONINGS


class Conditioning(Protocol):
    """The conditioning of B images. Registered under a name in ``CONDITIONINGS``; a model family
    names the one it takes.
    """

    def __len__(self) -> int:
        """B."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Everything it holds, each ``[B, ...]``: the inputs of a CUDA graph."""
        ...

    @classmethod
    def from_tensors(cls, *tensors: Tensor) -> "Conditioning":
        """The inverse of ``tensors``; without the last one nothing is decided about dropping."""
        ...

    def dropped(self, drop: Tensor) -> "Conditioning":
        """The same, with nothing instead of the entries where ``drop [B]`` (bool) is true."""
        ...

    @property
    def is_decided(self) -> bool:
        """Whether it says which entries are dropped; if not, a network in training draws them."""
        ...

    def null(self) -> "Conditioning":
        """As many entries, all of them nothing."""
        ...

    def select(self, index: Tensor | slice) -> "Conditioning":
        """The entries of some of the images."""
        ...

    def to(self, device: torch.device | str) -> "Conditioning": ...


@CONDITIONINGS.register("labels")
@dataclass(frozen=True)
class ClassLabels:
    """Class labels.

    Attributes:
        labels: ``[B]`` int64.
        drop: ``[B]`` bool, labels that become the null class; None: the network draws them in
            training mode, and drops none in eval mode.
    """

    labels: Tensor
    drop: Tensor | None = None

    def __post_init__(self):
        # the embedding accepts any shape, and its sum with the time would broadcast
        if self.labels.dim() != 1:
            raise ValueError(f"expected labels [B], got {[*self.labels.shape]}")

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self) -> tuple[Tensor, Tensor]:
        # a CUDA graph needs the same inputs in every call, so None becomes "drop none"
        drop = torch.zeros_like(self.labels, dtype=torch.bool) if self.drop is None else self.drop
        return self.labels, drop

    @classmethod
    def from_tensors(cls, labels: Tensor, drop: Tensor | None = None) -> "ClassLabels":
        return cls(labels, drop)

    def dropped(self, drop: Tensor) -> "ClassLabels":
        return replace(self, drop=drop)

    @property
    def is_decided(self) -> bool:
        return self.drop is not None

    def null(self) -> "ClassLabels":
        return replace(self, drop=torch.ones_like(self.labels, dtype=torch.bool))

    def select(self, index: Tensor | slice) -> "ClassLabels":
        return ClassLabels(self.labels[index], None if self.drop is None else self.drop[index])

    def to(self, device: torch.device | str) -> "ClassLabels":
        drop = None if self.drop is None else self.drop.to(device, non_blocking=True)
        return ClassLabels(self.labels.to(device, non_blocking=True), drop)


def concatenate(first: Conditioning, second: Conditioning) -> Conditioning:
    """The entries of both, which are of one kind."""
    pairs = zip(first.tensors(), second.tensors(), strict=True)
    return type(first).from_tensors(*(torch.cat(pair) for pair in pairs))
