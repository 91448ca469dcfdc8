"""What a network is told besides the noisy image and the time, as one object.

A conditioning travels from the data set through the loop, the objective and the sampler to the
network's embedder. Nothing in between knows what it is: class labels, or features of a caption. It
can be replaced by "nothing", for classifier-free guidance (arXiv 2207.12598).
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
        """Everything it holds: the inputs of a CUDA graph."""
        ...

    def with_tensors(self, *tensors: Tensor) -> "Conditioning":
        """The same kind of conditioning with other tensors: the inverse of ``tensors``."""
        ...

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "Conditioning":
        """What a single tensor ``[B, ...]`` says, nothing being decided about dropping."""
        ...

    def dropped(self, drop: Tensor) -> "Conditioning":
        """The same, with nothing instead of the entries where ``drop [B]`` (bool) is true."""
        ...

    @property
    def is_decided(self) -> bool:
        """Whether it says which entries are dropped; if not, a network in training draws those of
        labels, and drops no captions.
        """
        ...

    def null(self) -> "Conditioning":
        """As many entries, all of them nothing."""
        ...

    def select(self, index: Tensor | slice) -> "Conditioning":
        """The entries of some of the images."""
        ...

    def concatenated(self, other: "Conditioning") -> "Conditioning":
        """These entries and then those of another one of the same kind."""
        ...

    def to(self, device: torch.device | str) -> "Conditioning": ...


def _check_drop(drop: Tensor | None, batch: int) -> None:
    """ValueError unless ``drop`` says of each of ``batch`` entries whether it is dropped: a single
    one would decide for all of them.
    """
    if drop is not None and (drop.shape != (batch,) or drop.dtype != torch.bool):
        raise ValueError(
            f"expected drop [{batch}] of torch.bool, got {[*drop.shape]} of {drop.dtype}"
        )


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, where the device's next work waits for it."""
    # on the host nothing would wait for a copy that is still under way
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


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
        _check_drop(self.drop, len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self) -> tuple[Tensor, Tensor]:
        # a CUDA graph needs the same inputs in every call, so None becomes "drop none"
        drop = torch.zeros_like(self.labels, dtype=torch.bool) if self.drop is None else self.drop
        return self.labels, drop

    def with_tensors(self, labels: Tensor, drop: Tensor) -> "ClassLabels":
        return ClassLabels(labels, drop)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "ClassLabels":
        return cls(tensor)

    def dropped(self, drop: Tensor) -> "ClassLabels":
        return replace(self, drop=drop)

    @property
    def is_decided(self) -> bool:
        return self.drop is not None

    def null(self) -> "ClassLabels":
        return replace(self, drop=torch.ones_like(self.labels, dtype=torch.bool))

    def select(self, index: Tensor | slice) -> "ClassLabels":
        return ClassLabels(self.labels[index], None if self.drop is None else self.drop[index])

    def concatenated(self, other: "ClassLabels") -> "ClassLabels":
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return ClassLabels(*(torch.cat(pair) for pair in pairs))

    def to(self, device: torch.device | str) -> "ClassLabels":
        drop = None if self.drop is None else _moved(self.drop, device)
        return ClassLabels(_moved(self.labels, device), drop)


