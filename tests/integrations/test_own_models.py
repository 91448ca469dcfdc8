"""One line for models that are written as the field writes them."""

import copy
from dataclasses import replace

import pytest
import torch
from one_line import assert_as_near, assert_bitwise, check, enough, rewrites
from own_models import OWN_MODELS, build
from torch.utils._pytree import tree_map_only

from benchmarks.other_models.results import difference, distance, in_dtype, run
from sra_fast import integrations


@pytest.fixture(autouse=True)
def nothing_compiled():
    """No compiled code of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OWN_MODELS)
def test_one_line_changes_only_roundings(name):
    model, inputs = build(name)
    check(model, inputs, OWN_MODELS[name].counts, then="aot_eager")


@pytest.mark.parametrize("name", ["DiT", "LightningDiT", "video, a time per token"])
def test_kernels(name, device, monkeypatch):
    """The kernels themselves, which the interpreter runs where there is no GPU."""
    monkeypatch.setenv("SRA_FAST_BACKEND", "triton")
    model, inputs = build(name)
    inputs = tree_map_only(torch.Tensor, lambda x: x.to(device), inputs)
    check(model.to(device), inputs, OWN_MODELS[name].counts)


def test_inductor():
    model, inputs = build("DiT", depth=1)
    check(model, inputs, (1, 0, 2, 0), then="inductor")


@pytest.mark.parametrize("name", ["DiT", "LightningDiT"])
def test_bf16(name):
    model, inputs = in_dtype(*build(name), torch.bfloat16)
    original = run(model, inputs)
    truth = run(*in_dtype(model, inputs, torch.float64))
    integrations.compile(model, then="eager")
    fused = run(model, inputs)
    assert distance(fused, truth) <= 1.5 * distance(original, truth)
    assert enough(rewrites(model), OWN_MODELS[name].counts)


@pytest.mark.parametrize("name", ["DiT", "video"])
def test_autocast(name):
    model, inputs = build(name)
    truth = run(*in_dtype(model, inputs, torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        original = run(model, inputs)
        integrations.compile(model, then="eager")
        fused = run(model, inputs)
    assert distance(fused, truth) <= 1.5 * distance(original, truth)
    assert enough(rewrites(model), OWN_MODELS[name].counts)


def test_without_gradients():
    model, inputs = build("DiT")
    with torch.no_grad():
        original = model(**inputs)
        integrations.compile(model, then="aot_eager")
        fused = model(**inputs)
    assert not fused.requires_grad
    assert torch.equal(fused, original)
    assert enough(rewrites(model), OWN_MODELS["DiT"].counts)


def test_a_copy_for_the_average_is_a_model_of_its_own():
    """Training code makes its EMA with deepcopy, before or after compiling."""
    model, inputs = build("DiT")
    original = run(model, inputs)
    integrations.compile(model, then="eager")
    fused = run(model, inputs)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for p in average.parameters():
            p.zero_()
    assert_bitwise(run(model, inputs), fused)
    assert_bitwise(run(integrations.undo(model), inputs), original)
    assert not average(**inputs).any()


def test_differences_are_noticed():
    """The judge of these tests: one wrong gradient, a missing one, too little fused."""
    model, inputs = build("DiT")
    original = run(model, inputs)
    truth = run(*in_dtype(model, inputs, torch.float64))
    name = "blocks.1.adaLN_modulation.1.weight"
    wrong = {**original.gradients, name: 1.0001 * original.gradients[name]}
    wrong = replace(original, gradients=wrong)
    assert difference(original, original) == 0
    assert difference(wrong, original) == pytest.approx(1e-4, rel=0.01)
    with pytest.raises(AssertionError, match=name):
        assert_as_near(wrong, original, truth, floor=1e-6)
    with pytest.raises(AssertionError, match=name):
        assert_bitwise(wrong, original)

    not_a_number = [torch.full_like(x, torch.nan) for x in original.outputs]
    not_a_number = replace(original, outputs=not_a_number)
    assert not difference(not_a_number, original) <= 1
    assert not distance(not_a_number, truth) <= 1

    fewer = dict(original.gradients)
    del fewer[name]
    with pytest.raises(AssertionError):
        difference(replace(original, gradients=fewer), original)

    assert enough((1, 0, 6, 0), (2, 1, 5, 0))
    assert not enough((2, 1, 5, 0), (1, 0, 6, 0))
    assert not enough((0, 0, 6, 0), (1, 0, 6, 0))
    assert not enough((7, 6, 0, 0), (7, 0, 0, 6))
