"""What the compiler backend rewrites, and what it must leave alone."""

import operator

import programs
import pytest
import torch
import torch.nn.functional as F
from programs import B, D, T, check

from sra_fast import integrations

EPS = 1e-6
bf16 = torch.bfloat16


def norm(x, eps=EPS):
    return F.layer_norm(x, (D,), eps=eps)


def modulated(m, x, c):
    shift, scale = m.vectors(c, 2)
    return m.first(norm(x) * (1 + scale) + shift)


def scale_first(m, x, c):
    shift, scale = m.vectors(c, 2)
    return shift + (scale + 1.0) * norm(x)


def sum_before_view(m, x, c):
    shift, scale = m.condition(c).chunk(9, dim=1)[:2]
    return norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]


def no_shift(m, x, c):
    (scale,) = m.vectors(c, 1)
    return m.first(norm(x) * (1 + scale))


def methods(m, x, c):
    shift, scale = m.vectors(c, 2)
    return norm(x).mul(scale.add(1)).add(shift)


def affine(m, x, c):
    shift, scale = m.vectors(c, 2)
    return F.layer_norm(x, (D,), m.weight, m.bias, 1e-5) * (1 + scale) + shift


def shared_vectors(m, x, c):
    return norm(x) * (1 + m.weight) + m.bias


def rms(m, x, c):
    shift, scale = m.vectors(c, 2)
    return F.rms_norm(x, (D,), m.weight, EPS) * (1 + scale) + shift


def rms_default_eps(m, x, c):
    shift, scale = m.vectors(c, 2)
    return F.rms_norm(1e-3 * x, (D,)) * (1 + scale) + shift


def rms_by_hand(m, x, c):
    shift, scale = m.vectors(c, 2)
    mean_square = x.float().pow(2).mean(-1, keepdim=True)
    h = x * torch.rsqrt(mean_square + EPS)
    return h.to(x.dtype) * m.weight * (1 + scale) + shift


def rms_squared(m, x, c):
    (scale,) = m.vectors(c, 1)
    return x * torch.rsqrt((x * x).mean(dim=2, keepdim=True) + EPS) * (1 + scale)


def per_token(m, x, c):
    shift, scale = (m.second(x)[:, :, None] + c[:, None, None]).expand(-1, -1, 2, -1).unbind(2)
    return m.first(norm(x) * (1 + scale) + shift)


def gated(m, x, c):
    (gate,) = m.vectors(c, 1)
    return x + gate * m.first(x)


def tanh_gated(m, x, c):
    (gate,) = m.vectors(c, 1)
    return m.first(x) * gate.tanh() + x


def added_product(m, x, c):
    (gate,) = m.vectors(c, 1)
    return torch.addcmul(x, gate, m.first(x))


def sandwich(m, x, c):
    (gate,) = m.vectors(c, 1)
    return x + gate.tanh() * F.rms_norm(m.first(x), (D,), m.weight, EPS)


def sandwich_one_plus(m, x, c):
    (gate,) = m.vectors(c, 1)
    return x + F.rms_norm(m.first(x), (D,), None, EPS) * (1 + gate)


def post_norm(m, x, c):
    return x + F.rms_norm(m.first(x), (D,), m.weight, EPS)


def fused(m, x, c):
    gate, shift, scale = m.vectors(c, 3)
    x = x + gate * m.first(x)
    return x, m.second(norm(x) * (1 + scale) + shift)


def ungated(m, x, c):
    shift, scale = m.vectors(c, 2)
    x = x + m.first(x)
    return x, norm(x) * (1 + scale) + shift


def plain_norm_after_gate(m, x, c):
    (gate,) = m.vectors(c, 1)
    x = x + gate * m.first(x)
    return x, F.layer_norm(x, (D,), m.weight, m.bias, EPS)


def two_modulations(m, x, c):
    gate, shift, scale, shift2, scale2 = m.vectors(c, 5)
    x = x + gate * m.first(x)
    h = norm(x)
    return x, h * (1 + scale) + shift, h * (1 + scale2) + shift2


