"""Operators of adaLN diffusion transformers.

Each runs on any device. Where a kernel exists, CUDA tensors use it.
"""

from sra_fast.ops.adaln import adaln
from sra_fast.ops.adaln_linear import adaln_linear
from sra_fast.ops.adaln_mlp import adaln_mlp
from sra_fast.ops.adamw_ema import adamw_ema_
from sra_fast.ops.align_distance import align_distance
from sra_fast.ops.attention import attention
from sra_fast.ops.ema_update import ema_update_
from sra_fast.ops.gated_residual import gated_residual
from sra_fast.ops.gated_residual_adaln import gated_residual_adaln
from sra_fast.ops.gated_residual_norm import gated_residual_norm
from sra_fast.ops.linear_gelu import linear_gelu
from sra_fast.ops.linear_swiglu import linear_swiglu
from sra_fast.ops.noise_pair import noise_pair
from sra_fast.ops.qk_norm_rope import qk_norm_rope

__all__ = [
    "adaln",
    "adaln_linear",
    "adaln_mlp",
    "adamw_ema_",
    "align_distance",
    "attention",
    "ema_update_",
    "gated_residual",
    "gated_residual_adaln",
    "gated_residual_norm",
    "linear_gelu",
    "linear_swiglu",
    "noise_pair",
    "qk_norm_rope",
]
