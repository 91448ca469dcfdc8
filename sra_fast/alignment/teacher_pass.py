"""How the teacher's forward runs: which images it sees, when, in which stream, and as a CUDA graph or not."""

import functools
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from sra_fast.config.schema import AlignConfig
from sra_fast.models import Backbone
from sra_fast.utils.cuda_graph import Graphed


def images_per_cycle(fraction: float, batch: int) -> tuple[int, int]:
    """``(p, q)``: the first p of every q images are aligned; the same images for every split into micro-batches.

    Raises:
        ValueError: a micro-batch of ``batch`` images cannot be cut so.
    """
    cycle = Fraction(fraction).limit_denominator(max(batch, 1))
    if cycle <= 0 or cycle > 1 or batch % cycle.denominator or abs(float(cycle) - fraction) > 1e-6:
        raise ValueError(
            f"align.fraction of the {batch} images of a micro-batch must be a whole number of images, got {fraction}"
        )
    return cycle.numerator, cycle.denominator


@functools.cache
def chosen_images(fraction: float, batch: int, device: torch.device) -> Tensor | None:
    """Indices ``[batch * fraction]`` of the images that are aligned, or None for all of them."""
    if fraction == 1:
        return None
    p, q = images_per_cycle(fraction, batch)
    return torch.tensor([i for i in range(batch) if i % q < p]).to(device)


class TeacherPass:
    """The teacher's features of one micro-batch, without gradient.

    By default ``result`` computes them, after the student's forward, so that the gather of the teacher's weights has that long
    to arrive.  In a stream of its own ``start`` sets it going beside the student.

    Args:
        teacher: the frozen ``Backbone``.
        align: fraction, graph and stream.
    """

    def __init__(self, teacher: Backbone, align: AlignConfig):
        self.run = functools.partial(_features, teacher)
        if align.teacher_graph:
            self.run = Graphed(self.run)
        self.stream = torch.cuda.Stream() if align.teacher_stream else None
        self.ready: Callable[[], None] = lambda: (
            None
        )  # returns once the teacher's weights have arrived
        self.inputs, self.target = (), None

    def start(self, *inputs: Tensor, chosen: Tensor | None) -> None:
        """Take ``x [B, C, H, W]``, ``t``, ``y``, ``drop`` ``[B]``, of which the ``chosen`` images are seen."""
        self.inputs = inputs if chosen is None else tuple(item[chosen] for item in inputs)
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.target = self._now()

    def result(self) -> Tensor:
        """``[B * fraction, T, D]`` features after block n."""
        if self.stream is None:
            target = self._now()
        else:
            torch.cuda.current_stream().wait_stream(self.stream)
            target, self.target = self.target, None
            target.record_stream(torch.cuda.current_stream())
        self.inputs = ()  # freed only now: both streams have met
        return target

    def _now(self) -> Tensor:
        self.ready()
        return self.run(*self.inputs)


@torch.no_grad()
def _features(teacher: Backbone, x: Tensor, t: Tensor, y: Tensor, drop: Tensor) -> Tensor:
    return teacher.features(x, t, y, drop=drop)
