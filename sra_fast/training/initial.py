"""The weights that ``train.init_from`` names, fitted to the run's model.

Weights of another task fit in part: with other classes, another resolution, other channels or
patches, or without a projection head. What fits is taken by name and shape. The rest keeps the
values of a fresh model of the run's seed, and is listed. The blocks and the time's embedder must
fit as a whole.
"""

import logging
import os

import torch
from torch import Tensor

from sra_fast import models
from sra_fast.checkpoint.load_model import CLASS_TABLE, HEAD, from_config
from sra_fast.checkpoint.names import KNOWN_PARAMETER
from sra_fast.checkpoint.optimizer_state import match_optimizer
from sra_fast.checkpoint.sources import read_weights
from sra_fast.checkpoint.values import refuse_reversed_time
from sra_fast.config.schema import Config
from sra_fast.models import SiT
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import MODEL_FAMILIES

log = logging.getLogger("sra_fast")

# parameters that another task may have in another shape, or not at all
ENDS = ("x_embedder.", "y_embedder.", "pos_embed", "final_layer.", HEAD)
# what continues a training run, and needs weights that fit as a whole
CONTINUED = ("opt", "steps", "epoch")


def read_initial(cfg: Config) -> dict:
    """What ``train.init_from`` names, as far as it fits the run's model.

    The first process logs one line about it.

    Returns:
        ``"ema"`` and ``"model"`` (the student): state dicts of what fits, under the names of the
        model. If everything fits, also what continues a published checkpoint: ``opt`` and
        ``steps``.

    Raises:
        ValueError: it cannot be read, or comes from another network (depth, width, heads, diffusion
            process), or its optimizer state does not fit.
    """
    source = str(cfg.train.init_from)
    initial = read_weights(source)
    # shapes only: no memory is used
    with torch.device("meta"):
        model = cfg.model.build()
        theirs = from_config(initial["config"]) if "config" in initial else None
    args = initial.get("args")
    _check_heads(source, model, theirs, args)
    known_classes = getattr(theirs or args, "num_classes", model.num_classes)
    fresh: dict[str, str] = {}
    for key in {"model", "ema"} & set(initial):
        state = initial[key]
        if theirs is None:
            refuse_reversed_time(state, args, source)
        _check_process(source, model, _process_of(theirs, args), state)
        missing = _not_fitting(source, model, state)
        if known_classes != model.num_classes:
            # a null class less may hide a class more: shapes do not tell
            missing.setdefault(CLASS_TABLE, f"it is of {known_classes} classes")
        initial[key] = {name: value for name, value in state.items() if name not in missing}
        fresh |= missing
    shapes = {name: [*value.shape] for name, value in model.state_dict().items()}
    parameters = {name: p.shape for name, p in model.named_parameters()}
    remark = _continued(source, initial, parameters, bool(fresh))
    _say(source, shapes, fresh, remark)
    # a published checkpoint with its optimizer continues at its step count
    steps = initial.get("steps", 0)
    require_that(
        steps < cfg.train.steps,
        f"train.steps must exceed the {steps} of train.init_from, got {cfg.train.steps}",
    )
    return initial


def _check_heads(source: str, model: SiT, theirs: SiT | None, args) -> None:
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


def _process_of(theirs: SiT | None, args) -> str | None:
    """The diffusion process that the weights were trained with; None: not known."""
    if theirs is not None:
        return theirs.process
    family = str(getattr(args, "model", "")).partition("-")[0]
    return MODEL_FAMILIES[family].process if family in MODEL_FAMILIES else None


def _check_process(source: str, model: SiT, process: str | None, state: dict[str, Tensor]) -> None:
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
        f"{ours:g}: it is of another family",
    )


def _not_fitting(source: str, model: SiT, state: dict[str, Tensor]) -> dict[str, str]:
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
    """Drop what does not continue: the optimizer state of other parameters, or an empty one.

    Returns:
        A remark about that, or nothing.
    """
    if in_part:
        dropped = [key for key in CONTINUED if initial.pop(key, None) is not None]
        return "; its optimizer state and step count are not taken" if dropped else ""
    if "opt" not in initial:
        return ""
    try:
        if match_optimizer(initial["opt"], shapes):
            return ", with its optimizer state"
    except ValueError as error:
        raise ValueError(f"train.init_from {source}: {error}") from None
    del initial["opt"]
    return "; its optimizer has no state"


def _say(source: str, shapes: dict, fresh: dict[str, str], remark: str) -> None:
    if int(os.environ.get("RANK", 0)):
        return
    # the position embedding is no parameter
    count = len(shapes) - 1
    taken = count - len(fresh.keys() - {"pos_embed"})
    line = f"started from {source}: {taken} of {count} parameters"
    if not fresh:
        log.info("%s%s", line, remark)
        return
    listed = ", ".join(f"{name} {shapes[name]} ({why})" for name, why in sorted(fresh.items()))
    log.warning("%s; fresh: %s%s", line, listed, remark)
