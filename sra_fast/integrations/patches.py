"""The operators in the blocks of DiT, SiT, REPA and SRA, for those who do not compile.

A block is recognized by its ``forward``: the syntax tree, without comments, layout and docstring,
must be one that is known here, and so must the ``modulate`` that it calls. Everything else is
refused. The ``forward`` of each instance is replaced; classes, parameters and state dicts stay.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from functools import reduce
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import LayerNorm, Module

from sra_fast import ops


def _fields(node: object) -> Any:
    """A syntax tree as nested tuples that are the same in every version of Python."""
    if isinstance(node, list):
        return tuple(_fields(item) for item in node)
    if not isinstance(node, ast.AST):
        return node
    fields = [
        (name, _fields(held))
        for name, held in ast.iter_fields(node)
        # what only some versions have, and what is said elsewhere
        if held not in (None, []) and name not in ("ctx", "kind", "type_comment", "annotation")
    ]
    return (type(node).__name__, *fields)


def fingerprint(function: Callable[..., Any]) -> str:
    """12 hexadecimal digits of a function's syntax tree, without docstring and annotations.

    Raises:
        ValueError: its source cannot be read.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise ValueError(f"sra_fast patch: the source of {function!r} cannot be read") from error
    if not isinstance(tree, ast.FunctionDef) or hasattr(function, "__wrapped__"):
        raise ValueError(f"sra_fast patch: {function!r} is no plain function")
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    tree.returns = None
    return hashlib.sha256(repr(_fields(tree)).encode()).hexdigest()[:12]


def _promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype of a sum of products of the tensors."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _modulated(norm: Module, x: Tensor, shift: Tensor, scale: Tensor) -> torch.dtype:
    """The dtype that the norm of x has after its modulation."""
    # autocast makes norms fp32 on some devices: PyTorch itself says so, of no images
    autocast = torch.is_autocast_enabled(x.device.type)
    normed = norm(x[:0]).dtype if autocast else x.dtype
    return torch.promote_types(normed, _promoted(shift, scale))


def _check_condition(c: Tensor) -> None:
    """Raise ValueError unless c is ``[B, D]``, for which all the published forwards are one."""
    if c.dim() != 2:
        raise ValueError(f"sra_fast patch: expected a condition [B, D], got {[*c.shape]}")


def _norm(norm: Module) -> dict[str, Any]:
    """Keyword arguments of a LayerNorm."""
    given = {"eps": norm.eps, "norm_weight": norm.weight, "norm_bias": norm.bias}
    return {name: held for name, held in given.items() if held is not None}


def _block_forward(self, x: Tensor, c: Tensor) -> Tensor:
    """A block of adaLN-Zero (DiT, arXiv 2212.09748, Fig. 3)."""
    _check_condition(c)
    vectors = self.adaLN_modulation(c).chunk(6, dim=-1)
    shift, scale, gate, shift2, scale2, gate2 = vectors
    dtype = _modulated(self.norm1, x, shift, scale)
    y = self.attn(ops.adaln(x, shift, scale, dtype=dtype, **_norm(self.norm1)))
    x = x.to(_promoted(x, gate, y))
    dtype = _modulated(self.norm2, x, shift2, scale2)
    norm2 = _norm(self.norm2)
    x, h = ops.gated_residual_adaln(x, y, gate, shift2, scale2, dtype=dtype, **norm2)
    y = self.mlp(h)
    return ops.gated_residual(x.to(_promoted(x, gate2, y)), y, gate2)


def _final_forward(self, x: Tensor, c: Tensor) -> Tensor:
    """The layer after the blocks: modulated norm and projection."""
    _check_condition(c)
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
    dtype = _modulated(self.norm_final, x, shift, scale)
    return self.linear(ops.adaln(x, shift, scale, dtype=dtype, **_norm(self.norm_final)))


# a model is pickled with the names of its methods: one that is loaded finds its class's own forward
_block_forward.__name__ = "forward"
_final_forward.__name__ = "forward"


