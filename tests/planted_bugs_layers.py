"""Bugs of the operators with a linear layer, for tests/planted_bugs.py."""

ROWS = "kernels/_rows.py"
ADALN = "kernels/adaln.py"
FUSED = "kernels/gated_residual_adaln.py"
GELU = "kernels/gelu.py"
CONCAT = "kernels/concat_columns.py"
HALF_BLOCK = "sra_fast/ops/_half_block.py"
LINEAR = "sra_fast/ops/adaln_linear.py"
MLP = "sra_fast/ops/adaln_mlp.py"
LAYERS = "sra_fast/models/layers.py"

T_LAYERS = "tests/ops/test_adaln_linear.py"
T_BLOCK = "tests/models/test_block.py"
T_GELU = "tests/ops/test_gelu.py"
T_CONCAT = "tests/ops/test_concat_columns.py"
T_PATCH = "tests/models/test_patch_embed.py"

BUGS = [
    (
        "recomputed h without the scale",
        FUSED,
        "xhat * w + load_fp32(shift_ptr",
        "xhat + load_fp32(shift_ptr",
        T_LAYERS,
    ),
    (
        "recomputed h with the shift of image 0",
        FUSED,
        "        shift_ptr += b * shift_b + g * shift_g\n",
        "        shift_ptr += g * shift_g\n",
        T_LAYERS,
    ),
    (
        "recomputed h, its tail lost",
        FUSED,
        "tail, half_tail, mod_tail, row_data, sums_tail, stores, tail_cols, D",
        "tail, half_tail, mod_tail, row_data, sums_tail,"
        " (shift_ptr, dx_new_ptr, dx_ptr, dy_ptr, None), tail_cols, D",
        T_LAYERS,
    ),
    (
        "recomputed y with the shift of group 0",
        ADALN,
        "        shift_ptr += b * shift_b + g * shift_g\n",
        "        shift_ptr += b * shift_b\n",
        T_LAYERS,
    ),
    ("total of image 0", ROWS, "first, M * P, K * D", "first, P, K * D", T_LAYERS),
    ("slope of GELU without its cube", GELU, "0.21406443847687905", "0.07135481282562635", T_GELU),
    ("GELU's own value from dx", GELU, "x * sigmoid, mask=mask", "dx * sigmoid, mask=mask", T_GELU),
    ("bias gradient of the last rows only", GELU, "sums += dx", "sums = dx", T_GELU),
    (
        "rows beyond the end counted",
        GELU,
        "mask = (row < M)[:, None] & (cols < N)",
        "mask = (row < M + 1)[:, None] & (cols < N)",
        T_GELU,
    ),
    (
        "GELU reads twice",
        GELU,
        "x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)",
        "x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)"
        " + 0 * tl.load(x_ptr + offsets, mask=mask, other=0.0)",
        "tests/ops/test_codegen_flat.py -k gelu_bytes",
    ),
    ("the third part is the second", CONCAT, "source = c_ptr", "source = b_ptr", T_CONCAT),
    (
        "rows of the first part's length",
        CONCAT,
        "stride = b_row.to(tl.int64)",
        "stride = D.to(tl.int64)",
        T_CONCAT,
    ),
    (
        "sums of the last rows only",
        CONCAT,
        "sums += x.to(tl.float32)",
        "sums = x.to(tl.float32)",
        T_CONCAT,
    ),
    (
        "parts in another order",
        HALF_BLOCK,
        "for grad in grads[-parts:]]",
        "for grad in grads[-1 : -parts - 1 : -1]]",
        T_LAYERS,
    ),
    (
        "h kept all the same",
        LINEAR,
        "kept = None if recompute or not",
        "kept = None if not",
        T_LAYERS,
    ),
    (
        "hidden kept all the same",
        MLP,
        "hidden if needs_weight2 and not recompute else None",
        "hidden if needs_weight2 else None",
        T_LAYERS,
    ),
    (
        "weight gradients of frozen weights",
        MLP,
        "    if needs_weight2:\n",
        "    if True:\n",
        T_LAYERS,
    ),
    (
        "gradient of x' dropped",
        HALF_BLOCK,
        "dx_new = grads[0].contiguous()",
        "dx_new = None",
        T_LAYERS,
    ),
    (
        "bias of the residual dropped",
        HALF_BLOCK,
        "return y, gate, bias\n",
        "return y, gate, None\n",
        T_LAYERS,
    ),
    ("autocast unheard", HALF_BLOCK, "if empty or autocast(x) or not", "if empty or not", T_LAYERS),
    (
        "second derivatives of weights in silence",
        LINEAR,
        "guard_double_backward(backward, *up",
        "backward(*up",
        T_LAYERS,
    ),
    (
        "inputs of frozen layers kept",
        MLP,
        "h if needs_weight1 and not recompute else None",
        "h if not recompute else None",
        T_LAYERS,
    ),
    (
        "outputs are views",
        HALF_BLOCK,
        "return torch.ops.aten._unsafe_view(out, [*x.shape[:2], out.shape[1]])",
        "return out.view(*x.shape[:2], -1)",
        T_LAYERS,
    ),
    (
        "the block's MLP keeps everything",
        LAYERS,
        "residual=(attended, gate_msa, proj.bias),\n            recompute=recompute,",
        "residual=(attended, gate_msa, proj.bias),",
        T_BLOCK,
    ),
    (
        "a patch's columns before its rows",
        LAYERS,
        "permute(0, 2, 4, 1, 3, 5)",
        "permute(0, 2, 4, 1, 5, 3)",
        T_PATCH,
    ),
    (
        "patches column by column",
        LAYERS,
        "permute(0, 2, 4, 1, 3, 5)",
        "permute(0, 4, 2, 1, 3, 5)",
        T_PATCH,
    ),
    (
        "patches without their bias",
        LAYERS,
        "self.weight.flatten(1), self.bias)",
        "self.weight.flatten(1))",
        T_PATCH,
    ),
    (
        "the deferred bias is lost",
        LAYERS,
        "return x, (y, gate_mlp, fc2.bias if self.defer_bias else None)",
        "return x, (y, gate_mlp, None)",
        T_BLOCK,
    ),
    (
        "the deferred bias is added twice",
        LAYERS,
        "None if self.defer_bias else fc2.bias,",
        "fc2.bias,",
        T_BLOCK,
    ),
]
