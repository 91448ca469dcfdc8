"""Alignment distances: forward and gradients against fp64, kinks, zeros, layouts, bad input."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_kernel_close

from sra_fast.ops.align_distance import KINDS, _bwd, _fwd, align_distance, align_distance_ref

# power of two; odd; more tokens than a tile; widths of SiT-S and SiT-XL, ragged T
SHAPES = [(2, 16, 64), (1, 9, 72), (2, 70, 72), (3, 5, 384), (2, 7, 1152)]


def naive(pred, target, kind, beta=0.05, weight=None):
    """What a training script writes, in the dtype it is given: sets the error budget."""
    target = target.to(pred.dtype)  # torch 2.11's l2 takes no mixture
    if kind == "cosine_token":
        return (1 - F.cosine_similarity(pred, target, dim=1)).mean(1)
    if kind == "cosine_patch":
        tok = 1 - F.cosine_similarity(pred, target, dim=2)
    elif kind == "smooth_l1":
        tok = F.smooth_l1_loss(pred, target, beta=beta, reduction="none").mean(2)
    else:
        tok = {"l1": F.l1_loss, "l2": F.mse_loss}[kind](pred, target, reduction="none").mean(2)
    return (tok if weight is None else tok * weight).mean(1)


def make(shape, dtype, device, weighted=False):
    torch.manual_seed(0)
    pred = torch.randn(shape, device=device).to(dtype)
    # close to pred in places, so that both pieces of smooth-L1 occur
    noise = torch.randn(shape, device=device) * torch.rand(shape, device=device).pow(4)
    target = (pred.float() + noise).to(dtype)
    weight = torch.rand(shape[:2], device=device) if weighted else None
    return pred, target, weight


def run(fn, pred, target, weight, dloss):
    # no clone: it would make the strides plain
    leaves = [t.detach().requires_grad_() for t in (pred, weight) if t is not None]
    loss = fn(leaves[0], target, weight=leaves[1] if weight is not None else None)
    return [loss, *torch.autograd.grad(loss, leaves, dloss.to(loss.dtype))]


def check(kind, pred, target, weight, floor, dloss=None, **kw):
    """Forward and gradients of the kernel against fp64, with plain PyTorch in the same dtype as
    the yardstick.
    """
    dloss = torch.randn(pred.shape[0], device=pred.device) if dloss is None else dloss
    ours = run(
        lambda p, q, weight: align_distance(p, q, kind, weight=weight, backend="triton", **kw),
        pred,
        target,
        weight,
        dloss,
    )
    same = run(
        lambda p, q, weight: naive(p, q, kind, weight=weight, **kw), pred, target, weight, dloss
    )
    wide = [None if t is None else t.double() for t in (pred, target, weight, dloss)]
    truth = run(lambda p, q, weight: align_distance_ref(p, q, kind, weight=weight, **kw), *wide)
    for a, b, c in zip(ours, same, truth, strict=True):
        # gradients are about 1/(T D): compared at the scale of their largest entry
        scale = c.abs().max().clamp_min(1e-30)
        assert_kernel_close(a.double() / scale, b.double() / scale, c / scale, floor=floor)
    assert (
        ours[0].dtype == torch.float32 and ours[1].dtype == pred.dtype and ours[1].is_contiguous()
    )


# a weight is not defined for cosine_token
CASES = [(kind, False) for kind in KINDS] + [
    (kind, True) for kind in KINDS if kind != "cosine_token"
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind, weighted", CASES)
def test_forward_and_gradients(kind, weighted, shape, device):
    check(kind, *make(shape, torch.float32, device, weighted), floor=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype, device):
    # the stored gradient is rounded once more than the result; the interpreter truncates bf16
    pred, target, _ = make((2, 9, 1152), dtype, device)
    check(
        kind,
        pred,
        target,
        None,
        floor={torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype],
        dloss=torch.tensor([700.0, -300.0], device=device),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_dtypes_and_layouts(kind, device):
    """Permuted, column-sliced and expanded inputs, used in place or copied, give the same numbers."""
    torch.manual_seed(0)
    B, T, D = 2, 9, 72
    pred = torch.randn(T, B, D, device=device).transpose(0, 1)
    sliced = torch.randn(B, T, 2 * D, device=device)[:, :, D:]
    check(kind, pred, sliced, None, floor=1e-6)
    check(kind, torch.randn(B, D, T, device=device).transpose(1, 2), sliced, None, floor=1e-6)
    check(kind, sliced, torch.randn(1, T, D, device=device).expand(B, T, D), None, floor=1e-6)
    check(kind, pred, sliced.bfloat16(), None, floor=1e-6)


@pytest.mark.parametrize("kind", ["l2", "cosine_token"])
def test_offsets_beyond_32_bits(kind, device):
    """An image stride that fits 32 bits while its double does not: virtual memory on a CPU, 4 GiB
    on a GPU.
    """
    T, D, stride = 4, 16, 2**30 + 16
    base = torch.empty(2 * stride + T * D, dtype=torch.bfloat16, device=device)
    pred = base.as_strided((3, T, D), (stride, D, 1))
    pred.copy_(torch.randn(3, T, D))
    check(kind, pred, torch.randn(3, T, D, device=device).bfloat16(), None, floor=2**-6)


@pytest.mark.parametrize("kind", ["cosine_patch", "cosine_token"])
def test_zero_vectors(kind, device):
    """Zero features have a finite distance and gradient: torch's clamp at 1e-8 is followed
    exactly.
    """
    pred, target, _ = make((2, 6, 64), torch.float32, device)
    pred[0, 2] = 0
    target[1, 3] = 0
    pred[:, :, 5] = 0
    target[:, :, 7] = 0
    check(kind, pred, target, None, floor=1e-6)


@pytest.mark.parametrize("kind", ["l1", "smooth_l1"])
def test_kinks(kind, device):
    """Differences of exactly zero and beta; beta=0 is L1."""
    target = torch.zeros(1, 4, 64, device=device)
    pred = torch.tensor([-0.5, -0.05, 0.0, 0.25], device=device)[None, :, None].expand(1, 4, 64)
    check(kind, pred, target, None, floor=1e-6)
    if kind == "smooth_l1":
        check(kind, pred, target, None, floor=1e-6, beta=0.0)
        check(kind, pred, target, None, floor=1e-6, beta=0.25)


def test_expanded_upstream_gradient_and_mean(device):
    pred, target, weight = make((3, 5, 72), torch.float32, device, weighted=True)
    pred.requires_grad_()
    loss = align_distance(
        pred, target, "smooth_l1", weight=weight, reduction="mean", backend="triton"
    )
    (grad,) = torch.autograd.grad(loss * 0.2, pred)
    wide = pred.detach().double().requires_grad_()
    truth = align_distance_ref(wide, target.double(), "smooth_l1", weight=weight.double()).mean()
    torch.testing.assert_close(loss.double(), truth, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(truth * 0.2, wide)[0], atol=1e-9, rtol=1e-5
    )


@pytest.mark.parametrize("per_token", [True, False], ids=["token", "channel"])
def test_strides_of_the_upstream_gradient(per_token, device):
    torch.manual_seed(0)
    B, T, D = 2, 70, 72
    grad = torch.randn(B, T, D, device=device)
    n = T if per_token else D
    for ddist in (
        torch.randn(n, B, device=device).t(),
        torch.randn(B, 1, device=device).expand(B, n),
    ):
        factor = ddist[:, :, None] / D if per_token else ddist[:, None] / T
        torch.testing.assert_close(_bwd(ddist, grad, per_token), grad * factor)


def test_no_gradient_is_computed_or_leaks(device):
    pred, target, _ = make((2, 5, 64), torch.float32, device)
    target.requires_grad_()
    assert not align_distance(pred, target, "l2", backend="triton").requires_grad
    pred.requires_grad_()
    align_distance(pred, target, "l2", backend="triton").sum().backward()
    assert target.grad is None and pred.grad.abs().sum() > 0
    with torch.no_grad():
        dist, grad = _fwd(pred, target, "l2", 0.05, False)
        assert dist.shape == (2, 5) and grad.numel() == 0
        torch.testing.assert_close(
            align_distance(pred, target, "l2", backend="triton"), dist.mean(1)
        )


def test_backward_twice_gives_the_same_gradient(device):
    pred, target, _ = make((2, 5, 64), torch.float32, device)
    pred.requires_grad_()
    loss = align_distance(pred, target, "cosine_patch", backend="triton").sum()
    first, second = (torch.autograd.grad(3 * loss, pred, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_fp64_goes_to_the_reference(device):
    pred, target, weight = (
        t.double().requires_grad_() for t in make((2, 3, 8), torch.float64, device, weighted=True)
    )
    for kind in ("smooth_l1", "cosine_patch"):
        fn = lambda p, w, kind=kind: align_distance(p, target, kind, weight=w, backend="triton")
        assert fn(pred, weight).dtype == torch.float64
        assert torch.autograd.gradcheck(fn, (pred, weight))


def test_empty_batch(device):
    pred = torch.zeros(0, 4, 8, device=device, requires_grad=True)
    loss = align_distance(pred, torch.zeros(0, 4, 8, device=device), "smooth_l1", backend="triton")
    assert loss.shape == (0,)
    assert torch.autograd.grad(loss.sum(), pred)[0].shape == pred.shape


def test_operator_registration(device):
    pred, target, _ = make(SHAPES[0], torch.float32, device)
    for kind, per_token in (("smooth_l1", True), ("cosine_token", False)):
        for need_grad in (False, True):
            torch.library.opcheck(_fwd, (pred, target, kind, 0.05, need_grad))
        dist, grad = _fwd(pred, target, kind, 0.05, True)
        torch.library.opcheck(_bwd, (torch.randn_like(dist), grad, per_token))


def test_compiles(device):
    pred, target, weight = make((2, 5, 64), torch.float32, device, weighted=True)
    pred.requires_grad_()
    expected = torch.autograd.grad(
        align_distance_ref(pred * 2, target, "smooth_l1", weight=weight).sum(), pred
    )[0]

    def fn(p):
        return align_distance(p * 2, target, "smooth_l1", weight=weight, backend="triton")

    loss = torch.compile(fn, fullgraph=True, backend="aot_eager")(pred)
    torch.testing.assert_close(
        torch.autograd.grad(loss.sum(), pred)[0], expected, atol=1e-8, rtol=1e-5
    )


def test_rejects_bad_input(device):
    pred, target, weight = make((2, 5, 64), torch.float32, device, weighted=True)
    with pytest.raises(ValueError, match="one shape"):
        align_distance(pred, target[:1], "l1")
    with pytest.raises(ValueError, match="kind must be one of"):
        align_distance(pred, target, "huber")
    with pytest.raises(ValueError, match="expected weight"):
        align_distance(pred, target, "cosine_token", weight=weight)
    with pytest.raises(ValueError, match="expected weight"):
        align_distance(pred, target, "l1", weight=weight[:, :2])
    with pytest.raises(ValueError, match="beta >= 0"):
        align_distance(pred, target, "smooth_l1", beta=-1.0)
    with pytest.raises(ValueError, match="reduction"):
        align_distance(pred, target, "l1", reduction="sum")
    with pytest.raises(ValueError, match="floating-point"):
        align_distance(pred, target.long(), "l1")
    with pytest.raises(ValueError, match="one device"):
        align_distance(pred, target.to("meta"), "l1")
