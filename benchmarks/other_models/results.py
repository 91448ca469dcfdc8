"""What one pass through a model gives, and how far apart two of them are."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Results:
    """What one pass through a model gives.

    Attributes:
        outputs: all tensors that ``forward`` returns.
        gradients: of inputs and parameters, by name, with those that there are.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        outputs = {f"output {i}": output for i, output in enumerate(self.outputs)}
        return {**outputs, **self.gradients}

    def scales(self) -> dict[str, float]:
        """The size of every result.

        A gradient that is zero in mathematics, such as that of the bias of keys, is only noise. So
        no gradient counts as smaller than a hundredth of the model's largest.
        """
        largest = max(gradient.abs().max().item() for gradient in self.gradients.values())
        sizes = {name: result.abs().max().item() for name, result in self.named().items()}
        least = {name: 0.01 * largest for name in self.gradients}
        # nothing but zeros differs by what it differs
        return {name: max(size, least.get(name, 0.0)) or 1.0 for name, size in sizes.items()}


def forward(
    model: nn.Module, inputs: dict, autocast: torch.dtype | None = None
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """A forward pass.

    Every floating-point input that is a tensor by itself and no mask needs a gradient.

    Args:
        model: to run.
        inputs: arguments of its ``forward``.
        autocast: dtype of ``torch.autocast``, or None without it.

    Returns:
        What needs a gradient, inputs and parameters by name, and all floating-point tensors of the
        output.
    """
    inputs = dict(inputs)
    leaves = {}
    for name, value in inputs.items():
        is_mask = name.endswith("mask")
        if isinstance(value, Tensor) and value.is_floating_point() and not is_mask:
            leaves[name] = inputs[name] = value.detach().requires_grad_()
    leaves.update((name, p) for name, p in model.named_parameters() if p.requires_grad)
    device = next(iter(leaves.values())).device.type
    with torch.autocast(device, autocast, enabled=autocast is not None):
        returned = model(**inputs)
    outputs = [x for x in tree_leaves(returned) if isinstance(x, Tensor)]
    # labels may be among the outputs
    return leaves, [x for x in outputs if x.is_floating_point()]


def backward(leaves: dict[str, Tensor], outputs: list[Tensor]) -> dict[str, Tensor]:
    """Gradients by name, from random gradients of the outputs, the same for every model."""
    generator = torch.Generator(outputs[0].device).manual_seed(2)
    draw = lambda x: torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
    outputs = [x for x in outputs if x.requires_grad]
    douts = [draw(x) for x in outputs]
    gradients = torch.autograd.grad(outputs, [*leaves.values()], douts, allow_unused=True)
    found = zip(leaves, gradients, strict=True)
    return {name: gradient for name, gradient in found if gradient is not None}


def run(model: nn.Module, inputs: dict, autocast: torch.dtype | None = None) -> Results:
    """Forward and backward pass; the arguments are those of ``forward``."""
    leaves, outputs = forward(model, inputs, autocast)
    gradients = backward(leaves, outputs)
    return Results([x.detach() for x in outputs], gradients)


def in_dtype(model: nn.Module, inputs: dict, dtype: torch.dtype) -> tuple[nn.Module, dict]:
    """A copy of the model and its inputs in another floating-point dtype."""
    cast = lambda x: x.to(dtype) if x.is_floating_point() else x
    # diffusers' own ``to`` warns of parts that it would rather keep in fp32
    return nn.Module.to(copy.deepcopy(model), dtype), tree_map_only(Tensor, cast, inputs)


def difference(actual: Results, expected: Results) -> float:
    """The largest difference of a result, relative to the result's size."""
    theirs = expected.named()
    ours = actual.named()
    assert ours.keys() == theirs.keys()
    scales = expected.scales()
    largest = [(ours[name] - theirs[name]).abs().max().double() / scales[name] for name in ours]
    # of tensors, because Python's max may lose a NaN
    return torch.stack(largest).max().item()


def distance(actual: Results, truth: Results) -> float:
    """Root mean square of all results' root mean square errors, relative to the results' sizes.

    In half precision the largest error of one result is a matter of luck.
    """
    truths = truth.named()
    scales = truth.scales()
    squares = [
        (result.double() - truths[name]).square().mean() / scales[name] ** 2
        for name, result in actual.named().items()
    ]
    return torch.stack(squares).mean().sqrt().item()
