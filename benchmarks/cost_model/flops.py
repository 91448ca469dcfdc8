"""FLOPs of a training step as it runs: a forward as the engine counts it, and its backward."""

from fractions import Fraction

from sra_fast.config.schema import Config
from sra_fast.training.flops import aligned_share, forward_flops


def step_flops(cfg: Config, full_depth: bool = False) -> dict[str, Fraction]:
    """FLOPs per image of a training step.

    Args:
        cfg: filled in; model and alignment are read.
        full_depth: whether the teacher runs to its last layer.

    Returns:
        ``student`` (forward and backward, the targets' heads and losses included) and ``teacher``.
        Heads and teacher count for the share of images and steps that are aligned.
    """
    part = forward_flops(cfg)
    # the backward pass is twice the forward pass, less the gradients of the inputs
    student = 3 * part["student"] - part["inputs"]
    teacher = Fraction(0)
    for section, align in cfg.alignments.items():
        share = aligned_share(align)
        student += 3 * part[section] * share
        once = part[f"{section}_teacher"]
        # what a whole teacher predicts is thrown away
        if once and full_depth:
            once = part["student"]
        teacher += once * share
    return {"student": student, "teacher": teacher}
