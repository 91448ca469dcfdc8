"""What the tests of the row operators share: gradients, memory traffic, unusual layouts, launches
without data.
"""

import contextlib
import tempfile
from collections.abc import Callable

import torch
from conftest import DEVICE, assert_kernel_close
from torch.utils._python_dispatch import TorchDispatchMode

from sra_fast.kernels import adaln, gated_residual, gated_residual_adaln, per_token

WIDTHS = [64, 72, 384, 768, 1024, 1152, 1536]
# the interpreter truncates to bf16 where the device rounds
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")]


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def run(fn, inputs, douts, dtype=None):
    """Outputs and gradients of ``fn(*inputs)``; None inputs stay None; ``dtype`` casts the inputs
    first.
    """
    inputs = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = as_tuple(fn(*inputs))
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    douts = [d.to(o.dtype) for d, o in zip(douts, out, strict=True)]
    return [*out, *torch.autograd.grad(out, wanted, douts)]


def check_against_fp64(kernel, naive, reference, inputs, douts, floor=4e-6):
    """Outputs and gradients of the kernel: at most twice as far from the fp64 truth as plain
    PyTorch is. Returns them.
    """
    ours = run(kernel, inputs, douts)
    theirs = run(naive, inputs, douts)
    truth = run(reference, inputs, douts, torch.float64)
    for i, (a, b, c) in enumerate(zip(ours, theirs, truth, strict=True)):
        assert a.shape == c.shape and a.dtype == b.dtype, f"result {i}"
        assert a.isfinite().all(), f"result {i} has a value that was never written"
        assert_kernel_close(a, b, c, floor=floor * max(1.0, c.abs().max().item()))
    return ours


