"""Reads the scheduler's configuration of a diffusers pipeline.

It tells how the network was trained: its noise levels, what it predicts, which way time runs, how
times are shifted. Class and spacing of times only choose a sampler, and are not taken.
"""

import json
import math
import sys
from pathlib import Path

from sra_fast.diffusion.flow_matching import check_time_shift
from sra_fast.diffusion.gaussian_diffusion import NUM_TIMES
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import why_unreadable
from sra_fast.utils.messages import warn

PLACE = "scheduler/scheduler_config.json"
# the chain of noise levels that a DiT has, and what it predicts
DIT_CHAIN = {
    "num_train_timesteps": NUM_TIMES,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
}
# what they change in every prediction, where their file does not say otherwise
CLIPS_BY_DEFAULT = ("DDIMScheduler", "DDPMScheduler")
# how the release of SD3 shifts its times
SD3_SHIFT = 3.0
# options that space the times of flow matching in other ways than a shift does
OTHER_SPACINGS = (
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)


# of e, in a float
MOST_EXPONENT = math.log(sys.float_info.max)
# between which numbers of tokens a dynamic shift goes from which exponent to which
DYNAMIC = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


def check_dit_scheduler(pipeline: Path | None) -> None:
    """ValueError if a pipeline's scheduler is of other noise levels than a DiT's, or of another
    prediction. Weights without a scheduler, and a sampler that clips, are a warning.

    Args:
        pipeline: folder; None: the weights lie in none.
    """
    held = None if pipeline is None else _read(pipeline / PLACE)
    if pipeline is None or held is None:
        warn(
            "no scheduler lies beside the weights: a DiT's noise levels (%s from %g to %g) and a "
            "prediction of the noise are assumed",
            *(DIT_CHAIN["beta_schedule"], DIT_CHAIN["beta_start"], DIT_CHAIN["beta_end"]),
        )
        return
    file = pipeline / PLACE
    name = str(held.get("_class_name"))
    # flow matching has no such numbers, or an option that replaces them
    is_chain = "beta_schedule" in held or name in CLIPS_BY_DEFAULT
    require_that(
        is_chain and not held.get("use_flow_sigmas"),
        f"expected the noise levels of a DiT in {file}, got those of a {name}",
    )
    for option, expected in DIT_CHAIN.items():
        found = held.get(option, expected)
        require_that(
            found == expected, f"expected {option} {expected} in {file}, got {found}: no DiT here"
        )
    clips = held.get("clip_sample", name in CLIPS_BY_DEFAULT)
    if clips or held.get("thresholding"):
        warn("the scheduler in %s clips the images of every step: samplers here do not", file)


def time_shift_of(pipeline: Path | None, num_tokens: int) -> float:
    """The shift of times of a pipeline of flow matching (``diffusion.time_shift``).

    Args:
        pipeline: folder; None: the weights lie in none.
        num_tokens: of an image, on which a dynamic shift depends.

    Returns:
        That of its scheduler; SD3's, with a warning, where there is none.

    Raises:
        ValueError: the scheduler is damaged, its times run backwards, or up to another number.
    """
    held = None if pipeline is None else _read(pipeline / PLACE)
    if pipeline is None or held is None:
        warn("no scheduler lies beside the weights: times get SD3's shift of %g", SD3_SHIFT)
        return SD3_SHIFT
    file = pipeline / PLACE
    steps = held.get("num_train_timesteps", NUM_TIMES)
    require_that(
        steps == NUM_TIMES, f"expected num_train_timesteps {NUM_TIMES} in {file}, got {steps}"
    )
    require_that(
        not held.get("invert_sigmas"), f"expected times from noise to data in {file}, got inverted"
    )
    name = str(held.get("_class_name"))
    is_flow = name.startswith("FlowMatch") or held.get("use_flow_sigmas")
    require_that(bool(is_flow), f"expected a scheduler of flow matching in {file}, got {name}")
    others = [option for option in OTHER_SPACINGS if held.get(option)]
    if others:
        warn("not taken from %s, no sampler here has it: %s", file, ", ".join(others))
    # solvers that know flow matching besides have another name for it
    shift = held.get("shift", held.get("flow_shift", 1.0))
    if held.get("use_dynamic_shifting"):
        shift = _dynamic_shift(held, num_tokens, file)
    check_time_shift(shift, str(file))
    return float(shift)


def _dynamic_shift(held: dict, num_tokens: int, file: Path) -> float:
    """The shift at one number of tokens (diffusers' ``calculate_shift``)."""
    kind = held.get("time_shift_type", "exponential")
    require_that(
        kind in ("exponential", "linear"),
        f"expected time_shift_type exponential or linear in {file}, got {kind!r}",
    )
    told = {name: held.get(name, default) for name, default in DYNAMIC.items()}
    few, many, first, last = told.values()
    numbers = all(
        type(value) in (int, float) and abs(value) <= sys.float_info.max for value in told.values()
    )
    require_that(
        numbers and few != many, f"expected numbers for a dynamic shift in {file}, got {told}"
    )
    mu = first + (last - first) * (num_tokens - few) / (many - few)
    if kind == "linear":
        return mu
    # what no float can hold is refused as infinite
    return math.exp(mu) if mu < MOST_EXPONENT else math.inf


def _read(file: Path) -> dict | None:
    """A scheduler's configuration; None: there is none.

    Raises:
        ValueError: it cannot be read, or is no configuration.
    """
    if not file.exists():
        return None
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no readable JSON file: {why_unreadable(error)}") from None
    require_that(
        isinstance(held, dict), f"expected the configuration of a scheduler in {file}, got {held!r}"
    )
    return held
