"""What the scheduler of a diffusers pipeline says about the weights beside it.

Its class and its spacing of times choose a sampler, and are not taken. What the network was trained
with is in the same file: the noise levels, what is predicted, which way time runs, how times are
shifted.
"""

import math
from pathlib import Path

from sra_fast.diffusion.gaussian_diffusion import NUM_TIMES
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import read_json
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


# between which numbers of tokens a dynamic shift goes from which exponent to which
DYNAMIC = {
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}


def check_dit_scheduler(pipeline: Path) -> None:
    """ValueError if a pipeline's scheduler is of other noise levels than a DiT's, or of another
    prediction. Weights without a scheduler, and a sampler that clips, are a warning.

    Args:
        pipeline: folder.
    """
    file = pipeline / PLACE
    if not file.exists():
        warn(
            "expected %s, found none: a DiT's noise levels (%s from %g to %g) and a prediction of "
            "the noise are assumed",
            *(file, DIT_CHAIN["beta_schedule"], DIT_CHAIN["beta_start"], DIT_CHAIN["beta_end"]),
        )
        return
    held = _read(file)
    name = str(held.get("_class_name"))
    # flow matching has no such numbers, or an option that replaces them
    require_that(
        "beta_schedule" in held and not held.get("use_flow_sigmas"),
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


def time_shift_of(pipeline: Path, num_tokens: int) -> float:
    """The shift of times of a pipeline of flow matching (``diffusion.time_shift``).

    Args:
        pipeline: folder.
        num_tokens: of an image, on which a dynamic shift depends.

    Returns:
        That of its scheduler; SD3's, with a warning, where there is none.

    Raises:
        ValueError: the scheduler is damaged, its times run backwards, or up to another number.
    """
    file = pipeline / PLACE
    if not file.exists():
        warn("expected %s, found none: times get SD3's shift of %g", file, SD3_SHIFT)
        return SD3_SHIFT
    held = _read(file)
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
    shift = _dynamic_shift(held, num_tokens) if held.get("use_dynamic_shifting") else _shift(held)
    require_that(
        type(shift) in (int, float) and 0 < shift < math.inf,
        f"expected a positive shift in {file}, got {shift!r}",
    )
    return float(shift)


def _shift(held: dict):
    # solvers that know flow matching besides have another name for it
    return held.get("shift", held.get("flow_shift", 1.0))


def _dynamic_shift(held: dict, num_tokens: int) -> float:
    """The shift at one number of tokens (diffusers' ``calculate_shift``)."""
    told = {name: held.get(name, default) for name, default in DYNAMIC.items()}
    few, many, first, last = told.values()
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in told.values())
    require_that(
        numbers and few != many, f"expected numbers for a dynamic shift of times, got {told}"
    )
    mu = first + (last - first) * (num_tokens - few) / (many - few)
    return mu if held.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def _read(file: Path) -> dict:
    held = read_json(file)
    require_that(
        isinstance(held, dict), f"expected the configuration of a scheduler in {file}, got {held!r}"
    )
    return held
