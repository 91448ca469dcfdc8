"""The variants of a training step: what each name stands for.

Settings may follow a name after ``+``: ``sra+train.compile=true``, ``sra+SRA_FAST_CUBLASLT=0``,
``strong+compile=whole``. Those with a dot are the engine's options, those in capitals variables of its environment,
the others fields of ``Switches``.
"""

from dataclasses import dataclass, field, fields, replace

from benchmarks.record import VARIABLES

# these rooms register what a configuration may name
from sra_fast import alignment, data, diffusion  # noqa: F401
from sra_fast.config.cli import parse_train
from sra_fast.config.schema import AlignConfig, Config
from sra_fast.models import preset
from sra_fast.utils.registry import TARGETS


@dataclass(frozen=True)
class Switches:
    """What a plain PyTorch program (``torch_program.py``) does differently from the published code.

    Attributes:
        teacher_copy: the teacher is a copy of the EMA in the training precision, refreshed after every step.
        truncated: the teacher stops at the aligned block.
        swap: there is no separate teacher. The EMA is copied into the live weights, the student runs as the
            teacher, and its weights are copied back.
        kernels: the operators may run their Triton kernels. Otherwise whoever builds the program sets
            SRA_FAST_BACKEND=torch.
        compile: "no", "blocks" (every block, the layers after them and the losses), or "whole" (forward pass
            and losses as one graph).
        backend: of torch.compile.
        mode: of torch.compile.
        adamw: "foreach" or "fused".
        ema: "each" parameter by itself, or "foreach".
        graph: forward and backward pass are replayed as one CUDA graph, as the engine's are.
        measured_attention: attention's backend is the fastest in a measurement. Otherwise PyTorch picks it.
    """

    teacher_copy: bool = False
    truncated: bool = False
    swap: bool = False
    kernels: bool = False
    compile: str = "no"
    backend: str = "inductor"
    mode: str | None = None
    adamw: str = "foreach"
    ema: str = "each"
    graph: bool = False
    measured_attention: bool = False


# student and teacher layer of the paper
LAYERS = {
    "SiT-B": (3, 8),
    "SiT-L": (6, 16),
    "SiT-XL": (8, 20),
    "DiT-B": (3, 7),
    "DiT-L": (6, 14),
    "DiT-XL": (8, 16),
}
STUDENT_LAYER = "align.student_layer"
TEACHER_LAYER = "align.teacher_layer"
TARGET = "align.target"

# alignment targets besides SRA's, each a variant of its own name
OTHER_TARGETS = (
    "self_flow",
    "dual_time",
    "vae_latent",
    "layer_sync",
    "dispersive",
    "cached_features",
)
# channels of the stored features: those of DINOv2-B, which REPA and iREPA are aligned to
FEATURE_WIDTH = 768

# the published code under the name that its rows have had since the first measurement
PUBLISHED = "reference"

# this engine with its defaults, and what a variant changes
_ONE_PASS = {"optim.implementation": "fused"}
_COMPILED = {**_ONE_PASS, "train.compile": "true"}
_GRAPH = {**_COMPILED, "train.graph": "true"}
ENGINE = {
    "plain": {TARGET: "none"},
    "sra": {},
    "sra_fp8": {"align.teacher_dtype": "fp8"},
    "one_pass": {**_ONE_PASS, "train.compile": "false", "train.graph": "false"},
    "compile": {**_COMPILED, "train.graph": "false"},
    "graph": _GRAPH,
    "fp8": {**_GRAPH, "align.teacher_dtype": "fp8"},
    **{name: {TARGET: name} for name in OTHER_TARGETS},
}

# fields of ``Switches`` that are words; PyTorch knows those of the first two, the others are true or false
OF_PYTORCH = ("backend", "mode")
WORDS = {
    "compile": ("no", "blocks", "whole"),
    "adamw": ("foreach", "fused"),
    "ema": ("each", "foreach"),
}

