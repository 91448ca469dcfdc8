"""What the row kernels share: how a width and a batch are split, and the sum of partial gradients.

A program owns one image (or one group of its tokens) and walks some of its rows. It loads two rows
before it uses either, so that the loads of both are in flight together. Rows that are too wide for
that, and those that bring vectors of their own (per_token.py), come one at a time.

Head and tail. A width that is not a power of two is cut in two, 1152 = 1024 + 128: the head has
HEAD columns, the tail TAIL columns, both powers of two. Padding 1152 to 2048 would leave 44 % of
the lanes empty. TAIL = 0 means the row has no tail; the tail's variables then exist but are never
used. The names end in ``_head`` and ``_tail``.

Each half is a one-dimensional tensor, so that the statistics of a row are scalars. With
two-dimensional tiles the statistics of head and tail would force both into one of their two
layouts, and whole tiles would cross shared memory in every iteration.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# the dtype of a quantized row
E4M3 = torch.float8_e4m3fn
# rows per program are a multiple of this: most kernels take two in an iteration
STEP = 2
# bytes in flight that saturate a Hopper SM's share of the memory bandwidth: 25 bytes/ns times
# about 0.8 us of latency, twice
BYTES_IN_FLIGHT = 40 * 1024
# upper limits of 32-bit registers per thread
REGISTERS = {"sum_partials_kernel": 64}
# warps of a program that adds partial sums: four such programs share an SM of Hopper
SUM_WARPS = 8
# numbers of rows, and of programs that share them. No address depends on these alone, so a kernel
# is not compiled anew where another batch makes one of them 1 or a multiple of 16
SHARES = ["T", "M", "P", "num_rows"]


@functools.cache
def width_config(D: int) -> dict[str, int]:
    """D, HEAD, TAIL and num_warps for rows of D columns.

    A thread gets 8 columns of the head: 128 bits in bf16.
    """
    padded = triton.next_power_of_2(D)
    head = padded if padded == D else padded // 2
    tail = triton.next_power_of_2(D - head)
    # a tail as wide as the head saves nothing
    if head == D or tail == head:
        head = padded
        tail = 0
    return {"D": D, "HEAD": head, "TAIL": tail, "num_warps": min(max(head // 256, 1), 16)}


def columns_per_thread(config: dict[str, int]) -> int:
    """Of a row, by ``width_config``."""
    return (config["HEAD"] + config["TAIL"]) // (32 * config["num_warps"])


@functools.cache
def num_splits(images: int, steps: int, slots: int) -> int:
    """Programs per image: as few as fill the device evenly, because each one adds a partial sum.

    Args:
        images: number of images times number of groups.
        steps: loop iterations that one image takes.
        slots: programs that run at the same time.
    """
    most = max(min(steps, triton.cdiv(2 * slots, images)), 1)

    def cost(splits: int) -> int:
        waves = triton.cdiv(images * splits, slots)
        # the prologue and epilogue of a program take about as long as one iteration
        return waves * (triton.cdiv(steps, splits) + 1)

    return min(range(1, most + 1), key=cost)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 2 for any other device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    # the interpreter runs programs one after the other: two per image are enough to test splitting
    return 2


def mod_strides(mod: Tensor | None) -> tuple[int, int]:
    """Strides of image and group of a modulation ``[B, D]`` or ``[B, G, D]``; 0 without groups.

    Of ``[B, T, D]`` those of image and token.
    """
    if mod is None:
        return 0, 0
    assert mod.stride(-1) == 1 or mod.shape[-1] == 1
    return (mod.stride(0), mod.stride(1)) if mod.dim() == 3 else (mod.stride(0), 0)


def split_rows(x: Tensor, groups: int, num_loads: int) -> tuple[int, int]:
    """How the rows of ``x [B, T, D]`` are shared out.

    Args:
        x: the tokens.
        groups: vectors per image.
        num_loads: arrays of the size of x that the kernel reads.

    Returns:
        ``(programs per image and group, rows per program)``.
    """
    B, T, D = x.shape
    steps = triton.cdiv(T, STEP)
    in_flight = STEP * num_loads * D * x.element_size()
    programs_per_sm = min(max(triton.cdiv(BYTES_IN_FLIGHT, in_flight), 2), 16)
    splits = num_splits(B * groups, steps, num_sms(x.device) * programs_per_sm)
    return splits, triton.cdiv(steps, splits) * STEP


@triton.jit
def locate(G, P):
    """Index, image, group and split of this program, and the group indices it owns.

    All are int64, because they are multiplied by strides. ``owned`` is the pair (first, last).
    """
    pid = tl.program_id(0).to(tl.int64)
    g = pid // P % G
    # the outer groups also own the indices outside [0, G), so that every row is written
    # 64-bit bounds would cost 22 registers (fused backward, sm_90)
    first = tl.where(g == 0, -(2**31), g.to(tl.int32))
    last = tl.where(g == G - 1, 2**31 - 1, g.to(tl.int32))
    return pid, pid // P // G, g, pid % P, (first, last)


@triton.jit
def row_columns(HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Column indices of the head and of the tail; without a tail a single unused index."""
    return tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL if TAIL else 1)


