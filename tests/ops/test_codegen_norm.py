"""Every launch of the row kernels, compiled for three GPUs: registers, spills, number and width of loads and stores.

`python tests/ops/test_codegen_norm.py` prints the table.
"""

import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest import mock

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[i]) for i in (1, 2)]
from codegen import compile_kernels, record_launches  # noqa: E402
from rows import launchers  # noqa: E402

from sra_fast.kernels import _rows, adaln, gated_residual, gated_residual_adaln  # noqa: E402

ARCHS, WIDTHS = (80, 90, 100), (384, 768, 1024, 1152, 1536)
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
# what else a launch may be given, compiled for Hopper at the width of SiT-XL
VARIANTS = [
    *(
        {"dtype": dtype} | variant
        for dtype in (bf16, fp32)
        for variant in (
            {"rms": True},
            {"bias": True},
            {"variant": "group"},
            {"variant": "group", "bias": True},
            {"variant": "token"},
            {"variant": "group", "rms": True},
            {"modulation": fp32},
            {"again": True},
            {"again": True, "bias": True},
            {"variant": "group", "again": True, "bias": True},
        )
    ),
    {"dtype": fp16},
    {"dtype": fp32, "y": bf16},
    {"dtype": fp32, "y": bf16, "modulation": bf16},
]
# a residual stream in fp32 in training in bf16, on every architecture at the width of SiT-XL
STREAM = {"dtype": fp32, "y": bf16, "h": bf16, "modulation": bf16}
# partial sums [M, P, K, D] and whether the last k has a total
SUMS = [
    # fused backward of SiT-XL/2 at 32, 64 and 256 images, of B at 256
    (32, 12, 4, 1152, True), (64, 6, 4, 1152, True), (256, 3, 4, 1152, True), (256, 2, 4, 768, True),
    # gated addition, adaln's backward; few images, and one split for each
    (32, 19, 2, 1152, True), (256, 5, 2, 1152, False), (8, 43, 4, 1152, True), (4, 128, 2, 1152, True),
    (256, 1, 3, 1152, False),
    # the bias before GELU, and that of queries, keys and values
    (1, 142, 1, 4608, True), (1, 47, 1, 3456, True),
]  # fmt: skip

# rows read in every iteration, read once per program, rows written, partial sums written
ACCESSES = {
    "_adaln_fwd_kernel": (["x"], ["shift", "scale"], ["y"], []),
    "_adaln_bwd_kernel": (["dy", "x"], ["scale"], ["dx"], ["dscale"] * 2),
    "_gated_residual_fwd_kernel": (["x", "y"], ["gate", "bias"], ["x_new"], []),
    "_gated_residual_bwd_kernel": (["dx_new", "y"], ["gate", "bias"], ["dy"], ["part"]),
    "_gated_residual_adaln_fwd_kernel": (
        ["x", "y"],
        ["gate", "shift", "scale", "bias"],
        ["x_new", "h"],
        [],
    ),
    "_gated_residual_adaln_bwd_kernel": (
        ["x_new", "y", "dx_new", "dh"],
        ["gate", "scale", "bias"],
        ["dx", "dy"],
        ["part"] * 3,
    ),
}
AGAIN = {"_adaln_bwd_kernel": "y", "_gated_residual_adaln_bwd_kernel": "h"}


def launches(D, dtype, **variant):
    """The kernel launches of the three operators, forward and backward, on a device with 132 processors."""
    h100 = mock.patch.object(_rows, "num_sms", lambda device: 132)
    with h100, record_launches(_rows, adaln, gated_residual, gated_residual_adaln) as log:
        for launch in launchers(32, 256, D, dtype, **variant).values():
            launch()
    return log


def sums(M, P, K, D, has_total, dtype):
    """The launch that adds partial sums ``[M, P, K, D]``."""
    make = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    outputs, total = [make(M, D) for _ in range(K - has_total)], make(D) if has_total else None
    with record_launches(_rows) as log:
        _rows.sum_partials(make(M, P, K, D).float(), *outputs, total=total)
    return log


def cases():
    plain = [
        launches(D, dtype, again=again)
        for D in WIDTHS
        for dtype in (bf16, fp32)
        for again in (False, True)
    ]
    plain += [sums(*shape, bf16) for shape in SUMS]
    requests = [replace(r, arch=arch) for arch in ARCHS for log in plain for r in log]
    requests += [r for variant in VARIANTS for r in launches(1152, **variant)]
    stream = [
        r
        for bias in (False, True)
        for again in (False, True)
        for r in launches(1152, bias=bias, again=again, **STREAM)
    ]
    requests += [replace(r, arch=arch) for arch in ARCHS for r in stream]
    # the same launch can occur twice (sums of partial gradients)
    return list({repr(r): r for r in requests}.values())


@pytest.fixture(scope="module")
def compiled():
    requests = cases()
    return list(zip(requests, compile_kernels(requests), strict=True))


def label(request):
    pointer = next(
        value for value in request.args.values() if isinstance(value, str) and value.startswith("*")
    )
    return f"{request.kernel} sm_{request.arch} D={request.args['D']} {pointer}"


