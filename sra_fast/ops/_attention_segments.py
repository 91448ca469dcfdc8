"""Attention inside runs of tokens, at the cost of the runs: slices, and a call for each.

``Runs`` are the lengths that the tokens are cut into, in order: one tuple for all images, or one
for each. They are Python integers, so shapes are known on the host and nothing waits for a device.
Queries, keys and values are ``[B, T, H, d]``. The variable-length kernels are in
``_attention_varlen.py``.
"""

from collections.abc import Callable, Sequence
from operator import index

import torch
from torch import Tensor

Runs = tuple[tuple[int, ...], ...]
# attention of all tokens, [B, T, H, d]
Full = Callable[[Tensor, Tensor, Tensor], Tensor]


def checked_runs(segments: object, num_images: int, num_tokens: int) -> Runs:
    """The runs that the caller's ``segments`` stand for: one tuple if all images are alike.

    Raises:
        ValueError: they are no lengths of so many tokens, or not of so many images.
    """
    if not isinstance(segments, list | tuple):
        raise ValueError(
            "attention: expected segments as a tuple of integers, or one for each image, "
            f"got {type(segments).__name__}"
        )
    if not all(isinstance(run, list | tuple) for run in segments):
        segments = (segments,)
    elif len(segments) != num_images:
        raise ValueError(
            f"attention: expected segments of {num_images} images, got those of {len(segments)}"
        )
    runs = tuple(tuple(run) for run in segments)
    for run in runs:
        # True is no length
        if not all(type(length) is int and length > 0 for length in run) or sum(run) != num_tokens:
            raise ValueError(
                f"attention: expected segments as positive integers that sum to T = {num_tokens}, "
                f"got {run}"
            )
    # a compiler may trace with symbols for integers; index makes numbers of them
    runs = tuple(tuple(index(length) for length in run) for run in runs)
    return runs[:1] if all(run == runs[0] for run in runs) else runs


def token_runs(runs: Runs, num_images: int, device: torch.device) -> Tensor:
    """``[B, T]`` int64: the number of the run that a token belongs to."""
    numbers = [[i for i, length in enumerate(run) for _ in range(length)] for run in runs]
    return torch.tensor(numbers, device=device).expand(num_images, -1)


def by_slices(full: Full, q: Tensor, k: Tensor, v: Tensor, runs: Runs) -> Tensor:
    """``full`` for every run, ``[B, T, H, d]``. Images with the same runs are one batch."""
    if len(runs) == 1:
        return _alike(full, q, k, v, run=runs[0])
    members: dict[tuple[int, ...], list[int]] = {}
    for image, run in enumerate(runs):
        members.setdefault(run, []).append(image)
    # images are concatenated: an index would have to be copied to the device
    images = [x.split(1) for x in (q, k, v)]
    outs: dict[int, Tensor] = {}
    for run, batch in members.items():
        alike = (torch.cat([x[image] for image in batch]) for x in images)
        out = _alike(full, *alike, run=run)
        outs.update(zip(batch, out.split(1), strict=True))
    return torch.cat([outs[image] for image in range(len(runs))])


def _alike(full: Full, q: Tensor, k: Tensor, v: Tensor, *, run: Sequence[int]) -> Tensor:
    """``by_slices`` where every image has the runs ``run``."""
    if all(length == run[0] for length in run):
        # runs of one length are a batch, and nothing is put together
        cut = (len(run), run[0])
        out = full(*(x.unflatten(1, cut).flatten(0, 1) for x in (q, k, v)))
        return out.unflatten(0, (q.shape[0], len(run))).flatten(1, 2)
    slices = zip(*(x.split(run, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([full(*parts) for parts in slices], dim=1)
