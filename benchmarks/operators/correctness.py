"""Whether a variant of an operator computes the right results: checked before its speed is printed."""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.operators.entry import Operator
from benchmarks.operators.shapes import Shape
from benchmarks.timing import make_randn


def as_tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def as_leaves(operator: Operator, inputs: tuple) -> tuple:
    """The inputs detached, with ``requires_grad`` where the operator has a gradient. Strides stay."""
    leaves = list(inputs)
    for i in operator.grads:
        leaves[i] = inputs[i].detach().requires_grad_()
    return tuple(leaves)


def output_gradients(out: tuple, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Random gradients of the outputs, the same for every variant and every output dtype."""
    randn = make_randn(1, device)
    return [randn(o.shape, dtype=dtype).to(o.dtype) for o in out]


def all_results(
    operator: Operator, function: Callable, inputs: tuple, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Everything that a call computes: outputs and gradients, or the inputs that it changed."""
    if operator.written:
        function(*inputs)
        return tree_leaves([inputs[i] for i in operator.written])
    inputs = as_leaves(operator, inputs)
    out = as_tuple(function(*inputs))
    grads = ()
    if operator.grads:
        # all gradients in one backward pass, as in training
        wanted = [inputs[i] for i in operator.grads]
        grads = torch.autograd.grad(out, wanted, output_gradients(out, dtype, device))
    return [*(o.detach() for o in out), *grads]


@contextlib.contextmanager
def nan_poisoned() -> Iterator[None]:
    """Meanwhile ``new_empty`` returns NaN, so memory that a kernel leaves unwritten is found."""
    original = torch.Tensor.new_empty

    def new_empty(self, *shape, **kw):
        t = original(self, *shape, **kw)
        # a traced fill would become part of the compiled code
        if t.is_floating_point() and not torch.compiler.is_compiling():
            t.fill_(float("nan"))
        return t

    torch.Tensor.new_empty = new_empty
    try:
        yield
    finally:
        torch.Tensor.new_empty = original


def _errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """The largest error and the root mean square error."""
    # in fp32: a bf16 difference would be rounded itself
    difference = actual.float() - truth.float()
    rms = difference.norm() / math.sqrt(difference.numel())
    return difference.abs().max().item(), rms.item()


class Oracle:
    """The true results of an operator for one shape and dtype, and how far plain PyTorch is from them.

    Args:
        operator: from the registry.
        shape: of the inputs.
        dtype: the working dtype of the variants. The truth is the definition on fp32 inputs.
        device: "cuda" or "cpu".
    """

    def __init__(self, operator: Operator, shape: Shape, dtype: torch.dtype, device: str):
        self.operator = operator
        self.shape = shape
        self.dtype = dtype
        self.device = device
        inputs = self.inputs()
        # operators in place have fixed dtypes of their own
        if not operator.written:
            inputs = tree_map_only(Tensor, lambda x: x.float(), inputs)
        self.truth = all_results(operator, operator.reference, inputs, dtype, device)
        # the error that rounding to the working dtype makes anyway
        plain = all_results(operator, operator.eager, self.inputs(), dtype, device)
        self.sizes = [_errors(t, torch.zeros_like(t)) for t in self.truth]
        self.plain_errors = [_errors(a, t) for a, t in zip(plain, self.truth, strict=True)]

    def inputs(self, seed: int = 0) -> tuple:
        return self.operator.make(self.shape, self.dtype, make_randn(seed, self.device))

    def complaint(self, function: Callable) -> str | None:
        """What is wrong with a variant, or None.

        Largest and root mean square error of every result may be twice those of plain PyTorch, plus one
        unit in the last place of the truth's largest (root mean square) value. In fp32 the slack is 5e-5 of it
        where there are sums, whose order is free, and 4e-6 elsewhere.
        """
        with nan_poisoned():
            actual = all_results(self.operator, function, self.inputs(), self.dtype, self.device)
        if len(actual) != len(self.truth):
            return f"expected {len(self.truth)} results, got {len(actual)}"
        least_slack = 5e-5 if self.operator.grads else 4e-6
        # outputs come first, then gradients
        for i, result in enumerate(actual):
            truth = self.truth[i]
            if result.shape != truth.shape:
                return f"result {i}: expected shape {[*truth.shape]}, got {[*result.shape]}"
            slack = max(torch.finfo(result.dtype).eps, least_slack)
            errors = _errors(result, truth)
            for error, size, plain in zip(errors, self.sizes[i], self.plain_errors[i], strict=True):
                # written so that NaN is an error as well
                if not error <= 2 * plain + slack * size:
                    return (
                        f"result {i} is off by {error:.2e}, plain PyTorch by {plain:.2e} "
                        f"(size {size:.2e})"
                    )
        return None
