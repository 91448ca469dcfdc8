"""The variants of a training step: what each name stands for.

A name may carry settings behind ``+``: those with a dot are the engine's own options, the others fields of
``programs.Switches``: ``sra+train.compile=true``, ``strong+compile=whole``, ``sra+align.teacher_layer=14``.
"""

from dataclasses import dataclass, fields, replace

from programs import Switches

from sra_fast.config.cli import parse_train
from sra_fast.config.schema import Config
from sra_fast.models import preset

# student and teacher layer of the paper
LAYERS = {
    "SiT-B": (3, 8),
    "SiT-L": (6, 16),
    "SiT-XL": (8, 20),
    "DiT-B": (3, 7),
    "DiT-L": (6, 14),
    "DiT-XL": (8, 16),
}
TEACHER_LAYER = "align.teacher_layer"
REFERENCE = "reference"
_ONE_PASS = {"optim.implementation": "fused"}
_COMPILED = {**_ONE_PASS, "train.compile": "true"}
_GRAPH = {**_COMPILED, "train.graph": "true"}
# the engine with its own defaults, and what they are changed to
ENGINE = {
    "plain": {"align.target": "none"},
    "sra": {},
    "sra_fp8": {"align.teacher_dtype": "fp8"},
    "one_pass": {**_ONE_PASS, "train.compile": "false", "train.graph": "false"},
    "compile": {**_COMPILED, "train.graph": "false"},
    "graph": _GRAPH,
    "fp8": {**_GRAPH, "align.teacher_dtype": "fp8"},
}
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
NAMES = (REFERENCE, *ENGINE, *PROGRAMS)
# every rung changes one thing, but for swap_ema, which is how other engines run an EMA teacher today; fp32_teacher is the
# published program written with this repository's modules
LADDER = (
    REFERENCE,
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
    """Student layer, teacher layer and depth; a quarter and two thirds of the depth where the paper has no such size."""
    depth = preset(model)[1]["depth"]
    return *LAYERS.get(model.partition("/")[0], (depth // 4, depth * 2 // 3)), depth


def teacher_depths(model: str) -> list[str]:
    """SRA with the teacher stopped at a quarter, a half, three quarters and the whole of the depth."""
    return [f"sra+{TEACHER_LAYER}={layers(model)[2] * quarter // 4}" for quarter in (1, 2, 3, 4)]


def is_depth(name: str) -> bool:
    """Whether a variant is ``sra``, at most with another teacher layer."""
    return name == "sra" or (name.startswith(f"sra+{TEACHER_LAYER}=") and name.count("+") == 1)


def teacher_share(name: str, model: str) -> float:
    """n/L of a variant of the engine."""
    _, teacher, depth = layers(model)
    return int(Variant.parse(name).options.get(TEACHER_LAYER, teacher)) / depth


def expand(names: list[str], model: str, has_reference: bool) -> list[str]:
    """``ladder`` and ``depths`` replaced by what they stand for, in order.

    ValueError for unknown names, and for the published code without a checkout; a ladder without one starts higher up.
    """
    groups = {"ladder": LADDER[0 if has_reference else 1 :], "depths": teacher_depths(model)}
    found = [each for name in names for each in groups.get(name, (name,))]
    if REFERENCE in [Variant.parse(name).base for name in found] and not has_reference:
        raise ValueError(
            "the variant reference needs --reference PATH: a checkout of the published code"
        )
    return found


@dataclass(frozen=True)
class Variant:
    """A parsed name: engine options, and a program's switches or None (the engine, or the published code)."""

    name: str
    base: str
    options: dict[str, str]
    switches: Switches | None

    @classmethod
    def parse(cls, name: str) -> "Variant":
        base, *settings = name.split("+")
        if base not in NAMES:
            raise ValueError(
                f"expected a variant of {', '.join((*NAMES, 'ladder', 'depths'))}, got {base!r}"
            )
        if any("=" not in setting for setting in settings):
            raise ValueError(f"expected settings name=value behind +, got {name!r}")
        given = dict(setting.split("=", 1) for setting in settings)
        options = {**ENGINE.get(base, {}), **{k: v for k, v in given.items() if "." in k}}
        switches = {k: v for k, v in given.items() if "." not in k}
        unknown = set(switches) - (
            {f.name for f in fields(Switches)} if base in PROGRAMS else set()
        )
        if unknown:
            raise ValueError(
                f"variant {base} has no switch {', '.join(sorted(unknown))}; engine options have a dot"
            )
        if base not in PROGRAMS:
            return cls(name, base, options, None)
        words = {"true": True, "false": False}
        return cls(
            name,
            base,
            options,
            replace(PROGRAMS[base], **{k: words.get(v, v) for k, v in switches.items()}),
        )

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are set while it is built and runs: no kernel of ours in a program that must do without."""
        if self.switches is None:
            return {}
        backend = {} if self.switches.kernels else {"SRA_FAST_BACKEND": "torch"}
        # with SRA_FAST_BACKEND alone PyTorch picks attention's backend; the best rival measures it, as the engine does
        return {
            **backend,
            "SRA_FAST_ATTENTION": "auto" if self.switches.measured_attention else "sdpa",
        }

    def configuration(self, model: str, resolution: int, batch: int, device: str) -> Config:
        """The engine's configuration of one case; batches are per process, and there is one."""
        student, teacher, _ = layers(model)
        options = {
            "model.name": model, "model.input_size": resolution // 8, "train.global_batch": batch,
            "align.student_layer": min(student, int(self.options.get(TEACHER_LAYER, student))),
            TEACHER_LAYER: teacher, "train.precision": "bf16" if device == "cuda" else "fp32",
            "train.log_every": 10**9, **self.options,
        }  # fmt: skip
        return parse_train(
            [word for name, value in options.items() for word in (f"--{name}", str(value))]
        )[0]