# plain PyTorch programs; swap_ema is how other engines run an EMA teacher today
_TRUNCATED = Switches(teacher_copy=True, truncated=True)
PROGRAMS = {
    "fp32_teacher": Switches(),
    "bf16_teacher": Switches(teacher_copy=True),
    "swap_ema": Switches(swap=True, adamw="fused", ema="foreach"),
    "truncated": _TRUNCATED,
    "fused_ops": replace(_TRUNCATED, kernels=True, measured_attention=True),
    "strong": replace(
        _TRUNCATED, compile="blocks", adamw="fused", ema="foreach", measured_attention=True
    ),
}
NAMES = (PUBLISHED, *ENGINE, *PROGRAMS)

# from the published code to this engine with an fp8 teacher. Every rung changes one thing, except for
# swap_ema. fp32_teacher is the published program written with this repository's modules.
LADDER = (
    PUBLISHED,
    "fp32_teacher",
    "swap_ema",
    "bf16_teacher",
    "truncated",
    "fused_ops",
    "one_pass",
    "compile",
    "graph",
    "fp8",
)


def layers(model: str) -> tuple[int, int, int]:
    """Student layer, teacher layer and depth.

    For sizes that the paper does not have, a quarter and two thirds of the depth are taken, of an
    MMDiT a quarter and three quarters.
    """
    family, sizes = preset(model)
    depth = sizes["depth"]
    rule = (depth // 4, depth * 3 // 4 if family.family == "MMDiT" else depth * 2 // 3)
    student, teacher = LAYERS.get(model.partition("/")[0], rule)
    return student, teacher, depth


def teacher_depths(model: str) -> list[str]:
    """``sra`` with the teacher stopped at a quarter, a half, three quarters and all of the depth."""
    _, _, depth = layers(model)
    return [f"sra+{TEACHER_LAYER}={depth * quarter // 4}" for quarter in (1, 2, 3, 4)]


def is_depth(name: str) -> bool:
    """Whether a variant is ``sra``, possibly with another teacher layer, and nothing else."""
    return name == "sra" or (name.startswith(f"sra+{TEACHER_LAYER}=") and name.count("+") == 1)


def teacher_share(name: str, model: str) -> float:
    """The teacher's blocks over all blocks, n/L, of a variant of the engine."""
    _, teacher, depth = layers(model)
    return int(Variant.parse(name).options.get(TEACHER_LAYER, teacher)) / depth


def expand(names: list[str], model: str, has_published: bool) -> list[str]:
    """The names with ``ladder`` and ``depths`` replaced by what they stand for.

    Args:
        names: variants, in order.
        model: whose depth counts.
        has_published: whether there is a checkout of the published code. Without one the ladder starts
            at its second rung.

    Raises:
        ValueError: an unknown name, or the published code without a checkout.
    """
    ladder = LADDER if has_published else LADDER[1:]
    groups = {"ladder": ladder, "depths": teacher_depths(model)}
    found = [each for name in names for each in groups.get(name, (name,))]
    bases = [Variant.parse(name).base for name in found]
    if PUBLISHED in bases and not has_published:
        raise ValueError(
            f"the variant {PUBLISHED} needs --published PATH: a checkout of the published code"
        )
    return found


def value_of(switch: str, word: str) -> str | bool:
    """The value of a field of ``Switches``.

    Raises:
        ValueError: it has no such value, and would be taken for another one.
    """
    if switch in OF_PYTORCH:
        return word
    known = WORDS.get(switch, ("true", "false"))
    if word not in known:
        raise ValueError(f"expected {switch} to be {' or '.join(known)}, got {word!r}")
    return word if switch in WORDS else word == "true"


def is_another_target(option: str) -> bool:
    """Whether an option chooses what is aligned to."""
    return option == TARGET or option.startswith("align2.")


@dataclass(frozen=True)
class Variant:
    """A parsed name.

    Attributes:
        name: with its settings.
        base: without them.
        options: of the engine, ``{"align.target": "none"}``.
        switches: of a plain PyTorch program; None for the engine and the published code.
        variables: of the environment, from the name.
    """

    name: str
    base: str
    options: dict[str, str]
    switches: Switches | None
    variables: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """The variant of this name.

        Raises:
            ValueError: an unknown name or setting.
        """
        base, *settings = name.split("+")
        if base not in NAMES:
            known = ", ".join((*NAMES, "ladder", "depths"))
            raise ValueError(f"expected a variant of {known}, got {base!r}")
        if any("=" not in setting for setting in settings):
            raise ValueError(f"expected settings name=value after +, got {name!r}")
        given = dict(setting.split("=", 1) for setting in settings)
        options = {**ENGINE.get(base, {}), **{k: v for k, v in given.items() if "." in k}}
        # a rival's variables are chosen for it
        variables = {k: v for k, v in given.items() if k in VARIABLES and base in ENGINE}
        switches = {k: v for k, v in given.items() if "." not in k and k not in variables}

        known = {each.name for each in fields(Switches)} if base in PROGRAMS else set()
        unknown = ", ".join(sorted(set(switches) - known))
        if unknown:
            raise ValueError(
                f"variant {base} has no switch {unknown}; options of the engine have a dot, and its "
                f"variables are {', '.join(VARIABLES)}"
            )
        if base not in ENGINE and any(is_another_target(option) for option in options):
            raise ValueError(f"variant {base} runs SRA and nothing else, got {name!r}")
        if base not in PROGRAMS:
            return cls(name, base, options, None, variables)
        values = {switch: value_of(switch, word) for switch, word in switches.items()}
        return cls(name, base, options, replace(PROGRAMS[base], **values))

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are set while the variant is built and runs.

        Some keep this repository's kernels out of the programs that must do without.
        """
        if self.switches is None:
            return self.variables
        # SRA_FAST_BACKEND=torch also lets PyTorch pick attention's backend; "auto" measures it
        found = {"SRA_FAST_ATTENTION": "auto" if self.switches.measured_attention else "sdpa"}
        if not self.switches.kernels:
            found["SRA_FAST_BACKEND"] = "torch"
        return found

    def configuration(self, model: str, resolution: int, batch: int, device: str) -> Config:
        """The engine's configuration of one case.

        Args:
            model: such as "SiT-XL/2".
            resolution: of the images, in pixels.
            batch: images of the one process that there is.
            device: "cuda" trains in bf16, "cpu" in fp32.
        """
        options = {
            "model.name": model,
            "model.input_size": resolution // 8,
            "train.global_batch": batch,
            "train.precision": "bf16" if device == "cuda" else "fp32",
            # no log rows while steps are timed
            "train.log_every": 10**9,
            **self._layer_options(model),
            **self.options,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        cfg, _ = parse_train(words)
        # no data set is opened: channels and classes are those of ImageNet's latents
        cfg.model.fill_in()
        for align in cfg.alignments.values():
            fill_in(align, cfg)
        return cfg

    def _layer_options(self, model: str) -> dict[str, int]:
        """SRA's layers for every target with a teacher, so that their times compare. The others
        have their own, which the engine fills in.
        """
        target = self.options.get(TARGET, AlignConfig.target)
        # plain has the options of SRA, without effect
        has_teacher = target == "none" or hasattr(TARGETS[target].config, "teacher_layer")
        if not has_teacher:
            return {}
        student, teacher, _ = layers(model)
        # the student's layer may not lie above the teacher's
        student = min(student, int(self.options.get(TEACHER_LAYER, teacher)))
        return {STUDENT_LAYER: student, TEACHER_LAYER: teacher}


def fill_in(align: AlignConfig, cfg: Config) -> None:
    """Give what is left open of a target its default."""
    TARGETS[align.target].fill_in(align, cfg)
    if hasattr(align, "feature_width") and align.feature_width is None:
        align.feature_width = FEATURE_WIDTH
