"""Machine code of the flat kernels: registers, spills, widths of loads and stores; and the bytes
that each touches.
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from codegen import ARCHS, compile_kernels, record_launches
from rows import count_bytes

from sra_fast.kernels import _rows
from sra_fast.kernels import adamw_ema as adamw_kernels
from sra_fast.kernels import align_distance as align_kernels
from sra_fast.kernels import concat_columns as concat_kernels
from sra_fast.kernels import ema_update as ema_kernels
from sra_fast.kernels import gelu as gelu_kernels
from sra_fast.kernels import noise_pair as noise_kernels
from sra_fast.kernels import swiglu as swiglu_kernels

WIDTHS = (384, 768, 1024, 1152, 1536)
# segments of an e4m3 copy: a weight by itself, the weights of SiT-XL/2's teacher, and of all its
# blocks
SEGMENTS = (1, 60, 84)
INTERPRETED = not torch.cuda.is_available()


def meta(*shape, dtype=torch.float32):
    """A tensor without memory, of any size."""
    return torch.empty(shape, dtype=dtype, device="meta")


def align_launches(dtype, target=None, T=256, widths=(1152,), grads=(True,)):
    for D, grad in product(widths, grads):
        pred = meta(32, T, D, dtype=dtype)
        other = meta(32, T, D, dtype=target or dtype)
        for kind in ("smooth_l1", "l1", "l2", "cosine_patch", "cosine_token"):
            dist, saved = align_kernels.align_distance_fwd(pred, other, kind, 0.05, grad)
            if grad:
                align_kernels.align_distance_bwd(dist, saved, kind != "cosine_token")


def noise_launches(dtype):
    x = meta(32, 4096, dtype=dtype)
    moments = meta(32, 8192, dtype=dtype)
    t = meta(32)
    for cosine in (False, True):
        noise_kernels.noise_pair(x, None, x, t, t, cosine, 1.0)
        noise_kernels.noise_pair(moments, x, x, t, t, cosine, 0.18215)


def ema_launches(dtype, copy=torch.bfloat16):
    # five elements past a whole number of chunks need a second launch
    ema = torch.zeros(ema_kernels.CHUNK + 5)
    decays = (0.9, torch.full((), 0.9, dtype=torch.float64))
    for copies, decay in product(([], [ema.to(copy)]), decays):
        ema_kernels.ema_update_([ema], [ema.to(dtype)], copies, decay)


def adamw_launches(dtype, half=torch.bfloat16, fp8=False):
    # the number of the update on the host and on the device
    counts = (None, meta(4, dtype=torch.float64))
    # beyond 2^31 elements the length is a 64-bit integer
    for N in (4096, 2**31 + 53):
        full = meta(N)
        grad = meta(N, dtype=dtype)
        copy = meta(N, dtype=half)
        # weights, ema, ema_copy, multiplier, amax, ends, clip_scale
        outputs = [(copy, full, copy, None, None, None, meta()), (None,) * 7]
        if fp8:
            e4m3 = meta(N, dtype=torch.float8_e4m3fn)
            scaling = lambda S: (meta(S), meta(S), meta(S, dtype=torch.int64))
            outputs = [(copy, full, e4m3, *scaling(S), meta()) for S in SEGMENTS]
        for given, numbers in product(outputs, counts):
            adamw_kernels.adamw_ema_(
                full, grad, full, full, *given, 1, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.9, None, numbers
            )


def pieces_launches(dtype, fp8=False):
    full, copy, e4m3 = (torch.zeros(4096, dtype=kind) for kind in (fp32, bf16, torch.float8_e4m3fn))
    scaling = lambda S: (torch.zeros(S), torch.zeros(S), torch.zeros(S, dtype=torch.int64))
    copies = [(e4m3, *scaling(S)) for S in SEGMENTS] if fp8 else [(copy, None, None, None)]
    pieces = [torch.zeros(n, dtype=dtype) for n in (1024, 3072)]
    for outputs, numbers in product(copies, (None, torch.ones(4, dtype=torch.float64))):
        outputs = (copy, full, *outputs, torch.zeros(()))
        scalars = (1, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.9)
        adamw_kernels.adamw_ema_(full, pieces, full, full, *outputs, *scalars, [0, 1024], numbers)


def gelu_launches(dtype):
    for N, recompute_y in product((4608, 1536), (False, True)):
        gelu_kernels.gelu_bwd(*meta(2, 8192, N, dtype=dtype), recompute_y)


def swiglu_launches(dtype):
    # LightningDiT's widths
    for N in (3072, 1024):
        x = meta(8192, 2 * N, dtype=dtype)
        swiglu_kernels.swiglu_fwd(x)
        for flags in product((False, True), (False, True)):
            swiglu_kernels.swiglu_bwd(meta(8192, N, dtype=dtype), x, *flags)


def concat_launches(dtype):
    for D in (384, 1152):
        concat_kernels.concat_columns([*meta(3, 8192, D, dtype=dtype)])


bf16 = torch.bfloat16
fp16 = torch.float16
fp32 = torch.float32
# launches compiled for every architecture, only for Hopper, and for those that have e4m3
CASES = {
    align_kernels: (
        [
            partial(align_launches, dtype, widths=(1152, align_kernels.MAX_WIDTH))
            for dtype in (bf16, fp32)
        ]
        + [partial(align_launches, dtype, T=1024, grads=(True, False)) for dtype in (bf16, fp32)],
        [
            partial(align_launches, bf16, widths=WIDTHS),
            partial(align_launches, fp16),
            partial(align_launches, fp32, bf16),
        ],
    ),
    concat_kernels: (
        [partial(concat_launches, bf16), partial(concat_launches, fp32)],
        [partial(concat_launches, fp16)],
    ),
    gelu_kernels: (
        [partial(gelu_launches, bf16), partial(gelu_launches, fp32)],
        [partial(gelu_launches, fp16)],
    ),
    swiglu_kernels: (
        [partial(swiglu_launches, bf16), partial(swiglu_launches, fp32)],
        [partial(swiglu_launches, fp16)],
    ),
    noise_kernels: (
        [partial(noise_launches, bf16), partial(noise_launches, fp32)],
        [partial(noise_launches, fp16)],
    ),
    ema_kernels: (
        [partial(ema_launches, bf16), partial(ema_launches, fp32)],
        [partial(ema_launches, fp16), partial(ema_launches, bf16, fp16)],
    ),
    adamw_kernels: (
        [
            partial(adamw_launches, bf16),
            partial(adamw_launches, fp32),
            partial(pieces_launches, bf16),
            partial(pieces_launches, fp32),
        ],
        [partial(adamw_launches, fp16), partial(adamw_launches, bf16, fp16)],
        [
            partial(launch, dtype, fp8=True)
            for launch in (adamw_launches, pieces_launches)
            for dtype in (bf16, fp32)
        ],
    ),
}


def requests_of(module):
    """Every request of a module, once."""
    requests = []
    # zip stops early for modules without e4m3
    with_e4m3 = tuple(arch for arch in ARCHS if arch >= 90)
    for launches, archs in zip(CASES[module], (ARCHS, (90,), with_e4m3), strict=False):
        with record_launches(module, _rows) as log:
            for launch in launches:
                launch()
        own = [request for request in log if request.module == module.__name__]
        requests += [replace(request, arch=arch) for arch in archs for request in own]
    return list({repr(r): r for r in requests}.values())


def is_wide(request):
    """Whether all addresses and lengths are multiples of 16; other elements get separate launches."""
    return request.args.get("VECTOR", True) and request.args.get("N") != "i32:1"


def vectors(request, names, elements):
    """Accesses per thread if it has ``elements`` of every array: of 128 bits if it can, else of
    one element.
    """
    found = Counter()
    for bits in map(request.bits, names):
        width = min(128, elements * bits) if is_wide(request) else bits
        found[width] += elements * bits // width
    return found


def expected(request):
    """Loads and stores of one thread; a narrower access than 128 bits is a single number."""
    args = request.args
    if request.kernel == "_align_bwd_kernel":
        loads, stores = (vectors(request, [name], 32) for name in ("grad", "dpred"))
        # plus the factors of the thread's rows, or of its columns: as many columns as 128 bits hold
        columns = 128 // request.bits("grad")
        loads += Counter({32: 32 // columns} if args["PER_TOKEN"] else {128: columns * 32 // 128})
    elif request.kernel == "_align_token_kernel":
        loads = vectors(request, ["pred", "target"], 8 * args["NUM_BLOCKS"])
        stores = vectors(request, ["grad"] * args["WRITE_GRAD"], 8 * args["NUM_BLOCKS"]) + Counter(
            {32: 1}
        )
    elif request.kernel == "_align_channel_kernel":
        loads = vectors(request, ["pred", "target"], 32)
        stores = vectors(request, ["grad"] * args["WRITE_GRAD"], 32) + Counter({32: 1})
    elif request.kernel == "_noise_pair_kernel":
        moments = ["x0", "latent_noise"] * args["MOMENTS"]
        loads = vectors(request, ["x0", "noise", *moments], 8) + Counter({32: 2})
        stores = vectors(request, ["x_t", "x_teacher", "v"], 8)
    elif request.kernel == "_gelu_bwd_kernel":
        loads = vectors(request, ["dy", "x"], 16)
        stores = vectors(request, ["dx", *["y"] * (args["y_ptr"] is not None)], 16) + vectors(
            request, ["part"], 8
        )
    elif request.kernel == "_swiglu_fwd_kernel":
        loads = vectors(request, ["x", "x"], 16)
        stores = vectors(request, ["y"], 16)
    elif request.kernel == "_swiglu_bwd_kernel":
        loads = vectors(request, ["dy", "x", "x"], 16)
        stores = vectors(request, ["dx", "dx", *["y"] * (args["y_ptr"] is not None)], 16)
        if args["part_ptr"] is not None:
            stores += vectors(request, ["part", "part"], 8)
    elif request.kernel == "_concat_columns_kernel":
        loads = vectors(request, ["a"], 16)
        stores = vectors(request, ["out"], 16) + Counter({32: 1})
    elif request.kernel == "_ema_kernel":
        copy = args["WRITE_COPY"]
        entries = 3 + copy + bool(args["decay_ptr"])
        loads = vectors(request, ["ema_like", "p_like"], 16) + Counter({64: entries})
        stores = vectors(request, ["ema_like", *["copy_like"] * copy], 16)
    else:
        state = ["param", "exp_avg", "exp_avg_sq", *["ema"] * args["EMA"]]
        loads = vectors(request, ["grad", *state], 8) + Counter({32: int(args["CLIP"])})
        if args["numbers_ptr"]:
            # the two bias corrections, the factor of the learning rate, whether it is taken
            loads += Counter({64: 4})
        if args["begin_ptr"]:
            # the block's first piece and its begin; in the loop begin, address and count of a piece
            loads += Counter({32: 1, 64: 4})
        if args["SEGMENTS"]:
            # all ends; in the loop end, multiplier and peak of a segment
            loads += Counter({32: 2, 64: 2})
        stores = vectors(
            request, state + ["weights"] * args["WEIGHTS"] + ["ema_copy"] * args["EMA_COPY"], 8
        )
    return loads, stores


@pytest.mark.parametrize("module", CASES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_code(module):
    requests = requests_of(module)
    for request, report in zip(requests, compile_kernels(requests), strict=True):
        what = f"{request.kernel} sm_{request.arch} {request.args}: {report}"
        assert report.spills == 0, what
        assert (report.loads, report.stores) == expected(request), what
        # launches with accesses of one element need not be fast; an e4m3 copy takes more registers
        limit = 160 if request.args.get("SEGMENTS") else 128
        if is_wide(request):
            limit = module.REGISTERS[request.kernel]
        assert report.registers <= limit, what


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("kind", ["smooth_l1", "cosine_patch", "cosine_token"])
def test_align_distance_bytes(kind, monkeypatch):
    B, T, D = 1, 100, 1152
    pred, target = torch.randn(2, B, T, D).bfloat16().unbind()
    minimum = 3 * 2 * B * T * D
    with count_bytes(monkeypatch) as seen:
        dist, grad = align_kernels.align_distance_fwd(pred, target, kind, 0.05, True)
    # a kernel cannot move less than its operands: a lower count would mean a broken counter
    assert minimum <= sum(seen.values()) <= 1.05 * minimum
    with count_bytes(monkeypatch) as seen:
        align_kernels.align_distance_bwd(torch.ones_like(dist), grad, kind != "cosine_token")
    minimum = 2 * 2 * B * T * D
    assert minimum <= sum(seen.values()) <= 1.05 * minimum


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("moments", [False, True], ids=["latent", "moments"])
def test_noise_pair_bytes(moments, monkeypatch):
    B, N = 2, 1500
    noise = torch.randn(B, N)
    x0 = torch.randn(B, 2 * N if moments else N)
    e = torch.randn(B, N) if moments else None
    minimum = (28 if moments else 20) * B * N
    with count_bytes(monkeypatch) as seen:
        noise_kernels.noise_pair(x0, e, noise, torch.rand(B), torch.rand(B), True, 1.0)
    assert minimum <= sum(seen.values()) <= 1.05 * minimum


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("copy", [False, True], ids=["ema", "ema+copy"])
def test_ema_update_bytes(copy, monkeypatch):
    N = 3 * ema_kernels.CHUNK + 48
    copies = [torch.empty(N, dtype=torch.bfloat16)] if copy else []
    minimum = (12 if copy else 10) * N
    with count_bytes(monkeypatch) as seen:
        ema_kernels.ema_update_([torch.randn(N)], [torch.randn(N).bfloat16()], copies, 0.9)
    assert minimum <= sum(seen.values()) <= 1.05 * minimum


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
def test_adamw_ema_bytes(monkeypatch):
    N = 2 * adamw_kernels.BLOCK + 23
    full = [torch.rand(N) for _ in range(5)]
    half = [torch.empty(N, dtype=torch.bfloat16) for _ in range(2)]
    param, grad, exp_avg, exp_avg_sq, ema = full
    with count_bytes(monkeypatch) as seen:
        adamw_kernels.adamw_ema_(
            param, grad, exp_avg, exp_avg_sq, half[0], ema, half[1], None, None, None, torch.ones(()),
            1, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.9,
        )  # fmt: skip
    assert 40 * N <= sum(seen.values()) <= 1.05 * 40 * N


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("recompute_y", [False, True])
def test_gelu_bytes(recompute_y, monkeypatch):
    M, N, P = 24, 1000, 3
    monkeypatch.setattr(gelu_kernels, "num_splits", lambda *args: P)
    dy, x = torch.randn(2, M, N).bfloat16()
    with count_bytes(monkeypatch) as seen:
        gelu_kernels.gelu_bwd(dy, x, recompute_y)
    assert sum(seen.values()) == (3 + recompute_y) * 2 * M * N + 2 * N + 8 * P * N


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
@pytest.mark.parametrize("recompute_y", [False, True])
def test_swiglu_bytes(recompute_y, monkeypatch):
    M, N, P = 24, 200, 3
    monkeypatch.setattr(swiglu_kernels, "num_splits", lambda *args: P)
    x = torch.randn(M, 2 * N).bfloat16()
    with count_bytes(monkeypatch) as seen:
        y = swiglu_kernels.swiglu_fwd(x)
    assert sum(seen.values()) == 3 * 2 * M * N
    with count_bytes(monkeypatch) as seen:
        swiglu_kernels.swiglu_bwd(y, x, recompute_y, True)
    assert sum(seen.values()) == (5 + recompute_y) * 2 * M * N + 2 * 2 * N + 16 * P * N


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter")
def test_concat_bytes(monkeypatch):
    M, D, P = 50, 200, 3
    monkeypatch.setattr(concat_kernels, "num_splits", lambda *args: P)
    with count_bytes(monkeypatch) as seen:
        concat_kernels.concat_columns([*torch.randn(3, M, D).bfloat16()])
    assert sum(seen.values()) == 2 * 2 * M * 3 * D + 2 * 3 * D + 8 * P * 3 * D
