"""The weights that ``train.init_from`` names, fitted to the run's model.

Weights of another task fit in part: with other classes, captions by another text encoder, another
resolution, other channels or patches, or without a projection head. What fits is taken by name and
shape. The rest keeps the values of a fresh model of the run's seed, and is listed. The blocks and
the time's embedder must fit as a whole.
"""

from dataclasses import asdict

import torch
from torch import Tensor

from sra_fast import models
from sra_fast.alignment.target import trained_heads
from sra_fast.checkpoint.load_model import HEAD, described_in, facts_of, from_config
from sra_fast.checkpoint.names import CLASS_TABLE, KNOWN_PARAMETER
from sra_fast.checkpoint.optimizer_state import match_optimizer
from sra_fast.checkpoint.published import OF_TEXT
from sra_fast.checkpoint.sources import read_weights
from sra_fast.checkpoint.values import (
    family_in,
    refuse_other_prediction,
    refuse_reversed_time,
    refuse_unknown_times,
    warn_of_direction,
)
from sra_fast.config.schema import Config
from sra_fast.data.facts import DataFacts
from sra_fast.data.normalization import told_apart
from sra_fast.models import ALIGN_HEADS, DiffusionTransformer, has_joint_blocks
from sra_fast.models.positions import grid_positions
from sra_fast.utils.checks import require_that
from sra_fast.utils.messages import warn
from sra_fast.utils.registry import MODEL_FAMILIES

# parameters that another task may have in another shape, or not at all
ENDS = ("x_embedder.", "y_embedder.", "context_embedder.", "pos_embed", "final_layer.", HEAD)
# of an MMDiT: what reads the features of captions
TEXT_ENDS = ("y_embedder.", "context_embedder.")
# what continues a training run, and needs weights that fit as a whole
CONTINUED = ("opt", "steps", "epoch")
# arguments of the published code, and their names here
PUBLISHED_SETTINGS = {
    "cfg_prob": "model.class_dropout_prob",
    "t_max": "align.t_max",
    "block_out_s": "align.student_layer",
    "block_out_t": "align.teacher_layer",
}
PUBLISHED_DISTANCES = {"sml1": "smooth_l1", "l2": "l2", "l1": "l1", "cos": "cosine_token"}


def read_initial(cfg: Config, facts: DataFacts | None = None) -> dict:
    """What ``train.init_from`` names, as far as it fits the run's model.

    The first process warns of what is not taken, and of data of another kind.

    Args:
        cfg: checked, with the sizes of the model filled in.
        facts: about the run's data, to compare with those of the weights.

    Returns:
        ``"ema"`` and ``"model"`` (the student): state dicts of what fits, under the names of the
        model. If everything fits, also what continues a published checkpoint: ``opt`` and
        ``steps``. ``"origin"``: what was taken, for the first line of the run.

    Raises:
        ValueError: it cannot be read, or comes from another network (depth, width, heads, diffusion
            process, interpolant), or its optimizer state does not fit.
    """
    source = str(cfg.train.init_from)
    initial = read_weights(source)
    # shapes only: no memory is used
    with torch.device("meta"):
        model = cfg.model.build()
        described = initial.get("config") or described_in(initial.get("args"))
        theirs = from_config(described, source) if described else None
    args = initial.get("args")
    states = {key: initial[key] for key in ("model", "ema") if key in initial}
    # what kind of weights they are, before their details
    for state in states.values():
        if theirs is None:
            refuse_reversed_time(state, args, source)
            refuse_unknown_times(state, args, source)
        _check_conditioning(source, model, state)
    if theirs is None:
        warn_of_direction(next(iter(states.values())), args, source)
    _check_heads(source, model, theirs, args)
    _check_times(source, model, theirs or args)
    refuse_other_prediction(args, model.process, source)
    reasons = _other_classes(model, theirs or args)
    their_facts = facts_of(initial, theirs)
    if facts is not None and their_facts is not None:
        _warn_of_other_inputs(source, facts, their_facts)
        reasons = reasons or _other_names(facts, their_facts)
        reasons |= _other_encoder(model, facts, their_facts)
    missing: dict[str, dict[str, str]] = {}
    for key, state in states.items():
        _check_process(source, model, _process_of(theirs, args), state)
        _check_positions(source, cfg, model, state, theirs)
        missing[key] = reasons | _not_fitting(source, model, state)
        initial[key] = {name: value for name, value in state.items() if name not in missing[key]}
    # the student's decide what continues; the EMA of what it lacks begins as the student's
    fresh = missing.get("model", missing.get("ema", {}))
    only_ema = sorted(missing.get("ema", {}).keys() - fresh.keys())
    _check_interpolant(source, cfg, model, initial)
    shapes = {name: [*value.shape] for name, value in model.state_dict().items()}
    parameters = {name: p.shape for name, p in model.named_parameters()}
    heads = trained_heads(cfg.alignments.values())
    own_heads = sorted(name for name in heads if name.startswith(ALIGN_HEADS))
    remark = _continued(source, initial, parameters, bool(fresh) or bool(own_heads))
    if only_ema:
        remark += f"; its EMA has no {', '.join(only_ema)}, which begin as the student's"
    if "opt" in initial:
        _warn_of_other_settings(source, cfg, initial)
    if own_heads:
        remark += f"; fresh: the head {' and '.join(own_heads)}, which no model has"
    initial["origin"] = _described(source, shapes, fresh, initial)
    _warn_of_the_rest(source, shapes, fresh, remark)
    _check_steps(source, cfg, initial.get("steps", 0))
    return initial


