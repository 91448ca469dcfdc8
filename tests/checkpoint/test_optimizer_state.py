"""Optimizer states go to their own parameters, or are refused by name."""

import pytest
import torch
from foreign import network

from sra_fast.checkpoint.optimizer_state import match_optimizer, numbered
from sra_fast.checkpoint.shards import MOMENTS


def adamw(model, parameters) -> dict:
    """AdamW's state after a step whose gradients tell the parameters apart."""
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 1.0 + i)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    return optimizer.state_dict()


def position(model) -> torch.nn.Parameter:
    return torch.nn.Parameter(model.pos_embed, requires_grad=False)


@pytest.fixture
def model():
    return network(depth=2)


def shapes_of(model) -> dict:
    return {name: p.shape for name, p in model.named_parameters()}


def expected(model) -> dict:
    return {name: 0.1 * (1 + i) for i, (name, _) in enumerate(model.named_parameters())}


def assert_own(matched, model):
    assert list(matched) == list(shapes_of(model))
    for name, value in expected(model).items():
        assert torch.allclose(matched[name]["exp_avg"], torch.tensor(value)), name
        assert matched[name]["step"] == 1


def test_with_and_without_the_position_embedding(model):
    for first in ([position(model)], []):
        opt = adamw(model, [*first, *model.parameters()])
        assert_own(match_optimizer(opt, shapes_of(model)), model)


def test_another_order_is_matched_by_name_if_there_are_names(model):
    named = list(model.named_parameters())[::-1]
    opt = adamw(model, named)
    assert_own(match_optimizer(opt, shapes_of(model)), model)
    decayed = [(name, p) for name, p in named if p.dim() > 1]
    rest = [(name, p) for name, p in named if p.dim() == 1]
    opt = adamw(model, [{"params": decayed}, {"params": rest, "weight_decay": 0.0}])
    assert_own(match_optimizer(opt, shapes_of(model)), model)


def test_the_inverse_is_the_published_optimizer(model):
    opt = adamw(model, [position(model), *model.parameters()])
    matched = match_optimizer(opt, shapes_of(model))
    again = numbered(matched, {"lr": 1.0})
    assert again["param_groups"] == [{"lr": 1.0, "params": opt["param_groups"][0]["params"]}]
    for number, state in opt["state"].items():
        assert all(
            torch.equal(again["state"][number][key], state[key]) for key in (*MOMENTS, "step")
        )


def test_no_step_is_no_state(model):
    for opt in (None, {}, {"state": {}}, torch.optim.AdamW(model.parameters()).state_dict()):
        assert match_optimizer(opt, shapes_of(model)) == {}


def change(opt, number, **values):
    return {**opt, "state": {**opt["state"], number: {**opt["state"][number], **values}}}


def test_what_does_not_fit_is_refused_by_name(model):
    shapes = shapes_of(model)
    opt = adamw(model, list(model.parameters()))
    states = opt["state"]
    reversed_opt = adamw(model, list(model.parameters())[::-1])
    two_groups = adamw(model, [{"params": [p]} for p in list(model.parameters())[:2]])
    less = {**opt, "state": {i: s for i, s in states.items() if i != 3}}
    third = list(shapes)[3]
    bad = torch.full_like(states[0]["exp_avg"], float("nan"))
    for wrong, message in (
        (
            reversed_opt,
            r"exp_avg of x_embedder.proj.weight should be \[32, 1, 2, 2\], it is \[64\]",
        ),
        (two_groups, "expected one group of .* parameters.*got 2 groups of 2"),
        (adamw(model, list(model.parameters())[1:]), "expected one group of"),
        (less, f"the optimizer state has nothing of {third}"),
        ({**opt, "state": {**states, 99: states[0]}}, "number 99 belongs to no parameter"),
        (change(opt, 0, exp_avg=bad), "exp_avg of x_embedder.proj.weight has NaN or infinity"),
        (change(opt, 1, step=torch.tensor(9.0)), "have taken different numbers of steps"),
        (
            {**opt, "state": {**states, 2: {"momentum_buffer": 1}}},
            "expected AdamW's state of .* no exp",
        ),
        ([], r"expected the optimizer's state_dict\(\), got a list"),
        ({**opt, "state": [1]}, "the optimizer state should be by number, got list"),
        ({**opt, "param_groups": [{"lr": 1.0}]}, "param_groups should have params"),
        ({**opt, "param_groups": None}, "expected one group of"),
        ({**opt, "state": {**states, 2: None}}, "expected AdamW's state of .* no exp_avg"),
        (change(opt, 0, exp_avg=bad.to_sparse()), "exp_avg of x_embedder.* is sparse or has no"),
        (change(opt, 0, exp_avg=bad.to("meta")), "exp_avg of x_embedder.* is sparse or has no"),
        (
            change(opt, 0, step="one"),
            "step of x_embedder.proj.weight should be a number, it is one",
        ),
        (change(opt, 0, exp_avg_sq=None), "exp_avg_sq of x_embedder.proj.weight should be"),
    ):
        with pytest.raises(ValueError, match=message):
            match_optimizer(wrong, shapes)
