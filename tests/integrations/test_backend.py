"""The compiler backend around whole models: its name, graph breaks, checkpoints, shapes, undoing."""

import copy
import os
import subprocess
import sys

import launch
import programs
import pytest
import torch
import torch.nn.functional as F
from blocks import Stack
from programs import B, D, Program, T
from torch import nn
from torch.utils.checkpoint import checkpoint

from sra_fast import integrations
from sra_fast.integrations import rewriting

FUSED = "gated_residual_adaln"


def stack(**options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Stack(**options)


def check_equal(model, before, x, c, tolerance=1e-6):
    after = programs.run(model, x, c)
    for mine, theirs in zip(after, before, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)


def check(model, compile_it, expected, tolerance=1e-6):
    """Compiled by ``compile_it`` the model gives the same outputs and gradients."""
    x, c = programs.inputs(device=next(model.parameters()).device)
    before = programs.run(model, x, c)
    compile_it(model)
    check_equal(model, before, x, c, tolerance)
    report = integrations.report(model)
    assert dict(report.rewrites) == expected, str(report)
    return report


def test_the_name_is_known_without_an_import():
    program = """
import torch
from torch import nn
assert not any(name.startswith("sra_fast") for name in __import__("sys").modules)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2, 1, 8))
    def forward(self, x):
        return nn.functional.layer_norm(x, (8,)) * (1 + self.scale)
model = Model()
model.compile(backend="sra_fast", options={"then": "eager"})
x = torch.randn(2, 3, 8)
torch.testing.assert_close(model(x), model.forward(x))
from sra_fast import integrations
print(integrations.report(model))
"""
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=300,
        env=launch.environment(),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("sra_fast: 1 graph(s); 1 adaln\n")


def test_every_backend_behind_it():
    for then in ("eager", "aot_eager"):
        check(
            stack(),
            lambda model, then=then: integrations.compile(model, then=then, fullgraph=True),
            {"adaln": 1, FUSED: 5, "gated_residual": 1},
        )


def test_inductor():
    check(
        stack(depth=1),
        lambda model: integrations.compile(model, fullgraph=True),
        {"adaln": 1, FUSED: 1, "gated_residual": 1},
        tolerance=1e-5,
    )


def test_the_kernels_run(monkeypatch, device):
    """Compiled with the interpreted kernels: their operators are in the graph that AOT traces."""
    monkeypatch.setenv("SRA_FAST_BACKEND", "triton")
    check(
        stack(depth=2).to(device),
        lambda model: integrations.compile(model, then="aot_eager", fullgraph=True),
        {"adaln": 1, FUSED: 3, "gated_residual": 1},
        tolerance=1e-5,
    )


def test_wrapped_by_torch_compile():
    model = stack()
    x, c = programs.inputs()
    before = programs.run(model, x, c)
    wrapped = torch.compile(model, backend=integrations.backend, options={"then": "eager"})
    check_equal(wrapped, before, x, c)
    assert integrations.report(wrapped).rewrites[FUSED] == 5
    assert integrations.undo(wrapped) is model


class Broken(rewriting._Rewriter):
    """One that fails, or leaves an ill-formed graph, when half of it is changed."""

    spoil = None

    def _replace_one(self, found):
        super()._replace_one(found)
        self.spoil()

    def _replace_pair(self, pair):
        super()._replace_pair(pair)
        self.spoil()

    def fail(self):
        raise KeyError("a node")

    def use_before_definition(self):
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        first.args = (next(reversed(self.graph.nodes)).prev,)


@pytest.mark.parametrize(
    "spoil, error", [(Broken.fail, "KeyError"), (Broken.use_before_definition, "RuntimeError")]
)
def test_a_graph_that_cannot_be_rewritten_stays(
    spoil, error, monkeypatch, caplog, every_graph_is_rewritten
):
    """A fault of this code costs a user the operators, not the model."""
    every_graph_is_rewritten.setLevel("CRITICAL")
    monkeypatch.setattr(Broken, "spoil", spoil)
    monkeypatch.setattr(rewriting, "_Rewriter", Broken)
    model = stack()
    report = check(model, lambda m: integrations.compile(m, then="eager"), {})
    (miss,) = report.near_misses
    assert miss.where == "a whole graph" and miss.reason.startswith(f"not rewritten: {error}: ")
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("a graph was not rewritten, please report this: ")


def test_a_graph_that_cannot_be_rewritten_fails_a_test(monkeypatch):
    monkeypatch.setattr(Broken, "spoil", Broken.fail)
    monkeypatch.setattr(rewriting, "_Rewriter", Broken)
    with pytest.raises(Exception, match="a graph was not rewritten.*KeyError"):
        check(stack(), lambda m: integrations.compile(m, then="eager"), {})


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside(reentrant):
    """The bodies of the checkpoints are rewritten, each by itself."""
    around = lambda block, x, c: checkpoint(block, x, c, use_reentrant=reentrant)
    check(
        stack(depth=2, around=around),
        lambda model: integrations.compile(model, then="aot_eager"),
        {"adaln": 2, FUSED: 2, "gated_residual": 2},
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_blocks_inside_checkpoints(reentrant):
    around = lambda block, x, c: checkpoint(block, x, c, use_reentrant=reentrant)

    def compile_blocks(model):
        for block in model.blocks:
            integrations.compile(block, then="aot_eager")

    # Dynamo compiles the first block, and the others use its graph; a reentrant checkpoint runs
    # once without gradients and once with
    graphs = 2 if reentrant else 1
    report = check(
        stack(depth=2, around=around),
        compile_blocks,
        {"adaln": graphs, FUSED: graphs, "gated_residual": graphs},
    )
    assert report.graphs == graphs


def test_a_forward_that_is_compiled_already():
    """LightningDiT decorates its forward functions: they become part of the model's graph."""

    class Decorated(Stack):
        @torch.compile(backend="eager")
        def forward(self, x, c, depth=None):
            return super().forward(x, c)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = Decorated(2)

        def forward(self, x, c):
            return self.stack(x, c)

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Model()
    report = check(
        model,
        lambda model: integrations.compile(model, then="eager", fullgraph=True),
        {"adaln": 1, FUSED: 3, "gated_residual": 1},
    )
    assert report.graphs == 1
    integrations.undo(model)
    assert "forward" not in model.stack.__dict__


def test_graph_breaks():
    def around(block, x, c):
        torch._dynamo.graph_break()
        return block(x, c)

    report = check(
        stack(around=around),
        lambda model: integrations.compile(model, then="eager"),
        {"adaln": 1, FUSED: 1, "gated_residual": 1},
    )
    assert report.graphs == 1


@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_dynamic_shapes(then):
    """One graph for every number of images and tokens, and no guard of ours on them."""
    model = stack()
    report = check(
        model,
        lambda model: integrations.compile(model, then=then, dynamic=True, fullgraph=True),
        {"adaln": 1, FUSED: 5, "gated_residual": 1},
    )
    assert report.graphs == 1
    reference = copy.deepcopy(model)
    for images, tokens in ((3, 9), (5, 4), (T, T)):
        x, c = torch.randn(images, tokens, D), torch.randn(images, D)
        check_equal(model, programs.run(integrations.undo(reference), x, c), x, c)
    assert integrations.report(model).graphs == 1


def test_batch_of_one_and_one_token():
    """Sizes of 1 broadcast, and are constants in a graph."""
    for shape in ((1, T), (B, 1), (1, 1)):
        model = stack(depth=1)
        x, c = torch.randn(*shape, D), torch.randn(shape[0], D)
        before = programs.run(model, x, c)
        integrations.compile(model, then="eager", fullgraph=True)
        check_equal(model, before, x, c)
        assert integrations.report(model).rewrites[FUSED] == 1, shape


def test_vectors_shared_by_a_batch_of_any_size():
    """``[D]``, ``[1, 1, D]`` and ``[1, T, D]`` in a graph of dynamic shapes."""

    def program(m, x, c):
        per_token = m.second(x[:1]).unbind(0)[0][None]
        x = x + m.weight[None, None] * m.first(x)
        return F.layer_norm(x, (D,)) * (1 + m.bias) + m.weight, x + per_token * m.first(x)

    torch._dynamo.reset()
    module = Program(program)
    reference = copy.deepcopy(module)
    integrations.compile(module, then="eager", dynamic=True, fullgraph=True)
    for images in (2, 3):
        x, c = torch.randn(images, T, D), torch.randn(images, D)
        check_equal(module, programs.run(reference, x, c), x, c)
    assert integrations.report(module).rewrites == {FUSED: 1, "gated_residual": 1}
    assert integrations.report(module).graphs == 1


def test_undo_is_the_original_to_the_bit():
    model = stack()
    x, c = programs.inputs()
    names = list(model.state_dict())
    before = programs.run(model, x, c)
    assert integrations.compile(model, then="eager") is model
    programs.run(model, x, c)
    assert list(model.state_dict()) == names
    assert integrations.undo(model) is model
    assert integrations.report(model).graphs == 0
    for mine, theirs in zip(programs.run(model, x, c), before, strict=True):
        assert torch.equal(mine, theirs)


def test_a_report_is_about_one_model():
    first = stack(depth=1)
    second = Stack(depth=2)
    x, c = programs.inputs()
    for model in (first, second):
        integrations.compile(model, then="eager")
        assert "nothing was compiled yet" in str(integrations.report(model))
        model(x, c)
    assert integrations.report(first).rewrites[FUSED] == 1
    assert integrations.report(second).rewrites[FUSED] == 3
    text = str(integrations.report(second))
    assert "3 gated_residual_adaln" in text and "left alone: products, 6 calls" in text


def test_undo_leaves_the_copy_of_a_model_compiled():
    """A model and its frozen copy, as an EMA teacher: two graphs of one class."""
    model = stack(depth=1)
    teacher = copy.deepcopy(model).requires_grad_(False)
    x, c = programs.inputs()
    for network in (model, teacher):
        integrations.compile(network, then="eager")
        network(x, c)
    integrations.undo(model)
    assert integrations.report(teacher).rewrites[FUSED] == 1


def test_the_second_model_of_a_class_has_the_graph_of_the_first():
    first, second = stack(depth=1), Stack(depth=1)
    x, c = programs.inputs()
    for model in (first, second):
        integrations.compile(model, then="eager")
        model(x, c)
        assert integrations.report(model).rewrites[FUSED] == 1


def test_bytes_of_the_report():
    """Counted by hand for x + gate y and the norm after it, in fp32."""

    def program(m, x, c):
        gate, shift, scale = c.reshape(B, 1, 3, D).unbind(2)
        x = x + gate * x.relu()
        return x, F.layer_norm(x, (D,)) * (1 + scale) + shift

    torch._dynamo.reset()
    module = Program(program)
    integrations.compile(module, then="eager", fullgraph=True)
    # no parameter is read: the program's input stands for one
    c = nn.Parameter(torch.randn(B, 3 * D))
    module.register_parameter("c", c)
    module(torch.randn(B, T, D), c)
    (call,) = integrations.report(module).calls
    rows, vectors = 4 * B * T * D, 4 * B * D
    assert call.bytes_after == 4 * rows + 3 * vectors
    # the product, the sum, the norm, the modulation
    products = 2 * (3 * rows) - rows + vectors
    assert call.bytes_before == products + 2 * rows + 2 * (2 * rows + vectors)
    assert (
        call.where.endswith("F.layer_norm(x, (D,)) * (1 + scale) + shift")
        and "test_backend" in call.where
    )


def test_a_training_run_is_the_same():
    """AdamW and an EMA by deepcopy: the compiled model trains as the original does."""
    weights = []
    for compiled in (False, True):
        model = stack(depth=2)
        if compiled:
            integrations.compile(model, then="aot_eager")
        average = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            x, c = programs.inputs()
            (model(x, c) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.data.lerp_(p.data, 0.1)
        weights.append([*model.state_dict().values(), *average.state_dict().values()])
        torch.manual_seed(0)
    for mine, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: integrations.compile(3), "expected a torch.nn.Module, got int"),
        (lambda: integrations.undo(None), "expected a torch.nn.Module, got NoneType"),
        (lambda: integrations.report("x"), "expected a torch.nn.Module, got str"),
        (lambda: integrations.compile(stack(), then="xla"), "then must be one of"),
        (lambda: integrations.compile(stack(), backend="eager"), "the backend is sra_fast"),
        (lambda: integrations.compile(stack(), mode="fastest"), "mode must be one of"),
        (
            lambda: integrations.compile(stack(), then="eager", mode="max-autotune"),
            "takes no options",
        ),
        (lambda: integrations.compile(stack(), options=3), "expected options as a dict, got 3"),
        (
            lambda: integrations.compile(stack(), options={"vectors_per_token": "yes"}),
            "expected vectors_per_token True or False, got 'yes'",
        ),
        (
            lambda: integrations.compile(stack(), mode="default", options={"x": 1}),
            "expected mode or options, got both",
        ),
        (
            lambda: integrations.compile(stack(), options={"max_autotone": True}),
            "inductor has no option max_autotone",
        ),
        (lambda: integrations.compile(stack(), options={"then": "xla"}), "then must be one of"),
        (
            lambda: integrations.compile(stack(), options={"then": "eager", "max_autotune": True}),
            "then='eager' takes no options",
        ),
        (
            lambda: integrations.compile(stack(), dynamic="yes"),
            "expected dynamic True, False or None, got 'yes'",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def no_inductor(monkeypatch):
    """The backend inductor runs graphs as they are; gives a list of the options that it got."""
    given = []

    def fake(graph, inputs, config_patches=None):
        given.append(config_patches)
        return graph.forward

    original = torch._dynamo.lookup_backend
    monkeypatch.setattr(
        torch._dynamo, "lookup_backend", lambda name: fake if name == "inductor" else original(name)
    )
    return given


@pytest.mark.parametrize("part", ["norm", "gate"])
def test_a_vector_per_token_is_left_to_inductor(no_inductor, part):
    """What has a vector per image is replaced all the same."""

    def program(m, x, c):
        vectors = m.second(x) + c[:, None]
        (image,) = m.vectors(c, 1)
        scale, gate = (vectors, image) if part == "norm" else (image, vectors[:, :, :D])
        x = x + gate * m.first(x)
        return F.layer_norm(x, (D,)) * (1 + scale)

    # without its gate's product x + gate y is a plain residual
    expected = {"norm": {"gated_residual": 1}, "gate": {FUSED: 1}}[part]
    torch._dynamo.reset()
    report = check(Program(program), integrations.compile, expected)
    assert [miss.reason for miss in report.near_misses] == [
        "a vector per token: left to inductor, which fuses it with what makes it"
    ]
    assert no_inductor == [None]
    for other_way in ({"then": "eager"}, {"options": {"vectors_per_token": True}}):
        torch._dynamo.reset()
        taken = lambda model: integrations.compile(model, **other_way)  # noqa: B023, called here
        check(Program(program), taken, {FUSED: 1})
    torch._dynamo.reset()
    kept = {"vectors_per_token": False, "then": "eager"}
    left = lambda model: model.compile(backend="sra_fast", options=kept)
    check(Program(program), left, expected)


def test_options_reach_inductor(no_inductor):
    """``mode`` and ``options`` become inductor's configuration."""
    x, c = programs.inputs()
    for options in (
        {"mode": "max-autotune"},
        {"options": {"epilogue_fusion": False}},
        {"mode": "default"},
    ):
        integrations.compile(stack(depth=1), **options)(x, c)
    assert no_inductor[0]["max_autotune"] is True
    assert no_inductor[1:] == [{"epilogue_fusion": False}, None]


def test_imports_the_operators_alone():
    """Neither diffusers nor DeepSpeed nor inductor is loaded before it is needed."""
    program = """
import sys
import sra_fast.integrations
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("sra_fast.")}
assert rooms <= {"integrations", "ops", "kernels"}, rooms
assert not {"deepspeed", "diffusers", "torch._inductor.compile_fx"} & set(sys.modules)
"""
    environment = launch.environment(PYTHONPATH=os.getcwd())
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, env=environment)