def _check_steps(source: str, cfg: Config, steps) -> None:
    """A published checkpoint with its optimizer continues at its step count."""
    require_that(
        isinstance(steps, int),
        f"expected a number of steps in train.init_from {source}, got {steps!r}",
    )
    require_that(
        steps < cfg.train.steps,
        f"train.steps must exceed the {steps} of train.init_from, got {cfg.train.steps}",
    )


def _check_heads(
    source: str, model: DiffusionTransformer, theirs: DiffusionTransformer | None, args
) -> None:
    """The number of heads is the one property of a model that the shapes of its weights do not
    show.
    """
    ours = models.arguments_of(model)["num_heads"]
    found = getattr(args, "num_heads", ours)
    if theirs is not None:
        found = models.arguments_of(theirs)["num_heads"]
    require_that(
        found == ours,
        f"train.init_from {source} was made with {found} heads, the model has {ours}",
    )


def _check_interpolant(
    source: str, cfg: Config, model: DiffusionTransformer, initial: dict
) -> None:
    """ValueError for weights that were trained with another path from data to noise. Shapes do not
    show it either.
    """
    ours = cfg.diffusion.path
    told = initial.get("config", {}).get("diffusion", {})
    found = told.get("path", getattr(initial.get("args"), "path_type", ours))
    # the other processes have no choice of it
    require_that(
        found == ours or model.process != "flow_matching",
        f"train.init_from {source} was trained with the interpolant {found}, the run has "
        f"--diffusion.path {ours}",
    )
    if model.process != "flow_matching":
        return
    # other times are learned, unlike another interpolant
    args = initial.get("args")
    known = {"time": getattr(args, "weighting", None)}
    known["time_shift"] = getattr(args, "time_shift", None)
    known |= {name: told[name] for name in asdict(cfg.diffusion) if name in told and name != "path"}
    different = [
        f"{name} {theirs}, the run has {getattr(cfg.diffusion, name)}"
        for name, theirs in known.items()
        if theirs not in (None, getattr(cfg.diffusion, name))
    ]
    if different:
        warn("train.init_from %s is of diffusion.%s", source, "; of diffusion.".join(different))


def _check_conditioning(source: str, model: DiffusionTransformer, state: dict) -> None:
    """ValueError for weights of class labels where the model takes captions, and the inverse."""
    found = "text" if has_joint_blocks(state) else "labels"
    require_that(
        found == model.conditioning,
        f"train.init_from {source} holds a network of {found}, the model ({model.family}) takes "
        f"{model.conditioning}",
    )


def _check_times(source: str, model: DiffusionTransformer, told) -> None:
    """ValueError for weights whose times are multiplied by another number, which shapes do not
    show.
    """
    found = getattr(told, "time_scale", OF_TEXT["time_scale"])
    require_that(
        found == model.time_scale,
        f"train.init_from {source} multiplies times by {found:g}, the model by "
        f"{model.time_scale:g}: expected model.time_scale {found:g}",
    )