class OpLog(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def count_bytes(monkeypatch):
    """Count the bytes that interpreted kernels load and store, without masked lanes: ``{"load": n,
    "store": n}``.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    total = {"load": 0, "store": 0}

    def counting(kind, original):
        def call(self, ptrs, *args):
            mask = args[0] if kind == "load" else args[1]
            total[kind] += int(mask.data.sum()) * (ptrs.get_element_ty().primitive_bitwidth // 8)
            return original(self, ptrs, *args)

        return call

    with monkeypatch.context() as patch:
        for kind in total:
            name = f"create_masked_{kind}"
            patch.setattr(
                InterpreterBuilder, name, counting(kind, getattr(InterpreterBuilder, name))
            )
        yield total


def far_apart(stride, *values):
    """Views equal to ``values [B, D]``, rows ``stride`` elements apart, side by side in one buffer.

    On the host that is a sparse file, which takes little memory; on a GPU it takes all of it, once
    for all values.
    """
    B, D = values[0].shape
    dtype = values[0].dtype
    device = values[0].device
    size = (B - 1) * stride + len(values) * D
    if device.type == "cuda":
        flat = torch.empty(size, dtype=dtype, device=device)
    else:
        with tempfile.NamedTemporaryFile() as file:
            flat = torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    views = [flat.as_strided((B, D), (stride, 1), i * D) for i in range(len(values))]
    for view, value in zip(views, values, strict=True):
        view.copy_(value)
    return views


def without_memory(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def launchers(
    B,
    T,
    D,
    dtype,
    *,
    y=None,
    h=None,
    modulation=None,
    variant="image",
    bias=False,
    rms=False,
    recompute=False,
    absent=(),
    affine=False,
    tables=None,
    make=without_memory,
) -> dict[str, Callable]:
    """Every launcher by name, ready to be called.

    Args:
        dtype: of x, and of the rest unless it is given.
        y: dtype of y.
        h: dtype of the norm's output.
        modulation: dtype of gate, shift and scale, which are column slices of one array.
        variant: one vector per "image", "group" or "token".
        bias: with a bias.
        rms: RMS norm.
        recompute: the backward also recomputes the norm's output.
        absent: which of "gate", "shift" and "scale" are left out; a scale only with the shift.
        affine: the scale is the factor itself; with one vector per "token": weight and bias of the
            norm.
        tables: dtype of the tables of gate, shift and scale; only with one vector per "token".
        make: called as ``make(*shape, dtype=dtype)`` for every tensor.
    """
    x = make(B, T, D, dtype=dtype)
    y = make(B, T, D, dtype=y or dtype)
    dh = make(B, T, D, dtype=h or dtype)
    rstd = make(B, T, dtype=torch.float32)
    bias = make(D, dtype=y.dtype) if bias else None
    mean = rstd[:0] if rms else rstd
    shape = {"image": (B, 6 * D), "group": (B, 2, 6 * D), "token": (B, T, 6 * D)}[variant]
    gate, shift, scale = make(*shape, dtype=modulation or dtype).chunk(6, dim=-1)[2:5]
    if variant == "token":
        weight = make(D, dtype=modulation or dtype) if affine else None
        affine = (weight, weight)
        tables = [None if tables is None else make(D, dtype=tables) for _ in range(3)]
        vectors = (gate, affine, shift, scale)
        return _per_token_launchers(x, y, dh, bias, vectors, tables, mean, rstd, rms, h)
    group = make(B, T, dtype=torch.int64) if variant == "group" else None
    has_shift = "shift" not in absent
    gate = None if "gate" in absent else gate
    scale = None if "scale" in absent else scale
    shift = shift if has_shift else None
    flags = (has_shift, affine)
    recomputed = shift if recompute else None
    plain = gated_residual
    fused = gated_residual_adaln
    found = {
        "adaln_fwd": lambda: adaln.adaln_fwd(x, shift, scale, group, 1e-6, rms, h, affine),
        "adaln_bwd": lambda: adaln.adaln_bwd(dh, x, scale, group, mean, rstd, recomputed, *flags),
        "gated_residual_fwd": lambda: plain.gated_residual_fwd(x, y, bias, gate, group),
        "gated_residual_bwd": lambda: plain.gated_residual_bwd(x, y, bias, gate, group),
        "gated_residual_adaln_fwd": lambda: fused.gated_residual_adaln_fwd(
            x, y, bias, gate, shift, scale, group, 1e-6, rms, h, affine
        ),
        "gated_residual_adaln_bwd": lambda: fused.gated_residual_adaln_bwd(
            x, dh, x, y, bias, gate, scale, group, mean, rstd, recomputed, *flags
        ),
        "gated_residual_norm_fwd": lambda: adaln.adaln_fwd(
            y, None, scale, group, 1e-6, rms, dtype, True, x
        ),
        "gated_residual_norm_bwd": lambda: adaln.adaln_bwd(
            x, y, scale, group, mean, rstd, None, False, True
        ),
    }
    # without a gate there is no pass
    if gate is None:
        del found["gated_residual_bwd"]
    return found


def _per_token_launchers(x, y, dh, bias, vectors, tables, mean, rstd, rms, h):
    """Both passes of every operator with one vector per token."""
    fwd = per_token.per_token_fwd
    bwd = per_token.per_token_bwd
    gate, affine, shift, scale = vectors
    of_gate, of_shift, of_scale = tables
    # as arguments: the dtype of h, whether the scale is a factor, the tables
    of_norm = (False, None, of_shift, of_scale)
    of_update = (False, of_gate, None, None)
    of_both = (False, *tables)
    # a backward takes the dtype of the shift's table
    dtype = None if of_shift is None else of_shift.dtype
    back_of_norm = (False, None, dtype, of_scale)
    back_of_both = (False, of_gate, dtype, of_scale)
    of_factor = (True, None, None, of_scale)
    none = (None, None)
    norm = (1e-6, rms, True)
    empty = rstd[:0]
    return {
        "adaln_fwd": lambda: fwd(
            x, None, None, None, *affine, shift, scale, None, *norm, h, *of_norm
        ),
        "adaln_bwd": lambda: bwd(
            None, dh, x, None, None, None, *affine, scale, mean, rstd, *back_of_norm
        ),
        "gated_residual_fwd": lambda: fwd(
            x, y, bias, gate, *none, None, None, None, 0.0, False, False, None, *of_update
        ),
        "gated_residual_bwd": lambda: bwd(
            x, None, None, y, bias, gate, *none, None, empty, empty, *of_update
        ),
        "gated_residual_adaln_fwd": lambda: fwd(
            x, y, bias, gate, *affine, shift, scale, None, *norm, h, *of_both
        ),
        "gated_residual_adaln_bwd": lambda: bwd(
            x, dh, x, y, bias, gate, *affine, scale, mean, rstd, *back_of_both
        ),
        "gated_residual_norm_fwd": lambda: fwd(
            y, None, None, None, affine[0], None, None, scale, x, *norm, x.dtype, *of_factor
        ),
        "gated_residual_norm_bwd": lambda: bwd(
            None, x, y, None, None, None, affine[0], None, scale, mean, rstd, *of_factor
        ),
    }


def launchers_of_two(
    B, T, D, dtype, *, y=None, h=None, modulation=None, bias=False, make=without_memory
) -> tuple[Callable, Callable]:
    """Both passes of the fused kernel with two modulations, ready to be called; see
    ``launchers``.
    """
    x = make(B, T, D, dtype=dtype)
    y = make(B, T, D, dtype=y or dtype)
    dh, dh2 = (make(B, T, D, dtype=h or dtype) for _ in range(2))
    mean, rstd = (make(B, T, dtype=torch.float32) for _ in range(2))
    bias = make(D, dtype=y.dtype) if bias else None
    projection = make(B, 9 * D, dtype=modulation or dtype)
    gate, shift, scale, shift2, scale2 = projection.chunk(9, dim=1)[2:7]
    fused = gated_residual_adaln
    return (
        lambda: fused.gated_residual_adaln_two_fwd(
            x, y, bias, gate, shift, scale, shift2, scale2, 1e-6, False, h
        ),
        lambda: fused.gated_residual_adaln_two_bwd(
            x, dh, dh2, x, y, bias, gate, scale, scale2, mean, rstd
        ),
    )


def noncontiguous(t):
    """The same values ``[B, T, D]`` in a permuted and sliced view."""
    return torch.stack([t, t], dim=-1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]


def bitwise_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
