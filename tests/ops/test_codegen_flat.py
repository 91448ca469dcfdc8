"""Machine code of the flat kernels: registers, spills, widths of loads and stores; and the bytes that each touches."""
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from codegen import Request, compile_kernels

from sra_fast.kernels import adamw_ema as adamw_kernels
from sra_fast.kernels import align_distance as align_kernels
from sra_fast.kernels import ema_update as ema_kernels
from sra_fast.kernels import noise_pair as noise_kernels

ARCHS = (80, 90, 100)
DTYPES = ("bf16", "fp32")
INTERPRETED = not torch.cuda.is_available()


@contextmanager
def traffic():
    """Bytes that the kernels touch in global memory while the block runs: distinct addresses per load and store."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = {"load": 0, "store": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(kind, ptrs, mask):
        bits = ptrs.get_element_ty().primitive_bitwidth
        seen[kind] += np.unique(ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]).size * max(bits // 8, 1)

    def counted_load(self, ptrs, mask, *args):
        count("load", ptrs, mask)
        return load(self, ptrs, mask, *args)

    def counted_store(self, ptrs, value, mask, *args):
        count("store", ptrs, mask)
        return store(self, ptrs, value, mask, *args)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        yield seen
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def check_code(requests, registers):
    """No spills, no more registers than `registers`, no narrow vector access to the contiguous operands."""
    for request, report in zip(requests, compile_kernels(requests), strict=True):
        what = f"{request.kernel} sm_{request.arch} {request.args}: {report}"
        assert report.spills == 0, what
        assert report.registers <= registers, what
        # the wide operands: at least as many 128-bit accesses as all narrower ones (scalars per row) together
        assert report.loads[128] >= sum(report.loads.values()) - report.loads[128], what
        assert report.stores[128] and not report.stores[16] and not report.stores[64], what


def align_requests():
    D, ints = 1152, ("pred_stride_b", "pred_stride_t", "target_stride_b", "target_stride_t")
    for arch in ARCHS:
        for dtype in DTYPES:
            pair = {"pred_ptr": f"*{dtype}", "target_ptr": f"*{dtype}", "dist_ptr": "*fp32", "grad_ptr": f"*{dtype}"}
            rows = align_kernels._row_config(D)
            warps, tile = rows["num_warps"], {"ROWS": rows["ROWS"], "BLOCK_D": rows["BLOCK_D"]}
            sizes = dict.fromkeys(("num_rows", "T", "D"), "i32")
            # smooth-L1 and the patch cosine, the two that reduce differently
            for kind in (0, 3):
                args = pair | sizes | dict.fromkeys(ints, "i32") | {"beta": "fp32", "KIND": kind, "WRITE_GRAD": True}
                yield Request("sra_fast.kernels.align_distance", "_token_kernel", arch, args | tile, warps)
            # 256 and 512 px fill the registers alike; 1024 is the largest T
            cols = align_kernels._tile_config(1024, D)
            args = pair | {"T": "i32", "D": "i32"} | dict.fromkeys(ints, "i32") | {"WRITE_GRAD": True}
            args |= {"BLOCK_T": cols["BLOCK_T"], "BLOCK_D": cols["BLOCK_D"]}
            yield Request("sra_fast.kernels.align_distance", "_channel_kernel", arch, args, cols["num_warps"])
            args = {"ddist_ptr": "*fp32", "grad_ptr": f"*{dtype}", "dpred_ptr": f"*{dtype}", "T": "i32", "D": "i32"}
            # the upstream gradient of a mean is contiguous
            args |= {"ddist_stride_b": "i32", "ddist_stride_n": 1, "PER_TOKEN": False, "BLOCK_T": 64, "BLOCK_D": 64}
            yield Request("sra_fast.kernels.align_distance", "_backward_kernel", arch, args, 4)


def test_align_distance_code():
    check_code(list(align_requests()), registers=128)


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("kind", ["smooth_l1", "cosine_patch", "cosine_token"])
def test_align_distance_bytes(kind):
    B, T, D = 1, 100, 1152
    pred, target = torch.randn(2, B, T, D).bfloat16().unbind()
    minimum = 3 * 2 * B * T * D
    with traffic() as seen:
        dist, grad = align_kernels.align_distance_fwd(pred, target, kind, 0.05, True)
    # the kernel cannot read or write less than its operands: a count below that would be a broken counter
    assert minimum <= seen["load"] + seen["store"] <= 1.05 * minimum
    with traffic() as seen:
        align_kernels.align_distance_bwd(torch.ones_like(dist), grad, kind != "cosine_token")
    minimum = 2 * 2 * B * T * D
    assert minimum <= seen["load"] + seen["store"] <= 1.05 * minimum


def noise_requests():
    outs = dict.fromkeys(("x_t_ptr", "x_teacher_ptr", "v_ptr"), "*fp32")
    for arch in ARCHS:
        for dtype in DTYPES:
            for moments, cosine in ((False, False), (True, True)):
                args = dict.fromkeys(("x0_ptr", "latent_noise_ptr", "noise_ptr"), f"*{dtype}")
                args |= {"t_ptr": "*fp32", "t_teacher_ptr": "*fp32"} | outs
                args |= dict.fromkeys(("N", "x0_stride", "latent_noise_stride", "noise_stride"), "i32")
                args |= {"t_stride": 1, "t_teacher_stride": 1, "scale": "fp32"}
                args |= {"MOMENTS": moments, "COSINE": cosine, "BLOCK": noise_kernels.BLOCK}
                yield Request("sra_fast.kernels.noise_pair", "_noise_pair_kernel", arch, args)


def test_noise_pair_code():
    check_code(list(noise_requests()), registers=64)


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("moments", [False, True], ids=["latent", "moments"])
def test_noise_pair_bytes(moments):
    B, N = 2, 1500
    noise = torch.randn(B, N)
    x0, e = (torch.randn(B, 2 * N), torch.randn(B, N)) if moments else (torch.randn(B, N), None)
    minimum = (28 if moments else 20) * B * N
    with traffic() as seen:
        noise_kernels.noise_pair(x0, e, noise, torch.rand(B), torch.rand(B), True, 1.0)
    assert minimum <= seen["load"] + seen["store"] <= 1.05 * minimum


def ema_requests(vector):
    for arch in ARCHS:
        for dtype in DTYPES:
            for copy in (False, True):
                args = {"table_ptr": "*i64", "ema_like_ptr": "*fp32", "p_like_ptr": f"*{dtype}"}
                args |= {"copy_like_ptr": "*bf16", "weight": "fp32", "decay": "fp32"}
                args |= {"WRITE_COPY": copy, "VECTOR": vector, "CHUNK": ema_kernels.CHUNK}
                yield Request("sra_fast.kernels.ema_update", "_ema_kernel", arch, args, num_warps=8)


def test_ema_update_code():
    check_code(list(ema_requests(vector=True)), registers=48)


def test_ema_update_code_for_misaligned_tensors():
    """One element per access, so only spills are checked: it must stay usable, not fast."""
    for report in compile_kernels([r for r in ema_requests(vector=False) if r.arch == 90 and r.args["WRITE_COPY"]]):
        assert report.spills == 0 and report.registers <= 128 and not report.loads[128], report


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("copy", [False, True], ids=["ema", "ema+copy"])
def test_ema_update_bytes(copy):
    N = 3 * ema_kernels.CHUNK + 48
    copies = [torch.empty(N, dtype=torch.bfloat16)] if copy else []
    minimum = (12 if copy else 10) * N
    with traffic() as seen:
        ema_kernels.ema_update_([torch.randn(N)], [torch.randn(N).bfloat16()], copies, 0.9)
    assert minimum <= seen["load"] + seen["store"] <= 1.05 * minimum


def adamw_requests():
    flags = ("CLIP", "WEIGHTS", "EMA", "EMA_COPY")
    scalars = ("shrink", "weight1", "beta2", "weight2", "step_size", "inv_sqrt_bias2", "eps", "ema_weight", "decay")
    for arch in ARCHS:
        for dtype in DTYPES:
            for full in (False, True):
                args = {"param_ptr": "*fp32", "grad_ptr": f"*{dtype}"}
                args |= dict.fromkeys(("exp_avg_ptr", "exp_avg_sq_ptr"), "*fp32")
                args |= {"weights_ptr": "*bf16", "ema_ptr": "*fp32", "ema_copy_ptr": "*bf16", "clip_scale_ptr": "*fp32"}
                # buffers beyond 2^31 elements have a 64-bit length
                args |= {"N": "i64" if full else "i32"} | dict.fromkeys(scalars, "fp32") | dict.fromkeys(flags, full)
                args |= {"BLOCK": adamw_kernels.BLOCK}
                yield Request("sra_fast.kernels.adamw_ema", "_adamw_ema_kernel", arch, args)


def test_adamw_ema_code():
    check_code(list(adamw_requests()), registers=64)


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
def test_adamw_ema_bytes():
    N = 2 * adamw_kernels.BLOCK + 23
    full = [torch.rand(N) for _ in range(5)]
    half = [torch.empty(N, dtype=torch.bfloat16) for _ in range(2)]
    param, grad, exp_avg, exp_avg_sq, ema = full
    with traffic() as seen:
        adamw_kernels.adamw_ema_(
            param, grad, exp_avg, exp_avg_sq, half[0], ema, half[1], torch.ones(()), 1, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.9
        )
    assert 40 * N <= seen["load"] + seen["store"] <= 1.05 * 40 * N
