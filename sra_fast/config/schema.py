"""The configuration: typed dataclasses, read from YAML files and the command line.

A field made by ``choice`` takes a name from a registry. ``config/cli.py`` offers what is registered
when the parser is built.
"""

import inspect
import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch

from sra_fast import models
from sra_fast.utils.registry import DATASETS, LR_SCHEDULES, SAMPLERS, TARGETS, Registry


def choice(registry: Registry, default: str, *more: str):
    """A dataclass field with a name of ``registry``, or one of ``more``."""
    # the registry itself, not its names: it may be empty when this module is imported
    return field(default=default, metadata={"registry": registry, "more": more})


# arguments of a network's constructor that say how it runs, and are not given as options of it
EXECUTION = {"recompute", "defer_bias", "residual_dtype", "model_depth"}
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def constructor_arguments(network: type) -> dict[str, inspect.Parameter]:
    """The arguments that a class takes by name, with those that it hands on to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in network.__mro__:
        if "__init__" not in vars(base):
            continue
        own = inspect.signature(base).parameters.values()
        found = {p.name: p for p in own if p.kind in NAMED} | found
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own):
            break
    return found


def _of_its_type(name: str, value: Any, default: Any) -> Any:
    """The value of an option of a model family; ValueError if its default is of another type."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if kind in kinds and type(value) is not kind:
        raise ValueError(f"model.options.{name}: expected {kinds[kind]}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"model.options.{name}: expected a finite number, got {value}")
    return value


@dataclass
class ModelConfig:
    """Network."""

    name: str = "SiT-XL/2"
    """FAMILY-SIZE/PATCH, with the size S, B, L or XL and patches of 2, 4 or 8; or MMDiT-REPA/2"""
    input_size: int | None = None
    """side of the square input (image side / 8 for VAE latents); default: that of the data"""
    in_channels: int | None = None
    """channels of the input; default: those of the data"""
    num_classes: int | None = None
    """number of labels; default: that of the data"""
    context_tokens: int | None = None
    """of MMDiT: tokens of a caption; default: those of the data's text features"""
    context_size: int | None = None
    """of MMDiT: width of a caption's tokens; default: that of the data's text features"""
    pooled_size: int | None = None
    """of MMDiT: width of a caption's pooled feature, which is added to the time, 0: it is not used;
    default: that of the data's text features"""
    time_scale: float | None = None
    """of MMDiT: what times are multiplied by before their sinusoid: 1 (default), or 1000 as in SD3"""
    position_start: float | None = None
    """of MMDiT: place of the first patch in the position embedding; default: 0"""
    position_step: float | None = None
    """of MMDiT: from one patch to the next in the position embedding; default: 1"""
    class_dropout_prob: float = 0.1
    """share of labels or captions dropped for classifier-free guidance; 0 builds no null class"""
    qk_norm: bool = False
    """norm of queries and keys: LayerNorm, of MMDiT RMSNorm"""
    patch_size: int | None = None
    """replaces the named size's"""
    hidden_size: int | None = None
    """replaces the named size's"""
    depth: int | None = None
    """replaces the named size's"""
    num_heads: int | None = None
    """replaces the named size's"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of the family's constructor, by name: {mlp_ratio: 3}"""

    @property
    def family(self) -> str:
        """Name of the model family."""
        return models.preset(self.name)[0].family

    @property
    def process(self) -> str:
        """Name of the diffusion process that the family is trained with."""
        return models.preset(self.name)[0].process

    @property
    def conditioning(self) -> str:
        """Name of what the family is conditioned on."""
        return models.preset(self.name)[0].conditioning

    def fill_in(self, shape: tuple[int, int, int] = (4, 32, 32), num_classes: int = 1000) -> None:
        """Set what was not given.

        Args:
            shape: (C, H, W) of the data; by default that of ImageNet's latents at 256 pixels.
            num_classes: of the data.
        """
        if self.in_channels is None:
            self.in_channels = shape[0]
        if self.input_size is None:
            self.input_size = shape[1]
        if self.conditioning == "text":
            self.fill_in_text()
        elif self.num_classes is None:
            self.num_classes = num_classes

    def fill_in_text(self, tokens: int = 77, width: int = 768, pooled: int = 0) -> None:
        """Set what was not given of captions.

        Args:
            tokens, width: of a caption's features; by default those of CLIP ViT-L/14.
            pooled: width of its pooled feature; 0: it has none.
        """
        if self.context_tokens is None:
            self.context_tokens = tokens
        if self.context_size is None:
            self.context_size = width
        # a name may say that the pooled feature is not used
        if self.pooled_size is None and "pooled_size" not in models.preset(self.name)[1]:
            self.pooled_size = pooled

    def arguments(self) -> dict:
        """Constructor arguments of the student.

        Raises:
            ValueError: a field was given that the family has no use for, or an option that it does
                not have, or of another type.
        """
        family, sizes = models.preset(self.name)
        arguments = dict(sizes)
        taken = constructor_arguments(family.backbone)
        for option in fields(self):
            value = getattr(self, option.name)
            # None keeps what the name stands for, or the constructor's default
            if option.name in ("name", "options") or value is None:
                continue
            if option.name in taken:
                arguments[option.name] = value
            # what nobody gave is no reason to refuse a family that does not know it
            elif value != option.default:
                raise ValueError(
                    f"model.{option.name} means nothing to a {family.family}, got {value}: "
                    "leave it out"
                )
        return {**arguments, **self._further(family)}

    def _further(self, family: type[models.DiffusionTransformer]) -> dict[str, Any]:
        """``options``; ValueError unless the family has them."""
        own = {option.name for option in fields(self)}
        every = constructor_arguments(family)
        known = {name: every[name] for name in every if name not in own | EXECUTION}
        found = {}
        for name, value in self.options.items():
            if name not in known:
                instead = f": it is model.{name}" if name in own else ""
                raise ValueError(
                    f"expected in model.options what a {family.family} has there "
                    f"({', '.join(known) or 'nothing'}), got {name}{instead}"
                )
            found[name] = _of_its_type(name, value, known[name].default)
        return found

    @property
    def takes_groups(self) -> bool:
        """Whether the tokens of an image may belong to groups with times of their own."""
        return models.preset(self.name)[0].takes_groups

    def takes(self, argument: str) -> bool:
        """Whether the constructor of the family's ``backbone`` has this argument."""
        return argument in constructor_arguments(models.preset(self.name)[0].backbone)

    def any_condition(self, count: int) -> models.Conditioning:
        """A conditioning of ``count`` images that says nothing in particular, with none dropped:
        for counting and measuring. The sizes must be known.
        """
        none = torch.zeros(count, dtype=torch.bool)
        if self.conditioning == "labels":
            return models.ClassLabels(torch.arange(count) % self.num_classes, none)
        arguments = self.arguments()
        pooled = arguments.get("pooled_size")
        make = lambda batch: models.TextFeatures(
            torch.zeros(batch, arguments["context_tokens"], arguments["context_size"]),
            torch.zeros(batch, pooled) if pooled else None,
        )
        return replace(make(count), empty=make(1), drop=none)

    @property
    def num_tokens(self) -> int:
        """T, the patches of an image; the sizes must be known."""
        arguments = self.arguments()
        return (arguments["input_size"] // arguments["patch_size"]) ** 2

    @property
    def joint_tokens(self) -> int:
        """Tokens that attend to each other: those of an image, and of its caption if there is one;
        the sizes must be known.
        """
        return self.num_tokens + (self.context_tokens or 0)

    def build(self, **execution) -> models.DiffusionTransformer:
        """The student. ``execution``: how it runs, e.g. ``recompute``; see ``Backbone``. What the
        family does not take is left out.
        """
        return models.preset(self.name)[0](**self.arguments(), **self._fitting(execution))

    def _fitting(self, execution: dict) -> dict:
        return {name: value for name, value in execution.items() if self.takes(name)}

    def build_teacher(self, depth: int, **execution) -> models.Backbone:
        """The student's first ``depth`` blocks, without an output."""
        backbone = models.preset(self.name)[0].backbone
        # captions of the last block of all go no further: only a family that has them asks for it
        arguments = self.arguments()
        arguments |= {"model_depth": arguments["depth"], "depth": depth}
        # what only the output of a family knows
        taken = constructor_arguments(backbone)
        fitting = {name: value for name, value in arguments.items() if name in taken}
        return backbone(**fitting, **self._fitting(execution))


@dataclass
class AlignConfig:
    """What every alignment target has; `align: none` trains the plain model.

    A target has further options: a dataclass that inherits from this one (``alignment/target.py``).
    An option that makes no sense for a target is none of its fields, so that it is refused by name.
    """

    target: str = choice(TARGETS, "ema_teacher")
    """where the target features come from"""
    student_layer: int | None = None
    """m: the student's features after this block are aligned (1-based); default: that of the
    target's paper for B, L and XL, else its rule"""
    weight: float = 0.2
    """lambda: weight of the alignment loss"""
    schedule: Literal["constant", "epochs", "steps", "milestones"] = "constant"
    """lambda over time: constant; held for `hold` epochs (or steps), then divided by ten every
    `decay`; or `milestones`
    """
    hold: int = 149
    """last epoch (or step) at full lambda; the default is the paper's, in epochs"""
    decay: int = 1000
    """epochs (or steps) in which lambda falls by a factor of ten; the default is the paper's, in
    epochs"""
    milestones: dict[int, float] = field(default_factory=dict)
    """step -> lambda from that step on (schedule: milestones)"""
    stop_at_step: int | None = None
    """no alignment from this step on (HASTE, arXiv 2505.16792): the target is not computed. An
    input with two times per image, or with separated groups, stays"""
    every: int = 1
    """alignment in each `every`-th step only, with lambda times `every`"""

    @property
    def active(self) -> bool:
        """Whether there is an alignment loss."""
        return self.target != "none"

    @property
    def share(self) -> float:
        """Share of the images that are aligned in a step with alignment."""
        return 1.0

    @property
    def largest_gap(self) -> float:
        """By how much the teacher's time is earlier than the student's at most, in [0, 1]."""
        return 0.0


@dataclass
class TokenAlignConfig(AlignConfig):
    """Options of a target that gives every token a feature: the student's are compared with it."""

    fraction: float = 1.0
    """share of the images that are aligned each step; the loss is the mean over these"""

    @property
    def share(self) -> float:
        return self.fraction


# KINDS of ops/align_distance.py
Distance = Literal["smooth_l1", "l1", "l2", "cosine_patch", "cosine_token"]


@dataclass
class DistanceConfig(TokenAlignConfig):
    """Options of a target whose distance from the student's features can be chosen."""

    distance: Distance = "smooth_l1"
    """distance between the features"""
    beta: float = 0.05
    """where smooth-L1 turns linear"""


@dataclass
class DiffusionConfig:
    """SiT's process (DiT's has no choices)."""

    path: Literal["linear", "cosine"] = "linear"
    """interpolant of data and noise"""
    time: Literal["uniform", "lognormal"] = "uniform"
    """distribution of the student's times"""
    time_mean: float = 0.0
    """of time lognormal: mean of the logarithm of the noise-to-data ratio"""
    time_std: float = 1.0
    """of time lognormal: its standard deviation"""
    time_shift: float = 1.0
    """the noise-to-data ratio of every time is multiplied by this (SD3, arXiv 2403.03206, Eq. 23):
    above 1 for larger images and for latents of many channels"""


@dataclass
class DataConfig:
    """Training data."""

    name: str = choice(DATASETS, "auto", "auto")
    """scikit-learn's digits, VAE moments, or pixels; auto: what lies at `path`"""
    path: str | None = None
    """folder that holds index.json (packed by preprocess.py) or vae-sd/ (the published code's
    layout); or an .npz of images (arr_0 uint8 [N, H, W, C], arr_1 labels)
    """
    verify: bool = False
    """compare the SHA-256 of each packed shard with the index at its first read"""
    latent_scale: float | list[float] | None = None
    """a latent is (z - latent_shift) * latent_scale, z being drawn from the VAE's posterior; one
    number, or a list of one for each channel; default: the scaling_factor of the VAE that made the
    data, divided by its latents_std if it has that, or 0.18215 (SD-VAE)"""
    latent_shift: float | list[float] | None = None
    """see latent_scale; default: the latents_mean or the shift_factor of the VAE that made the
    data, or 0"""
    latent_statistics: bool = False
    """take both from the data: mean 0 and deviation 1 in every channel; the run's config.yaml has
    the numbers"""
    flip: bool = False
    """mirror half of the images, drawn anew in every step (pixels only; the option `mirror` of
    preprocess.py adds mirrored images to latents)"""
    features: str | None = None
    """name of stored features below `<path>/features` (preprocess.py makes them), which come with
    every batch: for align.target cached_features"""
    text: str | None = None
    """name of stored text features below `<path>/text` (the option `captions` of preprocess.py makes
    them), for models of text; default: the only ones there are"""
    num_workers: int = 4
    """loader processes, at most one per CPU"""


@dataclass
class OptimConfig:
    """AdamW."""

    implementation: Literal["fused", "torch"] = "fused"
    """fused: AdamW, rounded weights, EMA and teacher in one pass (ops.adamw_ema_); torch:
    torch.optim.AdamW, then the EMA
    """
    lr: float = 1e-4
    """learning rate after warm-up"""
    schedule: str = choice(LR_SCHEDULES, "constant")
    """how the learning rate goes on after the warm-up, until train.steps: as it is (the paper), or
    down to min_lr"""
    min_lr: float = 0.0
    """learning rate that linear and cosine end at"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of the two moments"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.0
    """decoupled weight decay, of all parameters, biases and the alignment's head among them"""
    clip: float = 1.0
    """largest global gradient norm; 0 turns clipping off"""
    warmup_steps: int = 0
    """steps of linear warm-up, from lr / warmup_steps"""


@dataclass
class Average:
    """An average of the weights that only evaluation reads: one of the two."""

    decay: float | None = None
    """of an exponential average, per update"""
    sigma_rel: float | None = None
    """relative width of a power-function average (EDM2, arXiv 2312.02696), in (0, 0.288]; 0.05 and 0.1
    are the paper's"""

    @property
    def given(self) -> dict[str, float]:
        """What is given, by name, as a manifest has it."""
        both = {"decay": self.decay, "sigma_rel": self.sigma_rel}
        return {name: value for name, value in both.items() if value is not None}


@dataclass
class TrainConfig:
    """The run."""

    steps: int = 400000
    """optimizer steps"""
    global_batch: int = 256
    """images per optimizer step, over all processes"""
    micro_batch: int | None = None
    """images per process and forward pass; the rest is accumulated (default: all of the process's
    share)
    """
    precision: Literal["bf16", "fp32"] = "bf16"
    """of weights and activations; master weights and EMA are always fp32"""
    residual: Literal["bf16", "fp32"] = "bf16"
    """dtype of the residual stream in bf16 training, of student and teacher; fp32 is what the
    published code has (its position embedding is fp32, and autocast rounds inside the half-blocks
    only)"""
    graph: bool | None = None
    """replay forward and backward pass as one CUDA graph, so that the host launches it in one call;
    its activations keep their memory between steps; default: on one GPU, where it can (ZeRO 0-2,
    optim.implementation fused, no align.teacher_graph); true does it on several too (ZeRO 1-2):
    gradients are then sent after the backward pass instead of during it; a CPU runs the same program
    without a graph"""
    compile: bool = False
    """torch.compile each block (ZeRO 0-2)"""
    recompute: Literal["none", "norm", "full"] = "none"
    """what the backward pass recomputes: nothing; the outputs of norms and GELU, which the kernels
    write again in passes that run anyway; everything inside a block"""
    tf32: bool = False
    """let fp32 matrix products run in TF32 on a GPU"""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage (a stage in DeepSpeed's JSON wins)"""
    ema_decay: float = 0.9999
    """decay of the EMA of the weights that the teacher follows and that is sampled by default, from
    step 0"""
    averages: dict[str, Average] = field(default_factory=dict)
    """further averages of the weights, by name: {slow: {decay: 0.9999}, narrow: {sigma_rel: 0.05}}; each
    takes 4 bytes per parameter over all processes, and sample.weights names one"""
    average_snapshots: int = 0
    """steps between two snapshots of the power-function averages in the run's folder `ema`, from which
    sample.weights power:SIGMA makes one of any width; 0: none"""
    seed: int = 0
    """of initialisation, data order, noise, times and dropped labels"""
    out: str = "runs/default"
    """a numbered run folder is made in here"""
    resume: str | None = None
    """run folder to resume: a path, or 'auto' for the newest one in `out` that has a checkpoint"""
    init_from: str | None = None
    """weights to start from: a run or checkpoint folder, .safetensors (sharded too), a Hugging Face
    folder, or a .pt of the published code or others. If they fit the model in part only, what fits is
    loaded and the rest is initialised and listed"""
    save_every: int = 50000
    """steps between checkpoints; one is always written at the end"""
    save_minutes: float = 30.0
    """minutes after which a checkpoint is written besides; 0: only every `save_every` steps"""
    keep: int = 3
    """newest checkpoints that are kept; 0: all of them"""
    keep_every: int = 0
    """checkpoints of steps that are a multiple of this are kept besides; 0: none"""
    on_nan: Literal["skip", "rollback", "stop"] = "skip"
    """an update whose gradients are not finite is never taken. Then: go on with the next batch; go
    back to the last checkpoint and leave out the images since then; or stop"""
    skip_limit: int = 5
    """updates skipped in a row that stop the run"""
    spike: float = 20.0
    """a warning is logged when a loss or a feature norm is this many times its running median;
    0: never"""
    on_spike: Literal["warn", "rollback"] = "warn"
    """what follows such a warning of the loss: nothing, or the last checkpoint without the images
    since then"""
    stall_minutes: float = 10.0
    """without a step for so long, a line says which process is where; 0: never"""
    log_every: int = 100
    """steps between log lines"""
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """where the numbers go besides stats.jsonl, which is always written: tensorboard, wandb, csv"""
    export: list[Literal["safetensors", "published"]] = field(
        default_factory=lambda: ["safetensors"]
    )
    """written at the end: EMA weights as safetensors; the published code's .pt with weights, EMA
    and optimizer state"""


@dataclass
class MonitorConfig:
    """Samples and the held-out loss of `sample.weights` during training, made by all processes
    together. An average `power:SIGMA` exists at the end only: the EMA is looked at instead."""

    every: int = 0
    """steps between two looks at the weights; 0: never"""
    count: int = 100
    """images that are sampled each time; 0: none"""
    held_out: int | None = None
    """images on which the held-out loss is measured each time, at least 2; 0: none; default: 1024 if the data
    have a held-out share, which preprocess.py sets aside; the digits have one"""
    grid: int = 100
    """images in the picture, the first ones"""
    batch: int = 64
    """images per process and model call; another value rounds the held-out loss differently"""
    vae: str | None = None
    """folder of a diffusers AutoencoderKL, for latents of 4 channels"""
    reference: str | None = None
    """.npz of images or statistics: the FID of the `count` images is logged (published ones are of
    50 000)
    """
    inception: str | None = None
    """path of weights-inception-2015-12-05-6726825d.pth, for the FID"""


@dataclass
class SampleConfig:
    """Samplers."""

    method: str = choice(SAMPLERS, "auto", "auto")
    """auto: euler_maruyama for SiT, ddpm for DiT"""
    steps: int = 250
    """sampling steps"""
    time_shift: float | None = None
    """of SiT's and MMDiT's samplers: the noise-to-data ratio of evenly spaced times is multiplied
    by this; default: diffusion.time_shift of the training"""
    guidance: float = 1.0
    """classifier-free guidance; 1 is none"""
    interval: tuple[float, float] = (0.0, 1.0)
    """times in [0, 1] in which guidance applies"""
    guided_channels: int = 0
    """how many channels guidance applies to; 0: all (the official DiT and SiT samplers: 3)"""
    weights: str = "ema"
    """which weights sample: ema; model, the student (the published code samples from it during
    training); the name of one of train.averages; power:SIGMA, an average of that relative width made
    from a run's snapshots"""
    labels: Literal["balanced", "random"] = "balanced"
    """every class equally often, or drawn at random"""
    rounding: Literal["round", "truncate"] = "round"
    """from [0, 255] to uint8 (the published code truncates)"""


@dataclass
class Config:
    """sra-fast"""

    model: ModelConfig = field(default_factory=ModelConfig)
    # looked up when a Config is made: the target registers itself when its room is imported
    align: AlignConfig = field(default_factory=lambda: TARGETS["ema_teacher"].config())
    # a second target, whose loss is added; it has the options of a target too
    align2: AlignConfig = field(default_factory=lambda: AlignConfig(target="none"))
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    @property
    def alignments(self) -> "dict[str, AlignConfig]":
        """The alignment targets that are on, by their section."""
        sections = {"align": self.align, "align2": self.align2}
        return {name: align for name, align in sections.items() if align.active}