def _check_positions(
    source: str,
    cfg: Config,
    model: DiffusionTransformer,
    state: dict[str, Tensor],
    theirs: DiffusionTransformer | None,
) -> None:
    """ValueError for weights whose patches have other places in the position embedding than those
    of the model, which are computed anew.

    At another size SD3's patches have the middle of its table. Places that the user gives for such
    a size are taken as they are.
    """
    table = state.get("pos_embed")
    if table is not None:
        found = grid_positions(table)
        assert found is not None, "weights with another table are not read"
    elif theirs is not None:
        found = (_grid(theirs), *_places(theirs))
    else:
        return
    their_grid, start, step = found
    grid = _grid(model)
    if grid != their_grid:
        given = (cfg.model.position_start, cfg.model.position_step)
        if (start, step) == (0.0, 1.0) or given != (None, None):
            return
        start += (their_grid - grid) // 2 * step
    elif table is not None:
        ours = model.make_pos_embed()
        # a network of another width is refused later; the table may have been rounded to bf16
        if table.shape != ours.shape or torch.allclose(table, ours, rtol=0, atol=1e-2):
            return
    require_that(
        (start, step) == _places(model),
        f"train.init_from {source} has other positions than the model: expected "
        f"model.position_start {start!r} and model.position_step {step!r}",
    )


def _grid(model: DiffusionTransformer) -> int:
    """Patches along an axis."""
    return model.input_size // model.patch_size


def _places(model: DiffusionTransformer) -> tuple[float, float]:
    """Start and step of the patches in the position embedding."""
    arguments = models.arguments_of(model)
    return arguments.get("position_start", 0.0), arguments.get("position_step", 1.0)


def _other_classes(model: DiffusionTransformer, told) -> dict[str, str]:
    """The class table and why it does not fit, if the weights were made for another number of
    classes.
    """
    if model.conditioning != "labels":
        return {}
    # a null class less may hide a class more: shapes do not tell
    found = getattr(told, "num_classes", model.num_classes)
    return {} if found == model.num_classes else {CLASS_TABLE: f"it is of {found} classes"}


def _other_names(ours: DataFacts, theirs: DataFacts) -> dict[str, str]:
    """The class table and why it does not fit, if its rows stand for other classes."""
    if not ours.class_names or not theirs.class_names or ours.class_names == theirs.class_names:
        return {}
    pairs = zip(theirs.class_names, ours.class_names, strict=False)
    first = next((f", {a} for {b}" for a, b in pairs if a != b), "")
    return {CLASS_TABLE: f"its classes have other names{first}"}


def _other_encoder(
    model: DiffusionTransformer, ours: DataFacts, theirs: DataFacts
) -> dict[str, str]:
    """What reads captions and why it does not fit, if other text encoders have made their
    features.
    """
    encoders = [(facts.text or {}).get("encoders") for facts in (ours, theirs)]
    if None in encoders:
        return {}
    hashes = [[encoder["sha256"] for encoder in held] for held in encoders]
    if hashes[0] == hashes[1]:
        return {}
    names = [name for name in model.state_dict() if name.startswith(TEXT_ENDS)]
    return dict.fromkeys(names, "its captions have the features of another text encoder")


def _warn_of_other_inputs(source: str, ours: DataFacts, theirs: DataFacts) -> None:
    """The inputs of the two trainings may have the same shape and mean something else."""
    kinds = ["pixels" if facts.pixels else "latents" for facts in (theirs, ours)]
    if ours.pixels != theirs.pixels:
        warn("%s was trained on %s, the data of this run are %s", source, *kinds)
        return
    for name in ("scale", "shift"):
        found, expected = getattr(theirs, name), getattr(ours, name)
        if found != expected:
            warn(
                "%s was trained on latents of %s %s, the data of this run have %s "
                "(--data.latent_%s)",
                *(source, name, *told_apart(found, expected), name),
            )


def _process_of(theirs: DiffusionTransformer | None, args) -> str | None:
    """The diffusion process that the weights were trained with; None: not known."""
    if theirs is not None:
        return theirs.process
    family = family_in(args)
    return None if family is None else MODEL_FAMILIES[family].process