@triton.jit
def is_owned(group_ptr, row, t, owned, T):
    """Whether token t (row `row` of all) exists and its group index is one of this program's."""
    live = t < T
    if group_ptr is not None:
        index = tl.load(group_ptr + row, mask=live, other=0).to(tl.int32)
        live &= (index >= owned[0]) & (index <= owned[1])
    return live


@triton.jit
def load(ptr, offsets, mask):
    """Load as stored; 0 where masked."""
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def load_fp32(ptr, offsets, mask):
    """Load in fp32; 0 where masked."""
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_bias(bias_ptr, cols, mask):
    """The bias in fp32, or the constant 0 without one."""
    return load_fp32(bias_ptr, cols, mask) if bias_ptr is not None else 0.0


@triton.jit
def load_gate(gate_ptr, cols, mask):
    """The gate in fp32, or the constant 1 without one."""
    return load_fp32(gate_ptr, cols, mask) if gate_ptr is not None else 1.0


@triton.jit
def load_stored(ptr, cols, mask):
    """A vector as stored, or the constant 0 without one."""
    return load(ptr, cols, mask) if ptr is not None else 0.0


@triton.jit
def factor_of(scale, scale_ptr, IS_FACTOR: tl.constexpr):
    """What xhat is multiplied with, in fp32: 1 + scale, the scale itself, or 1 without one."""
    if scale_ptr is None:
        factor = 1.0
    elif IS_FACTOR:
        factor = scale.to(tl.float32)
    else:
        factor = 1.0 + scale.to(tl.float32)
    return factor


@triton.jit
def residual(x, y, gate, bias, out_ptr, offsets, mask):
    """Store x + gate (y + bias), rounded once, and return the stored value in fp32."""
    out = x.to(tl.float32) + gate * (y.to(tl.float32) + bias)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=mask)
    return out.to(tl.float32)


@triton.jit
def load_two_arrays(
    a_ptr, b_ptr, group_ptr, b, owned, t, T, columns, D: tl.constexpr, TAIL: tl.constexpr
):
    """Row t of image b of two arrays, as stored; a stands in for an absent b.

    Returns the row's index, whether this program owns it, and (a, b) of its head and of its tail.
    """
    head_cols, tail_cols = columns
    row = b * T + t
    live = is_owned(group_ptr, row, t, owned, T)
    a_head = load(a_ptr, row * D + head_cols, live & (head_cols < D))
    b_head = a_head
    if b_ptr is not None:
        b_head = load(b_ptr, row * D + head_cols, live & (head_cols < D))
    head = (a_head, b_head)
    # without a tail its place in the result holds the head, which nothing reads
    tail = head
    if TAIL:
        a_tail = load(a_ptr, row * D + tail_cols, live & (tail_cols < D))
        b_tail = a_tail
        if b_ptr is not None:
            b_tail = load(b_ptr, row * D + tail_cols, live & (tail_cols < D))
        tail = (a_tail, b_tail)
    return row, live, head, tail