def second_modulation_computed_late(m, x, c):
    """As in SD3.5, but for the projection: it comes after the first modulation."""
    gate, shift, scale = m.vectors(c, 3)
    x = x + gate * m.first(x)
    n = norm(x)
    h = n * (1 + scale) + shift
    shift2, scale2 = m.condition(c).chunk(9, dim=1)[:2]
    return x, h, n * (1 + scale2[:, None]) + shift2[:, None]


def second_modulation_of_the_first(m, x, c):
    gate, shift, scale = m.vectors(c, 3)
    x = x + gate * m.first(x)
    n = norm(x)
    h = n * (1 + scale) + shift
    shift2, scale2 = m.condition(h.mean(1)).chunk(9, dim=1)[:2]
    return x, h, n * (1 + scale2[:, None]) + shift2[:, None]


def second_modulation_without_shift(m, x, c):
    gate, shift, scale, scale2 = m.vectors(c, 4)
    x = x + gate * m.first(x)
    n = norm(x)
    return x, n * (1 + scale) + shift, n * (1 + scale2)


def second_modulation_per_token(m, x, c):
    gate, shift, scale = m.vectors(c, 3)
    shift2, scale2 = (m.second(x)[:, :, None] + c[:, None, None]).expand(-1, -1, 2, -1).unbind(2)
    x = x + gate * m.first(x)
    n = norm(x)
    return x, n * (1 + scale) + shift, n * (1 + scale2) + shift2


def three_modulations(m, x, c):
    gate, *vectors = m.vectors(c, 7)
    x = x + gate * m.first(x)
    n = norm(x)
    shift, scale, shift2, scale2, shift3, scale3 = vectors
    return n * (1 + scale) + shift, n * (1 + scale2) + shift2, n * (1 + scale3) + shift3


def block(m, x, c):
    shift, scale, gate, shift2, scale2, gate2 = m.vectors(c)
    x = x + gate * m.first(norm(x) * (1 + scale) + shift)
    return x + gate2 * m.second(norm(x) * (1 + scale2) + shift2)


def tap_before_modulation(m, x, c):
    gate, _ = m.vectors(c, 2)
    x = x + gate * m.first(x)
    feature = torch.tanh(x)
    # the next block computes its modulation after the tap
    shift, scale = F.silu(m.condition(c)).chunk(9, dim=1)[3:5]
    return feature, norm(x) * (1 + scale[:, None]) + shift[:, None]


def in_place(m, x, c):
    gate, shift, scale = m.vectors(c, 3)
    x = m.second(x)
    x += gate * m.first(x.relu())
    h = norm(x)
    h *= 1 + scale
    h += shift
    return h


def fp32_statistics(m, x, c):
    shift, scale = m.vectors(c, 2)
    return (norm(x.float()) * (1 + scale.float()) + shift.float()).type_as(x)


def fp32_result(m, x, c):
    shift, scale = m.vectors(c, 2)
    return norm(x.float()) * (1 + scale.float()) + shift.float()


def fp32_residual(m, x, c):
    gate, shift, scale = m.vectors(c, 3)
    x = (x.float() + m.first(x) * gate.float()).type_as(x)
    return x, (norm(x.float()) * (1 + scale.float()) + shift.float()).type_as(x)


def fp32_gate_promotes(m, x, c):
    (gate,) = m.vectors(c, 1)
    return x + gate.float() * m.first(x)


def post_norm_with_bias(m, x, c):
    (gate,) = m.vectors(c, 1)
    return x + gate * F.layer_norm(m.first(x), (D,), m.weight, m.bias)


def modulation_of_the_sum(m, x, c):
    x = x + m.first(x)
    shift, scale = m.condition(x).chunk(9, -1)[:2]
    return norm(x) * (1 + scale) + shift


def mean_square_used_again(m, x, c):
    gate, shift, scale = m.vectors(c, 3)
    x = x + gate * m.first(x)
    mean_square = x.pow(2).mean(-1, keepdim=True)
    return x, x * torch.rsqrt(mean_square + EPS) * (1 + scale) + shift, mean_square


