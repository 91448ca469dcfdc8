"""Bugs of the operators with a linear layer, for tests/planted_bugs.py."""

ROWS = "kernels/_rows.py"
ADALN = "kernels/adaln.py"
FUSED = "kernels/gated_residual_adaln.py"
GELU = "kernels/gelu.py"
CONCAT = "kernels/concat_columns.py"
HALF_BLOCK = "sra_fast/ops/_half_block.py"
LINEAR = "sra_fast/ops/adaln_linear.py"
MLP = "sra_fast/ops/adaln_mlp.py"
CUBLASLT = "sra_fast/ops/_cublaslt.py"
GRAPH = "sra_fast/utils/cuda_graph.py"
LAYERS = "sra_fast/models/layers.py"

T_LAYERS = "tests/ops/test_adaln_linear.py"
T_BLOCK = "tests/models/test_block.py"
T_GELU = "tests/ops/test_gelu.py"
T_CONCAT = "tests/ops/test_concat_columns.py"
T_CUBLASLT = "tests/ops/test_cublaslt.py"
T_EPILOGUES = "tests/ops/test_adaln_mlp_epilogues.py"
T_GRAPH = (
    "tests/training/test_graphed_step.py::test_outputs_have_no_history"
    " tests/training/test_graphed_step.py::test_only_gradients_that_share_memory_are_copied"
    " tests/training/test_graphed_step.py::test_shared_and_strided_gradients_become_tensors_of_their_own"
)
T_PATCH = "tests/models/test_patch_embed.py"

BUGS = [
    (
        "an epilogue where GELU's output is missing",
        MLP,
        "_cublaslt.available(a) and not recompute_hidden:",
        "_cublaslt.available(a):",
        T_EPILOGUES,
    ),
    (
        "the product's two outputs exchanged",
        MLP,
        "hidden, a = linear_gelu_keep(",
        "a, hidden = linear_gelu_keep(",
        T_EPILOGUES,
    ),
    (
        "no gradient of the first bias beside an epilogue",
        MLP,
        "dbias1 = da.sum(0) if needs_bias1 else None",
        "dbias1 = da.new_zeros(da.shape[1]) if needs_bias1 else None",
        T_EPILOGUES,
    ),
    (
        "the weight is not transposed",
        CUBLASLT,
        "self._describe(_TRANSPOSE_A, ctypes.c_int32(shape.transpose_a))",
        "self._describe(_TRANSPOSE_A, ctypes.c_int32(0))",
        T_CUBLASLT,
    ),
    (
        "all products are in bf16",
        CUBLASLT,
        "dtype = DTYPES[shape.dtype]",
        "dtype = DTYPES[torch.bfloat16]",
        T_CUBLASLT,
    ),
    (
        "one plan for all dtypes",
        CUBLASLT,
        "_Shape(out.get_device(), out.dtype, epilogue",
        "_Shape(out.get_device(), torch.float16, epilogue",
        T_CUBLASLT,
    ),
    (
        "no room for partial sums",
        CUBLASLT,
        "_WORKSPACE_BYTES = 32 << 20",
        "_WORKSPACE_BYTES = 0",
        T_CUBLASLT,
    ),
    (
        "partial sums in half precision",
        CUBLASLT,
        "_REDUCE_IN_COMPUTE_TYPE = 2",
        "_REDUCE_IN_COMPUTE_TYPE = 7",
        T_CUBLASLT,
    ),
    ("proposals for other devices", CUBLASLT, " if each.state == 0]", "]", T_CUBLASLT),
    ("an odd width", CUBLASLT, "or N % 8 or K % 8", "or N % 8", T_CUBLASLT),
    (
        "a search for better addresses than later ones",
        CUBLASLT,
        "for alignment in (_BEST_ALIGNMENT, _LEAST_ALIGNMENT):",
        "for alignment in (_BEST_ALIGNMENT, 128, _LEAST_ALIGNMENT):",
        T_CUBLASLT,
    ),
    (
        "a measured algorithm in a deterministic program",
        CUBLASLT,
        "    if torch.are_deterministic_algorithms_enabled():\n        return 0\n",
        "",
        T_CUBLASLT,
    ),
    (
        "what a capture has met is never measured",
        CUBLASLT,
        "    if not plan.measured and not torch.cuda.is_current_stream_capturing():\n",
        "    if not plan.measured:\n",
        T_CUBLASLT,
    ),
    (
        "outputs of a graph hold autograd's nodes",
        GRAPH,
        "return tree_map(detach, output), gradients",
        "return output, gradients",
        T_GRAPH,
    ),
    (
        "gradients share memory",
        GRAPH,
        "if not whole or storage.data_ptr() in seen:",
        "if not whole:",
        T_GRAPH,
    ),
    (
        "a part of a tensor is a whole gradient",
        GRAPH,
        "gradient.is_contiguous() and storage.nbytes() == gradient.nbytes",
        "gradient.is_contiguous()",
        T_GRAPH,
    ),
    (
        "every view is copied",
        GRAPH,
        "gradient.is_contiguous() and storage.nbytes() == gradient.nbytes",
        "gradient.is_contiguous() and not gradient._is_view()",
        T_GRAPH,
    ),
    (
        "recomputed h without the scale",
        FUSED,
        "xhat * w + load_bias(shift_ptr",
        "xhat + load_bias(shift_ptr",
        T_LAYERS,
    ),
    (
        "recomputed h with the shift of image 0",
        FUSED,
        "        shift_ptr += b * shift_b + g * shift_g\n    if scale2_ptr",
        "        shift_ptr += g * shift_g\n    if scale2_ptr",
        T_LAYERS,
    ),
    (
        "recomputed h, its tail lost",
        FUSED,
        "tail, half_tail, mod_tail, row_data, sums_tail, stores, tail_cols, D",
        "tail, half_tail, mod_tail, row_data, sums_tail,"
        " (shift_ptr, dx_new_ptr, dx_ptr, dy_ptr, None, dh2_ptr), tail_cols, D",
        T_LAYERS,
    ),
    (
        "recomputed y with the shift of group 0",
        ADALN,
        "        shift_ptr += b * shift_b + g * shift_g\n    columns",
        "        shift_ptr += b * shift_b\n    columns",
        T_LAYERS,
    ),
    (
        "wide rows: the gradient of x' dropped",
        HALF_BLOCK,
        "dx if dx_new is None else dx + dx_new",
        "dx",
        "tests/ops/test_optional_vectors.py::test_half_blocks_of_wide_rows_run_the_kernels",
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
        "products for gradients that nobody wants",
        HALF_BLOCK,
        "    if needs_norm:\n",
        "    if True:\n",
        "tests/ops/test_wanted_gradients.py",
    ),
    (
        "weight gradients of frozen weights",
        MLP,
        "weight_gradient(dout, input2) if needs_weight2 else None",
        "weight_gradient(dout, input2)",
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
    ("autocast unheard", HALF_BLOCK, "if empty or autocast(x) or too", "if empty or too", T_LAYERS),
    (
        "second derivatives of weights in silence",
        LINEAR,
        'guard_double_backward(\n            "adaln_linear", backward, *up',
        "backward(\n            *up",
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
        "residual=(attended, gate_msa, proj.bias),\n            group=group,\n"
        '            recompute=self.recompute == "norm",',
        "residual=(attended, gate_msa, proj.bias),\n            group=group,",
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
