"""FLOPs of a training step: those of its products, counted on tensors without data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sra_fast.alignment.objective import SRAObjective, add_heads, inputs_of, make_objective
from sra_fast.alignment.target import Inputs, Target
from sra_fast.config.schema import AlignConfig, Config, TokenAlignConfig
from sra_fast.diffusion.draws import Draws
from sra_fast.diffusion.micro_batch import MicroBatch, NoisyImages
from sra_fast.utils.registry import TARGETS

# of a forward, by configuration: counting those of SiT-XL/2 takes a core some seconds
_forward_flops: dict[str, dict[str, Fraction]] = {}

# parts of the student, by the ends of its modules' names
PARTS = {
    # inputs of these products are data and need no gradient
    "inputs": (
        ".x_embedder.proj",
        ".t_embedder.mlp.0",
        ".context_embedder",
        # of a pooled feature; a table of classes has no product
        ".y_embedder.mlp.0",
    ),
    # queries with keys, probabilities with values
    "attention": (".attn", ".joint"),
    # shift, scale and gate of all blocks and of the last layer
    "modulation": (".adaLN_modulation.1",),
}


def training_flops(cfg: Config) -> tuple[float, float]:
    """FLOPs per image of ``(plain step, step with alignment)``, the latter as a mean over the steps
    of ``align.every``.

    A student that sees two times per image or separated groups does so in the plain step too.
    """
    plain, extra = step_flops(cfg)
    every = sum(extra[section] / align.every for section, align in cfg.alignments.items())
    return float(plain), float(plain + every)


def step_flops(cfg: Config) -> tuple[Fraction, dict[str, Fraction]]:
    """FLOPs per image of a plain step, and what each target adds to a step in which it is computed.

    A plain step is three forwards of the student. A target adds three of its head and loss and one
    of its network, for its share of the images.
    """
    part = forward_flops(cfg)
    extra = {}
    for section, align in cfg.alignments.items():
        once = 3 * part[section] + part[f"{section}_teacher"]
        extra[section] = once * _share_of_images(align)
    # a backward pass costs two forwards
    return 3 * part["student"], extra


def aligned_share(align: AlignConfig) -> Fraction:
    """Share of the images of all steps that a target is computed for while it is on."""
    return _share_of_images(align) / align.every


def _share_of_images(align: AlignConfig) -> Fraction:
    # 0.3 is no binary fraction
    return Fraction(align.share).limit_denominator(1000)


def forward_flops(cfg: Config) -> dict[str, Fraction]:
    """FLOPs per image of one forward.

    Returns:
        ``student``, without heads, and what of it its ``PARTS`` are; of each target by its section
        ``align``, head and loss, and ``align_teacher``, its network. Of images and steps in which
        the target is computed.
    """
    key = repr((cfg.model, cfg.align, cfg.align2))
    if key not in _forward_flops:
        cut = _count_forward_flops(cfg)
        # images that are left whole cost more: a mean over both kinds
        share = _whole_share(cfg)
        whole = _count_forward_flops(_whole_images(cfg)) if share else cut
        mean = {name: (1 - share) * cut[name] + share * whole[name] for name in cut}
        _forward_flops[key] = mean
    return _forward_flops[key]


@torch.no_grad()
def _count_forward_flops(cfg: Config) -> dict[str, int]:
    """``forward_flops`` of images that are all cut into groups, if any are."""
    with torch.device("meta"):
        objective = _on_meta(cfg)
        with _named(cfg.alignments):
            batch = _one_image(objective, cfg)
        noisy = NoisyImages.make(objective.process, batch, objective.student.patch_size)
    student = objective.student
    depths = {depth for target in objective.targets for depth in target.depths}
    outputs = []

    def run() -> None:
        times = batch.times
        out = student(noisy.x, times.student, batch.condition, depths=depths, groups=times.groups)
        outputs.append(out)

    modules = flops_of_modules(run)
    found = {"student": modules["Global"]}
    for name, ends in PARTS.items():
        found[name] = sum(flops for module, flops in modules.items() if module.endswith(ends))

    features = outputs[0][1] if depths else None
    for section, target in zip(cfg.alignments, objective.targets, strict=True):
        inputs = inputs_of(target, noisy, student.sinusoid(batch.times.teacher))

        def align(target: Target = target, inputs: Inputs = inputs) -> None:
            target.start(inputs)
            target.loss(student, features, inputs)

        with _named({section: target.align}):
            everything, teacher = _flops_with_share(align, target.network)
        found[section] = everything - teacher
        found[f"{section}_teacher"] = teacher
    return found


@contextmanager
def _named(alignments: dict[str, AlignConfig]) -> Iterator[None]:
    """ValueError that names the targets, if their code asks a tensor without data for its values.

    ``alignments``: their options by the section of the configuration.
    """
    try:
        yield
    except (RuntimeError, TypeError) as error:
        # NotImplementedError, a RuntimeError, is one of them; other faults keep their traceback
        if "meta" not in str(error).lower():
            raise
        names = [f"{section}.target {align.target}" for section, align in alignments.items()]
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{' and '.join(names)}: __init__, times, start and loss run once on meta tensors, "
            f"which have no values, to count FLOPs; there it fails with: {reason}"
        ) from error


def _flops_with_share(forward: Callable[[], object], network: nn.Module | None) -> tuple[int, int]:
    """FLOPs of one call, and those of them that are spent in the modules of a network."""
    share = 0
    # FLOPs at the entry of the modules that run just now, each inside the one before
    entered: list[int] = []
    counter = FlopCounterMode(display=False)

    def enter(*_: object) -> None:
        entered.append(counter.get_total_flops())

    def leave(*_: object) -> None:
        nonlocal share
        before = entered.pop()
        if not entered:
            share += counter.get_total_flops() - before

    # they stay: a network without data is thrown away after it
    for module in () if network is None else network.modules():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    with counter:
        forward()
    return counter.get_total_flops(), share


@torch.no_grad()
def flops_of_modules(forward: Callable[[], object]) -> dict[str, int]:
    """FLOPs of one call by the names of the modules that run in it, ``Global`` being all of it."""
    with FlopCounterMode(display=False) as counter:
        forward()
    counts = counter.get_flop_counts()
    found = {name: sum(by_operator.values()) for name, by_operator in counts.items()}
    # a call without a product has no entry
    return {"Global": 0, **found}


def _whole_share(cfg: Config) -> Fraction:
    """Share of the images that a target with groups leaves whole."""
    shares = [getattr(align, "full_share", 0.0) for align in cfg.alignments.values()]
    return Fraction(max(shares, default=0.0)).limit_denominator(1000)


def _whole_images(cfg: Config) -> Config:
    """The same without separation: whole images have the products of two groups that attend to
    each other.
    """
    changes = {
        section: replace(align, separate=False)
        for section, align in cfg.alignments.items()
        if hasattr(align, "separate")
    }
    return replace(cfg, **changes)


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
    with _named(whole.alignments):
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
    widths = [getattr(target.align, "feature_width", None) for target in objective.targets]
    width = next((width for width in widths if width), None)
    external = None if width is None else torch.zeros(1, tokens, width)
    return MicroBatch(x0, model.any_condition(1), x0, objective.times(draws), external)
