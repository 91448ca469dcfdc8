"""``table + embedding`` per token: which sums the backend takes apart, and which it must not."""

import logging

import one_line
import programs
import pytest
import torch
import torch.nn.functional as F
from own_models import build
from programs import B, D, Program, T, check
from torch import nn
from torch.utils.checkpoint import checkpoint

from sra_fast import integrations, ops

FUSED = "gated_residual_adaln"
bf16 = torch.bfloat16


@pytest.fixture
def graph(monkeypatch):
    """The last graph that was handed to the backend "eager"."""
    held = {}

    def keep(graph_module, inputs):
        held["graph"] = graph_module
        return graph_module.forward

    original = torch._dynamo.lookup_backend
    monkeypatch.setattr(
        torch._dynamo, "lookup_backend", lambda name: keep if name == "eager" else original(name)
    )
    return held


NAMES = {
    ops.adaln: ("x", "shift", "scale"),
    ops.gated_residual: ("x", "y", "gate"),
    ops.gated_residual_adaln: ("x", "y", "gate", "shift", "scale"),
    ops.gated_residual_norm: ("x", "y", "gate"),
}


def calls(graph):
    """The operators' calls in a graph."""
    return [node for node in graph["graph"].graph.nodes if node.target in NAMES]


def pairs(graph):
    """The names of the vectors that are pairs, over all calls of the operators."""
    found = []
    for call in calls(graph):
        given = dict(zip(NAMES[call.target], call.args, strict=False)) | call.kwargs
        found += [name for name, vector in given.items() if isinstance(vector, tuple)]
    return sorted(found)


def additions(graph):
    """The sums that are left in a graph."""
    adds = (torch.add, torch.Tensor.add)
    return [
        node
        for node in graph["graph"].graph.nodes
        if node.target in adds or getattr(node.target, "__name__", "") == "add"
    ]


def table(m, rows=3):
    """A table ``[rows, D]`` made of the module's parameters."""
    return m.second.weight[:rows]


def embedding(m, x, c, rows=3):
    """``[B, T, rows, D]``, different for every token."""
    return (m.second(x.detach())[:, :, None] * m.condition(c).view(B, 1, 9, D)[:, :, :rows]).tanh()


def block(m, x, gate, shift, scale):
    """A residual with its norm."""
    x = x + gate * m.first(x)
    return x, m.first(F.layer_norm(x, (D,)) * (1 + scale) + shift)


def chunked(m, x, c):
    """As Wan 2.2."""
    e = (table(m).unsqueeze(0).unsqueeze(0) + embedding(m, x, c).float()).chunk(3, dim=2)
    return block(m, x, *(part.squeeze(2).to(x.dtype) for part in e))


def unbound(m, x, c):
    """As LTX-Video."""
    return block(m, x, *(table(m)[None, None].to(x.device) + embedding(m, x, c)).unbind(dim=2))


def indexed(m, x, c):
    e = embedding(m, x, c) + table(m)
    return block(m, x, e[:, :, 0], e[..., 1, :], e.select(2, 2))


def sliced(m, x, c):
    e = torch.add(embedding(m, x, c), table(m))
    return block(m, x, *(e[:, :, i : i + 1].squeeze(2) for i in range(3)))


def in_a_row(m, x, c):
    """``[B, T, 3 D]``."""
    e = embedding(m, x, c).flatten(2) + table(m).reshape(-1)
    return block(m, x, *e.split(D, dim=-1))


def rows_first(m, x, c):
    """As SkyReels-V2: ``[B, 3, T, D]``."""
    e = (table(m)[None].unsqueeze(2) + embedding(m, x, c).transpose(1, 2)).chunk(3, dim=1)
    return block(m, x, *(part.squeeze() for part in e))


def reshaped(m, x, c):
    e = (table(m) + embedding(m, x, c)).reshape(B, T, 3 * D)
    return block(m, x, *e.chunk(3, dim=-1))


def viewed(m, x, c):
    """The operators get another layout than the sum's, of which a view would not exist."""
    e = (table(m) + embedding(m, x, c, 1)).view(B, T, -1).unflatten(2, (3, D))
    return block(m, x, *e.unbind(2))


