"""FLOPs of every target's step, counted for the paper's models at 256 pixels, stay below limits, and the
table in docs/alignments.md has them.
"""

from fractions import Fraction

import pytest

from benchmarks.cost_model.alignment_costs import (
    BLOCK,
    DOCUMENT,
    MODELS,
    configuration,
    per_token_cost,
    render,
    step_cost,
)
from benchmarks.report.table import fill
from sra_fast.training.flops import forward_flops

XL, B = MODELS
# most that a step may cost: over the step with SRA, or over the plain one
LIMITS = [
    ("self_flow", "ema_teacher", {XL: 0.005, B: 0.005}),
    ("dual_time", "ema_teacher", {XL: 0.005, B: 0.005}),
    ("layer_sync", "none", {XL: 0.005, B: 0.005}),
    ("dispersive", "none", {XL: 0.005, B: 0.005}),
    ("vae_latent", "none", {XL: 0.05, B: 0.093}),
    ("cached_features", "none", {XL: 0.02, B: 0.082}),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("target, other, limits", LIMITS)
def test_a_step_costs_at_most(target, other, limits, model):
    over = step_cost(target, model) / step_cost(other, model) - 1
    assert over <= limits[model]


def test_pairs_of_images_cost_nothing():
    """The dispersive loss compares all images with each other: one product forward, one backward."""
    _, width, tokens = sizes(XL)
    images = 256
    pairs = 2 * 2 * images * tokens * width
    assert pairs / step_cost("none", XL) == pytest.approx(0.0004, abs=5e-5)


def sizes(model: str) -> tuple[int, int, int]:
    """Depth, width and tokens."""
    arguments = configuration("none", model).model.arguments()
    return arguments["depth"], arguments["hidden_size"], 256


@pytest.mark.parametrize("model", MODELS)
def test_two_groups_cost_two_modulations_per_image(model):
    depth, width, _ = sizes(model)
    one = forward_flops(configuration("none", model))["modulation"]
    # six vectors for a block, two for the last layer
    assert one == 2 * (6 * depth + 2) * width**2
    for target in ("self_flow", "dual_time"):
        assert forward_flops(configuration(target, model))["modulation"] == 2 * one


@pytest.mark.parametrize("model", MODELS)
def test_separated_attention_costs_the_squares_of_its_groups(model):
    depth, width, tokens = sizes(model)
    full = forward_flops(configuration("ema_teacher", model))
    cut = forward_flops(configuration("dual_time", model))
    assert full["attention"] == 4 * depth * tokens**2 * width
    assert cut["attention"] == Fraction(625, 1000) * full["attention"]

    # the teacher's attention is cut as well; it has a second time and a second modulation per block
    blocks = configuration("dual_time", model).align.teacher_layer
    saved = Fraction(375, 1000) * 4 * tokens**2 * width
    time = 2 * width * (256 + width)
    more = time + blocks * (12 * width**2 - saved)
    assert cut["align_teacher"] - full["align_teacher"] == more


def test_a_modulation_per_token_is_what_two_groups_avoid():
    """For XL half of the forward again, and as large a share of the plain step."""
    part = forward_flops(configuration("none", XL))
    assert 255 * part["modulation"] / part["student"] == pytest.approx(0.485, abs=5e-4)
    over = per_token_cost(XL) / step_cost("none", XL) - 1
    assert over == pytest.approx(0.485, abs=5e-4)


def test_the_document_has_what_is_counted():
    text = DOCUMENT.read_text()
    command = "run python -m benchmarks.cost_model.alignment_costs"
    assert fill(text, {BLOCK: render}, []) == text, command
