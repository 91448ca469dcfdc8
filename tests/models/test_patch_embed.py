"""Patches as one product: the convolution of the published code, to rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sra_fast.models.layers import PatchEmbed

CASES = [(2, 4, 72, (16, 16)), (1, 1, 64, (8, 8)), (4, 3, 40, (8, 16)), (8, 4, 1152, (32, 32))]


def made(patch_size, channels, width, size, device):
    torch.manual_seed(0)
    layer = PatchEmbed(patch_size, channels, width).to(device)
    return layer, torch.randn(3, channels, *size, device=device)


def convolution(layer, x):
    """The definition in fp64, and what its gradients are taken of."""
    operands = [
        t.detach().double().requires_grad_() for t in (x, layer.proj.weight, layer.proj.bias)
    ]
    out = F.conv2d(*operands, stride=layer.proj.stride)
    return out.flatten(2).transpose(1, 2), operands


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, device):
    layer, x = made(*case, device)
    x.requires_grad_()
    out = layer(x)
    expected, operands = convolution(layer, x)
    assert out.is_contiguous() and out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, layer.proj.weight, layer.proj.bias), dout)
    for got, want in zip(
        found, torch.autograd.grad(expected, operands, dout.double()), strict=True
    ):
        assert got.shape == want.shape
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("layout", ["channels last", "a slice", "flipped in memory"])
def test_inputs_of_any_layout(layout, device):
    layer, x = made(2, 4, 64, (8, 8), device)
    same = {
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "a slice": torch.cat([x, x], dim=1)[:, 4:],
        "flipped in memory": x.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    assert torch.equal(layer(same), layer(x))


def test_parameters_and_randomness_of_a_convolution():
    """The same names and shapes, the same first values, and as many random numbers drawn."""
    torch.manual_seed(0)
    ours = PatchEmbed(2, 4, 72).proj
    after = torch.rand(1)
    torch.manual_seed(0)
    theirs = nn.Conv2d(4, 72, 2, stride=2)
    expected = torch.rand(1)
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        "weight": (72, 4, 2, 2),
        "bias": (72,),
    }
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert torch.equal(after, expected)


def test_mixed_precision(device):
    """bf16 weights and autocast to bf16: the output is rounded, its sums are not."""
    layer, x = made(2, 4, 72, (16, 16), device)
    expected, _ = convolution(layer, x)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = layer(x)
    for out in (mixed, layer.bfloat16()(x.bfloat16())):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, atol=0.03, rtol=0.02)


def test_compiles_whole_and_without_memory(device):
    layer, x = made(2, 4, 72, (16, 16), device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (3, 64, 72)


def test_a_hook_of_the_projection_sees_the_call(device):
    """ZeRO 3 gathers there what the product reads, before it and again before its backward pass."""
    layer, x = made(2, 4, 64, (8, 8), device)
    expected, operands = convolution(layer, x)
    weight = layer.proj.weight.data
    calls = []

    def gather(*_):
        calls.append("gather")
        layer.proj.weight.data = weight

    def release(module, args, out):
        calls.append("release")
        layer.proj.weight.data = weight.new_empty(0)
        out.register_hook(gather)

    layer.proj.register_forward_pre_hook(gather)
    layer.proj.register_forward_hook(release)
    layer.proj.weight.data = weight.new_empty(0)
    layer(x).sum().backward()
    expected.sum().backward()
    assert calls == ["gather", "release", "gather"]
    torch.testing.assert_close(
        layer.proj.weight.grad.double(), operands[1].grad, atol=1e-4, rtol=1e-5
    )


def test_no_images(device):
    layer, _ = made(2, 4, 72, (16, 16), device)
    assert layer(torch.empty(0, 4, 16, 16, device=device)).shape == (0, 64, 72)