def one_embedding(m, x, c):
    """As the last norm of Wan 2.2: one embedding for all of them."""
    e = (table(m)[None, None] + embedding(m, x, c, 1)).chunk(3, dim=2)
    return block(m, x, *(part.squeeze(2) for part in e))


def shared_by_images(m, x, c):
    e = (table(m) + m.second(x[:1])[:, :, None]).unbind(2)
    return block(m, x, *e)


def tokens_alone(m, x, c):
    """``[T, D]``, and tables ``[D]``."""
    (gate,) = (m.second(x[0])[None] + m.weight).unbind(0)
    return block(m, x, gate, m.first(x[1]) + m.bias, m.weight[None] + m.second(x[1]).sin())


SPELLINGS = [
    *(chunked, unbound, indexed, sliced, in_a_row, rows_first, one_embedding),
    *(shared_by_images, tokens_alone, reshaped, viewed),
]


@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
@pytest.mark.parametrize("program", SPELLINGS, ids=lambda f: f.__name__)
def test_the_operator_adds_the_table(graph, program, dtype):
    """All three vectors are pairs, nothing adds an array of tokens, values and gradients stay."""
    check(program, {FUSED: 1}, dtype=dtype)
    assert pairs(graph) == ["gate", "scale", "shift"]
    assert not additions(graph)


def test_one_cut_for_all_vectors(graph):
    """The embedding is cut once: a gradient for each cut would be as large as the embedding."""

    def program(m, x, c):
        parts = (table(m, 6) + embedding(m, x, c, 6)).chunk(6, dim=2)
        parts = [part.squeeze(2) for part in parts]
        first, h = block(m, x, *parts[:3])
        return block(m, first + h, *parts[3:])

    check(program, {FUSED: 2})
    assert len(pairs(graph)) == 6
    cuts = [node for node in graph["graph"].graph.nodes if node.target == "chunk"]
    assert len(cuts) == 1


def whole(e):
    return e.sin()


def a_part(e):
    """No operator takes tanh of a part."""
    return e[:, :, 1].tanh()


def not_a_pattern(e):
    return e[:, :, 2] - e[:, :, 0]


@pytest.mark.parametrize("read", [whole, a_part, not_a_pattern], ids=lambda f: f.__name__)
def test_a_sum_that_something_else_reads(graph, read):
    """It is computed all the same, so the operators read it: a second cut would be a second
    gradient as large as the embedding.
    """

    def program(m, x, c):
        e = table(m) + embedding(m, x, c)
        return *block(m, x, *e.unbind(2)), read(e)

    check(program, {FUSED: 1})
    assert not pairs(graph)
    assert len(additions(graph)) == 1


def test_a_part_that_is_also_normed(graph):
    """One part of the sum modulates the norm of another."""

    def program(m, x, c):
        scale, y = (table(m, 2) + embedding(m, x, c, 2)).unbind(2)
        return F.layer_norm(y, (D,)) * (1 + scale)

    check(program, {"adaln": 1})
    assert not pairs(graph)


def test_modulation_that_is_computed_earlier(graph):
    """A tap reads x' before the modulation is cut out of its sum."""

    def program(m, x, c):
        e = table(m) + embedding(m, x, c)
        gate = e.unbind(2)[0]
        x = x + gate * m.first(x)
        tap = m.second(x)
        _, shift, scale = e.unbind(2)
        return tap, m.first(F.layer_norm(x, (D,)) * (1 + scale) + shift)

    check(program, {FUSED: 1})
    assert pairs(graph) == ["gate", "scale", "shift"]


def test_cuts_that_move_twice(graph):
    """One cut serves two patterns, and the second moves it before the first."""

    def program(m, x, c):
        given = embedding(m, x, c)
        first = x + m.weight * m.first(x)
        second = x + m.bias * m.second(x)
        taps = (first.sin(), second.sin())
        e = (table(m) + given).unbind(2)
        h = F.layer_norm(second, (D,)) * (1 + e[0]) + e[1]
        return *taps, F.layer_norm(first, (D,)) * (1 + e[1]) + e[2], h

    check(program, {FUSED: 2})
    assert len(pairs(graph)) == 4