def one_of_two_modulations_changed(m, x, c):
    gate, shift, scale, shift2, scale2 = m.vectors(c, 5)
    x = x + gate * m.first(x)
    h = norm(x)
    second = h * (1 + scale2) + shift2
    second[:, 0] = 0
    return x, h * (1 + scale) + shift, second


def norm_of_a_modulated_norm(m, x, c):
    """The sum with a shift per token is no residual."""
    shift, scale, shift2, scale2 = m.condition(x).chunk(9, -1)[:4]
    y = norm(x) * (1 + scale) + shift
    return norm(y) * (1 + scale2) + shift2


def two_norms_in_one_sum(m, x, c):
    scale, scale2 = m.vectors(c, 2)
    return norm(x) * (1 + scale) + norm(m.first(x)) * (1 + scale2)


def expanded_vectors(m, x, c):
    shift, scale = m.vectors(c, 2)
    x = x + m.first(x)
    return x, norm(x) * (1 + scale).expand_as(x) + shift.expand_as(x)


def changed_by_keyword(m, x, c):
    gate, shift, scale = m.vectors(c, 3)
    y = m.first(x)
    x = x + gate.detach() * y
    F.relu(input=y, inplace=True)
    return x, norm(x) * (1 + scale) + shift


def cast_changed_before(m, x, c):
    (gate,) = m.vectors(c, 1)
    wide = m.second(x).to(bf16).float()
    wide.clamp_(min=0)
    return (wide + gate.float() * m.first(x).float()).to(bf16)


def scale_changed_after_the_sum(m, x, c):
    shift, scale = m.vectors(c, 2)
    scale = scale * 1
    factor = 1 + scale
    scale.zero_()
    return norm(x) * factor + shift


def copy_changed_before(m, x, c):
    shift, scale = m.vectors(c, 2)
    y = m.second(x).transpose(1, 2).contiguous().transpose(1, 2).contiguous()
    y.clamp_(min=0)
    return norm(y) * (1 + scale) + shift


