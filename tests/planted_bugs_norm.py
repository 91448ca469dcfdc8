"""Bugs of the row kernels and of what every operator shares, for tests/planted_bugs.py."""

ROWS = "kernels/_rows.py"
ADALN = "kernels/adaln.py"
PLAIN = "kernels/gated_residual.py"
FUSED = "kernels/gated_residual_adaln.py"
QUANTIZE = "kernels/quantize_rows.py"
O_ADALN = "sra_fast/ops/adaln.py"
O_GATED = "sra_fast/ops/gated_residual.py"
O_FUSED = "sra_fast/ops/gated_residual_adaln.py"
MODULATION = "sra_fast/ops/_modulation.py"
REGISTER = "sra_fast/ops/_register.py"
BACKEND = "sra_fast/ops/_backend.py"
ATTENTION = "sra_fast/ops/attention.py"

T_ADALN = "tests/ops/test_adaln.py"
T_GATED = "tests/ops/test_gated_residual.py"
T_FUSED = "tests/ops/test_gated_residual_adaln.py"
T_ROWS = "tests/ops/test_rows.py"
T_FAR = "tests/ops/test_far_rows.py"
T_CONTRACTS = "tests/ops/test_contracts.py"
T_ATTENTION = "tests/ops/test_attention.py"
T_SUMS = "tests/ops/test_sum_partials.py"
T_FP8 = "tests/ops/test_fp8.py"
T_QUANTIZE = "tests/ops/test_quantize_rows.py"

