"""The optimizer state of a published checkpoint, whose entries are numbers, by parameter name."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sra_fast.checkpoint.shards import MOMENTS
from sra_fast.checkpoint.values import is_dense
from sra_fast.utils.checks import require_that


def match_optimizer(opt: Mapping | None, shapes: Mapping[str, torch.Size]) -> dict[str, dict]:
    """The state of AdamW of every parameter.

    PyTorch numbers the parameters in the order in which they were handed to the optimizer. The
    published code hands over all of its model's, the position embedding first, which has no state.
    Names are used where the file has them (``param_names``).

    Args:
        opt: ``state_dict()`` of the optimizer; None: there was none.
        shapes: shape of every trained parameter, in the model's order.

    Returns:
        name -> ``{"exp_avg", "exp_avg_sq": fp32 of the parameter's shape, "step": float}``; empty
        if the optimizer has no state, because it has taken no step.

    Raises:
        ValueError: a state that is missing, or does not fit its parameter. It says which.
    """
    if opt is None:
        return {}
    kind = type(opt).__name__
    require_that(isinstance(opt, Mapping), f"expected the optimizer's state_dict(), got a {kind}")
    states = opt.get("state") or {}
    kind = type(states).__name__
    require_that(
        isinstance(states, Mapping), f"the optimizer state should be by number, got {kind}"
    )
    if not states:
        return {}
    names = _names_by_number(opt, list(shapes))
    unknown = sorted(set(states) - set(names), key=str)
    if unknown:
        raise ValueError(
            f"the optimizer state number {unknown[0]} belongs to no parameter of the model"
        )
    states = {names[number]: state for number, state in states.items()}
    matched = {}
    for name, shape in shapes.items():
        if name not in states:
            raise ValueError(f"the optimizer state has nothing of {name}")
        matched[name] = _checked(states[name], name, shape)
    steps = {state["step"] for state in matched.values()}
    if len(steps) > 1:
        # one count for all: each parameter has taken every step
        raise ValueError(f"the optimizer states have taken different numbers of steps: {steps}")
    return matched


def _names_by_number(opt: Mapping, expected: list[str]) -> dict:
    """Number in the optimizer -> name of the parameter."""
    groups = opt.get("param_groups") or []
    require_that(
        all(isinstance(group, Mapping) and "params" in group for group in groups),
        "the optimizer's param_groups should have params, the numbers of their parameters",
    )
    numbers = [number for group in groups for number in group["params"]]
    if groups and all("param_names" in group for group in groups):
        return dict(
            zip(numbers, (name for group in groups for name in group["param_names"]), strict=True)
        )
    # groups of their own, for example without weight decay, change the order
    if len(groups) == 1 and len(numbers) == len(expected) + 1:
        return dict(zip(numbers, ["pos_embed", *expected], strict=True))
    if len(groups) == 1 and len(numbers) == len(expected):
        return dict(zip(numbers, expected, strict=True))
    raise ValueError(
        "the optimizer state lists its parameters in another way: expected one group of "
        f"{len(expected)} parameters, with or without the position embedding before them, "
        f"or their names, got {len(groups)} groups of {len(numbers)}"
    )


def _checked(state: Mapping, name: str, shape: torch.Size) -> dict:
    """A parameter's state, if it is AdamW's and has its shape."""
    found = state if isinstance(state, Mapping) else {}
    missing = [key for key in (*MOMENTS, "step") if key not in found]
    if missing:
        raise ValueError(f"expected AdamW's state of {name}, it has no {missing[0]}")
    for key in MOMENTS:
        value = state[key]
        if not isinstance(value, Tensor) or value.shape != shape:
            found = [*value.shape] if isinstance(value, Tensor) else value
            raise ValueError(
                f"the optimizer state {key} of {name} should be {[*shape]}, it is {found}"
            )
        if not is_dense(value):
            raise ValueError(f"the optimizer state {key} of {name} is sparse or has no values")
        if not value.isfinite().all():
            raise ValueError(f"the optimizer state {key} of {name} has NaN or infinity")
    moments = {key: state[key].float() for key in MOMENTS}
    step = state["step"]
    is_number = isinstance(step, int | float) or (isinstance(step, Tensor) and step.numel() == 1)
    require_that(is_number, f"the optimizer state step of {name} should be a number, it is {step}")
    return {**moments, "step": float(step)}


def numbered(states: Mapping[str, Mapping], group: Mapping) -> dict:
    """The inverse of ``match_optimizer``: the state dict of the published code's optimizer.

    Args:
        states: name -> state, in the model's order.
        group: settings of its parameter group.
    """
    # number 0 is the position embedding, which has no state
    state = {}
    for number, held in enumerate(states.values(), start=1):
        step = torch.as_tensor(held["step"], dtype=torch.float32).detach().cpu().clone()
        state[number] = {**{key: held[key] for key in MOMENTS}, "step": step}
    return {"state": state, "param_groups": [{**group, "params": [*range(len(states) + 1)]}]}
