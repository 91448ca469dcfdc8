"""The row kernels as the launchers launch them, compiled for three GPUs: registers, spills, width of loads and stores.

`python tests/ops/test_codegen_norm.py` prints the whole table, every real width included.
"""
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (1, 2)]
from codegen import compile_kernels, record_launches  # noqa: E402

from sra_fast.kernels import _rows, adaln, gated_residual, gated_residual_adaln  # noqa: E402

# 32-bit registers per thread: with 128 threads a program, 4, 3 and 2 programs share an SM of Hopper, and 12 to 8 warps
# with one row pair each in flight are what kernels/_rows.py counts on
BUDGET = {
    ("adaln", "_fwd_kernel"): 128,
    ("adaln", "_bwd_kernel"): 144,
    ("gated_residual", "_fwd_kernel"): 72,
    ("gated_residual", "_bwd_kernel"): 96,
    ("gated_residual_adaln", "_fwd_kernel"): 144,
    ("gated_residual_adaln", "_bwd_kernel"): 250,
    ("_rows", "sum_partials_kernel"): 40,
}
# at the width of SiT-XL in bf16, what a training step runs
BUDGET_XL = {("gated_residual_adaln", "_fwd_kernel"): 96, ("gated_residual_adaln", "_bwd_kernel"): 168}


def launches(D, dtype, variant="image"):
    """Every kernel launch of the three operators, forward and backward, with [B, 6D] modulation used in place."""
    B, T, G = 32, 256, 2
    like = lambda *shape, dtype=dtype: torch.empty(shape, dtype=dtype, device="meta")
    x, row, bias = like(B, T, D), like(B, T, dtype=torch.float32), like(D) if variant == "group" else None
    shape = {"image": (B, 6 * D), "group": (B, G, 6 * D), "token": (B, T, 6 * D)}[variant]
    gate, shift, scale = like(*shape).chunk(6, dim=-1)[2:5]
    group = like(B, T, dtype=torch.int64) if variant == "group" else None
    # as on an H100, whose 132 processors decide how many programs share an image
    h100 = mock.patch.object(_rows, "num_sms", lambda device: 132)
    with h100, record_launches(_rows, adaln, gated_residual, gated_residual_adaln) as log:
        adaln.adaln_fwd(x, shift, scale, group, 1e-6, False)
        adaln.adaln_bwd(x, x, scale, group, row, row)
        if variant != "token":
            gated_residual.gated_residual_fwd(x, x, bias, gate, group)
            gated_residual.gated_residual_bwd(x, x, bias, gate, group)
            gated_residual_adaln.gated_residual_adaln_fwd(x, x, bias, gate, shift, scale, group, 1e-6, False)
            gated_residual_adaln.gated_residual_adaln_bwd(x, x, x, x, bias, gate, scale, group, row, row)
    return log


def cases(full=False):
    bf16, fp32 = torch.bfloat16, torch.float32
    every = [(384, bf16), (768, bf16), (1024, bf16), (1152, bf16), (384, fp32), (768, fp32), (1024, fp32), (1152, fp32)]
    chosen = {arch: every if full else [(1152, bf16), (1152, fp32)] for arch in (80, 90, 100)}
    if not full:
        chosen[90] = [*chosen[90], (384, bf16), (768, bf16)]
    pairs = [(arch, *pair) for arch in chosen for pair in chosen[arch]]
    requests = [replace(r, arch=arch) for arch, D, dtype in pairs for r in launches(D, dtype)]
    for dtype in (bf16, fp32) if full else (bf16,):
        requests += [r for variant in ("group", "token") for r in launches(1152, dtype, variant)]
    # the same launch can occur twice (sums of partial gradients)
    return [r for i, r in enumerate(requests) if r not in requests[:i]]


@pytest.fixture(scope="module")
def compiled():
    requests = cases()
    return list(zip(requests, compile_kernels(requests), strict=True))


def label(request):
    pointer = next(value for value in request.args.values() if isinstance(value, str) and value.startswith("*"))
    return f"{request.module.rpartition('.')[2]}.{request.kernel} sm_{request.arch} D={request.args['D']} {pointer}"


def test_registers_and_spills(compiled):
    for request, report in compiled:
        key = request.module.rpartition(".")[2], request.kernel
        assert report.spills == 0, label(request)
        assert report.registers <= BUDGET[key], f"{label(request)}: {report.registers} registers"
        xl = request.args["D"] == 1152 and "*fp32" not in (request.args.get("y_ptr"), request.args.get("x_ptr"))
        if xl and key in BUDGET_XL and request.args["group_ptr"] is None and request.arch == 90:
            assert report.registers <= BUDGET_XL[key], f"{label(request)}: {report.registers} registers"


def test_loads_and_stores_are_128_bits_wide(compiled):
    """The head of a row moves in 128-bit pieces; its tail, a ninth of SiT-XL's and a third of SiT-B's, in less."""
    for request, report in compiled:
        if request.kernel == "sum_partials_kernel":
            continue
        for kind, found in (("loads", report.loads), ("stores", report.stores)):
            share = 128 * found[128] / sum(bits * n for bits, n in found.items())
            assert share >= 0.5, f"{label(request)}: {kind} {dict(found)}"


def test_widths_follow_alignment():
    """The check above can fail: a misaligned pointer or an odd stride costs the wide loads."""
    request = next(r for r in launches(1152, torch.bfloat16) if r.kernel == "_fwd_kernel" and "gate_ptr" in r.args)
    odd = replace(request, args=request.args | {"x_ptr": "*bf16:1"})
    aligned, misaligned = compile_kernels([request, odd])
    assert misaligned.loads[128] < aligned.loads[128]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for request, report in zip(found := cases(full=True), compile_kernels(found, timeout=3000)):
        kind = "token" if request.args.get("PER_TOKEN") else "group" if request.args.get("group_ptr") else "image"
        moves = [" ".join(f"{n}x{bits}" for bits, n in sorted(c.items())) for c in (report.loads, report.stores)]
        usage = f"{report.registers:4} registers, {report.spills} spilled, {report.barriers} barriers"
        print(f"{label(request):58} {kind:6} {usage}, loads {moves[0]}, stores {moves[1]}")