def test_a_table_beside_a_vector_per_image(graph):
    def program(m, x, c):
        gate, shift = m.vectors(c, 2)
        return block(m, x, gate, shift, (table(m) + embedding(m, x, c)).unbind(2)[0])

    check(program, {FUSED: 1})
    assert pairs(graph) == ["scale"]


def test_half_precision_keeps_more_digits(graph):
    """A sum that the model rounds to bf16 is not rounded any more."""

    def program(m, x, c):
        e = (table(m).float() + embedding(m, x, c)).to(bf16)
        return block(m, x, *e.unbind(2))

    check(program, {FUSED: 1}, dtype=bf16)
    assert pairs(graph) == ["gate", "scale", "shift"]


def test_a_video_model(graph):
    """All six vectors of every block and both of the last norm, as in Wan 2.2 with a time per
    token, and nothing that adds a table.
    """
    model, inputs = build("video, a time per token")
    one_line.check(model, inputs, (1, 0, 6, 0))
    assert len(pairs(graph)) == 6 * len(model.blocks) + 2
    width = model.norm.normalized_shape[0]
    shapes = [node.meta["example_value"].shape for node in additions(graph)]
    assert not [shape for shape in shapes if len(shape) == 4 and shape[-1] == width]


def test_dynamic_shapes(graph):
    def program(m, x, c):
        e = m.second(x.detach()).unsqueeze(2).tanh() + table(m)[None, None]
        return block(m, x, *e.unbind(2))

    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Program(program)
    expected = []
    shapes = [(2, 6), (3, 5), (5, 9)]
    for images, tokens in shapes:
        x, c = torch.randn(images, tokens, D), torch.randn(images, D)
        expected.append((x, c, programs.run(module, x, c)))
    integrations.compile(module, then="eager", dynamic=True, fullgraph=True)
    for x, c, wanted in expected:
        for mine, theirs in zip(programs.run(module, x, c), wanted, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert pairs(graph) == ["gate", "scale", "shift"]
    assert integrations.report(module).graphs == 1


def test_inside_a_checkpoint():
    """The body of a checkpoint has a graph of its own."""
    given = []

    class Counted(nn.Module):
        def forward(self, m, x, c):
            return checkpoint(lambda x, c: unbound(m, x, c), x, c, use_reentrant=False)

    original = ops.gated_residual_adaln

    def spy(*args, **options):
        given.append([isinstance(v, tuple) for v in (args[2], options["shift"], options["scale"])])
        return original(*args, **options)

    counted = Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "gated_residual_adaln", spy)
        check(lambda m, x, c: counted(m, x, c), {FUSED: 1})
    assert given and all(row == [True] * 3 for row in given)


def test_bytes_of_the_report(graph):
    """``bytes_before`` counts a sum that the rewrite removed, and not one that it left."""
    found = check(unbound, {FUSED: 1})

    def summed(m, x, c):
        e = (table(m) + embedding(m, x, c)).sin()
        return block(m, x, *e.unbind(2))

    torch._dynamo.reset()
    kept = check(summed, {FUSED: 1})
    assert not pairs(graph)
    # read: embedding and table; written: their sum
    moved = 4 * (2 * B * T * 3 * D + 3 * D)
    before = [sum(call.bytes_before for call in report.calls) for report in (found, kept)]
    assert before[0] - before[1] == moved


# what must stay a sum


def changed_embedding(m, x, c):
    """The embedding is changed after the sum has read it."""
    e = embedding(m, x, c).detach()
    parts = (e + table(m)).unbind(2)
    e.mul_(0.5)
    return *block(m, x, *parts), e.sin()


def changed_sum(m, x, c):
    e = embedding(m, x, c) + table(m)
    parts = [e[:, :, i] for i in range(3)]
    e.view(-1)[:2].zero_()
    return block(m, x, *parts)


def without_gradient(m, x, c):
    """A sum that has no gradient, of operands that have one."""
    with torch.no_grad():
        e = embedding(m, x, c) + table(m)
    return block(m, x, *e.unbind(2))


def detached(m, x, c):
    return block(m, x, *(embedding(m, x, c) + table(m)).detach().unbind(2))


def weighted_sum(m, x, c):
    return block(m, x, *torch.add(embedding(m, x, c), table(m), alpha=2).unbind(2))


