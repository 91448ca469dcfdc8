"""A model for sampling and analysis from anything that holds weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sra_fast import models
from sra_fast.checkpoint.names import CLASS_TABLE
from sra_fast.checkpoint.sources import find_weights, held_key, read_found
from sra_fast.checkpoint.values import (
    family_in,
    refuse_other_prediction,
    refuse_reversed_time,
    refuse_unknown_times,
    warn_of_assumptions,
)
from sra_fast.config.averages import EMA, STUDENT
from sra_fast.config.schema import DiffusionConfig, ModelConfig
from sra_fast.data.facts import DataFacts
from sra_fast.diffusion.flow_matching import check_time_shift
from sra_fast.models import DiffusionTransformer, has_joint_blocks
from sra_fast.utils.checks import require_that
from sra_fast.utils.messages import warn
from sra_fast.utils.registry import MODEL_FAMILIES

HEAD = "ap_head."


@dataclass
class LoadedModel:
    """Weights from anywhere, with what is known about them.

    Attributes:
        model: in eval mode, fp32, on the CPU.
        diffusion: interpolant and shift of times that it was trained with; the rest is not known.
        facts: about the data it was trained on; None: not known (weights of other projects).
        config: at least ``model`` and ``diffusion`` of the run's configuration; None: not known.
        step: how many optimizer steps made the weights; None: not known.
        source: the file or checkpoint folder that was read.
        fresh: names of the parameters that the weights lack: a projection head, which only training
            reads. They are zero.
        weights: which weights these are, ``"ema"``, ``"model"`` (the student) or the name of an
            average; None: the file does not say.
    """

    model: DiffusionTransformer
    diffusion: DiffusionConfig
    facts: DataFacts | None = None
    config: dict | None = None
    step: int | None = None
    source: Path | None = None
    fresh: tuple[str, ...] = ()
    weights: str | None = None

    @property
    def path(self) -> str:
        """The interpolant that it was trained with."""
        return self.diffusion.path


def load_model(
    path: str,
    weights: str = "ema",
    num_heads: int | None = None,
    input_size: int | None = None,
) -> LoadedModel:
    """A model for sampling and analysis.

    Args:
        path: whatever ``read_weights`` takes: a run folder (its newest weights), a checkpoint
            folder, ``.safetensors``, shards, a Hugging Face model folder, a ``.pt``.
        weights: ``"ema"``; ``"model"`` (the student, which a checkpoint and the published code's
            ``.pt`` hold); the name of one of ``train.averages``, which a checkpoint holds; or
            ``"power:SIGMA"``, made from a run's snapshots. An export has the weights that it was
            made of, under their name and as ``"ema"``.
        num_heads: for weights whose width is not one of the paper's sizes and that do not say it.
        input_size: for weights without a position embedding that do not say it.

    Raises:
        ValueError: nothing is there, it cannot be read, it does not have these weights, or they
            contradict ``num_heads`` or ``input_size``.
    """
    source = find_weights(path, weights)
    held, source = read_found(path, source, weights)
    return model_of(held, source, weights, num_heads, input_size)


def model_of(
    held: dict,
    source: Path,
    weights: str = "ema",
    num_heads: int | None = None,
    input_size: int | None = None,
) -> LoadedModel:
    """The model of weights that were read.

    Args:
        held: from ``read_weights``.
        source: where from.
        weights, num_heads, input_size: see ``load_model``.

    Raises:
        ValueError: see ``load_model``.
    """
    state, role = _chosen(held, weights, source)
    config = held.get("config")
    args = held.get("args")
    if config is None:
        refuse_reversed_time(state, args, str(source))
        refuse_unknown_times(state, args, str(source))
    described = config or described_in(args)
    if described is not None:
        model = from_config(described, source)
    else:
        warn_of_assumptions(state, args, str(source))
        state, num_classes = _with_classes(state, getattr(args, "num_classes", None), source)
        model = _from_shapes(state, args, num_heads, num_classes, input_size)
    refuse_other_prediction(args, model.process, str(source))
    known = models.arguments_of(model)
    for name, value in {"num_heads": num_heads, "input_size": input_size}.items():
        require_that(
            value in (None, known[name]),
            f"{source} was made with {name} {known[name]}, got {name} {value}",
        )
    fresh = fill(model, state)
    # a projection head that the weights lack: the same in every process that samples
    for name in fresh:
        torch.nn.init.zeros_(model.get_parameter(name))
    step = held.get("step", held.get("steps"))
    # other projects may have anything there
    step = step if isinstance(step, int) else None
    facts = facts_of(held, model)
    diffusion = diffusion_in(config, args, source)
    return LoadedModel(model.eval(), diffusion, facts, config, step, source, fresh, role)


def diffusion_in(config: dict | None, args, source: str | Path) -> DiffusionConfig:
    """Interpolant and shift of times that weights were trained with; ValueError for such as are not
    known here.

    Args:
        config: of a run, or what an export of other weights has; None: there is none.
        args: of a ``.pt``; only ours say the shift.
        source: for messages.
    """
    told = (config or {}).get("diffusion", {})
    path = told.get("path", getattr(args, "path_type", "linear"))
    require_that(
        path in ("linear", "cosine"),
        f"expected weights of the interpolant linear or cosine, {source} has {path}",
    )
    shift = told.get("time_shift", getattr(args, "time_shift", 1.0))
    check_time_shift(shift, str(source))
    return DiffusionConfig(path=path, time_shift=float(shift))


def facts_of(held: dict, model: DiffusionTransformer | None) -> DataFacts | None:
    """What is known of the data that weights were trained on.

    Args:
        held: from ``read_weights``.
        model: of its configuration; None: it has none.
    """
    if "data" in held:
        return DataFacts.from_json(held["data"])
    return None if model is None else _facts_of_config(held.get("config", {}), model)


def has_run(config: dict | None) -> bool:
    """Whether a configuration is that of a run: those of other weights say the model and its
    process only.
    """
    return config is not None and "optim" in config


def _facts_of_config(config: dict, model: DiffusionTransformer) -> DataFacts | None:
    """What the configuration of a run tells about its data, where an older version has kept no more."""
    data = config.get("data", {})
    if data.get("latent_scale") is None:
        return None
    return DataFacts(
        name=data["name"],
        shape=(model.in_channels, model.input_size, model.input_size),
        # captions have none
        num_classes=getattr(model, "num_classes", 1),
        path=data["path"],
        pixels=data["name"] == "digits",
        scale=data["latent_scale"],
        shift=data.get("latent_shift") or 0.0,
    )


def _chosen(held: dict, weights: str, source: Path) -> tuple[dict[str, Tensor], str | None]:
    """The weights of a name, and which they are; a student without EMA stands for both."""
    key = held_key(weights)
    # an export of other weights is that, also where nobody asks for them by name
    named = held.get("weights", EMA)
    if EMA in held and named != EMA and weights in (EMA, named):
        return held[EMA], named
    # the only weights of a file that does not name them; those of a run are its EMA
    unnamed = named == EMA and held.get("unnamed", False) and not has_run(held.get("config"))
    if key in held:
        return held[key], None if unnamed else weights
    if weights == EMA:
        warn("%s holds no EMA: its only weights are taken", source)
        return held[STUDENT], STUDENT
    known = [named] if named != EMA else [key for key in (EMA, STUDENT) if key in held]
    only = "weights without a name" if unnamed else ", ".join(known)
    where = "the student is in a run's checkpoints and in a .pt as the published code writes it"
    if weights != STUDENT:
        where = "averages of train.averages are in a run's checkpoints"
    raise ValueError(f"{source} holds no weights {weights!r}, only {only}; {where}")


def from_config(config: dict, source: str | Path) -> DiffusionTransformer:
    """The model of a run's configuration, or of the ``architecture`` that an export of other
    weights has instead; ValueError, which names the source, if this version does not know it.
    """
    try:
        if "architecture" in config:
            architecture = config["architecture"]
            return MODEL_FAMILIES[architecture["family"]](**architecture["arguments"])
        return ModelConfig(**config["model"]).build()
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"the configuration of the weights in {source} is that of another version: {error}"
        ) from None


def described_in(args) -> dict | None:
    """The architecture that the arguments of a ``.pt`` of a run tell; None: they tell none."""
    told = getattr(args, "architecture", None)
    # other projects may have anything of this name
    if not isinstance(told, dict) or set(told) != {"family", "arguments"}:
        return None
    return {"architecture": told}


def _with_classes(
    state: dict[str, Tensor], num_classes: int | None, source: Path
) -> tuple[dict[str, Tensor], int | None]:
    """Weights with a class embedding, and their number of classes."""
    has_classes = any(name.startswith("y_embedder.") for name in state)
    if has_classes or has_joint_blocks(state):
        return state, num_classes
    warn("%s has no class embedding: its model is unconditional, one class", source)
    # one class whose embedding adds nothing
    width = state["x_embedder.proj.weight"].shape[0]
    return {**state, CLASS_TABLE: torch.zeros(1, width)}, 1


def _from_shapes(
    state: dict[str, Tensor],
    args,
    num_heads: int | None,
    num_classes: int | None,
    input_size: int | None,
) -> DiffusionTransformer:
    """A model of the size that the weights' shapes show.

    ``args`` of a published checkpoint say what shapes do not: heads, classes apart from the null
    class, SiT or DiT; of an MMDiT also what ``_told_of_text`` knows.
    """
    if "pos_embed" not in state and input_size is None:
        input_size = getattr(args, "input_size", None)
        # of the image: the published code's VAE makes latents of an eighth of it
        if input_size is None and hasattr(args, "resolution"):
            input_size = args.resolution // 8
    cls, arguments = models.arguments_from_state_dict(
        state,
        getattr(args, "num_heads", None) or num_heads,
        num_classes,
        family_in(args),
        input_size,
    )
    if cls.conditioning == "text":
        arguments |= _told_of_text(args, "pos_embed" in state)
    return cls(**arguments)


def _told_of_text(args, has_table: bool) -> dict:
    """Arguments of an MMDiT that a published checkpoint of ours tells, and its shapes do not.

    ``has_table``: the weights have a position table, which shows the positions.
    """
    names = {
        "context_tokens": "context_tokens",
        "time_scale": "time_scale",
        "cfg_prob": "class_dropout_prob",
    }
    if not has_table:
        names |= {name: name for name in ("position_start", "position_step")}
    told = {name: getattr(args, key, None) for key, name in names.items()}
    return {name: value for name, value in told.items() if value is not None}


def fill(model: DiffusionTransformer, state: dict[str, Tensor]) -> tuple[str, ...]:
    """Load weights into a model. What the model computes itself, or only training reads, may be
    absent: the position embedding and the projection head.

    Returns:
        Names of the parameters that keep their values, those of the head if it is absent.

    Raises:
        ValueError: the weights have another name or shape. It says which.
    """
    expected = {name: [*value.shape] for name, value in model.state_dict().items()}
    found = {name: [*value.shape] for name, value in state.items()}
    absent = [name for name in expected if name.startswith(HEAD)]
    # a part of a head is no head
    fresh = tuple(absent) if not any(name.startswith(HEAD) for name in found) else ()
    free = {*fresh, "pos_embed"}
    for name in sorted((set(expected) | set(found)) - free):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"the weights do not fit the model: {name} should be "
                f"{expected.get(name, 'absent')}, it is {found.get(name, 'absent')}"
            )
    # a table of another resolution was checked, and is computed anew
    fitting = {name: state[name] for name in found if found[name] == expected.get(name)}
    table = fitting.get("pos_embed")
    # it may have been rounded to half precision
    if table is not None and not torch.allclose(table, model.pos_embed, rtol=0, atol=1e-2):
        raise ValueError(
            "the weights do not fit the model: their position table pos_embed is that of other "
            "positions"
        )
    model.load_state_dict(fitting, strict=False)
    return fresh
