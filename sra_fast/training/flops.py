"""FLOPs of a training step: those of its products, counted on tensors without data."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from sra_fast.alignment.objective import SRAObjective, add_heads, inputs_of, make_objective
from sra_fast.config.schema import AlignConfig, Config, TokenAlignConfig
from sra_fast.diffusion.draws import Draws
from sra_fast.diffusion.micro_batch import MicroBatch, NoisyImages
from sra_fast.utils.registry import CONDITIONINGS, TARGETS

# FLOPs by configuration: counting those of SiT-XL/2 takes a core a second
_training_flops: dict[str, tuple[float, float]] = {}


def training_flops(cfg: Config) -> tuple[float, float]:
    """FLOPs per image of ``(plain step, step with alignment)``.

    A plain step is three forwards of the student. Alignment adds three of a target's head and loss
    and one of its network, as often as they run. A student that sees two times per image or
    separated groups does so in the plain step too.
    """
    key = repr((cfg.model, cfg.align, cfg.align2))
    if key not in _training_flops:
        _training_flops[key] = _count_training_flops(cfg)
    return _training_flops[key]


@torch.no_grad()
def forward_flops(cfg: Config) -> dict[str, int]:
    """FLOPs per image of one forward: of the ``student`` without heads, and of each target by its
    section, ``align`` (head and loss) and ``align_teacher`` (its network).
    """
    with torch.device("meta"):
        objective = _on_meta(cfg)
        batch = _one_image(objective, cfg)
        noisy = NoisyImages.make(objective.process, batch, objective.student.patch_size)
    student = objective.student
    depths = {depth for target in objective.targets for depth in target.depths}
    times = batch.times
    run = lambda: student(
        noisy.x, times.student, batch.condition, depths=depths, groups=times.groups
    )
    found = {"student": count_flops(run)}
    features = run()[1] if depths else None
    for section, target in zip(cfg.alignments, objective.targets, strict=True):
        inputs = inputs_of(target, noisy)
        teacher = 0
        if target.network is not None:
            target.start(inputs)
            teacher = count_flops(target.result)
        target.start(inputs)
        loss = count_flops(lambda: target.loss(student, features, inputs))  # noqa: B023
        found[section] = loss - teacher
        found[f"{section}_teacher"] = teacher
    return found


def _count_training_flops(cfg: Config) -> tuple[float, float]:
    part = forward_flops(cfg)
    # a backward pass costs two forwards
    plain = 3.0 * part["student"]
    extra = 0.0
    for section, align in cfg.alignments.items():
        once = 3 * part[section] + part[f"{section}_teacher"]
        extra += once * align.share / align.every
    return plain, plain + extra


@torch.no_grad()
def count_flops(forward: Callable[[], object]) -> int:
    """FLOPs of one call, 2 per multiply-add."""
    with FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def _on_meta(cfg: Config) -> SRAObjective:
    """The objective without data, with all images aligned."""
    whole = replace(cfg, align=_of_all_images(cfg.align), align2=_of_all_images(cfg.align2))
    student = cfg.model.build().eval()
    add_heads(student, whole)
    network = None
    for align in whole.alignments.values():
        depth = TARGETS[align.target].network_depth(align)
        if depth is not None:
            network = cfg.model.build_teacher(depth).eval()
    return make_objective(whole, student, network)


def _of_all_images(align: AlignConfig) -> AlignConfig:
    """The same target with all images aligned, and in plain calls."""
    changes = {"fraction": 1.0} if isinstance(align, TokenAlignConfig) else {}
    if hasattr(align, "teacher_graph"):
        changes |= {"teacher_graph": False, "teacher_stream": False}
    if hasattr(align, "full_share"):
        changes["full_share"] = 0.0
    return replace(align, **changes)


def _one_image(objective: SRAObjective, cfg: Config) -> MicroBatch:
    """A micro-batch of one image."""
    model = cfg.model
    x0 = torch.zeros(1, model.in_channels, model.input_size, model.input_size)
    tokens = objective.student.num_tokens
    draws = Draws(
        noise=x0,
        posterior=None,
        uniform=torch.zeros(1),
        gap=torch.zeros(1),
        drop=torch.zeros(1, dtype=torch.bool),
        second=torch.zeros(1, 2),
        tokens=torch.zeros(1, tokens),
    )
    labels = torch.zeros(1, dtype=torch.int64)
    condition = CONDITIONINGS[objective.student.conditioning].from_tensors(labels, draws.drop)
    widths = [getattr(target.align, "feature_width", None) for target in objective.targets]
    width = next((width for width in widths if width), None)
    external = None if width is None else torch.zeros(1, tokens, width)
    return MicroBatch(x0, condition, x0, objective.times(draws), external)