def per_frame(m, x, c):
    """Vectors ``[B, F, 1, D]`` of tokens that are seen as frames."""
    gate, shift, scale = m.condition(c[:, None] * m.weight[:3, None]).chunk(9, -1)[:3]
    frames = lambda y: y.unflatten(1, (3, T // 3))
    x = x + (gate[:, :, None] * frames(m.first(x))).flatten(1, 2)
    h = frames(norm(x)) * (1 + scale)[:, :, None] + shift.unsqueeze(2)
    return x, h.reshape(B, T, D)


def per_frame_without_shift(m, x, c):
    scale = m.condition(c[:, None] * m.weight[:3, None]).chunk(9, -1)[0]
    return (norm(x).view(B, 3, T // 3, D) * (scale[:, :, None] + 1)).flatten(1, 2)


def per_token_arrays(m, x, c):
    """As in a block that is compiled by itself: the vectors are no parts of anything."""
    return norm(x) * (1 + m.first(x)) + m.second(x)


ADALN = {"adaln": 1}
GATED = {"gated_residual": 1}
FUSED = {"gated_residual_adaln": 1}
SANDWICH = {"gated_residual_norm": 1}
REWRITTEN = [
    (modulated, ADALN),
    (scale_first, ADALN),
    (sum_before_view, ADALN),
    (no_shift, ADALN),
    (methods, ADALN),
    (affine, ADALN),
    (shared_vectors, ADALN),
    (rms, ADALN),
    (rms_default_eps, ADALN),
    (rms_by_hand, ADALN),
    (rms_squared, ADALN),
    (per_token, ADALN),
    (gated, GATED),
    (tanh_gated, GATED),
    (added_product, GATED),
    (sandwich, SANDWICH),
    (sandwich_one_plus, SANDWICH),
    (post_norm, SANDWICH),
    (fused, FUSED),
    (ungated, FUSED),
    (plain_norm_after_gate, FUSED),
    (two_modulations, FUSED),
    (second_modulation_computed_late, FUSED),
    (second_modulation_of_the_first, {**FUSED, **ADALN}),
    (second_modulation_without_shift, {**FUSED, **ADALN}),
    (second_modulation_per_token, {**FUSED, **ADALN}),
    (three_modulations, {**FUSED, **ADALN}),
    (block, {**ADALN, **FUSED, **GATED}),
    (tap_before_modulation, FUSED),
    (in_place, FUSED),
    (fp32_statistics, ADALN),
    (fp32_result, ADALN),
    (fp32_residual, FUSED),
    (fp32_gate_promotes, GATED),
    (modulation_of_the_sum, ADALN),
    (mean_square_used_again, GATED),
    (one_of_two_modulations_changed, GATED),
    (norm_of_a_modulated_norm, {"adaln": 2}),
    (two_norms_in_one_sum, SANDWICH),
    (expanded_vectors, ADALN),
    (changed_by_keyword, FUSED),
    (post_norm_with_bias, GATED),
    (per_frame, FUSED),
    (per_frame_without_shift, ADALN),
    (per_token_arrays, ADALN),
    (cast_changed_before, {}),
    (scale_changed_after_the_sum, {}),
    (copy_changed_before, {}),
]
NAMES = [function.__name__ for function, _ in REWRITTEN]


@pytest.mark.parametrize(("function", "expected"), REWRITTEN, ids=NAMES)
def test_rewritten(function, expected):
    check(function, expected)


@pytest.mark.parametrize(("function", "expected"), REWRITTEN, ids=NAMES)
def test_rewritten_in_half_precision(function, expected):
    """Every cast and rounding: never less exact than the program as it was written."""
    check(function, expected, dtype=bf16)


# ---- what looks alike and is something else


def other_axis(m, x, c):
    shift, scale = m.vectors(c, 2)
    # over tokens and features
    return F.layer_norm(x, (T, D), eps=EPS) * (1 + scale) + shift


def mean_over_tokens(m, x, c):
    (scale,) = m.vectors(c, 1)
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS) * (1 + scale)


def rms_of_another(m, x, c):
    (scale,) = m.vectors(c, 1)
    return x * torch.rsqrt(m.first(x).pow(2).mean(-1, keepdim=True) + EPS) * (1 + scale)


def cubed(m, x, c):
    (scale,) = m.vectors(c, 1)
    return x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + EPS) * (1 + scale)


def scale_without_one(m, x, c):
    shift, scale = m.vectors(c, 2)
    return norm(x) * scale + shift


def scale_plus_two(m, x, c):
    shift, scale = m.vectors(c, 2)
    return norm(x) * (2 + scale) + shift


def dropout_between(m, x, c):
    (scale,) = m.vectors(c, 1)
    return F.dropout(norm(x), 0.5, False) * (1 + scale)


def activation_between(m, x, c):
    (scale,) = m.vectors(c, 1)
    return norm(x).tanh() * (1 + scale)


def norm_used_twice(m, x, c):
    shift, scale = m.vectors(c, 2)
    h = norm(x)
    return h, h * (1 + scale) + shift


def one_number_per_token(m, x, c):
    weight = m.first(x)[:, :, :1].sigmoid()
    return x + weight * m.second(x)


def gate_of_activations(m, x, c):
    return x + m.first(x).sigmoid() * m.second(x)


def gated_product_used_twice(m, x, c):
    (gate,) = m.vectors(c, 1)
    term = gate * m.first(x)
    return x + term, term


def scaled_sum(m, x, c):
    (gate,) = m.vectors(c, 1)
    return torch.add(x, gate * m.first(x), alpha=2)


def without_gradient_inside(m, x, c):
    shift, scale = m.vectors(c, 2)
    with torch.no_grad():
        h = norm(x)
    return h * (1 + scale) + shift


def four_dimensions(m, x, c):
    shift, scale = m.vectors(c, 2)
    heads = x.view(B, T, 1, D)
    return norm(heads) * (1 + scale[:, None]) + shift[:, None]


def two_dimensions(m, x, c):
    shift, scale = m.vectors(c, 2)
    return norm(c) * (1 + scale[:, 0]) + shift[:, 0]


def half_of_the_width(m, x, c):
    (scale,) = m.vectors(c, 1)
    return norm(x) * (1 + scale[..., :1])


def one_plus_scale_without_gradient(m, x, c):
    shift, scale = m.vectors(c, 2)
    with torch.no_grad():
        factor = 1 + scale
    return norm(x) * factor + shift


def cast_without_gradient(m, x, c):
    shift, scale = m.vectors(c, 2)
    y = m.second(x).to(torch.float16)
    with torch.no_grad():
        y = y.to(m.weight.dtype)
    return norm(y) * (1 + scale) + shift


def changed_without_gradient(m, x, c):
    """No pattern at all: the sum in place keeps the gradient of y, one out of place has none."""
    y = m.second(x)
    with torch.no_grad():
        y += 1
    return m.first(y)


def integer_scale(m, x, c):
    return norm(m.first(x)) * (1.0 + torch.arange(D))


def other_numbers_of_the_same_bits(m, x, c):
    """The view of fp16 numbers as bf16 is no view of their shape."""
    scale = m.vectors(c, 1)[0].detach().half()
    return norm(m.first(x)) * (1 + scale).view(bf16)


def part_changed_without_gradient(m, x, c):
    """A part of a projection, which autograd would not let change."""
    part = m.condition(c[:1]).chunk(9, dim=1)[7]
    with torch.no_grad():
        part.mul_(0.5)
    return m.first(x)


def boolean_scale(m, x, c):
    return norm(m.first(x)) * (1.0 + (torch.arange(D) > 3))


def under_vmap(m, x, c):
    return torch.vmap(lambda row: norm(row) * 2.0)(m.first(x))


def frames_that_stay_frames(m, x, c):
    scale = m.condition(c[:, None] * m.weight[:3, None]).chunk(9, -1)[0]
    return norm(x).unflatten(1, (3, T // 3)) * (1 + scale)[:, :, None]


def vectors_within_a_frame(m, x, c):
    """One vector for every token of a frame, the same for all frames."""
    scale = m.condition(c[:, None] * m.weight[:2, None]).chunk(9, -1)[0]
    return (norm(x).unflatten(1, (3, 2)) * (1 + scale)[:, None]).flatten(1, 2)


def frames_shifted_first(m, x, c):
    shift, scale = m.condition(c[:, None] * m.weight[:3, None]).chunk(9, -1)[:2]
    h = norm(x).unflatten(1, (3, T // 3)) + shift[:, :, None]
    return (h * (1 + scale)[:, :, None]).flatten(1, 2)


def frames_modulated_as_tokens(m, x, c):
    """As tokens again before the product, which makes something else of them."""
    scale = m.condition(c[:, None] * m.weight[:2, None]).chunk(9, -1)[0]
    h = norm(x).unflatten(1, (2, T // 2)).flatten(1, 2)
    return h * (1 + scale)[:, :, None]


UNTOUCHED = [
    (other_axis, "more than the last dimension"),
    (mean_over_tokens, "not over the last dimension"),
    (rms_of_another, None),
    (cubed, None),
    (scale_without_one, "not added to 1"),
    (scale_plus_two, "not added to 1"),
    (dropout_between, None),
    (activation_between, None),
    (norm_used_twice, "another use"),
    (one_number_per_token, "the gate is [2, 6, 1]"),
    (gate_of_activations, None),
    (gated_product_used_twice, "another use"),
    (scaled_sum, None),
    (without_gradient_inside, "autograd is switched"),
    (four_dimensions, "[2, 6, 1, 16]"),
    (two_dimensions, "[2, 16]"),
    (half_of_the_width, "the scale is [2, 1, 1]"),
    (one_plus_scale_without_gradient, "autograd is switched"),
    (cast_without_gradient, "autograd is switched"),
    (changed_without_gradient, None),
    (frames_that_stay_frames, None),
    (frames_shifted_first, None),
    (frames_modulated_as_tokens, None),
    (vectors_within_a_frame, None),
    (integer_scale, None),
    (boolean_scale, None),
    (part_changed_without_gradient, None),
    (other_numbers_of_the_same_bits, "not added to 1"),
    (under_vmap, None),
]


@pytest.mark.parametrize(
    ("function", "reason"), UNTOUCHED, ids=[function.__name__ for function, _ in UNTOUCHED]
)
def test_left_alone(function, reason):
    found = check(function, {})
    reasons = [miss.reason for miss in found.near_misses]
    if reason is not None:
        assert any(reason in said for said in reasons), reasons
        assert all("test_patterns.py:" in miss.where for miss in found.near_misses)


def test_the_norms_eps_is_kept():
    """Two norms that differ only in eps: each keeps its own."""

    def program(m, x, c):
        shift, scale = m.vectors(c, 2)
        x = 1e-2 * x
        return norm(x, 1e-6) * (1 + scale) + shift, norm(x, 1e-3) * (1 + scale) + shift

    check(program, {"adaln": 2})


def test_a_gate_of_another_tensor_is_that_tensors():
    """x is not what y was computed from, and the norm reads neither."""

    def program(m, x, c):
        gate, shift, scale = m.vectors(c, 3)
        other = m.second(x)
        return other + gate * m.first(x), norm(x) * (1 + scale) + shift

    check(program, {"gated_residual": 1, "adaln": 1})


def test_two_modulations_of_two_dtypes_are_two_calls():
    def program(m, x, c):
        gate, shift, scale, shift2, scale2 = m.vectors(c, 5)
        x = x + gate * m.first(x)
        n = norm(x)
        return x, n * (1 + scale) + shift, (n * (1 + scale2) + shift2).to(torch.float16)

    check(program, {**FUSED, **ADALN})


def test_modulation_that_depends_on_the_sum_is_not_moved_before_it():
    def program(m, x, c):
        (gate,) = m.vectors(c, 1)
        x = x + gate * m.first(x)
        feature = x.tanh()
        pooled = m.condition(feature.mean(1))
        shift, scale = pooled.chunk(9, dim=1)[:2]
        return feature, norm(x) * (1 + scale[:, None]) + shift[:, None]

    found = check(program, {"gated_residual": 1, "adaln": 1})
    assert any("cannot be computed before" in miss.reason for miss in found.near_misses)


def test_random_numbers_are_drawn_in_their_order():
    """A dropout between the sum and its norm, in the way of the modulation: it is not moved."""

    def program(m, x, c):
        (gate,) = m.vectors(c, 1)
        x = x + gate * m.first(x)
        feature = F.dropout(x, 0.5, m.training)
        shift, scale = F.dropout(m.condition(c), 0.5, m.training).chunk(9, dim=1)[3:5]
        return feature, norm(x) * (1 + scale[:, None]) + shift[:, None]

    torch.manual_seed(0)
    module = programs.Program(program)
    x, c = programs.inputs()
    torch.manual_seed(3)
    before = module(x, c)
    integrations.compile(module, then="eager")
    torch.manual_seed(3)
    after = module(x, c)
    for mine, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert integrations.report(module).rewrites["gated_residual_adaln"] == 0


def norm_changed_afterwards(m, x, c):
    shift, scale = m.vectors(c, 2)
    y = m.second(x)
    h = norm(y)
    y.zero_()
    # reading y here would see zeros
    return h * (1 + scale) + shift


def view_changed_afterwards(m, x, c):
    (gate,) = m.vectors(c, 1)
    y = m.second(x)
    product = gate * y
    first = y[:, 0]
    first.zero_()
    return x + product


def cast_changed_afterwards(m, x, c):
    (gate,) = m.vectors(c, 1)
    wide = x.float()
    total = wide + gate * m.first(x)
    wide.zero_()
    return total


def out_argument(m, x, c):
    (gate,) = m.vectors(c, 1)
    y = m.second(x)
    product = gate * y
    torch.sin(x, out=y)
    return x + product


def activation_in_place(m, x, c):
    (gate,) = m.vectors(c, 1)
    y = m.second(x)
    product = gate * y
    F.silu(y, inplace=True)
    return x + product


@pytest.mark.parametrize(
    "function",
    [
        norm_changed_afterwards,
        view_changed_afterwards,
        cast_changed_afterwards,
        out_argument,
        activation_in_place,
    ],
    ids=lambda function: function.__name__,
)
def test_what_is_changed_in_place_is_read_before(function):
    """An operator at the end of the pattern would read the changed tensor."""
    torch.manual_seed(0)
    module = programs.Program(function)
    x, c = programs.inputs()
    with torch.no_grad():
        expected = module(x.clone(), c)
        integrations.compile(module, then="eager", fullgraph=True)
        torch.testing.assert_close(module(x.clone(), c), expected)
    found = integrations.report(module)
    assert not found.rewrites
    assert [miss.reason for miss in found.near_misses] == [
        "a tensor that it reads is changed in place"
    ]


def test_an_input_changed_in_place_is_changed():
    def program(m, x, c):
        (gate,) = m.vectors(c, 1)
        x += gate * m.first(c)[:, None]
        return norm(x) * (1 + gate)

    torch.manual_seed(0)
    module = programs.Program(program)
    x, c = programs.inputs()
    with torch.no_grad():
        expected = x.clone()
        out = module(expected, c)
        integrations.compile(module, then="eager")
        changed = x.clone()
        torch.testing.assert_close(module(changed, c), out)
    assert torch.equal(changed, expected)
    assert not torch.equal(changed, x)


def test_a_view_of_what_is_changed_sees_the_change():
    """``x += ...`` stays, because a view that is read afterwards shows the new values."""

    def program(m, x, c):
        (gate,) = m.vectors(c, 1)
        y = m.second(x)
        first = y[:, :1]
        y += gate * m.first(x.relu())
        return y, first.expand(-1, 2, -1)

    check(program, {})


def test_autocast():
    """Products in bf16, the residual stream in fp32; the modulation is not moved into another
    autocast.
    """

    def program(m, x, c):
        with torch.autocast("cpu", bf16):
            gate, shift, scale = m.vectors(c, 3)
            y = m.first(norm(x) * (1 + scale) + shift)
        with torch.autocast("cpu", enabled=False):
            x = x + gate * y
        feature = x.tanh()
        with torch.autocast("cpu", bf16):
            shift, scale = m.condition(c).chunk(9, dim=1)[3:5]
            return feature, m.second(norm(x) * (1 + scale[:, None]) + shift[:, None])

    check(program, {"adaln": 2, "gated_residual": 1})


def test_gradients_stop_where_they_stopped():
    """The norm under no_grad is not fused with the sum before it."""

    def program(m, x, c):
        gate, shift, scale = m.vectors(c, 3)
        x = x + gate * m.first(x)
        with torch.no_grad():
            h = norm(x) * (1 + scale) + shift
        return x, h

    check(program, {"adaln": 1, "gated_residual": 1})


def test_a_sum_that_lies_transposed_in_memory():
    """As after a patch embedding: a view that needs those strides keeps the sum as it was."""

    def transposed(m, x, c):
        (gate,) = m.vectors(c, 1)
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
        return x + gate * m.first(x)

    check(transposed, {"gated_residual": 1})

    def viewed(m, x, c):
        x = transposed(m, x, c)
        return x, x.transpose(1, 2).view(B, D * T)

    check(viewed, {})


def test_mixed_dtypes_with_fp64_are_left_alone():
    def program(m, x, c):
        shift, scale = m.vectors(c, 2)
        return norm(x) * (1 + scale.double()) + shift

    assert check(program, {}).near_misses[0].reason == "fp64 and other dtypes are mixed"


def test_every_in_place_operator_is_known():
    """Python's own list: an operator that is missing here would be rewritten around."""
    from sra_fast.integrations.facts import _IN_PLACE

    in_place = {
        getattr(operator, name)
        for name in dir(operator)
        if name.startswith("i") and hasattr(operator, f"__{name}__") and hasattr(operator, name[1:])
    }
    assert in_place - {operator.index} <= _IN_PLACE | {operator.is_, operator.inv, operator.invert}