def pieces(request, name):
    """Accesses of one row per thread: as wide as its columns of the head and of the tail are, 128 bits at most."""
    found = Counter()
    for columns in (request.args["HEAD"], request.args["TAIL"]):
        bits = request.bits(name) * columns // (32 * request.num_warps)
        if bits:
            found[min(bits, 128)] += max(bits // 128, 1)
    return found


def expected(request):
    """Loads and stores of an iteration of two rows, of the prologue and of the epilogue."""
    args = request.args
    rows_in, once_in, rows_out, once_out = ACCESSES[request.kernel]
    if args.get("PER_TOKEN"):
        rows_in, once_in, rows_out, once_out = rows_in + once_in, [], rows_out + once_out[:1], []
    if args.get("bias_ptr"):
        once_out = once_out + once_out[:1]
    if "_bwd" in request.kernel and args.get("shift_ptr"):  # the normed rows again
        rows_in, rows_out = [*rows_in, "shift"], [*rows_out, AGAIN[request.kernel]]
    loads = sum(
        (pieces(request, name) for name in rows_in * 2 + once_in if request.bits(name)), Counter()
    )
    stores = sum((pieces(request, name) for name in rows_out * 2 + once_out), Counter())
    statistics = loads if once_out or "dscale_ptr" in args else stores
    statistics[32] += 2 * sum(args.get(name) is not None for name in ("mean_ptr", "rstd_ptr"))
    loads[64] += 2 * (args["group_ptr"] is not None)
    return loads, stores


def expected_of_sums(request):
    """Loads of one iteration, 128 bits each, of the sums and of the total; stores of a thread's columns."""
    args, threads = request.args, 32 * request.num_warps
    outputs = [request.bits(name) for name in ("a", "b", "c") if request.bits(name)]
    columns = args["IMAGES"] * args["BLOCK"]
    loads = args["ROWS"] * columns // (4 * threads) if outputs else 0
    stores = Counter(max(columns // threads, 1) * bits for bits in outputs)
    if request.bits("total"):
        loads += args["TOTAL_ROWS"] * args["TOTAL_BLOCK"] // (4 * threads)
        stores[request.bits("total")] += 1
    return Counter({128: loads}), stores


def test_registers_and_spills(compiled):
    for request, report in compiled:
        module = import_module(request.module)
        assert report.spills == 0, label(request)
        assert report.registers * 32 * request.num_warps <= 65536, (
            f"{label(request)} cannot be launched"
        )
        assert report.registers <= module.REGISTERS[request.kernel], (
            f"{label(request)}: {report.registers} registers"
        )
        again = "_bwd" in request.kernel and request.args.get("shift_ptr")
        # of those that write rows again only the one of every block, on the GPUs that it is made for, is held to the limit
        fused = (
            request.kernel == "_gated_residual_adaln_bwd_kernel"
            and request.args["group_ptr"] is None
        )
        strict = not again or (fused and request.arch == 90)
        if (
            request.args["D"] == 1152
            and strict
            and all(request.bits(name) == 16 for name in ACCESSES[request.kernel][0])
        ):
            most = module.REGISTERS_XL[request.kernel]
            assert report.registers <= most, f"{label(request)}: {report.registers} registers"


def test_every_load_and_store_is_as_wide_as_it_can_be(compiled):
    """128 bits in the head of a row; the tail has fewer columns per thread, statistics are single numbers."""
    for request, report in compiled:
        found = (
            expected_of_sums(request)
            if request.kernel == "sum_partials_kernel"
            else expected(request)
        )
        assert (report.loads, report.stores) == found, label(request)


def test_the_widest_rows_do_not_spill():
    requests = []
    for module in (adaln, gated_residual, gated_residual_adaln):
        widest = [(module.MAX_WIDTH, module is not adaln), (gated_residual_adaln.MAX_WIDTH, True)]
        log = [
            r
            for dtype in (bf16, fp32)
            for D, again in widest
            for r in launches(D, dtype, variant="group", bias=True, again=again)
        ]
        requests += [
            replace(r, arch=arch) for arch in ARCHS for r in log if r.module == module.__name__
        ]
    for request, report in zip(requests, compile_kernels(requests), strict=True):
        assert report.spills == 0 and report.registers * 32 * request.num_warps <= 65536, label(
            request
        )


def test_widths_follow_alignment():
    """The check above can fail: a misaligned pointer costs the wide loads."""
    request = next(
        r for r in launches(1152, bf16) if r.kernel == "_gated_residual_adaln_fwd_kernel"
    )
    (report,) = compile_kernels([replace(request, args=request.args | {"x_ptr": "*bf16:1"})])
    assert report.loads[128] < expected(request)[0][128]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for request, report in zip(found := cases(), compile_kernels(found), strict=True):
        kind = (
            "token"
            if request.args.get("PER_TOKEN")
            else "group"
            if request.args.get("group_ptr")
            else "image"
        )
        moves = [
            " ".join(f"{n}x{bits}" for bits, n in sorted(c.items()))
            for c in (report.loads, report.stores)
        ]
        usage = (
            f"{report.registers:4} registers, {report.spills} spilled, {report.barriers} barriers"
        )
        print(f"{label(request):58} {kind:6} {usage}, loads {moves[0]}, stores {moves[1]}")
