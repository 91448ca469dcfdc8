"""Vectors that are left out, weights of the norm, and vectors per frame and per token: every row
operator, forward and gradients, against plain PyTorch in fp64.
"""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from rows import check_against_fp64

from sra_fast import ops

B, T, D, FRAMES, GROUPS = 2, 6, 72, 3, 2
NORMS = {"layer": F.layer_norm, "rms": F.rms_norm}
SHAPES = {
    "channel": (D,),
    "image": (B, D),
    "image 1": (B, 1, D),
    "frame": (B, FRAMES, D),
    "frame, one image": (1, FRAMES, D),
    "token": (B, T, D),
    "token, one image": (1, T, D),
    "group": (B, GROUPS, D),
}
# operator: vectors that vary, in the order of its arguments; vectors [D]
VECTORS = {
    "adaln": (("shift", "scale"), ("norm_weight", "norm_bias")),
    "gated_residual": (("gate",), ("bias",)),
    "gated_residual_adaln": (("gate", "shift", "scale"), ("norm_weight", "norm_bias", "bias")),
    "gated_residual_norm": (("gate",), ("norm_weight",)),
}
ARRAYS = {"adaln": 1}
OUTPUTS = {"gated_residual_adaln": 2}


def spread(vector, group):
    """Each token's vector, in plain PyTorch."""
    if group is not None:
        return torch.stack([v[g] for v, g in zip(vector, group, strict=True)])
    if vector.dim() == 1:
        return vector
    if vector.dim() == 2:
        return vector[:, None]
    rows = vector.shape[1]
    return vector if rows in (1, T) else vector.repeat_interleave(T // rows, 1)


def plain(operator, norm, group=None):
    """The operator as a codebase writes it, in the dtype of its inputs."""

    def normed(x):
        return NORMS[norm](x, x.shape[-1:], eps=1e-6)

    def modulated(x, shift, scale, weight, bias):
        x = normed(x)
        x = x if weight is None else x * weight
        x = x if bias is None else x + bias
        x = x if scale is None else x * (1 + spread(scale, group))
        return x if shift is None else x + spread(shift, group)

    def added(x, y, gate, bias):
        y = y if bias is None else y + bias
        return x + (y if gate is None else y * spread(gate, group))

    def fused(x, y, gate, shift, scale, weight, norm_bias, bias):
        x = added(x, y, gate, bias)
        return x, modulated(x, shift, scale, weight, norm_bias)

    return {
        "adaln": modulated,
        "gated_residual": added,
        "gated_residual_adaln": fused,
        "gated_residual_norm": lambda x, y, gate, weight: added(
            x, normed(y) if weight is None else normed(y) * weight, gate, None
        ),
    }[operator]


def call(operator, norm, group=None, backend="triton"):
    """The public operator as a function of the same tensors as ``plain``."""
    options = {} if operator == "gated_residual" else {"norm": norm}

    def fn(*tensors):
        # arrays and vectors by position, vectors [D] by name
        names = VECTORS[operator][1]
        channels = dict(zip(names, tensors[-len(names) :], strict=True))
        positional = tensors[: -len(names)]
        return getattr(ops, operator)(
            *positional, **channels, group=group, backend=backend, **options
        )

    return fn


def make(operator, kinds, dtype=torch.float32, shape=None):
    """Inputs in the order of ``plain`` and gradients; a vector that ``kinds`` lacks is None."""
    shape = shape or (B, T, D)
    random = lambda *shape: torch.randn(*shape, device=DEVICE, dtype=dtype)
    arrays = [random(*shape) for _ in range(ARRAYS.get(operator, 2))]
    varying, channels = VECTORS[operator]
    vectors = []
    for name in varying:
        vectors.append(random(*SHAPES[kinds[name]]) if name in kinds else None)
    vectors += [random(shape[2]) if name in kinds else None for name in channels]
    return arrays + vectors, [random(*shape) for _ in range(OUTPUTS.get(operator, 1))]


# operator, kind of each vector that is there, norm
CASES = [
    ("adaln", {}, "layer"),
    ("adaln", {}, "rms"),
    ("adaln", {"scale": "image"}, "rms"),
    ("adaln", {"shift": "image"}, "layer"),
    ("adaln", {"norm_weight": ""}, "rms"),
    ("adaln", {"norm_weight": "", "norm_bias": ""}, "layer"),
    ("adaln", {"norm_bias": ""}, "rms"),
    ("adaln", {"scale": "image", "norm_weight": ""}, "rms"),
    (
        "adaln",
        {"shift": "channel", "scale": "image 1", "norm_weight": "", "norm_bias": ""},
        "layer",
    ),
    ("adaln", {"shift": "frame", "scale": "frame"}, "layer"),
    ("adaln", {"shift": "frame, one image", "scale": "image", "norm_weight": ""}, "layer"),
    ("adaln", {"scale": "frame"}, "rms"),
    ("adaln", {"shift": "token", "scale": "token"}, "layer"),
    ("adaln", {"shift": "token, one image", "scale": "channel"}, "rms"),
    ("adaln", {"shift": "frame", "scale": "token", "norm_weight": "", "norm_bias": ""}, "layer"),
    ("adaln", {"scale": "token"}, "rms"),
    ("adaln", {"shift": "token"}, "layer"),
    ("gated_residual", {}, ""),
    ("gated_residual", {"bias": ""}, ""),
    ("gated_residual", {"gate": "frame", "bias": ""}, ""),
    ("gated_residual", {"gate": "frame, one image"}, ""),
    ("gated_residual", {"gate": "token", "bias": ""}, ""),
    ("gated_residual", {"gate": "token, one image"}, ""),
    ("gated_residual_adaln", {}, "layer"),
    ("gated_residual_adaln", {"bias": "", "norm_weight": "", "norm_bias": ""}, "layer"),
    ("gated_residual_adaln", {"gate": "image"}, "rms"),
    ("gated_residual_adaln", {"shift": "image", "scale": "image"}, "layer"),
    ("gated_residual_adaln", {"gate": "image", "scale": "image", "norm_weight": ""}, "rms"),
    ("gated_residual_adaln", {"gate": "image", "scale": "image", "bias": ""}, "rms"),
    ("gated_residual_adaln", {"gate": "channel", "shift": "frame", "scale": "frame"}, "layer"),
    ("gated_residual_adaln", {"gate": "frame", "norm_weight": "", "bias": ""}, "rms"),
    ("gated_residual_adaln", {"gate": "token", "shift": "token", "scale": "token"}, "layer"),
    ("gated_residual_adaln", {"gate": "channel", "shift": "token", "bias": ""}, "rms"),
    (
        "gated_residual_adaln",
        {"gate": "token", "scale": "image", "norm_weight": "", "norm_bias": "", "bias": ""},
        "layer",
    ),
    ("gated_residual_norm", {}, "rms"),
    ("gated_residual_norm", {"norm_weight": ""}, "rms"),
    ("gated_residual_norm", {"gate": "image"}, "layer"),
    ("gated_residual_norm", {"gate": "image", "norm_weight": ""}, "rms"),
    ("gated_residual_norm", {"gate": "channel", "norm_weight": ""}, "layer"),
    ("gated_residual_norm", {"gate": "frame", "norm_weight": ""}, "rms"),
    ("gated_residual_norm", {"gate": "token", "norm_weight": ""}, "rms"),
]


def name_of(case):
    operator, kinds, norm = case
    return "-".join([operator, norm, *(f"{k}:{v}" if v else k for k, v in kinds.items())])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward_and_gradients(case, backend):
    operator, kinds, norm = case
    inputs, douts = make(operator, kinds)
    written = plain(operator, norm)
    check_against_fp64(call(operator, norm, backend=backend), written, written, inputs, douts)
    # without a gradient, as in the teacher
    with torch.no_grad():
        found = call(operator, norm, backend=backend)(*inputs)
        expected = written(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "case",
    [
        ("adaln", {"scale": "group", "norm_weight": ""}, "rms"),
        ("adaln", {"norm_weight": ""}, "rms"),
        ("adaln", {"shift": "group"}, "layer"),
        ("gated_residual", {}, ""),
        ("gated_residual_adaln", {"gate": "group", "norm_weight": "", "norm_bias": ""}, "layer"),
        ("gated_residual_adaln", {"scale": "group", "bias": ""}, "rms"),
        ("gated_residual_adaln", {"norm_weight": ""}, "rms"),
        ("gated_residual_norm", {"gate": "group", "norm_weight": ""}, "rms"),
        ("gated_residual_norm", {"norm_weight": ""}, "rms"),
    ],
    ids=name_of,
)
def test_with_a_group(case, backend):
    """A group beside vectors that are left out, or beside none at all."""
    operator, kinds, norm = case
    inputs, douts = make(operator, kinds)
    group = torch.randint(0, GROUPS, (B, T), device=DEVICE)
    written = plain(operator, norm, group)
    check_against_fp64(call(operator, norm, group, backend), written, written, inputs, douts)
