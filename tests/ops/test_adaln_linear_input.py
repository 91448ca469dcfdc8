"""Bad and empty inputs of adaln_linear and adaln_mlp."""

import pytest
import torch
from conftest import DEVICE
from test_adaln_linear import OPS, call, make

from sra_fast import ops


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "change, message",
    [
        ({0: lambda t: t[0]}, "expected x"),
        ({1: lambda t: t[:, 1:]}, r"expected x, residual\[0\] \[B, T, D\]"),
        ({3: lambda t: t[:, 1:]}, r"residual\[1\], shift, scale \[B, D\].*residual\[1\] \[2, 71\]"),
        ({6: lambda t: t[:, 1:]}, r"expected weight1? \[N, 72\] and bias1? \[N\] .* got"),
        ({7: lambda t: t[1:]}, "expected weight"),
        ({6: lambda t: t.bfloat16()}, "expected weight.* of dtype torch.bfloat16"),
        ({7: lambda t: t.to("meta")}, "expected weight"),
        ({8: lambda t: t.t()}, r"expected weight2 \[N, 96\]"),
        ({9: lambda t: t[1:]}, r"expected weight2 \[N, 96\]"),
        ({2: lambda t: t[1:]}, r"residual\[2\] \[71\]"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_bad_input_is_named(op, change, message, grad):
    inputs, _, _ = make(op)
    if max(change) >= len(inputs):
        pytest.skip("the other operator's")
    inputs = [change[i](t) if i in change else t for i, t in enumerate(inputs)]
    with pytest.raises(ValueError, match=message), torch.set_grad_enabled(grad):
        call(op)(*[t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_what_else_cannot_be_is_named(op, grad):
    (x, y, _, gate, shift, scale, *layers), _, _ = make(op)
    x.requires_grad_(grad)
    per_token = shift[:, None].expand(2, 5, 72)
    for args, options, message in (
        ((x, per_token, per_token), {}, r"shift, scale \[B, D\]"),
        ((x[0, 0], shift, scale), {}, r"expected x \[B, T, D\], got \[72\]"),
        ((x.sum(), shift, scale), {}, r"expected x \[B, T, D\], got \[\]"),
        (
            (x, shift, scale),
            {"residual": (y,)},
            r"expected residual \(y, gate\) .* got \['Tensor'\]",
        ),
        ((x, shift, scale), {"residual": (y, None)}, "expected residual"),
        ((x, shift, scale), {"residual": (y, gate, None, None)}, "expected residual"),
        ((x, shift, scale), {"residual": y}, "expected residual"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS[op](*args, *layers, **options)


def test_layers_without_outputs():
    (x, y, _, gate, shift, scale, *_), _, _ = make("linear")
    x.requires_grad_()
    empty = torch.zeros(0, 72, device=DEVICE)
    bias = torch.zeros(0, device=DEVICE)
    _, parts = ops.adaln_linear(
        x, shift, scale, empty, bias, residual=(y, gate), parts=3, backend="triton"
    )
    assert [part.shape for part in parts] == [(2, 5, 0)] * 3
    _, out = ops.adaln_mlp(
        x, shift, scale, empty, bias, empty.t(), residual=(y, gate), backend="triton"
    )
    assert out.shape == (2, 5, 72) and not out.any()


def test_options_are_named():
    inputs, _, _ = make("linear")
    for options, message in (
        ({"norm": "batch"}, "norm must be one of"),
        ({"backend": "cuda"}, "backend must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            call("linear", **{"backend": "triton", **options})(
                *[t.requires_grad_() for t in inputs]
            )