# forward -> (its replacement, the norms that it uses). DiT, SiT and SRA's DiT split the modulation
# along dimension 1, REPA and SRA's SiT along the last; c is [B, D], so these are one.
KNOWN: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "24111cc667f3": (_block_forward, ("norm1", "norm2")),
    "b7d60b36649b": (_block_forward, ("norm1", "norm2")),
    "a6504295ab65": (_final_forward, ("norm_final",)),
    "c404d3daba41": (_final_forward, ("norm_final",)),
}
# modulate(x, shift, scale) of all of them: x (1 + scale) + shift, with vectors [B, D]
MODULATE = {"918820587c7a"}


class Patch:
    """What :func:`patch` did; ``undo()``, or the end of a ``with`` block, takes it back.

    Attributes:
        modules: the modules whose ``forward`` was replaced.
    """

    def __init__(self, modules: list[Module]):
        self.modules = modules

    def undo(self) -> None:
        """Give the modules their own ``forward`` back; a second call does nothing."""
        for module in self.modules:
            module.__dict__.pop("forward", None)
        self.modules = []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def patch(model: Module) -> Patch:
    """Let the blocks of a DiT, SiT, REPA or SRA model run the operators, without a compiler.

    Within a block the gated residual of the attention and the norm after it become one call; across
    blocks only ``compile`` fuses.

    Args:
        model: a model whose blocks and final layer have the published ``forward``.

    Returns:
        A :class:`Patch` with ``undo()``.

    Raises:
        ValueError: no module has a ``forward`` that is known, one that looks like a block has
            another, or a ``forward`` was replaced already.
    """
    if not isinstance(model, Module):
        raise ValueError(f"sra_fast patch: expected a torch.nn.Module, got {type(model).__name__}")
    found: list[tuple[Module, Callable[..., Tensor]]] = []
    for name, module in model.named_modules():
        if not hasattr(module, "adaLN_modulation"):
            continue
        replacement = _replacement(name or type(module).__name__, module)
        found.append((module, replacement))
    if not found:
        raise ValueError(
            "sra_fast patch: expected blocks of DiT, SiT, REPA or SRA (with an adaLN_modulation), "
            f"got {type(model).__name__} without one; sra_fast.integrations.compile takes any model"
        )
    for module, replacement in found:
        module.forward = MethodType(replacement, module)
    return Patch([module for module, _ in found])


def _replacement(name: str, module: Module) -> Callable[..., Tensor]:
    """The function that takes the place of a module's ``forward``.

    Raises:
        ValueError: it is not known.
    """
    if "forward" in module.__dict__:
        raise ValueError(f"sra_fast patch: the forward of {name} was replaced already")
    forward = type(module).forward
    digits = fingerprint(forward)
    if digits not in KNOWN:
        raise ValueError(
            f"sra_fast patch: expected a forward of DiT, SiT, REPA or SRA, got that of {name} "
            f"({type(module).__name__}, fingerprint {digits}); sra_fast.integrations.compile takes "
            "any model"
        )
    replacement, norms = KNOWN[digits]
    modulate = getattr(forward, "__globals__", {}).get("modulate")
    if not callable(modulate) or fingerprint(modulate) not in MODULATE:
        raise ValueError(f"sra_fast patch: {name} calls a modulate() that is not the published one")
    for norm in norms:
        _check_norm(f"{name}.{norm}", getattr(module, norm, None))
    return replacement


def _check_norm(name: str, norm: object) -> None:
    """Raise ValueError unless an operator may take the place of a norm, whose call is left out."""
    if type(norm) is not LayerNorm:
        kind = type(norm).__name__
        raise ValueError(f"sra_fast patch: expected a LayerNorm as {name}, got {kind}")
    if len(norm.normalized_shape) != 1:
        shape = norm.normalized_shape
        raise ValueError(f"sra_fast patch: expected {name} over the width, got {shape}")
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks)
    if any(hooks) or norm._backward_pre_hooks or "forward" in norm.__dict__:
        raise ValueError(
            f"sra_fast patch: {name} has hooks or another forward, which would not run"
        )
