"""Two noisy inputs and the velocity: against fp64, times, layouts, gradients, bad input."""

import pytest
import torch
from conftest import assert_kernel_close

from sra_fast.ops.noise_pair import PATHS, _op, _rows, interpolant, noise_pair, noise_pair_ref

SHAPES = [
    (2, 4, 16, 16),
    (3, 3, 7, 5),
    (1, 4, 32, 32),
    (2, 5, 23, 11),
]  # one block; ragged; SiT at 256 px; two blocks


def make(shape, dtype, device, moments=False):
    torch.manual_seed(0)
    B, C = shape[:2]
    x0 = torch.randn(B, 2 * C if moments else C, *shape[2:], device=device).to(dtype)
    noise, latent_noise = torch.randn(2, *shape, device=device).to(dtype)
    t = torch.rand(B, device=device)
    return {
        "x0": x0,
        "noise": noise,
        "t": t,
        "t_teacher": (t - 0.2 * torch.rand(B, device=device)).clamp(0, 1),
        "latent_noise": latent_noise if moments else None,
    }


def check(args, floor=1e-6, **kw):
    """The kernel against fp64, with the reference in the same dtype as the yardstick."""
    wide = {k: v.double() if torch.is_tensor(v) else v for k, v in args.items()}
    ours = noise_pair(**args, **kw, backend="triton")
    same = noise_pair_ref(**args, **kw)
    truth = noise_pair_ref(**wide, **kw)
    for a, b, c in zip(ours, same, truth, strict=True):
        assert a.dtype == torch.float32 and a.shape == args["noise"].shape and a.is_contiguous()
        assert_kernel_close(a.double(), b.double(), c, floor=floor)


@pytest.mark.parametrize("moments", [False, True], ids=["latent", "moments"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(shape, path, moments, device):
    check(make(shape, torch.float32, device, moments), path=path, scale=0.18215 if moments else 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_half_precision_inputs(path, dtype, device):
    """Half-precision data is widened before the arithmetic: the result is as exact as in fp32."""
    check(make((2, 4, 6, 5), dtype, device, moments=True), path=path, scale=0.5)


def test_the_whole_range_of_times(device):
    """The kernel's sine polynomial from data to noise, both ends included."""
    t = torch.linspace(0, 1, 257, device=device)
    x0 = torch.tensor([[1.0, 0.0]], device=device).repeat(257, 1)
    noise = 1 - x0
    x_t, x_teacher, v = noise_pair(x0, noise, t, t.flip(0), "cosine", backend="triton")
    alpha, sigma, dalpha, dsigma = interpolant(t.double(), "cosine")
    for out, expected in (
        (x_t, (alpha, sigma)),
        (x_teacher.flip(0), (alpha, sigma)),
        (v, (dalpha, dsigma)),
    ):
        torch.testing.assert_close(out.double(), torch.stack(expected, 1), atol=3e-7, rtol=0)
    assert x_t[0].tolist() == pytest.approx([1, 0], abs=1e-7) and x_t[-1].tolist() == pytest.approx(
        [0, 1], abs=1e-7
    )


@pytest.mark.parametrize("moments", [False, True], ids=["latent", "moments"])
def test_layouts(moments, device):
    """Batch slices are used in place; channels-last, strided and expanded inputs give the same
    numbers.
    """
    args = make((4, 3, 8, 5), torch.float32, device, moments)
    check(args | {"x0": args["x0"].to(memory_format=torch.channels_last)})
    check(args | {"noise": torch.randn(4, 3, 8, 10, device=device)[..., ::2]})
    check(args | {"noise": torch.randn(1, 3, 8, 5, device=device).expand(4, 3, 8, 5)})
    check(
        args
        | {
            "t": torch.rand(1, device=device).expand(4),
            "t_teacher": torch.rand(8, device=device)[::2],
        }
    )
    halves = {k: v[::2] for k, v in args.items() if v is not None}
    assert _rows(halves["x0"]).data_ptr() == args["x0"].data_ptr()
    check(halves)


def test_offsets_beyond_32_bits(device):
    """An image stride that fits 32 bits while its double does not: virtual memory on a CPU, 4 GiB
    on a GPU.
    """
    stride = 2**30 + 16
    base = torch.empty(2 * stride + 32, dtype=torch.bfloat16, device=device)
    x0 = base.as_strided((3, 1, 4, 8), (stride, 32, 8, 1))
    x0.copy_(torch.randn(3, 1, 4, 8))
    check(make((3, 1, 4, 8), torch.bfloat16, device) | {"x0": x0})


def test_gradients_go_through_the_reference(device, caplog):
    args = make((2, 2, 3, 2), torch.float64, device, moments=True)
    leaves = [
        args[k].double().requires_grad_() for k in ("x0", "noise", "t", "t_teacher", "latent_noise")
    ]

    def fn(x0, noise, t, t_teacher, latent_noise):
        return noise_pair(
            x0,
            noise,
            t,
            t_teacher,
            "cosine",
            latent_noise=latent_noise,
            scale=0.5,
            backend="triton",
        )

    assert torch.autograd.gradcheck(fn, leaves)
    x0 = torch.randn(2, 4, 3, 2, device=device, requires_grad=True)
    for _ in range(2):
        x_t, _, _ = fn(x0, *(s.detach().float() for s in leaves[1:]))
    (dx0,) = torch.autograd.grad(x_t.sum(), x0)
    alpha = 0.5 * interpolant(args["t"], "cosine")[0].float()
    torch.testing.assert_close(dx0[:, :2], alpha.view(2, 1, 1, 1).expand(2, 2, 3, 2))
    assert sum("unfused" in r.getMessage() for r in caplog.records) == 1


def test_empty_batch(device):
    x = torch.zeros(0, 4, 2, 2, device=device)
    assert [
        out.shape for out in noise_pair(x, x, x[:, 0, 0, 0], x[:, 0, 0, 0], backend="triton")
    ] == [x.shape] * 3


def test_operator_registration_and_compile(device):
    args = make((2, 3, 4, 5), torch.float32, device, moments=True)
    rows = [_rows(args[k]) for k in ("x0", "latent_noise", "noise")]
    torch.library.opcheck(_op, (*rows, args["t"], args["t_teacher"], True, 0.5))
    torch.library.opcheck(_op, (rows[1], None, rows[2], args["t"], args["t_teacher"], False, 1.0))
    fn = torch.compile(
        lambda **kw: noise_pair(**kw, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(fn(**args), noise_pair_ref(**args), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_rejects_bad_input(device):
    args = make((2, 4, 3, 3), torch.float32, device)
    for change in (
        {"noise": args["noise"][:1]},
        {"t": args["t"][:1]},
        {"t_teacher": args["t"][:, None]},
        {"latent_noise": args["noise"]},
    ):
        with pytest.raises(
            ValueError, match=r"expected .*noise \[B, C, H, W\] and t, t_teacher \[B\], got"
        ):
            noise_pair(**args | change)
    with pytest.raises(ValueError, match="path must be one of"):
        noise_pair(**args, path="quadratic")
    with pytest.raises(ValueError, match="floating-point"):
        noise_pair(**args | {"t": args["t"].long()})
    with pytest.raises(ValueError, match="one device"):
        noise_pair(**args | {"noise": args["noise"].to("meta")})
