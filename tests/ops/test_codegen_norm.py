"""Every launch of the row kernels, compiled for three GPUs: registers, spills, number and width of
loads and stores.

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
from codegen import ALL_ARCHS, ARCHS, compile_kernels, record_launches  # noqa: E402
from rows import launchers, launchers_of_two  # noqa: E402

from sra_fast.kernels import (  # noqa: E402
    _rows,
    adaln,
    gated_residual,
    gated_residual_adaln,
    gelu,
    per_token,
    swiglu,
)

WIDTHS = (384, 768, 1024, 1152, 1536)
bf16 = torch.bfloat16
fp16 = torch.float16
fp32 = torch.float32
# other options of a launch, compiled for Hopper at the width of SiT-XL. In fp32, a fifth
# of all that is compiled, only where all architectures are asked for
VARIANTS = [
    *(
        {"dtype": dtype} | variant
        for dtype in ((bf16, fp32) if ARCHS == ALL_ARCHS else (bf16,))
        for variant in (
            {"rms": True},
            {"bias": True},
            {"variant": "group"},
            {"variant": "group", "bias": True},
            {"variant": "token"},
            {"variant": "token", "rms": True},
            {"variant": "token", "affine": True, "bias": True},
            {"variant": "group", "rms": True},
            {"absent": ("gate", "shift", "scale"), "rms": True},
            {"absent": ("shift",), "affine": True, "rms": True},
            {"absent": ("gate",), "bias": True},
            {"modulation": fp32},
            {"recompute": True},
            {"recompute": True, "bias": True},
            {"variant": "group", "recompute": True, "bias": True},
        )
    ),
    {"dtype": bf16, "variant": "token", "tables": fp32},
    {"dtype": fp16},
    {"dtype": fp32, "y": bf16},
    {"dtype": fp32, "y": bf16, "modulation": bf16},
]
# a residual stream in fp32 in training in bf16, on every architecture at the width of SiT-XL
STREAM = {"dtype": fp32, "y": bf16, "h": bf16, "modulation": bf16}
# partial sums [M, P, K, D] and whether the last k has a total
SUMS = [
    # fused backward of SiT-XL/2 at 32, 64 and 256 images, of B at 256
    (32, 12, 4, 1152, True),
    (64, 6, 4, 1152, True),
    (256, 3, 4, 1152, True),
    (256, 2, 4, 768, True),
    # gated addition, adaln's backward; few images, and one split for each
    (32, 19, 2, 1152, True),
    (256, 5, 2, 1152, False),
    (8, 43, 4, 1152, True),
    (4, 128, 2, 1152, True),
    (256, 1, 3, 1152, False),
    # the bias before GELU, and that of queries, keys and values
    (1, 142, 1, 4608, True),
    (1, 47, 1, 3456, True),
]

# rows read in every iteration, read once per program, rows written, partial sums written
ACCESSES = {
    "_adaln_fwd_kernel": (["x", "residual"], ["shift", "scale"], ["y"], []),
    "_adaln_bwd_kernel": (["dy", "x"], ["scale"], ["dx"], []),
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
        [],
    ),
    # a row at a time; vectors [D] and tables are read with it, for every use
    "_per_token_fwd_kernel": (
        [
            *("x", "y", "bias", "gate", "weight", "norm_bias", "shift", "scale", "residual"),
            *("gate_table", "shift_table", "scale_table"),
        ],
        [],
        ["x_new", "h"],
        [],
    ),
    # the table of a shift, which no gradient depends on, is never read
    "_per_token_bwd_kernel": (
        [
            *("dx_new", "dh", "z", "y", "gate", "weight", "norm_bias", "scale", "bias"),
            *("gate_table", "scale_table"),
        ],
        [],
        ["dx", "dy", "dgate", "dscale"],
        [],
    ),
}
# of a second modulation, in the same order
SECOND = {
    "_gated_residual_adaln_fwd_kernel": ([], ["shift2", "scale2"], ["h2"]),
    "_gated_residual_adaln_bwd_kernel": (["dh2"], ["scale2"], []),
}
# the array that a backward can recompute
RECOMPUTED = {"_adaln_bwd_kernel": "y", "_gated_residual_adaln_bwd_kernel": "h"}


def launches(D, dtype, **variant):
    """The kernel launches of the four operators, forward and backward, on a device with 132
    processors.
    """
    h100 = mock.patch.object(_rows, "num_sms", lambda device: 132)
    modules = (_rows, adaln, gated_residual, gated_residual_adaln, per_token)
    with h100, record_launches(*modules) as log:
        for launch in launchers(32, 256, D, dtype, **variant).values():
            launch()
    return log


def test_another_batch_compiles_nothing_anew():
    """Rows and programs may be 1, a multiple of 16 or any other number."""

    def forms(*batches):
        found = set()
        for batch in batches:
            with mock.patch.object(_rows, "num_sms", lambda device: 132):
                modules = (adaln, gated_residual, gated_residual_adaln, per_token, gelu, swiglu)
                # sums of partial gradients have a form for each few numbers of programs
                with record_launches(_rows), record_launches(*modules) as log:
                    for launch in launchers(batch, 33 + batch, 1152, bf16).values():
                        launch()
                    x = torch.empty(batch * 17, 64, dtype=bf16, device="meta")
                    gelu.gelu_bwd(x, x, recompute_y=False)
                    swiglu.swiglu_bwd(x, torch.cat([x, x], 1), recompute_y=False, needs_dbias=True)
                    swiglu.swiglu_fwd(x)
            found |= {repr(request) for request in log}
        return found

    assert len(forms(2)) > 8
    assert forms(2) == forms(*range(1, 65))


def sums(M, P, K, D, has_total, dtype):
    """The launch that adds partial sums ``[M, P, K, D]``."""
    make = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    outputs = [make(M, D) for _ in range(K - has_total)]
    total = make(D) if has_total else None
    with record_launches(_rows) as log:
        _rows.sum_partials(make(M, P, K, D).float(), *outputs, total=total)
    return log


def cases():
    """Every request that is checked, once."""
    # fp32 at SiT-XL's width only: the widest rows are another test
    plain = [
        launches(D, dtype, recompute=recompute)
        for D in WIDTHS
        for dtype in ((bf16, fp32) if D == 1152 else (bf16,))
        for recompute in (False, True)
    ]
    plain += [launches(1152, dtype, variant="token") for dtype in (bf16, fp32)]
    plain += [sums(*shape, bf16) for shape in SUMS]
    # every architecture at SiT-XL's width, Hopper at the others
    requests = [
        replace(r, arch=arch)
        for log in plain
        for r in log
        for arch in (ARCHS if r.args["D"] == 1152 else (90,))
    ]
    requests += [r for variant in VARIANTS for r in launches(1152, **variant)]
    requests += [r for D in WIDTHS for r in launches(D, bf16, variant="token")]
    stream = [
        r
        for bias in (False, True)
        for recompute in (False, True)
        for r in launches(1152, bias=bias, recompute=recompute, **STREAM)
    ]
    requests += [replace(r, arch=arch) for arch in ARCHS for r in stream]
    # sums of partial gradients occur in several logs
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


def accesses(request, name):
    """Accesses of one row per thread: as wide as its columns of head and tail, 128 bits at most."""
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
    rows = 1 if "per_token" in request.kernel else args.get("ROWS", 2)
    # how many partial sums the launch asks for
    if args.get("part_ptr"):
        once_out = ["part"] * args["K"]
    if args.get("scale2_ptr"):
        rows_in, once_in, rows_out = (
            [*first, *second]
            for first, second in zip(
                (rows_in, once_in, rows_out), SECOND[request.kernel], strict=True
            )
        )
    if recomputes(request):
        rows_in = [*rows_in, "shift"]
        rows_out = [*rows_out, RECOMPUTED[request.kernel]]
    # only the gradient of a gate reads y and bias
    if "_bwd" in request.kernel and not args.get("gate_ptr"):
        rows_in = [name for name in rows_in if name not in ("y", "bias")]
        once_in = [name for name in once_in if name != "bias"]
    read = [name for name in rows_in * rows + once_in if request.bits(name)]
    written = [name for name in rows_out * rows + once_out if request.bits(name)]
    loads = sum((accesses(request, name) for name in read), Counter())
    stores = sum((accesses(request, name) for name in written), Counter())
    # a backward reads mean and rstd, a forward writes them
    statistics = loads if "_bwd" in request.kernel else stores
    count = rows * sum(args.get(name) is not None for name in ("mean_ptr", "rstd_ptr"))
    if count:
        statistics[32] += count
    if args.get("group_ptr") is not None:
        loads[64] += 2
    return loads, stores


def recomputes(request):
    """Whether a backward also writes the output of the norm."""
    return request.kernel in RECOMPUTED and request.args["shift_ptr"] is not None


def expected_of_sums(request):
    """Loads of one iteration, 128 bits each, of the sums and of the total; stores of a thread's
    columns.
    """
    args = request.args
    threads = 32 * request.num_warps
    outputs = [request.bits(name) for name in ("a", "b", "c") if request.bits(name)]
    columns = args["IMAGES"] * args["BLOCK"]
    loads = args["ROWS"] * columns // (4 * threads) if outputs else 0
    stores = Counter(max(columns // threads, 1) * bits for bits in outputs)
    if request.bits("total"):
        loads += args["TOTAL_ROWS"] * args["TOTAL_BLOCK"] // (4 * threads)
        stores[request.bits("total")] += 1
    return Counter({128: loads}), stores


def fits_a_program(request, report):
    """Whether the 65536 registers of an SM hold a program."""
    return report.registers * 32 * request.num_warps <= 65536


def has_tight_limit(request):
    """Whether the launch is one of a training of SiT-XL, in half precision.

    Of the launches that recompute, only the one of every block must keep the tight limit, and only
    on Hopper.
    """
    if request.args["D"] != 1152 or request.kernel not in ACCESSES:
        return False
    if recomputes(request):
        fused = request.kernel == "_gated_residual_adaln_bwd_kernel"
        if not fused or request.args["group_ptr"] is not None or request.arch != 90:
            return False
    names = ACCESSES[request.kernel][0]
    if "per_token" in request.kernel:
        # parts of it may be absent; sums for tables and weights take more
        if has_tables(request) and request.args["weight_ptr"]:
            return False
        names = [name for name in names if request.bits(name) and not name.endswith("table")]
    return all(request.bits(name) == 16 for name in names)


def has_tables(request):
    return any(request.args.get(f"{name}_table_ptr") for name in ("gate", "shift", "scale"))


def test_registers_and_spills(compiled):
    for request, report in compiled:
        module = import_module(request.module)
        told = f"{label(request)}: {report.registers} registers"
        assert report.spills == 0, told
        assert fits_a_program(request, report), f"{told}, cannot be launched"
        assert report.registers <= module.REGISTERS[request.kernel], told
        if has_tight_limit(request):
            assert report.registers <= module.REGISTERS_XL[request.kernel], told


def test_every_load_and_store_is_as_wide_as_it_can_be(compiled):
    """128 bits in the head of a row; the tail has fewer columns per thread, statistics are single
    numbers.
    """
    for request, report in compiled:
        is_sum = request.kernel == "sum_partials_kernel"
        wanted = expected_of_sums(request) if is_sum else expected(request)
        assert (report.loads, report.stores) == wanted, label(request)


# width and options of the widest launches of every kernel
WIDEST = [
    (adaln.MAX_WIDTH, {"variant": "group"}),
    (adaln.RECOMPUTE_WIDTH, {"recompute": True}),
    (adaln.TWO_ROWS_WIDTH, {"variant": "group"}),
    (adaln.TWO_ROWS_WIDTH_RECOMPUTE, {"variant": "group", "recompute": True}),
    # the first width above
    (adaln.TWO_ROWS_WIDTH, {"recompute": True}),
    (gated_residual.MAX_WIDTH, {"variant": "group", "bias": True}),
    (gated_residual.TWO_ROWS_WIDTH, {"variant": "group", "bias": True}),
    (gated_residual_adaln.MAX_WIDTH, {"variant": "group", "bias": True, "recompute": True}),
    (per_token.MAX_WIDTH, {"variant": "token"}),
    (per_token.AFFINE_WIDTH, {"variant": "token", "affine": True}),
    (per_token.FUSED_WIDTH, {"variant": "token"}),
    (per_token.FUSED_WIDTH_WITH_SUMS, {"variant": "token", "affine": True, "bias": True}),
    *(
        (width, {"variant": "token", "bias": True, "tables": fp32} | options)
        for width, options in (
            (per_token.TABLE_WIDTH, {}),
            # the norm of a branch has a weight and one table
            (per_token.TABLE_WIDTH, {"affine": True}),
            (per_token.TABLE_WIDTH_AFFINE, {"affine": True}),
            (per_token.FUSED_WIDTH_WITH_SUMS, {"affine": True}),
        )
    ),
]


def is_launched(width, request):
    """Whether the operators launch the kernel at this width, or split it into two. With tables:
    whether it is the widest backward of its kind; forwards take far fewer registers.
    """
    args = request.args
    if request.kernel.startswith("_gated_residual_adaln"):
        return width <= gated_residual_adaln.MAX_WIDTH
    if "per_token" not in request.kernel:
        return True
    if has_tables(request):
        if "_fwd" in request.kernel:
            return False
        if args["y_ptr"] and args["scale_ptr"]:
            return width == per_token.FUSED_WIDTH_WITH_SUMS
        with_affine = args["weight_ptr"] and not args["IS_FACTOR"]
        return width == (per_token.TABLE_WIDTH_AFFINE if with_affine else per_token.TABLE_WIDTH)
    with_sums = any(args[name] for name in ("bias_ptr", "weight_ptr", "norm_bias_ptr"))
    # with y and scale it is the update and the norm in one pass
    if args["y_ptr"] and args["scale_ptr"]:
        return width <= (per_token.FUSED_WIDTH_WITH_SUMS if with_sums else per_token.FUSED_WIDTH)
    return width <= (per_token.AFFINE_WIDTH if with_sums else per_token.MAX_WIDTH)


def test_the_widest_rows_do_not_spill():
    found = {}
    for D, options in WIDEST:
        for dtype in (bf16, fp32):
            for request in launches(D, dtype, **options):
                if request.kernel != "sum_partials_kernel" and is_launched(D, request):
                    # on the other architectures fp32 without tables: all of it takes minutes
                    archs = ARCHS if dtype == fp32 and not has_tables(request) else (90,)
                    found |= {(repr(request), arch): replace(request, arch=arch) for arch in archs}
    requests = [*found.values()]
    for request, report in zip(requests, compile_kernels(requests), strict=True):
        assert report.spills == 0 and fits_a_program(request, report), label(request)


# both passes at the widths of SD3.5, the widest rows, and where ptxas comes closest to spilling:
# pass, width, dtype, architecture
TWO = [
    (0, 1536, bf16, 90),
    (1, 1536, bf16, 90),
    (1, 1536, fp32, 80),
    (0, 2432, bf16, 100),
    (1, gated_residual_adaln.TWO_WIDTH, bf16, 80),
    (1, gated_residual_adaln.TWO_WIDTH_FP32, fp32, 100),
]


def test_two_modulations():
    """No spills, and every load and store as wide as it can be."""
    requests = []
    for which, D, dtype, arch in TWO:
        h100 = mock.patch.object(_rows, "num_sms", lambda device: 132)
        with h100, record_launches(gated_residual_adaln, _rows) as log:
            launchers_of_two(32, 256, D, dtype, bias=True)[which]()
        requests.append(replace(log[0], arch=arch))
    for request, report in zip(requests, compile_kernels(requests), strict=True):
        told = f"{label(request)}: {report.registers} registers, {report.spills} bytes spilled"
        assert report.spills == 0 and fits_a_program(request, report), told
        assert (report.loads, report.stores) == expected(request), told


def test_widths_follow_alignment():
    """The check above can fail: a misaligned pointer costs the wide loads."""
    request = next(
        r for r in launches(1152, bf16) if r.kernel == "_gated_residual_adaln_fwd_kernel"
    )
    (report,) = compile_kernels([replace(request, args=request.args | {"x_ptr": "*bf16:1"})])
    assert report.loads[128] < expected(request)[0][128]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = cases()
    for request, report in zip(found, compile_kernels(found), strict=True):
        kind = "image"
        if request.args.get("group_ptr"):
            kind = "group"
        if "per_token" in request.kernel:
            kind = "token"
        widths = lambda c: " ".join(f"{n}x{bits}" for bits, n in sorted(c.items()))
        usage = (
            f"{report.registers:4} registers, {report.spills} spilled, {report.barriers} barriers"
        )
        moves = f"loads {widths(report.loads)}, stores {widths(report.stores)}"
        print(f"{label(request):58} {kind:6} {usage}, {moves}")