def table_of_tokens(m, x, c):
    """``[T, 3, D]``: positions, not one row for all tokens."""
    positions = m.second.weight[:T, None].expand(T, 3, D)
    return block(m, x, *(embedding(m, x, c) + positions).unbind(2))


def table_of_images(m, x, c):
    of_images = m.condition(c).view(B, 1, 9, D)[:, :, :3]
    return block(m, x, *(embedding(m, x, c) + of_images).unbind(2))


def in_fp64(m, x, c):
    """The operator would compute in fp64, and the model rounds the sum first."""
    e = embedding(m, x, c) + table(m).double().sin()
    return block(m, x, *e.to(x.dtype).unbind(2))


def two_numbers(m, x, c):
    """A sum with a number."""
    return block(m, x, *(embedding(m, x, c) + 0.5).unbind(2))


def columns(m, x, c):
    """As many rows as columns, and the cut is along the columns."""
    e = table(m, D) + embedding(m, x, c, 1)
    # the first begins where the first row does
    return block(m, x, e[..., 0], *m.vectors(c, 2))


def one_number_for_each(m, x, c):
    e = m.second.bias[:3, None] + embedding(m, x, c)
    return block(m, x, *e.unbind(2))


STAY = [
    *(changed_embedding, without_gradient, detached, weighted_sum, table_of_tokens),
    *(table_of_images, in_fp64, two_numbers, columns, one_number_for_each),
]


@pytest.mark.parametrize("program", STAY, ids=lambda f: f.__name__)
def test_what_stays_a_sum(graph, program):
    """The operators get the sum, and results and gradients are the same."""
    check(program, {FUSED: 1})
    assert not pairs(graph)


def test_a_sum_that_is_changed(graph):
    """A change in place leaves no pattern at all."""
    check(changed_sum, {})
    assert not calls(graph)


@pytest.mark.parametrize("sizes", [[2, 4], [3, 3]])
def test_parts_along_the_tokens(graph, sizes, caplog):
    """Text and image in one sum: the table is one row for both."""

    def program(m, x, c):
        first, second = (table(m, 1)[0] + embedding(m, x, c, 1).squeeze(2)).split(sizes, dim=1)
        text, image = x.split(sizes, dim=1)
        return text + first * m.first(text), image + second * m.first(image)

    check(program, {"gated_residual": 2})
    assert pairs(graph) == ["gate", "gate"]
    # PyTorch logs what fails with fake tensors
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_cut_without_a_dimension():
    """``squeeze()`` may drop a dimension of the table and not of the sum; with as many rows as
    columns a column then looks like a row.
    """

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 1, 3, 3))

        def forward(self, x, y, e):
            return x + (self.table + e).squeeze(0)[:, :, 0] * y.sin()

    torch._dynamo.reset()
    torch.manual_seed(0)
    square = Square()
    inputs = (*torch.randn(2, B, T, 3), torch.randn(B, T, 3, 3))
    expected = square(*inputs)
    (slope,) = torch.autograd.grad(expected.sum(), [square.table])
    integrations.compile(square, then="eager", fullgraph=True)
    out = square(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), [square.table])[0], slope)
    assert integrations.report(square).rewrites == {"gated_residual": 1}


def test_a_cast_that_serves_several_sums(graph):
    """The gradients of all blocks are added up in fp32, where the embedding was raised once."""

    def program(m, x, c):
        e = embedding(m, x, c).float()
        for _ in range(2):
            x, h = block(m, x, *(part.to(x.dtype) for part in (table(m) + e).unbind(2)))
            x = x + h
        return x

    check(program, {FUSED: 2}, dtype=bf16)
    given = [vector for call in calls(graph) for vector in call.all_input_nodes]
    kinds = [node.meta["example_value"].dtype for node in given]
    assert len(pairs(graph)) == 6 and kinds.count(torch.float32) == 6


def test_a_region_without_gradients_before_it(graph):
    """As where a model makes its positions: the table is an input of the graph, before it."""

    def program(m, x, c):
        with torch.no_grad():
            positions = x.mean()
        first, h = unbound(m, x, c)
        return first, h + 0 * positions

    check(program, {FUSED: 1})
    assert pairs(graph) == ["gate", "scale", "shift"]