def _check_process(
    source: str, model: DiffusionTransformer, process: str | None, state: dict[str, Tensor]
) -> None:
    """ValueError for weights of another diffusion process, whose times mean something else."""
    require_that(
        process in (None, model.process),
        f"train.init_from {source} was trained with {process}, the model is trained with "
        f"{model.process}",
    )
    last = state.get("final_layer.linear.bias")
    if last is None:
        return
    # a DiT makes two channels of each: noise and variance
    _, channels, patch, _ = state[KNOWN_PARAMETER].shape
    made = len(last) / (channels * patch**2)
    ours = model.out_channels / model.in_channels
    require_that(
        made == ours,
        f"train.init_from {source} makes {made:g} channels for each of the input, the model makes "
        f"{ours:g}: a SiT makes 1, a DiT 2, without its variance (model.options.learn_sigma) 1",
    )


def _not_fitting(
    source: str, model: DiffusionTransformer, state: dict[str, Tensor]
) -> dict[str, str]:
    """Parameters of the model's ends that the weights do not have, each with what they have; and
    the position embedding, if it is that of another resolution.

    Raises:
        ValueError: anything else does not fit.
    """
    expected = {name: [*value.shape] for name, value in model.state_dict().items()}
    found = {name: [*value.shape] for name, value in state.items()}
    # without a table nothing is lost: the model computes it
    found.setdefault("pos_embed", expected["pos_embed"])
    missing = {}
    for name in sorted(set(expected) | set(found)):
        if expected.get(name) == found.get(name):
            continue
        is_end = name in expected and name.startswith(ENDS)
        require_that(
            is_end,
            f"train.init_from {source} does not fit the model: {name} should be "
            f"{expected.get(name, 'absent')}, it is {found.get(name, 'absent')}",
        )
        missing[name] = f"it is {found.get(name, 'absent')}"
    return missing


def _continued(source: str, initial: dict, shapes: dict, in_part: bool) -> str:
    """Drop what does not continue: the optimizer state of other parameters, and a step count
    without an optimizer state, since a fresh optimizer begins at step 0.

    Returns:
        A remark about that, or nothing.
    """
    if not in_part:
        try:
            if match_optimizer(initial.get("opt"), shapes):
                return ""
        except ValueError as error:
            raise ValueError(f"train.init_from {source}: {error}") from None
    dropped = [key for key in CONTINUED if initial.pop(key, None) is not None]
    if not dropped:
        return ""
    if in_part:
        return "; its optimizer state and step count are not taken"
    return "; it has no optimizer state, so the run starts at step 0"


def _warn_of_other_settings(source: str, cfg: Config, initial: dict) -> None:
    """One line about settings of this run that a published checkpoint, whose optimizer goes on, was
    trained with other values of.
    """
    group = initial["opt"]["param_groups"][0]
    told = {f"optim.{name}": group.get(name) for name in ("lr", "eps", "weight_decay")}
    betas = group.get("betas")
    told["optim.betas"] = (*betas,) if isinstance(betas, list | tuple) else None
    args = initial.get("args")
    told |= {ours: getattr(args, theirs, None) for theirs, ours in PUBLISHED_SETTINGS.items()}
    told["align.distance"] = PUBLISHED_DISTANCES.get(str(getattr(args, "loss_type", None)))
    different = []
    for name, theirs in told.items():
        section, _, field = name.partition(".")
        options = getattr(cfg, section)
        # another target may have no such option, and a plain run has no target
        ours = getattr(options, field, theirs) if getattr(options, "active", True) else theirs
        if isinstance(theirs, int | float | str | tuple) and theirs != ours:
            different.append(f"{name} {ours} (it was {theirs})")
    if different:
        warn("the run goes on from %s with other settings: %s", source, ", ".join(different))


def _described(source: str, shapes: dict, fresh: dict[str, str], initial: dict) -> str:
    """What a run was started from."""
    if fresh:
        return f"from {source}, {_count(shapes, fresh)}"
    if "opt" not in initial:
        return f"from {source}"
    return f"from {source}, step {initial.get('steps', 0)}, with its optimizer"


def _count(shapes: dict, fresh: dict[str, str]) -> str:
    # the position embedding is no parameter
    count = len(shapes) - 1
    return f"{count - len(fresh.keys() - {'pos_embed'})} of {count} parameters"


def _warn_of_the_rest(source: str, shapes: dict, fresh: dict[str, str], remark: str) -> None:
    """One line about what is not taken, if there is any."""
    listed = ", ".join(f"{name} {shapes[name]} ({why})" for name, why in sorted(fresh.items()))
    rest = f"; fresh: {listed}" if fresh else ""
    if rest or remark:
        warn("started from %s: %s%s%s", source, _count(shapes, fresh), rest, remark)
