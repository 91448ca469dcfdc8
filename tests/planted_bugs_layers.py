"""Bugs of the operators with a linear layer, for tests/planted_bugs.py."""

ROWS, ADALN, FUSED, GELU, CONCAT = (
    f"kernels/{n}.py" for n in ("_rows", "adaln", "gated_residual_adaln", "gelu", "concat_columns")
)
LINEAR, MLP, LAYERS = (
    "sra_fast/ops/adaln_linear.py",
    "sra_fast/ops/adaln_mlp.py",
    "sra_fast/models/layers.py",
)
T_LAYERS, T_BLOCK, T_GELU, T_CONCAT = (
    "tests/ops/test_adaln_linear.py",
    "tests/models/test_block.py",
    "tests/ops/test_gelu.py",
    ("tests/ops/test_concat_columns.py"),
)
T_PATCH = "tests/models/test_patch_embed.py"

BUGS = [
    ("h again without the scale", FUSED, "xhat * w + load_fp32(shift_ptr", "xhat + load_fp32(shift_ptr", T_LAYERS),
    ("h again with the shift of image 0", FUSED, "    shift_ptr += b * shift_b + g * shift_g\n    cols, cols2 = tl.arange(0, HEAD), HEAD"
     " + tl.arange(0, TAIL if TAIL else 1)\n    gate, w", "    shift_ptr += g * shift_g\n    cols, cols2 = tl.arange(0, HEAD), HEAD"
     " + tl.arange(0, TAIL if TAIL else 1)\n    gate, w", T_LAYERS),
    ("h again, its tail lost", FUSED, "*(dx_new_ptr, dx_ptr, dy_ptr, h_ptr, at, cols2, mask)",
     "*(dx_new_ptr, dx_ptr, dy_ptr, None, at, cols2, mask)", T_LAYERS),
    ("y again with the shift of group 0", ADALN, "shift_ptr += b * shift_b + g * shift_g\n    cols, cols2 = tl.arange(0, HEAD), "
     "HEAD + tl.arange(0, TAIL if TAIL else 1)\n    scale, scale2", "shift_ptr += b * shift_b\n    cols, cols2 = tl.arange(0, HEAD), "
     "HEAD + tl.arange(0, TAIL if TAIL else 1)\n    scale, scale2", T_LAYERS),
    ("total of image 0", ROWS, "first, M * P, K * D", "first, P, K * D", T_LAYERS),
    ("slope of GELU without its cube", GELU, "0.21406443847687905", "0.07135481282562635", T_GELU),
    ("GELU's own value from dx", GELU, "x * sigmoid, mask=mask", "dx * sigmoid, mask=mask", T_GELU),
    ("bias gradient of the last rows only", GELU, "sums += dx", "sums = dx", T_GELU),
    ("rows beyond the end counted", GELU, "mask = row[:, None] * N + cols, (row < M)[:, None] & (cols < N)",
     "mask = row[:, None] * N + cols, (row < M + 1)[:, None] & (cols < N)", T_GELU),
    ("GELU reads twice", GELU, "x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)",
     "x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) + 0 * tl.load(x_ptr + at, mask=mask, other=0.0)",
     "tests/ops/test_codegen_flat.py -k gelu_bytes"),
    ("the third part is the second", CONCAT, "if k == 2:\n        source, stride = c_ptr", "if k == 2:\n        source, stride = b_ptr", T_CONCAT),
    ("rows of the first part's length", CONCAT, "source, stride = b_ptr, b_row.to(tl.int64)", "source, stride = b_ptr, D", T_CONCAT),
    ("sums of the last rows only", CONCAT, "sums += x.to(tl.float32)", "sums = x.to(tl.float32)", T_CONCAT),
    ("parts in another order", LINEAR, "(weight.new_zeros(shape) if grad is None else grad for grad in grads[-parts:])",
     "(weight.new_zeros(shape) if grad is None else grad for grad in grads[-1 : -parts - 1 : -1])", T_LAYERS),
    ("h kept all the same", LINEAR, "kept = None if recompute or not", "kept = None if not", T_LAYERS),
    ("hidden kept all the same", MLP, "(None, None) if recompute else (h if", "(None, hidden) if recompute else (h if", T_LAYERS),
    ("weight gradients of frozen weights", MLP, "if wanted[2] else None", "", T_LAYERS),
    ("gradient of x' dropped", LINEAR, "dx_new = grads[0].contiguous()", "dx_new = None and grads[0].contiguous()", T_LAYERS),
    ("bias of the residual dropped", LINEAR, "return (*given, None)[:3]",
     "return (*given[:2], None)", T_LAYERS),
    ("autocast unheard", LINEAR, "        or autocast(x)\n", "", T_LAYERS),
    ("second derivatives of weights in silence", LINEAR, "found = once(backward, *up",
     "found = backward(*up", T_LAYERS),
    ("inputs of frozen layers kept", MLP, "(h if first else None, hidden if second else None)", "(h, hidden)", T_LAYERS),
    ("outputs are views", LINEAR, "return torch.ops.aten._unsafe_view(out, [*x.shape[:2], out.shape[1]])", "return out.view(*x.shape[:2], -1)", T_LAYERS),
    ("the block's MLP keeps everything", LAYERS, "residual=(attended, gate_msa, proj.bias),\n            recompute=recompute,", "residual=(attended, gate_msa, proj.bias),", T_BLOCK),
    ("a patch's columns before its rows", LAYERS, "permute(0, 2, 4, 1, 3, 5)", "permute(0, 2, 4, 1, 5, 3)", T_PATCH),
    ("patches column by column", LAYERS, "permute(0, 2, 4, 1, 3, 5)", "permute(0, 4, 2, 1, 3, 5)", T_PATCH),
    ("patches without their bias", LAYERS, "self.weight.flatten(1), self.bias)", "self.weight.flatten(1))", T_PATCH),
    ("the deferred bias is lost", LAYERS, "return x, (y, gate_mlp, fc2.bias if self.defer_bias else None)", "return x, (y, gate_mlp, None)", T_BLOCK),
    ("the deferred bias is added twice", LAYERS, "None if self.defer_bias else fc2.bias,", "fc2.bias,", T_BLOCK),
]  # fmt: skip
