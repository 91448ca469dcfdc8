"""What targets have in common whose features come from a network with the EMA's weights."""

import torch
from torch import Tensor

from sra_fast.alignment.target import Inputs, Target
from sra_fast.config.schema import AlignConfig
from sra_fast.diffusion.micro_batch import MicroBatch
from sra_fast.models import Backbone, Conditioning, TokenGroups


class TeacherTarget(Target):
    """Features of a network that follows the EMA of the student and sees the cleaner input.

    A subclass says how many blocks the network has (``network_depth``), and its ``loss`` compares
    the student's features with ``result``. It may also override ``told`` and ``features``. If
    ``largest_gap`` of its options is above 0, the teacher's time is earlier than the student's.
    """

    network: Backbone

    def __init__(self, align: AlignConfig, network: Backbone):
        super().__init__(align, network)
        # what the network is told, and how the tokens of its input are grouped: their tensors are
        # inputs of ``run``
        self.condition: Conditioning | None = None
        self.groups: TokenGroups | None = None
        # one callable for every way to run it
        self.run = self._features
        # the inputs of a micro-batch, from ``start`` to ``result``
        self.inputs: tuple[Tensor, ...] = ()

    @classmethod
    def network_depth(cls, align: AlignConfig) -> int:
        """Blocks of the network, at most those of the model."""
        raise NotImplementedError

    def told(self, batch: MicroBatch) -> Conditioning:
        """What the network is told of B images: the same as the student, with the same dropped."""
        return batch.condition

    def features(
        self, x: Tensor, sinusoid: Tensor, condition: Conditioning, groups: TokenGroups | None
    ) -> Tensor:
        """What the network computes, without gradient: the features after its last block.

        Args:
            x: ``[b, C, H, W]`` input of the teacher, the aligned images only.
            sinusoid: of the teacher's times, ``[b, 256]`` or ``[b, G, 256]``.
            condition: b of them.
            groups: of the teacher's tokens, or None.

        Returns:
            ``[b, T, D]``, in the order of the groups' sequence.
        """
        return self.network.features(x, sinusoid, condition, groups=groups)

    def start(self, inputs: Inputs) -> None:
        batch = inputs.noisy.batch
        condition = self.told(batch)
        groups = batch.times.teacher_groups
        # the teacher computes only the images that the loss compares
        if inputs.images is not None:
            condition = condition.select(inputs.images)
            groups = None if groups is None else groups.select(inputs.images)
        self.condition = condition
        self.groups = groups
        rows = [inputs.select(item) for item in (inputs.noisy.x_teacher, inputs.sinusoid)]
        self.inputs = (*rows, *condition.tensors())
        if groups is not None:
            self.inputs = (*groups.tensors(), *self.inputs)

    def result(self) -> Tensor:
        """What ``features`` gives for the micro-batch, once for each ``start``."""
        target = self._compute()
        self.inputs = ()
        return target

    def _compute(self) -> Tensor:
        # in the stream that runs the forward: the gathered weights must be visible there
        self.wait()
        return self.run(*self.inputs)

    @torch.no_grad()
    def _features(self, *tensors: Tensor) -> Tensor:
        """``features`` as a function of tensors only, as a CUDA graph needs it."""
        groups = None
        if self.groups is not None:
            count = len(self.groups.tensors())
            groups = self.groups.with_tensors(*tensors[:count])
            tensors = tensors[count:]
        assert self.condition is not None, "start comes first"
        x, sinusoid, *condition = tensors
        return self.features(x, sinusoid, self.condition.with_tensors(*condition), groups)
