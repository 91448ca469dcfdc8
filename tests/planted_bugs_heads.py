"""Bugs of the norm and rotation of queries and keys, and of SwiGLU, for tests/planted_bugs.py."""

KERNEL = "kernels/qk_norm_rope.py"
OPERATOR = "sra_fast/ops/qk_norm_rope.py"

SWIGLU = "kernels/swiglu.py"
O_SWIGLU = "sra_fast/ops/swiglu.py"
MLP = "sra_fast/ops/adaln_mlp.py"

T_HEADS = "tests/ops/test_qk_norm_rope.py"
T_SWIGLU = "tests/ops/test_swiglu.py"

BUGS = [
    (
        "heads: pairs of halves are neighbours",
        KERNEL,
        "first = tl.load(ptr + rows + cols, mask=mask, other=other)",
        "first = tl.load(ptr + rows + (cols ^ 1), mask=mask, other=other)",
        T_HEADS,
    ),
    (
        "heads: the reference pairs neighbours",
        OPERATOR,
        "        first, second = rows.chunk(2, dim=-1)\n"
        "        turned = torch.cat([-second, first], dim=-1)\n",
        "        first, second = rows.unflatten(-1, (-1, 2)).unbind(-1)\n"
        "        turned = torch.stack([-second, first], dim=-1).flatten(-2)\n",
        T_HEADS,
    ),
    (
        "heads: rotated the other way",
        KERNEL,
        "y1, y2 = y1 * cos[0] - y2 * sin[0], y2 * cos[1] + y1 * sin[1]",
        "y1, y2 = y1 * cos[0] + y2 * sin[0], y2 * cos[1] - y1 * sin[1]",
        T_HEADS,
    ),
    (
        "heads: the weight after the rotation",
        KERNEL,
        "                y1 *= w1\n"
        "                y2 *= w2\n"
        "                # rotate and round once\n"
        "                if cos_ptr is not None:\n"
        "                    y1, y2 = y1 * cos[0] - y2 * sin[0], y2 * cos[1] + y1 * sin[1]\n",
        "                if cos_ptr is not None:\n"
        "                    y1, y2 = y1 * cos[0] - y2 * sin[0], y2 * cos[1] + y1 * sin[1]\n"
        "                y1 *= w1\n"
        "                y2 *= w2\n",
        T_HEADS,
    ),
    (
        "heads: eps outside of the root",
        KERNEL,
        "1.0 / tl.sqrt(tl.where(live, squares / D + eps, 1.0))",
        "1.0 / (tl.sqrt(tl.where(live, squares / D, 1.0)) + eps)",
        T_HEADS,
    ),
    (
        "heads: no eps",
        KERNEL,
        "tl.where(live, squares / D + eps, 1.0)",
        "tl.where(live, squares / D, 1.0)",
        T_HEADS,
    ),
    (
        "heads: the mean enters the padding",
        KERNEL,
        "first = tl.where(first_exists[None, :], first - mean, 0.0)",
        "first = first - mean",
        T_HEADS,
    ),
    (
        "heads: the gradient rotated forward",
        KERNEL,
        "dn1, dn2 = dn1 * cos[0] + dn2 * sin[1], dn2 * cos[1] - dn1 * sin[0]",
        "dn1, dn2 = dn1 * cos[0] - dn2 * sin[1], dn2 * cos[1] + dn1 * sin[0]",
        T_HEADS,
    ),
    (
        "heads: sines of the other element",
        KERNEL,
        "dn1, dn2 = dn1 * cos[0] + dn2 * sin[1], dn2 * cos[1] - dn1 * sin[0]",
        "dn1, dn2 = dn1 * cos[0] + dn2 * sin[0], dn2 * cos[1] - dn1 * sin[1]",
        T_HEADS,
    ),
    (
        "heads: dx without c1",
        KERNEL,
        "dx1 = (dx1 - xhat1 * c1 - c2) * rstd",
        "dx1 = (dx1 - c2) * rstd",
        T_HEADS,
    ),
    (
        "heads: dx without c2",
        KERNEL,
        "dx2 = (dx2 - xhat2 * c1 - c2) * rstd",
        "dx2 = (dx2 - xhat2 * c1) * rstd",
        T_HEADS,
    ),
    (
        "heads: the weight's gradient from the input",
        KERNEL,
        "sum2 += dn2 * xhat2",
        "sum2 += dn2 * x[1].to(tl.float32)",
        T_HEADS,
    ),
    (
        "heads: the keys' sums over those of the queries",
        KERNEL,
        "tl.where(is_query, 0, K - 1)",
        "tl.where(is_query, 0, 0)",
        T_HEADS,
    ),
    (
        "heads: the last head left out",
        KERNEL,
        "tl.minimum(first_head + num_heads, H)",
        "tl.minimum(first_head + num_heads, H - 1)",
        T_HEADS,
    ),
    (
        "heads: tables begin at the first token",
        KERNEL,
        "        row = t - offset\n",
        "        row = t\n",
        T_HEADS,
    ),
    (
        "heads: one image's tables for all",
        KERNEL,
        "cos_rows = (b * cos_b + row * cos_t) * TABLE_UNIT",
        "cos_rows = row * cos_t * TABLE_UNIT",
        T_HEADS,
    ),
    (
        "heads: a column per pair where there is one per element",
        KERNEL,
        '"FULL": cos.shape[2] == D',
        '"FULL": False',
        T_HEADS,
    ),
    (
        "heads: the layout left behind",
        OPERATOR,
        "return (q_out.transpose(1, 2), k_out.transpose(1, 2)) if heads_first else (q_out, k_out)",
        "return q_out, k_out",
        T_HEADS,
    ),
    (
        "heads: a copy is kept for the backward",
        OPERATOR,
        "ctx.save_for_backward(q, k, cos,",
        "ctx.save_for_backward(q + 0, k, cos,",
        T_HEADS,
    ),
    (
        "swiglu: the halves exchanged",
        SWIGLU,
        "tl.store(y_ptr + row * N + cols, x1 * tl.sigmoid(x1) * x2, mask=mask)",
        "tl.store(y_ptr + row * N + cols, x2 * tl.sigmoid(x2) * x1, mask=mask)",
        T_SWIGLU,
    ),
    (
        "swiglu: halves of the wrong row",
        SWIGLU,
        "x2 = tl.load(x_ptr + (row * 2 + 1) * N + cols,",
        "x2 = tl.load(x_ptr + row * 2 * N + (N - 1 - cols),",
        T_SWIGLU,
    ),
    (
        "swiglu: the slope of the sigmoid",
        SWIGLU,
        "dx1 = dy * x2 * (sigmoid + silu * (1.0 - sigmoid))",
        "dx1 = dy * x2 * (sigmoid * (1.0 - sigmoid))",
        T_SWIGLU,
    ),
    ("swiglu: dx2 of the gate", SWIGLU, "dx2 = dy * silu", "dx2 = dy * sigmoid", T_SWIGLU),
    ("swiglu: a sum forgets rows", SWIGLU, "sums2 += dx2", "sums2 = dx2", T_SWIGLU),
    (
        "swiglu: one place for both sums",
        SWIGLU,
        "tl.store(part_ptr + N + cols, tl.sum(sums2",
        "tl.store(part_ptr + cols, tl.sum(sums2",
        T_SWIGLU,
    ),
    (
        "swiglu: the recomputed output without its half",
        SWIGLU,
        "tl.store(y_ptr + row * N + cols, silu * x2, mask=mask)",
        "tl.store(y_ptr + row * N + cols, silu, mask=mask)",
        T_SWIGLU,
    ),
    (
        "swiglu: the output is kept",
        O_SWIGLU,
        "        ctx.save_for_backward(x)\n        return swiglu_fwd(x)\n",
        "        y = swiglu_fwd(x)\n        ctx.save_for_backward(x, y)\n        return y\n",
        T_SWIGLU,
    ),
    (
        "swiglu: the hidden layer is kept",
        MLP,
        "        kept_hidden = hidden if needs_weight2 and not recompute else None\n",
        "        kept_hidden = hidden if needs_weight2 else None\n",
        T_SWIGLU,
    ),
    (
        "swiglu: GELU in its place",
        MLP,
        "first_half = run_linear_swiglu if swiglu else run_linear_gelu",
        "first_half = run_linear_gelu",
        T_SWIGLU,
    ),
]
