"""The teacher's copies of the EMA in e4m3: their scales lag by one step, and a run can be
resumed.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sra_fast import ops
from sra_fast.zero.master_weights import Group
from sra_fast.zero.teacher_weights import Fp8TeacherGroup

NAMES = ("a", "b")
SIZES = ((32, 16), (16, 48))


def replica(device="cpu", owners=1):
    """Two layers on one process.

    The masters are in one flat tensor with 8 elements of padding, or in one tensor per layer.
    """
    torch.manual_seed(0)
    layers = {
        name: nn.Linear(k, n).requires_grad_(False).to(device)
        for name, (n, k) in zip(NAMES, SIZES, strict=True)
    }
    flats = [layer.weight.detach().clone().view(-1) for layer in layers.values()]
    offsets = dict(zip(NAMES, (0, 512 + 8 * (owners == 1)), strict=True))
    if owners == 1:
        flats = [torch.cat([flats[0], torch.zeros(8, device=device), flats[1]])]
    masters = SimpleNamespace(flats=flats, owners=flats, rank=0, world=1, replicated=owners == 2)
    made = Fp8TeacherGroup(masters, Group(offsets, sum(map(len, flats)), range(owners)), layers)
    made.bind({name: layer.weight for name, layer in layers.items()})
    return made, layers, flats


def gather(made):
    assert made.gather() == []
    made.gathered()


def step(made, flats, ema):
    """An optimizer step that leaves ``ema``, and its copy, as ``AdamWEMA`` makes it."""
    for flat, new in zip(flats, ema, strict=True):
        zeros = [torch.zeros_like(flat) for _ in range(3)]
        ops.adamw_ema_(
            new.clone(), *zeros, 1, lr=0.0, ema=flat, ema_copy=made.copies[flat], decay=0.0
        )
        assert torch.equal(flat, new)


def error(layer, expected):
    """Largest error in units of e4m3's rounding: rounding to the nearest gives at most 1."""
    value = layer.weight.float() * layer.weight_scale
    expected = expected.view(layer.weight.shape)
    rounding = 2**-4 * expected.abs() + 2**-10 * layer.weight_scale
    return ((value - expected).abs() / rounding).max().item()


def parts(flats):
    whole = torch.cat(flats)
    return whole[:512], whole[-768:]


@pytest.mark.parametrize("owners", [1, 2])
def test_layers_read_what_the_optimizer_writes(owners, device):
    made, layers, flats = replica(device, owners)
    made.store(flats)
    gather(made)
    for factor in (1.0, 1.5, 0.01, 3.0):
        step(made, flats, [factor * flat for flat in flats])
        gather(made)
        for layer, expected in zip(layers.values(), parts(flats), strict=True):
            assert layer.weight.dtype == torch.float8_e4m3fn and error(layer, expected) <= 1
            assert len(layer.weight_scale.unique()) == 1


def test_segments_of_every_rank():
    """Layers of 512 and 768 elements, 8 between them, 32 after them, in three parts."""
    layers = {name: nn.Linear(k, n) for name, (n, k) in zip(NAMES, SIZES, strict=True)}
    found = []
    for rank in range(3):
        flat = torch.zeros(440)
        masters = SimpleNamespace(flats=[flat], owners=[flat], rank=rank, world=3, replicated=False)
        made = Fp8TeacherGroup(masters, Group({"a": 0, "b": 520}, 440, range(1)), layers)
        found.append(made.copies[flat].ends.tolist())
    assert found == [[440, 440], [80, 440], [0, 440]] and len(made.buffer) == 1320


def test_a_jump_saturates_once(device):
    made, layers, flats = replica(device)
    made.store(flats)
    gather(made)
    # the second layer only
    flats[0][520:] *= 20
    for saturated in (True, False):
        step(made, flats, flats)
        gather(made)
        errors = [
            error(layer, expected)
            for layer, expected in zip(layers.values(), parts(flats), strict=True)
        ]
        assert errors[0] <= 1 and (errors[1] > 2) == saturated
        assert (layers["b"].weight.float().abs() == 448).any() == saturated


def test_a_resumed_run_makes_the_same_copies(device):
    """The scales in use are older than the EMA they scale; a step without a gather follows."""
    made, layers, flats = replica(device)
    made.store(flats)
    gather(made)
    step(made, flats, [3 * flat for flat in flats])
    gather(made)
    state = made.in_use.tolist()
    saved = [flat.clone() for flat in flats]

    again, same_layers, others = replica(device)
    for flat, value in zip(others, saved, strict=True):
        flat.copy_(value)
    again.store(others, torch.tensor(state))
    gather(again)
    assert_equal(layers, same_layers)
    for factor, gathered in ((0.3, False), (0.2, True), (0.9, True)):
        for one, theirs in ((made, flats), (again, others)):
            step(one, theirs, [factor * flat for flat in theirs])
            gather(one) if gathered else one.skip()
        if gathered:
            assert_equal(layers, same_layers)


def test_scales_follow_steps_without_a_gather(device):
    """A teacher that has paused finds its range right."""
    made, layers, flats = replica(device)
    made.store(flats)
    gather(made)
    for _ in range(5):
        step(made, flats, [3 * flat for flat in flats])
        made.skip()
    step(made, flats, flats)
    gather(made)
    for layer, expected in zip(layers.values(), parts(flats), strict=True):
        assert error(layer, expected) <= 1


@pytest.mark.parametrize("paused", [False, True])
def test_scales_of_an_update_that_was_not_taken(paused, device):
    """Values and scales stay those of the pass before, also of one that no gather has followed."""
    taken = torch.tensor(True, device=device)
    made, layers, flats = replica(device)
    made.store(flats)
    gather(made)
    for factor in (3.0, 3.0):
        step(made, flats, [factor * flat for flat in flats])
        made.skip(taken) if paused else gather(made)
    before = [x.clone() for x in (made.buffer.view(torch.uint8), made.multiplier, made.held)]
    for _ in range(2):
        # the kernel has written and measured nothing
        made.gather(~taken)
        made.gathered()
    after = [made.buffer.view(torch.uint8), made.multiplier, made.held]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.equal(made.in_use, made.held) and not torch.equal(made.held, made.multiplier)
    for layer, expected in zip(layers.values(), parts(flats), strict=True):
        assert error(layer, expected) <= 1
    # as if it had not been
    step(made, flats, [1.5 * flat for flat in flats])
    made.gather(taken)
    made.gathered()
    for layer, expected in zip(layers.values(), parts(flats), strict=True):
        assert error(layer, expected) <= 1


def assert_equal(layers, others):
    for one, other in zip(layers.values(), others.values(), strict=True):
        assert torch.equal(one.weight.float(), other.weight.float())
        assert torch.equal(one.weight_scale, other.weight_scale)
