"""Machine code of the kernels that work on heads: registers, spills, widths of loads and stores."""

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from codegen import ARCHS, chosen_archs, compile_kernels, record_launches

from sra_fast.kernels import _rows
from sra_fast.kernels import qk_norm_rope as kernels

bf16 = torch.bfloat16
fp16 = torch.float16
fp32 = torch.float32
# (d, dtype, options), on every architecture
MODELS = [(d, bf16, {"interleaved": style}) for d in (72, 128) for style in (False, True)]
# on Hopper only
VARIANTS = [
    *((d, bf16, {"interleaved": style}) for d in (64, 80, 256) for style in (False, True)),
    *((72, fp32, {"interleaved": style, "full": True}) for style in (False, True)),
    (128, fp32, {"interleaved": False}),
    *((128, bf16, {"interleaved": style, "full": True}) for style in (False, True)),
    (72, bf16, {"interleaved": True, "center": True}),
    (256, bf16, {"interleaved": False, "full": True, "center": True}),
    (128, fp16, {"interleaved": True, "heads_first": True}),
    (128, bf16, {"interleaved": True, "rotate": False}),
    (72, bf16, {"interleaved": True, "norm": False}),
    (72, bf16, {"interleaved": True, "keys_weight": False}),
]


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(
    d,
    dtype,
    interleaved,
    full=False,
    norm=True,
    center=False,
    rotate=True,
    heads_first=False,
    keys_weight=True,
):
    """Forward and backward on views of a projection with 16 heads of keys, at 256 tokens."""
    B, T, H = 32, 256, 16
    q, k, _ = meta(B, T, 3, H, d, dtype=dtype).unbind(2)
    dy = meta(B, T, H, d, dtype=dtype)
    cos = meta(1, T, d if full else d // 2, dtype=fp32).expand(B, -1, -1) if rotate else None
    q_weight = meta(d, dtype=dtype) if norm else None
    k_weight = q_weight if keys_weight else None
    options = (1e-6, norm, center, interleaved, 0, heads_first)
    arguments = (q, k, cos, cos, q_weight, k_weight, *options)
    h100 = mock.patch.object(kernels, "num_sms", lambda device: 132)
    with h100, record_launches(kernels, _rows) as log:
        kernels.qk_norm_rope_fwd(*arguments)
        kernels.qk_norm_rope_bwd(dy, dy, *arguments)
    return [request for request in log if request.module == kernels.__name__]


def requests():
    found = [
        replace(r, arch=arch)
        for arch in ARCHS
        for d, dtype, options in MODELS
        for r in launches(d, dtype, **options)
    ]
    found += [r for d, dtype, options in VARIANTS for r in launches(d, dtype, **options)]
    return list({repr(r): r for r in found}.values())


def accesses(request, name, columns=None):
    """Accesses of a thread to its pairs of one head, or of a row of a table: as wide as can be."""
    args = request.args
    bits = request.bits(name)
    pairs = args["ROWS"] * args["HALF"] // (32 * request.num_warps)
    if columns == "pair":
        return Counter({128: pairs * bits // 128})
    if args["INTERLEAVED"]:
        return Counter({128: 2 * pairs * bits // 128})
    # each half; the second begins at a multiple of 4 elements in heads of 72
    width = min(128, bits * (4 if args["D"] % 16 else 8))
    return Counter({width: 2 * pairs * bits // width})


def expected(request):
    """Loads of arrays and tables, and stores of arrays: queries and keys share their code."""
    args = request.args
    backward = request.kernel == "_qk_norm_rope_bwd_kernel"
    loads = Counter()
    stores = Counter()
    for name in ("q", "q_out") if backward else ("q",):
        for bits, count in accesses(request, name).items():
            loads[bits] += args["HEADS"] * count
    for bits, count in accesses(request, "dq" if backward else "q_out").items():
        stores[bits] += args["HEADS"] * count
    if args["cos_ptr"] is not None:
        for _ in range(2):
            loads += accesses(request, "cos", None if args["FULL"] else "pair")
    return loads, stores


@pytest.fixture(scope="module")
def compiled():
    found = requests()
    return list(zip(found, compile_kernels(found), strict=True))


def test_registers_and_spills(compiled):
    for request, report in compiled:
        told = f"{request.kernel} sm_{request.arch} {request.args}: {report}"
        assert report.spills == 0, told
        assert report.registers <= kernels.REGISTERS[request.kernel], told


def test_every_load_and_store_is_as_wide_as_it_can_be(compiled):
    """What remains are both weights before the loop, and their partial sums after it."""
    for request, report in compiled:
        loads, stores = expected(request)
        told = f"{request.kernel} sm_{request.arch} {request.args}: {report}, {loads}, {stores}"
        assert loads <= report.loads and (report.loads - loads).total() <= 4, told
        assert stores <= report.stores and (report.stores - stores).total() <= 4, told


def test_widths_follow_the_unit():
    """The check above can fail: without strides in units, heads of 72 are read one by one."""
    request = launches(72, bf16, interleaved=True)[0]
    assert request.args["UNIT"] == 8
    (report,) = compile_kernels([replace(request, args=request.args | {"UNIT": 1})])
    assert report.loads[128] < expected(request)[0][128]


@pytest.mark.parametrize("text", ["", "80", "90 70", "hopper"])
def test_architectures_that_would_leave_tests_with_nothing_are_refused(text):
    assert chosen_archs("90 100") == (90, 100)
    with pytest.raises(ValueError, match="SRA_FAST_ARCHS must be 90 and others of"):
        chosen_archs(text)
