"""The objective of SRA (Eq. 6): denoising, plus alignment of the student's features."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sra_fast.alignment.checks import (
    check_found,
    check_head,
    check_kind,
    check_network,
    check_target,
)
from sra_fast.alignment.schedule import aligned_images
from sra_fast.alignment.target import AP_HEAD, Inputs, Target, own_head
from sra_fast.config.schema import Config
from sra_fast.diffusion.draws import Draws
from sra_fast.diffusion.micro_batch import MicroBatch, NoisyImages, Times
from sra_fast.diffusion.process import Process, make_process
from sra_fast.models import Backbone, DiffusionTransformer, Features
from sra_fast.models.token_groups import Segments
from sra_fast.utils.registry import TARGETS


class SRAObjective(nn.Module):
    """Student, alignment targets and the loss of one micro-batch: the module that DeepSpeed wraps.

    Args:
        student: the network that is trained, with the heads of the targets.
        targets: what its features are aligned to; one, two, or none.
        process: noises both inputs and compares the prediction.
    """

    def __init__(self, student: DiffusionTransformer, targets: Iterable[Target], process: Process):
        super().__init__()
        self.student = student
        self.targets = nn.ModuleList(targets)
        self.process = process

    @property
    def teacher(self) -> Backbone | None:
        """The network that follows the EMA, if a target has one."""
        networks = [target.network for target in self.targets if target.network is not None]
        return networks[0] if networks else None

    @property
    def has_groups(self) -> bool:
        """Whether the tokens of an image belong to two groups."""
        return any(target.has_groups for target in self.targets)

    @property
    def needs_mean(self) -> bool:
        """Whether a target reads the means of the posterior."""
        return any(target.needs_mean for target in self.targets)

    def segments(self, batch: int) -> Segments | None:
        """Runs of tokens inside which attention stays, in a micro-batch of ``batch`` images; see
        ``TokenGroups``.
        """
        tokens = self.student.num_tokens
        found = (target.segments(batch, tokens) for target in self.targets)
        return next((segments for segments in found if segments is not None), None)

    def times(self, draws: Draws) -> Times:
        """Student's and teacher's times of a micro-batch."""
        # at most one target has a teacher or groups, the others take the times as they come
        chosen = [target for target in self.targets if target.has_groups]
        chosen += [target for target in self.targets if target.network is not None]
        if chosen:
            return chosen[0].times(self.process, draws)
        return Times(*self.process.times(draws.uniform, draws.gap))

    @property
    def heads(self) -> dict[str, nn.Module]:
        """The student's heads by name. Only alignment losses train them."""
        own = {own_head(name): head for name, head in self.student.align_heads.items()}
        return {AP_HEAD: self.student.ap_head, **own}

    def forward(
        self, batch: MicroBatch, weights: Sequence[float | Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a micro-batch and its parts.

        Args:
            batch: images, conditioning, noise and times.
            weights: lambda of each target; a target with 0 is not computed. A tensor ``[]`` is not
                read on the host: its target is computed whatever the value.

        Returns:
            ``(loss [], parts)``: fp32 scalars ``denoise``, ``vb`` (DiT), and of each target that
            was computed ``align``, ``student_norm`` (mean token norm of the features after the
            head) and ``teacher_norm`` (of the target). Those of a second target have a 2 at the
            end of their names.

        Raises:
            ValueError: in training, a conditioning that leaves dropping to the network; or a target
                whose loss returns something else than ``Target.loss`` says.
        """
        # one noise for both inputs: they differ in their times only (SRA, Sec. 3.2)
        if self.student.training and not batch.condition.is_decided:
            # the student would draw its dropped entries, and the teacher would drop none
            raise ValueError(
                "expected a conditioning that says which entries are dropped (`dropped`), "
                "got one that leaves it to each network"
            )
        noisy = NoisyImages.make(self.process, batch, self.student.patch_size)
        sinusoid, of_teacher = _sinusoids(self.student, batch.times)
        # a tensor is not compared: that would wait for the device, and a CUDA graph cannot branch
        active = {
            i: target
            for i, target in enumerate(self.targets)
            if isinstance(weights[i], Tensor) or weights[i] != 0
        }
        inputs = {i: inputs_of(target, noisy, of_teacher) for i, target in active.items()}
        # before the student's forward, so that a target may be computed at the same time
        for i, target in active.items():
            target.start(inputs[i])
        prediction, features = self._student(noisy, sinusoid, active.values())

        parts = noisy.losses(self.process, prediction)
        loss = sum(parts.values())
        for i, target in active.items():
            if target.network is not None:
                # the all-gather of its weights has had the student's forward to finish
                target.wait()
            found = target.loss(self.student, features, inputs[i])
            suffix = "" if i == 0 else str(i + 1)
            check_found(f"align{suffix}", target, found, parts, prediction.requires_grad)
            # Eq. 6: denoising + lambda * alignment
            loss = loss + weights[i] * found["align"]
            # logged without lambda, which the log has as align_weight
            parts |= {f"{name}{suffix}": value for name, value in found.items()}
        used = {target.head_name(target.align) for target in active.values()}
        idle = [head for name, head in self.heads.items() if name not in used]
        if idle:
            loss = loss + self._no_gradient_for(idle)
        return loss, {name: value.detach() for name, value in parts.items()}

    def _student(
        self, noisy: NoisyImages, sinusoid: Tensor, active: Iterable[Target]
    ) -> tuple[Tensor, Features | None]:
        """The student's prediction, and its features where a target reads them."""
        depths = {depth for target in active for depth in target.depths}
        batch = noisy.batch
        out = self.student(
            noisy.x, sinusoid, batch.condition, depths=depths, groups=batch.times.groups
        )
        return out if depths else (out, None)

    def _no_gradient_for(self, idle: Iterable[nn.Module]) -> Tensor:
        """Zero, with a zero gradient for heads that no target trains in this step.

        Every parameter then has a gradient in every step, which all ZeRO stages handle alike.
        """
        student = self.student
        # one image of zeros is enough to give every weight of a head a gradient
        weight = student.x_embedder.proj.bias
        tokens = weight.new_zeros(1, student.num_tokens, student.hidden_size)
        condition = weight.new_zeros(1, student.hidden_size)
        outputs = [
            head(tokens[:, :1]) if head is student.ap_head else head(tokens, condition)
            for head in idle
        ]
        return sum(0.0 * output.sum() for output in outputs)


def add_heads(student: DiffusionTransformer, cfg: Config) -> None:
    """Give the student the heads that only single targets have.

    Raises:
        ValueError: a target's own code names a head or a network that cannot be.
    """
    for section, align in cfg.alignments.items():
        check_kind(section, align, cfg.model)
        kind = TARGETS[align.target]
        if kind.head_name(align) == own_head(align.target):
            head = kind.make_head(align, cfg.model)
            check_head(section, align, head)
            head.initialise()
            student.align_heads[align.target] = head


def make_objective(
    cfg: Config, student: DiffusionTransformer, network: Backbone | None
) -> SRAObjective:
    """The objective of a configuration.

    Args:
        cfg: filled in.
        student: with the heads of ``add_heads``.
        network: what follows the EMA, for the target that has one: ``cfg.model.build_teacher`` of
            the target's ``network_depth``. It is frozen.

    Raises:
        ValueError: a target has parameters that nothing would train, buffers that no checkpoint
            would keep, or reads blocks that the student does not have; or ``network`` is not the
            one that a target needs.
    """
    targets = []
    for section, align in cfg.alignments.items():
        kind = TARGETS[align.target]
        own = network if kind.has_network(align) else None
        check_network(section, align, own)
        target = kind(align, own)
        check_target(section, target, student)
        targets.append(target)
    return SRAObjective(student, targets, make_process(cfg))


def inputs_of(target: Target, noisy: NoisyImages, sinusoid: Tensor) -> Inputs:
    """What a target sees.

    ``sinusoid``: of the teacher's times.
    """
    images = aligned_images(target.align.share, len(noisy.batch), noisy.x.device)
    return Inputs(noisy, sinusoid, images)


def _sinusoids(student: Backbone, times: Times) -> tuple[Tensor, Tensor]:
    """Sinusoids of the student's and the teacher's times, in one pass."""
    both = torch.cat([times.student.flatten(), times.teacher.flatten()])
    sizes = [times.student.numel(), times.teacher.numel()]
    student, teacher = student.sinusoid(both).split(sizes)
    return student.view(*times.student.shape, -1), teacher.view(*times.teacher.shape, -1)
