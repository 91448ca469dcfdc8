"""FLOPs of a training step: those of its products, counted by torch's flop counter on tensors without data."""

from dataclasses import replace
from fractions import Fraction

import torch
from torch.utils.flop_counter import FlopCounterMode

from sra_fast.config.schema import Config


def count_flops(function, *args, **kw) -> int:
    """FLOPs of one call, 2 per multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*args, **kw)
    return counter.get_total_flops()


def forward_flops(cfg: Config) -> dict[str, int]:
    """Forward FLOPs per image of the student's parts.

    Returns:
        ``embed`` (patches, time and label), ``block`` (one of them), ``final`` (the last layer), ``head`` (the
        projection head), and ``first``: the two products whose input needs no gradient, part of ``embed``.
    """
    # all blocks are alike, so one is enough
    m = replace(cfg.model, depth=1)
    with torch.device("meta"):
        student = m.build().eval()
        x = torch.zeros(1, m.in_channels, m.input_size, m.input_size)
        t = torch.zeros(1)
        y = torch.zeros(1).long()
        patch_size = student.x_embedder.proj.kernel_size[0]
        tokens = torch.zeros(1, (m.input_size // patch_size) ** 2, student.hidden_size)
        frequencies = torch.zeros(1, student.t_embedder.frequency_size)
    embed = count_flops(student.embed, x, t, y)
    patches = count_flops(student.x_embedder, x)
    time = count_flops(student.t_embedder.mlp[0], frequencies)
    return {
        "embed": embed,
        "block": count_flops(student.features, x, t, y, depth=1) - embed,
        "final": count_flops(student.final_layer, tokens, tokens[:, 0]),
        "head": count_flops(student.ap_head, tokens),
        "first": patches + time,
    }


def step_flops(cfg: Config, full_depth: bool = False) -> dict[str, Fraction]:
    """FLOPs per image of a training step.

    Args:
        cfg: model, layers and target are read.
        full_depth: whether the teacher runs to its last layer.

    Returns:
        ``student`` (forward and backward, the projection head included) and ``teacher``. Head and teacher
        count for the share of images and steps that are aligned.
    """
    part = forward_flops(cfg)
    depth = cfg.model.arguments()["depth"]
    forward = part["embed"] + depth * part["block"] + part["final"]
    # the backward pass is twice the forward pass, less the gradients of the inputs
    student = 3 * forward - part["first"]
    if not cfg.align.active:
        return {"student": Fraction(student), "teacher": Fraction(0)}
    teacher = forward
    if not full_depth:
        teacher = part["embed"] + cfg.align.teacher_layer * part["block"]
    # exact: tests compare with counted FLOPs
    share = Fraction(cfg.align.fraction).limit_denominator(1000) / cfg.align.every
    return {"student": student + 3 * part["head"] * share, "teacher": teacher * share}
