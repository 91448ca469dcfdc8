"""The operators in known blocks without a compiler.

The published blocks are no part of this repository. These tests teach ``patch`` a block of their
own, and check what it refuses.
"""

import copy
import functools
import pickle

import programs
import pytest
import torch
from programs import D
from torch import nn

from sra_fast import integrations
from sra_fast.integrations import patches


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    def __init__(self, affine=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(D, elementwise_affine=affine, eps=1e-6)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=affine, eps=1e-5)
        self.attn = nn.Linear(D, D)
        self.mlp = nn.Linear(D, D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c):
        """What a block of adaLN-Zero computes."""
        parts = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + parts[2][:, None] * self.attn(modulate(self.norm1(x), parts[0], parts[1]))
        return x + parts[5][:, None] * self.mlp(modulate(self.norm2(x), parts[3], parts[4]))


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(D, 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class Model(nn.Module):
    def __init__(self, affine=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(affine) for _ in range(2))
        self.final_layer = Last()

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


@pytest.fixture
def known(monkeypatch):
    """``patch`` knows these blocks."""
    digits = patches.fingerprint(Block.forward)
    last = patches.fingerprint(Last.forward)
    table = {
        digits: (patches._block_forward, ("norm1", "norm2")),
        last: (patches._final_forward, ("norm_final",)),
    }
    monkeypatch.setattr(patches, "KNOWN", table)
    monkeypatch.setattr(patches, "MODULATE", {patches.fingerprint(modulate)})


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_same_results(known, monkeypatch, device, backend, affine):
    monkeypatch.setenv("SRA_FAST_BACKEND", backend)
    model = Model(affine).to(device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, c = programs.inputs(device=device)
    before = programs.run(model, x, c)
    names = list(model.state_dict())
    handle = integrations.patch(model)
    assert len(handle.modules) == 3 and list(model.state_dict()) == names
    average = copy.deepcopy(model)
    for patched in (model, average):
        after = programs.run(patched, x, c)
        for mine, theirs in zip(after, before, strict=True):
            torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=1e-5)
    # the copy computes with its own weights
    with torch.no_grad():
        average.blocks[0].attn.weight.zero_()
    assert not torch.allclose(average(x, c), model(x, c))
    handle.undo()
    for mine, theirs in zip(programs.run(model, x, c), before, strict=True):
        assert torch.equal(mine, theirs)


def test_the_operators_run(known, monkeypatch):
    called = []
    for name in ("adaln", "gated_residual", "gated_residual_adaln"):
        original = getattr(patches.ops, name)
        monkeypatch.setattr(
            patches.ops,
            name,
            lambda *a, _name=name, _original=original, **k: (
                called.append(_name) or _original(*a, **k)
            ),
        )
    model = Model()
    with integrations.patch(model):
        model(*programs.inputs())
    block = ["adaln", "gated_residual_adaln", "gated_residual"]
    assert called == [*block, *block, "adaln"]
    model(*programs.inputs())
    assert len(called) == 7


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_dtypes_under_autocast(known, weights):
    """Every sum has the dtype that PyTorch would have given it."""
    model = Model().to(weights)
    x, c = programs.inputs(weights)
    seen = []
    record = lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype))
    for block in model.blocks:
        for module in (block, block.attn, block.mlp):
            module.register_forward_hook(record)
    for autocast in (False, True):
        runs = []
        for patched in (False, True):
            seen.clear()
            handle = integrations.patch(model) if patched else None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                model(x, c)
            runs.append(list(seen))
            if handle is not None:
                handle.undo()
        assert runs[0] == runs[1]


def test_the_fingerprint_is_of_the_code_and_not_of_its_looks():
    class Plain:
        def forward(self, x):
            """Doc."""
            return x + 1

    class Typed:
        def forward(self, x: int) -> int:
            # laid out in another way
            return (x + 1)  # fmt: skip

    class Other:
        def forward(self, x):
            return x + 2

    assert patches.fingerprint(Plain.forward) == patches.fingerprint(Typed.forward)
    assert patches.fingerprint(Plain.forward) != patches.fingerprint(Other.forward)


class Decorated(Block):
    pass


def double(forward):
    @functools.wraps(forward)
    def doubled(self, x, c):
        return 2 * forward(self, x, c)

    return doubled


Decorated.forward = double(Block.forward)


class Changed(Block):
    def forward(self, x, c):
        return super().forward(x, c) * 2


def test_a_condition_per_token_is_refused(known):
    model = Model()
    with integrations.patch(model), pytest.raises(ValueError, match=r"\[B, D\], got \[2, 6, 16\]"):
        model(torch.randn(2, 6, D), torch.randn(2, 6, D))


def test_refused(known, monkeypatch):
    """Nothing is patched unless everything is known."""

    def message(model):
        with pytest.raises(ValueError) as error:
            integrations.patch(model)
        assert all("forward" not in module.__dict__ for module in Model().modules())
        return str(error.value)

    assert "got int" in message(3)
    assert "is no plain function" in message(Decorated())
    assert "got Linear without one" in message(nn.Linear(2, 2))
    mixed = nn.ModuleList([Block(), Changed()])
    assert "got that of 1 (Changed, fingerprint" in message(mixed)
    assert "forward" not in mixed[0].__dict__
    rms = Block()
    rms.norm2 = nn.RMSNorm(D)
    assert "expected a LayerNorm as Block.norm2, got RMSNorm" in message(rms)
    both = Block()
    both.norm1 = nn.LayerNorm((programs.T, D), elementwise_affine=False)
    assert "expected Block.norm1 over the width, got (6, 16)" in message(both)
    hooked = Block()
    hooked.norm1.register_forward_hook(lambda *arguments: None)
    assert "Block.norm1 has hooks" in message(hooked)
    replaced = Block()
    replaced.norm2.forward = lambda x: x
    assert "Block.norm2 has hooks or another forward" in message(replaced)
    twice = Block()
    integrations.patch(twice)
    assert "replaced already" in message(twice)
    monkeypatch.setattr(patches, "MODULATE", {"0"})
    assert "not the published one" in message(Block())


def test_a_patched_model_can_be_pickled(known):
    """What is loaded has the forwards of its own classes."""
    model = Model()
    x, c = programs.inputs()
    expected = model(x, c)
    integrations.patch(model)
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(x, c), expected)
    assert loaded.blocks[0].forward.__func__ is Block.forward