BUGS = [
    (
        "unmasked variance",
        ROWS,
        "x_tail = tl.where(tail_cols < D, x_tail - mean, 0.0)",
        "x_tail = x_tail - mean",
        T_FUSED,
    ),
    (
        "unmasked variance, one piece",
        ROWS,
        "x_head = tl.where(head_cols < D, x_head - mean, 0.0)",
        "x_head = x_head - mean",
        T_ADALN,
    ),
    (
        "one-pass variance",
        ROWS,
        "squares = fold(x_head * x_head, x_tail * x_tail, HEAD, TAIL)\n"
        "    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D + eps)",
        "y_head = x_head + mean\n"
        "    y_tail = x_tail + mean\n"
        "    squares = fold(y_head * y_head, y_tail * y_tail, HEAD, TAIL)\n"
        "    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / D - mean * mean + eps)",
        T_ADALN,
    ),
    ("eps outside the root", ROWS, "/ D + eps)", "/ D) + eps", T_ADALN),
    ("tail left out of the statistics", ROWS, "axis=1) + tail", "axis=1)", T_FUSED),
    (
        "norm backward without the mean term",
        ROWS,
        "c2 = fold(dxhat_head, dxhat_tail, HEAD, TAIL)",
        "c2 = c1 * 0.0",
        T_ADALN,
    ),
    (
        "a mean term for RMS",
        ROWS,
        "return tl.sum(c1, axis=0) / D, 0.0",
        "return tl.sum(c1, axis=0) / D, 0.5",
        T_ADALN,
    ),
    (
        "first partial sum dropped",
        ROWS,
        "row = p + tl.arange(0, ROWS)",
        "row = p + 1 + tl.arange(0, ROWS)",
        T_GATED,
    ),
    ("partial sums of the wrong image", ROWS, "m * P, P, K * D", "m, P, K * D", T_GATED),
    (
        "partial sums beyond the last image",
        ROWS,
        "live = (m < M) & (cols < D)",
        "live = cols < D",
        T_SUMS,
    ),
    ("one image of those side by side", ROWS, "* IMAGES + lane // BLOCK", "* IMAGES", T_SUMS),
    ("the second block of a total", ROWS, "cols = pid * TOTAL_BLOCK + tl", "cols = tl", T_SUMS),
    ("partial sums beyond the first rows", ROWS, "total += tl.sum(", "total = tl.sum(", T_SUMS),
    (
        "e4m3: the scale for its inverse",
        ROWS,
        "head = head * inverse\n        tail = tail * inverse",
        "head = head * scale\n        tail = tail * scale",
        T_FP8,
    ),
    (
        "e4m3: tail left out of the maximum",
        ROWS,
        "amax = tl.maximum(amax, tl.max(tl.abs(tail), axis=0))",
        "pass",
        T_FP8,
    ),
    ("quantize: GELU without its cube", QUANTIZE, "0.1029432397", "0.0", T_QUANTIZE),
    ("quantize: GELU without its square", QUANTIZE, "tl.rsqrt(t * t)", "tl.rsqrt(t)", T_QUANTIZE),
    (
        "quantize: largest value, not magnitude",
        QUANTIZE,
        "tl.maximum(amax, tl.abs(v))",
        "tl.maximum(amax, v)",
        T_QUANTIZE,
    ),
    (
        "quantize: largest of the last block",
        QUANTIZE,
        "tl.maximum(amax, tl.abs(v))",
        "tl.abs(v)",
        T_QUANTIZE,
    ),
    (
        "quantize: maximum before GELU",
        QUANTIZE,
        "tl.abs(v))\n",
        "tl.abs(blocks[i].to(tl.float32)))\n",
        T_QUANTIZE,
    ),
    ("rows past the last token", ROWS, "live = t < T\n", "live = t <= T\n", T_GATED),
    ("group ignored", ROWS, "(index >= owned[0]) & (index <= owned[1])", "owned[0] <= 0", T_ADALN),
    (
        "indices out of range skipped",
        ROWS,
        "tl.where(g == 0, -(2**31), g.to(tl.int32))",
        "g.to(tl.int32)",
        T_GATED,
    ),
    (
        "bias not added",
        ROWS,
        "(y.to(tl.float32) + bias)",
        "(y.to(tl.float32) + 0.0 * bias)",
        T_GATED,
    ),
    (
        "rounded twice",
        ROWS,
        "gate * (y.to(tl.float32) + bias)",
        "(gate * (y.to(tl.float32) + bias)).to(tl.float16)",
        T_GATED,
    ),
    ("residual sign", ROWS, "x.to(tl.float32) + gate", "x.to(tl.float32) - gate", T_GATED),
    (
        "32-bit program ids",
        ROWS,
        "pid = tl.program_id(0).to(tl.int64)",
        "pid = tl.program_id(0)",
        T_GATED,
    ),
    (
        "group stride for the image",
        ROWS,
        "(mod.stride(0), mod.stride(1)) if",
        "(mod.stride(1), mod.stride(0)) if",
        T_ADALN,
    ),
    (
        "scale without the one",
        ADALN,
        "xhat * (1.0 + scale.to(tl.float32))",
        "xhat * scale.to(tl.float32)",
        T_ADALN,
    ),
    (
        "shift and scale swapped",
        ADALN,
        "scale.to(tl.float32)) + shift.to(tl.float32)",
        "shift.to(tl.float32)) + scale.to(tl.float32)",
        T_ADALN,
    ),
    (
        "scale of the wrong image",
        ADALN,
        "scale_ptr += b * scale_b + g * scale_g\n    if y_ptr",
        "scale_ptr += split * scale_b + g * scale_g\n    if y_ptr",
        T_ADALN,
    ),
    (
        "one token's shift for all",
        ADALN,
        "load(shift_ptr, token_offsets[0] + cols, mask)",
        "load(shift_ptr, cols, mask)",
        T_ADALN,
    ),
    ("dx without c1", ADALN, "(dxhat - xhat * c1 - c2) * rstd", "(dxhat - c2) * rstd", T_ADALN),
    (
        "dx without rstd",
        ADALN,
        "(dxhat - xhat * c1 - c2) * rstd",
        "(dxhat - xhat * c1 - c2)",
        T_ADALN,
    ),
    ("dscale without xhat", ADALN, "sums[1] + dy * xhat", "sums[1] + dy", T_ADALN),
    (
        "per-token dscale of dxhat",
        ADALN,
        "tl.store(dscale_ptr + offsets, dy * xhat",
        "tl.store(dscale_ptr + offsets, dxhat * xhat",
        T_ADALN,
    ),
    (
        "tail of dshift lost",
        ADALN,
        "tl.store(dscale_ptr + tail_cols, tail_sums[0], mask=tail_cols < D)",
        "pass",
        T_ADALN,
    ),
    (
        "plain: gate of the wrong image",
        PLAIN,
        "# gate of this image and group, and the bias, loaded once for all rows\n"
        "    gate_ptr += b * gate_b",
        "gate_ptr += (b // 2) * gate_b",
        T_GATED,
    ),
    (
        "plain: dy without the gate",
        PLAIN,
        "dx_head * gate_head, mask=live",
        "dx_head, mask=live",
        T_GATED,
    ),
    (
        "plain: dgate without the bias",
        PLAIN,
        "dgate_head + sum_dx_head * bias_head",
        "dgate_head",
        T_GATED,
    ),
    (
        "plain: dgate forgets rows",
        PLAIN,
        "dgate_head += dx_head * head[1].to(tl.float32)",
        "dgate_head = dx_head * head[1].to(tl.float32)",
        T_GATED,
    ),
    (
        "plain: bias gradient without the gate",
        PLAIN,
        "sum_dx_tail * gate_tail",
        "sum_dx_tail",
        T_GATED,
    ),
    (
        "plain: the second row twice",
        PLAIN,
        "load_two_arrays(x_ptr, y_ptr, group_ptr, b, owned, t + 1, T",
        "load_two_arrays(x_ptr, y_ptr, group_ptr, b, owned, t, T",
        T_GATED,
    ),
    (
        "fused: h from x",
        FUSED,
        "h_head = xhat_head * w_head + shift_head",
        "h_head = xhat_head * w_head",
        T_FUSED,
    ),
    (
        "fused: scale strides of shift",
        FUSED,
        "scale_ptr += b * scale_b + g * scale_g\n    columns",
        "scale_ptr += b * gate_b + g * scale_g\n    columns",
        T_FUSED,
    ),
    (
        "fused: dx without the residual's gradient",
        FUSED,
        "dx += loaded[2].to(tl.float32)",
        "dx += 0.0",
        T_FUSED,
    ),
    (
        "fused: dy without the gate",
        FUSED,
        "tl.store(dy_ptr + offsets, dx * gate",
        "tl.store(dy_ptr + offsets, dx",
        T_FUSED,
    ),
    (
        "fused: dgate from dh",
        FUSED,
        "sums[0] + dx * loaded[1]",
        "sums[0] + dh * loaded[1]",
        T_FUSED,
    ),
    ("fused: dshift forgets rows", FUSED, "sums[1] + dh,", "dh,", T_FUSED),
    (
        "fused: dscale of x, not xhat",
        FUSED,
        "sums[2] + dh * xhat",
        "sums[2] + dh * loaded[0].to(tl.float32)",
        T_FUSED,
    ),
    (
        "fused: dgate without the bias",
        FUSED,
        "dgate + sum_dx * bias, mask",
        "dgate, mask",
        T_FUSED,
    ),
    (
        "fused: partial sums overlap",
        FUSED,
        "part_ptr + pid * K * D, sums_head, gate_head",
        "part_ptr + pid * D, sums_head, gate_head",
        T_FUSED,
    ),
    (
        "modulation copied",
        "sra_fast/ops/_modulation.py",
        "modulation if modulation.stride(-1) == 1 else",
        "",
        T_GATED,
    ),
    (
        "x saved as well",
        O_FUSED,
        "save_for_backward(x_new, y,",
        "save_for_backward(x_new, y + 0,",
        T_FUSED,
    ),
    (
        "more bytes than stated",
        ADALN,
        "load(x_ptr, row * D + cols, mask), shift",
        "load(x_ptr, row * D + cols, mask) + 0 * load(x_ptr, row * D + cols, mask), shift",
        T_ROWS,
    ),
    (
        "attention: groups ignored",
        ATTENTION,
        "groups[:, :, None] == groups[:, None, :]",
        "groups[:, :, None] == groups[:, :, None]",
        T_ATTENTION,
    ),
    ("attention: slowest wins", ATTENTION, "best = min(times", "best = max(times", T_ATTENTION),
    ("attention: measured every time", ATTENTION, "if key in _chosen:", "if False:", T_ATTENTION),
    (
        "attention: measured with the global seed",
        ATTENTION,
        "H * d, dtype=q.dtype, device=q.device, generator=generator)",
        "H * d, dtype=q.dtype, device=q.device)",
        T_ATTENTION,
    ),
    # rows beyond 2^31 elements
    (
        "32-bit rows of two arrays",
        ROWS,
        "row = b * T + t\n",
        "row = (b * T + t).to(tl.int32)\n",
        T_FAR,
    ),
    (
        "32-bit rows in adaln's forward",
        ADALN,
        "row = b * T + t\n    live = is_owned(group_ptr, row, t, owned, T)\n    offsets =",
        "row = (b * T + t).to(tl.int32)\n    live = is_owned(group_ptr, row, t, owned, T)\n    offsets =",
        T_FAR,
    ),
    (
        "32-bit rows in adaln's backward",
        ADALN,
        "row = b * T + t\n    live = is_owned(group_ptr, row, t, owned, T)\n    offset =",
        "row = (b * T + t).to(tl.int32)\n    live = is_owned(group_ptr, row, t, owned, T)\n    offset =",
        T_FAR,
    ),
    ("fused: 32-bit rows", FUSED, "row = b * T + t\n", "row = (b * T + t).to(tl.int32)\n", T_FAR),
    # eps, statistics, tails
    (
        "fused: eps ignored",
        FUSED,
        "rstd_ptr, eps, columns",
        "rstd_ptr, 1e-6, columns",
        T_FUSED,
    ),
    (
        "fused: eps ignored by the operator",
        O_FUSED,
        "scale, group, eps, norm ==",
        "scale, group, 1e-6, norm ==",
        T_FUSED,
    ),
    (
        "statistics in the dtype of x",
        ADALN,
        "rstd = x.new_empty((B, T), dtype=torch.float32)",
        "rstd = x.new_empty((B, T))",
        T_CONTRACTS,
    ),
    (
        "fused: statistics in the dtype of x",
        FUSED,
        "rstd = x.new_empty((B, T), dtype=torch.float32)",
        "rstd = x.new_empty((B, T))",
        T_CONTRACTS,
    ),
    ("fused: tail of h lost", FUSED, "w_tail + shift_tail if TAIL", "w_tail if TAIL", T_FUSED),
    (
        "plain: bias of the head in the tail",
        PLAIN,
        "tail[1], gate_tail, bias_tail,",
        "tail[1], gate_tail, 0.0,",
        T_GATED,
    ),
    (
        "partial sums of the wrong gradient",
        ROWS,
        "mask=live & (k == 1)",
        "mask=live & (k == 0)",
        T_FUSED,
    ),
    ("more partial sums than needed", ROWS, "min(range(1, most + 1), key=cost)", "most", T_ROWS),
    # what every operator promises
    (
        "y saved behind autograd's back",
        O_GATED,
        "save_for_backward(y, bias",
        "save_for_backward(y.data, bias",
        T_CONTRACTS,
    ),
    (
        "fused: y saved behind autograd's back",
        O_FUSED,
        "save_for_backward(x_new, y,",
        "save_for_backward(x_new, y.data,",
        T_CONTRACTS,
    ),
    (
        "x saved behind autograd's back",
        O_ADALN,
        "save_for_backward(x, scale",
        "save_for_backward(x.data, scale",
        T_CONTRACTS,
    ),
    (
        "a strided group",
        O_GATED,
        "None if group is None else group.contiguous()\n",
        "group\n",
        T_GATED,
    ),
    (
        "fused: a strided group",
        O_FUSED,
        "None if group is None else group.contiguous()\n",
        "group\n",
        T_FUSED,
    ),
    (
        "strides left to the compiler",
        REGISTER,
        "Tag.needs_exact_strides",
        "Tag.flexible_layout",
        T_CONTRACTS,
    ),
    (
        "launch on the current device",
        REGISTER,
        "with torch.cuda.device_of(_first_tensor(args)):",
        "if True:",
        T_CONTRACTS,
    ),
    (
        "forward mode dropped",
        REGISTER,
        "return backward or forward_ad._current_level >= 0",
        "return backward",
        T_CONTRACTS,
    ),
    (
        "a Function for every call",
        REGISTER,
        "    return backward or",
        "    return True or",
        T_CONTRACTS,
    ),
    (
        "one tensor twice",
        REGISTER,
        "if not torch.compiler.is_compiling():",
        "if True:",
        T_CONTRACTS,
    ),
    (
        "second derivatives in silence",
        REGISTER,
        "if torch.is_grad_enabled():",
        "if False:",
        T_CONTRACTS,
    ),
    ("rows of any width", MODULATION, "return D <= kernels.MAX_WIDTH", "return True", T_CONTRACTS),
    ("said at every call", BACKEND, "_said.add(message)", "pass", T_CONTRACTS),
]
