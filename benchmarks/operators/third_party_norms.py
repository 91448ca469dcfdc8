"""LayerNorms of other packages, as far as they are installed: rivals of the adaptive norms."""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.operators.entry import EPS


@functools.cache
def _constant(value: float, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((D,), value, dtype=dtype, device=device)


def _apex_norm() -> Callable:
    # PyPI's package of this name is another project and has no such module
    norm = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm
    return lambda x: norm(x, x.shape[-1:], EPS)


def _liger_norm() -> Callable:
    function = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction

    def norm(x: Tensor) -> Tensor:
        # Liger's norm always has an affine part; this one changes nothing
        D = x.shape[-1]
        weight = _constant(1.0, D, x.dtype, x.device)
        bias = _constant(0.0, D, x.dtype, x.device)
        return function.apply(x, weight, bias, EPS)

    return norm


def _quack_norm() -> Callable:
    norm = importlib.import_module("quack.layernorm").layernorm

    def on_rows(x: Tensor) -> Tensor:
        # quack takes [rows, D] and an fp32 weight
        weight = _constant(1.0, x.shape[-1], torch.float32, x.device)
        return norm(x.flatten(0, 1), weight, eps=EPS).view(x.shape)

    return on_rows


_LOADERS = {"apex": _apex_norm, "liger": _liger_norm, "quack": _quack_norm}
NAMES = tuple(_LOADERS)


def installed_norms() -> dict[str, Callable]:
    """``{package: layer_norm(x)}`` without affine part. The modulation after it stays PyTorch's."""
    found = {}
    for name, load in _LOADERS.items():
        try:
            found[name] = load()
        except ModuleNotFoundError:
            continue
        # a package built for another torch fails in many ways; then there is one rival less
        except Exception as error:
            reason = str(error).partition("\n")[0]
            print(f"{name} is installed but cannot be used: {reason}")
    return found