@triton.jit
def fold(head, tail, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Add the tail to the head, so that one reduction across threads sums both.

    Each thread first adds up its own columns of the head.
    """
    if TAIL:
        head = tl.sum(tl.reshape(head, (TAIL, HEAD // TAIL)), axis=1) + tail
    return head


@triton.jit
def norm_fwd(
    x_head,
    x_tail,
    row,
    live,
    mean_ptr,
    rstd_ptr,
    eps,
    columns,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """xhat of one row, head and tail; stores its statistics. RMS norm if mean_ptr is None."""
    head_cols, tail_cols = columns
    if mean_ptr is not None:
        mean = tl.sum(fold(x_head, x_tail, HEAD, TAIL), axis=0) / D
        tl.store(mean_ptr + row, mean, mask=live)
        # the padding now holds 0 - mean, which must not enter the variance
        x_head = tl.where(head_cols < D, x_head - mean, 0.0)
        x_tail = tl.where(tail_cols < D, x_tail - mean, 0.0)
    # second pass over the registers: the variance around the mean just computed
    squares = fold(x_head * x_head, x_tail * x_tail, HEAD, TAIL)
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=live)
    return x_head * rstd, x_tail * rstd


@triton.jit
def norm_bwd(
    xhat_head,
    xhat_tail,
    dxhat_head,
    dxhat_tail,
    mean_ptr,
    D: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """c1 = mean(xhat dxhat) and c2 = mean(dxhat) of dx = (dxhat - xhat c1 - c2) rstd.

    c2 is 0 if mean_ptr is None: RMS norm subtracts no mean.
    """
    c1 = fold(xhat_head * dxhat_head, xhat_tail * dxhat_tail, HEAD, TAIL)
    if mean_ptr is None:
        return tl.sum(c1, axis=0) / D, 0.0
    # join the two sums, so that one reduction across threads makes both
    c2 = fold(dxhat_head, dxhat_tail, HEAD, TAIL)
    return tl.split(tl.sum(tl.join(c1, c2), axis=0) / D)


@triton.jit
def e4m3_scale(amax):
    """The scale that maps [-amax, amax] onto e4m3's range; never 0, so that a zero row divides."""
    return tl.maximum(amax, 1e-12) / 448.0


@triton.jit
def store_row(
    ptr,
    scale_ptr,
    row,
    live,
    head,
    tail,
    head_offsets,
    head_mask,
    tail_offsets,
    tail_mask,
    TAIL: tl.constexpr,
):
    """Store one row; with scale_ptr in e4m3, divided by the row's scale, which is stored too."""
    if scale_ptr is not None:
        # the largest magnitude of head and tail decides the scale
        amax = tl.max(tl.abs(head), axis=0)
        if TAIL:
            amax = tl.maximum(amax, tl.max(tl.abs(tail), axis=0))
        scale = e4m3_scale(amax)
        tl.store(scale_ptr + row, scale, mask=live)
        # one division per row, not one per element
        inverse = 1.0 / scale
        head = head * inverse
        tail = tail * inverse
    tl.store(ptr + head_offsets, head.to(ptr.dtype.element_ty), mask=head_mask)
    if TAIL:
        tl.store(ptr + tail_offsets, tail.to(ptr.dtype.element_ty), mask=tail_mask)


@triton.jit
def _sum_rows(part_ptr, first, count, stride, cols, live, ROWS: tl.constexpr):
    """Sum every live column over `count` rows, `stride` elements apart, ROWS at a time.

    Each column has its own first row.
    """
    total = tl.zeros(cols.shape, dtype=tl.float32)
    # in the order of the splits, whatever order they finished in: the same bits every time
    for p in range(0, count, ROWS):
        row = p + tl.arange(0, ROWS)
        offsets = (first + row[:, None]) * stride + cols
        mask = (row < count)[:, None] & live
        total += tl.sum(tl.load(part_ptr + offsets, mask=mask, other=0.0), axis=0)
    return total


@triton.jit(do_not_specialize=SHARES)
def sum_partials_kernel(
    part_ptr,  # [M, P, K, D] fp32
    a_ptr,  # [M, D], the sum over P for k = 0; b to f for k = 1 to 5; or None
    b_ptr,
    c_ptr,
    d_ptr,
    e_ptr,
    f_ptr,
    total_ptr,  # [D], the sum over M and P for the last k, or None
    M,
    P,
    K,
    D,
    ROWS: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK: tl.constexpr,
    TOTAL_ROWS: tl.constexpr,
    TOTAL_BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    num_totals = 0
    num_sums = K
    if total_ptr is not None:
        # the first programs make the total, because theirs is the longest way: few columns, and
        # rows of every image at once
        num_totals = tl.cdiv(D, TOTAL_BLOCK)
        num_sums = K - 1
        if pid < num_totals:
            cols = pid * TOTAL_BLOCK + tl.arange(0, TOTAL_BLOCK)
            first = tl.zeros((TOTAL_BLOCK,), dtype=tl.int64)
            last_k_ptr = part_ptr + (K - 1) * D
            total = _sum_rows(last_k_ptr, first, M * P, K * D, cols, cols < D, TOTAL_ROWS)
            tl.store(total_ptr + cols, total, mask=cols < D)
    if a_ptr is not None:  # noqa: SIM102, decided when compiling; the next condition at run time
        if pid >= num_totals:
            # which of the K gradients, which images and which columns: BLOCK columns of IMAGES
            # images lie side by side in one program
            blocks = tl.cdiv(D, BLOCK)
            k = (pid - num_totals) // blocks % num_sums
            lane = tl.arange(0, IMAGES * BLOCK)
            m = ((pid - num_totals) // blocks // num_sums).to(tl.int64) * IMAGES + lane // BLOCK
            cols = (pid - num_totals) % blocks * BLOCK + lane % BLOCK
            live = (m < M) & (cols < D)

            # sum over the splits, and store to the output of this k
            total = _sum_rows(part_ptr + k * D, m * P, P, K * D, cols, live, ROWS)
            out = m * D + cols
            tl.store(a_ptr + out, total, mask=live & (k == 0))
            if b_ptr is not None:
                tl.store(b_ptr + out, total, mask=live & (k == 1))
            if c_ptr is not None:
                tl.store(c_ptr + out, total, mask=live & (k == 2))
            if d_ptr is not None:
                tl.store(d_ptr + out, total, mask=live & (k == 3))
            if e_ptr is not None:
                tl.store(e_ptr + out, total, mask=live & (k == 4))
            if f_ptr is not None:
                tl.store(f_ptr + out, total, mask=live & (k == 5))


def sum_partials(part: Tensor, *outputs: Tensor, total: Tensor | None = None) -> None:
    """Sum ``part [M, P, K, D]`` over P into K <= 6 contiguous tensors ``[M, D]``.

    With ``total [D]`` the last k is summed over M as well and goes there; K - 1 outputs remain.
    """
    M, P, K, D = part.shape
    assert len(outputs) == K - (total is not None) and all(out.is_contiguous() for out in outputs)
    # a warp has 128 columns, so that no lane idles at SiT's widths; a thread has at most eight
    # loads in flight, for the total too
    block = 128
    rows = min(triton.next_power_of_2(P), 64)
    images = min(SUM_WARPS, 64 // rows)
    # two 32-byte sectors of each row, and as many rows as one or two iterations take
    total_block = 16
    total_rows = min(max(triton.next_power_of_2(M * P), 64), 512)
    num_totals = 0 if total is None else triton.cdiv(D, total_block)
    num_sums = triton.cdiv(M, images) * triton.cdiv(D, block) * len(outputs)
    # what is absent is compiled out
    pointers = [*outputs, *(None,) * 6][:6]
    sum_partials_kernel[(num_totals + num_sums,)](
        part,
        *pointers,
        total,
        M,
        P,
        K,
        D,
        ROWS=rows,
        IMAGES=images,
        BLOCK=block,
        TOTAL_ROWS=total_rows,
        TOTAL_BLOCK=total_block,
        num_warps=SUM_WARPS,
        # without a limit ptxas 13 aims at 40 registers and waits after three to five of a thread's
        # eight loads (seen in the sm_90 code)
        maxnreg=REGISTERS["sum_partials_kernel"],
        enable_fp_fusion=True,
    )