@CONDITIONINGS.register("text")
@dataclass(frozen=True)
class TextFeatures:
    """Features of captions, by text encoders that are not trained.

    Nothing is the empty prompt: its features take the place of those of a caption that is dropped.

    Attributes:
        tokens: ``[B, L, E]``, any float dtype: a feature for each token.
        pooled: ``[B, P]``, one vector for each caption; None: the encoder has none.
        mask: ``[B, L]`` bool, the tokens that are there, which attention may read; None: all are.
        empty: features of the empty prompt, one entry; None: they are not known, and no caption can
            be dropped.
        drop: ``[B]`` bool, captions that become the empty prompt; None: nothing is dropped, and
            nobody has decided that.
    """

    tokens: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    empty: "TextFeatures | None" = None
    drop: Tensor | None = None

    def __post_init__(self):
        if self.tokens.dim() != 3:
            raise ValueError(f"expected tokens [B, L, E], got {[*self.tokens.shape]}")
        batch, length, _ = self.tokens.shape
        for name, expected in (("pooled", "[B, P]"), ("mask", "[B, L]")):
            value = getattr(self, name)
            if value is None:
                continue
            fits = value.dim() == 2 and len(value) == batch
            if name == "mask":
                fits = fits and value.shape[1] == length and value.dtype == torch.bool
            if not fits:
                raise ValueError(
                    f"expected {name} {expected} for tokens {[*self.tokens.shape]}, got "
                    f"{[*value.shape]} of {value.dtype}"
                )
        if self.empty is not None:
            self._check_empty(self.empty)
        _check_drop(self.drop, batch)
        if self.drop is not None and self.empty is None:
            raise ValueError(
                "expected captions with the features of the empty prompt, which takes the place of "
                "those that are dropped; got none"
            )

    def _check_empty(self, empty: "TextFeatures") -> None:
        """ValueError unless the empty prompt has the shapes of the captions."""
        for name in ("tokens", "pooled", "mask"):
            ours = getattr(self, name)
            theirs = getattr(empty, name)
            ours = None if ours is None else [1, *ours.shape[1:]]
            theirs = None if theirs is None else [*theirs.shape]
            if ours != theirs:
                raise ValueError(
                    f"expected {name} of the empty prompt {ours} like those of the captions, got "
                    f"{theirs}"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    def _kind(self) -> str:
        """What there is of the captions and of the empty prompt, for messages."""
        names = ("tokens", "pooled", "mask", "empty")
        return ", ".join(name for name in names if getattr(self, name) is not None)

    def _own(self) -> dict[str, Tensor]:
        """What the captions have."""
        own = {"tokens": self.tokens, "pooled": self.pooled, "mask": self.mask}
        return {name: value for name, value in own.items() if value is not None}

    def tensors(self) -> tuple[Tensor, ...]:
        own = tuple(self._own().values())
        if self.empty is None:
            return own
        # a CUDA graph needs the same inputs in every call, so None becomes "drop none"
        drop = self.drop
        if drop is None:
            drop = torch.zeros(len(self), dtype=torch.bool, device=self.tokens.device)
        return (*own, drop, *self.empty.tensors())

    def with_tensors(self, *tensors: Tensor) -> "TextFeatures":
        names = list(self._own())
        own = dict(zip(names, tensors[: len(names)], strict=True))
        if self.empty is None:
            assert len(tensors) == len(names), "without an empty prompt there is nothing else"
            return replace(self, **own)
        drop, *empty = tensors[len(names) :]
        return replace(self, **own, drop=drop, empty=self.empty.with_tensors(*empty))

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> "TextFeatures":
        return cls(tensor)

    def dropped(self, drop: Tensor) -> "TextFeatures":
        """See ``Conditioning``; ValueError without the features of the empty prompt."""
        return replace(self, drop=drop)

    @property
    def is_decided(self) -> bool:
        return self.drop is not None

    def null(self) -> "TextFeatures":
        return self.dropped(torch.ones(len(self), dtype=torch.bool, device=self.tokens.device))

    def seen(self) -> "TextFeatures":
        """What a network reads: captions that are dropped replaced by the empty prompt."""
        if self.drop is None:
            return self
        assert self.empty is not None, "checked"
        there = {}
        for name, value in self._own().items():
            nothing = getattr(self.empty, name).to(value.dtype)
            drop = self.drop.view(-1, *[1] * (value.dim() - 1))
            there[name] = torch.where(drop, nothing, value)
        return TextFeatures(**there)

    def select(self, index: Tensor | slice) -> "TextFeatures":
        own = {name: value[index] for name, value in self._own().items()}
        drop = None if self.drop is None else self.drop[index]
        return replace(self, **own, drop=drop)

    def concatenated(self, other: "TextFeatures") -> "TextFeatures":
        """See ``Conditioning``; ValueError unless both have a pooled feature, a mask and an empty
        prompt, or both have none, and the empty prompt is the same.
        """
        if self._kind() != other._kind():
            raise ValueError(
                f"expected captions of one kind, got {self._kind()} and {other._kind()}"
            )
        if not _are_same(self.empty, other.empty):
            raise ValueError("expected captions with the same empty prompt, got two of them")
        theirs = other._own()
        own = {name: torch.cat([value, theirs[name]]) for name, value in self._own().items()}
        drop = None
        if self.drop is not None or other.drop is not None:
            none = [torch.zeros(len(part), dtype=torch.bool) for part in (self, other)]
            drops = [
                zeros.to(self.tokens.device) if part.drop is None else part.drop
                for part, zeros in zip((self, other), none, strict=True)
            ]
            drop = torch.cat(drops)
        return replace(self, **own, drop=drop)

    def to(self, device: torch.device | str) -> "TextFeatures":
        own = {name: _moved(value, device) for name, value in self._own().items()}
        empty = None if self.empty is None else self.empty.to(device)
        drop = None if self.drop is None else _moved(self.drop, device)
        return replace(self, **own, empty=empty, drop=drop)


def _are_same(one: TextFeatures | None, other: TextFeatures | None) -> bool:
    """Whether two empty prompts are the same one."""
    if one is None or other is None or one is other:
        # the usual case: no values are compared, for which a device would have to be waited for
        return one is other
    pairs = zip(one.tensors(), other.tensors(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
