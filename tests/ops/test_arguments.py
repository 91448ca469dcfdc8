"""What the public operators take and refuse: one line that begins with the operator's name and
names only its own arguments; shapes of the modulation; layers without a bias.
"""

import inspect
import re

import pytest
import torch
from conftest import DEVICE

from sra_fast import ops

B, T, D = 2, 3, 16


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def valid() -> dict[str, dict]:
    """Arguments that each operator takes, with every optional tensor that fits beside the others."""
    torch.manual_seed(0)
    x, y = random(2, B, T, D)
    shift, scale, gate = random(3, B, D)
    norm = {"x": x, "shift": shift, "scale": scale, "eps": 1e-6, "norm": "layer"}
    residual = {"residual": (y, gate, random(D))}
    group = {"group": torch.zeros(B, T, dtype=torch.long, device=DEVICE)}
    affine = {"norm_weight": random(D), "norm_bias": random(D)}
    grouped = {"shift": shift[:, None], "scale": scale[:, None], **group}
    grouped["second"] = (gate[:, None], scale[:, None])
    flat = lambda: random(8).abs()
    mlp = {"weight1": random(12, D), "bias1": random(12), "weight2": random(D, 12)}
    return {
        "adaln": norm | grouped | affine,
        "adaln_linear": norm | residual | {"weight": random(12, D), "bias": random(12), "parts": 3},
        "adaln_mlp": norm | residual | mlp | {"bias2": random(D), "activation": "gelu_tanh"},
        "adamw_ema_": {
            "param": flat(),
            "grad": flat(),
            "exp_avg": flat(),
            "exp_avg_sq": flat(),
            "step": 1,
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "clip_scale": random(1),
            "weights": flat().bfloat16(),
            "ema": flat(),
            "ema_copy": flat().bfloat16(),
            "decay": 0.9,
        },
        "align_distance": {
            "pred": x,
            "target": y,
            "kind": "smooth_l1",
            "beta": 0.05,
            "weight": random(B, T),
            "reduction": "none",
        },
        "attention": {
            **dict(zip("qkv", random(3, B, T, 2, 8), strict=True)),
            "layout": "bthd",
            "groups": torch.zeros(B, T, dtype=torch.long, device=DEVICE),
        },
        "ema_update_": {
            "ema": [flat()],
            "params": [flat()],
            "decay": 0.9,
            "copies": [flat().bfloat16()],
        },
        "gated_residual": {"x": x, "y": y, "gate": gate[:, None], "bias": random(D), **group},
        "gated_residual_adaln": norm
        | grouped
        | affine
        | {"y": y, "gate": gate[:, None], "bias": random(D)},
        "gated_residual_norm": {
            **{"x": x, "y": y, "gate": gate[:, None], "eps": 1e-6, "norm": "rms"},
            "norm_weight": random(D),
            **group,
        },
        "linear_gelu": {"x": x, "weight": random(12, D), "bias": random(12)},
        "linear_swiglu": {"x": x, "weight": random(12, D), "bias": random(12)},
        "noise_pair": {
            "x0": random(B, 4, 3, 3),
            "noise": random(B, 2, 3, 3),
            "t": random(B).sigmoid(),
            "t_teacher": random(B).sigmoid(),
            "latent_noise": random(B, 2, 3, 3),
            "path": "linear",
            "scale": 0.5,
        },
        "qk_norm_rope": {
            **dict(zip("qk", random(2, B, T, 2, 8), strict=True)),
            **dict(zip(("cos", "sin"), random(2, T, 4), strict=True)),
            "q_weight": random(8),
            "k_weight": random(8),
            "eps": 1e-6,
            "norm": "rms",
            "style": "half",
            "layout": "bthd",
        },
    }


NOT_A_NUMBER = float("nan")
# what no operator takes in the place of a tensor
TENSORS = {
    "a list": lambda t: t.tolist(),
    "a number": lambda t: 1.0,
    "a size less": lambda t: t[..., :-1],
    "a dimension more": lambda t: t[None],
    "complex numbers": lambda t: t.to(torch.complex64),
    "another device": lambda t: t.to("meta"),
    "a sparse one": lambda t: t.to_sparse(),
    "a nested one": lambda t: torch.nested.nested_tensor([t]),
}
NUMBERS = {
    "nan": lambda n: NOT_A_NUMBER,
    "negative": lambda n: -1,
    "text": lambda n: "1",
    "None": lambda n: None,
    "a list": lambda n: [n],
}
WORDS = {
    "another word": lambda word: "bathd",
    "None": lambda word: None,
    "a list": lambda word: [word],
}
# of tensors that are written; elements of an expanded one share memory
WRITTEN = {
    *(("ema_update_", name) for name in ("ema", "copies")),
    *(
        ("adamw_ema_", name)
        for name in ("param", "exp_avg", "exp_avg_sq", "weights", "ema", "ema_copy")
    ),
}
EXPANDED = {"expanded": lambda t: t[:1].expand(t.shape)}
# tensors that may also be left out
OPTIONAL = {
    *("bias", "bias1", "bias2", "clip_scale", "copies", "ema", "ema_copy", "group", "groups"),
    *("k_weight", "latent_noise", "norm_bias", "norm_weight", "q_weight", "residual", "weights"),
    ("align_distance", "weight"),
    *((name, "gate") for name in ("gated_residual", "gated_residual_adaln", "gated_residual_norm")),
    *((name, "shift") for name in ("adaln", "gated_residual_adaln")),
    *((name, "scale") for name in ("adaln", "gated_residual_adaln")),
}
# what is legal after all
LEGAL = {
    # one number on the device, of any shape and dtype
    ("adamw_ema_", "clip_scale", "a dimension more"),
    ("adamw_ema_", "clip_scale", "complex numbers"),
    # the product takes any leading dimensions
    ("linear_gelu", "x", "a dimension more"),
    ("linear_swiglu", "x", "a dimension more"),
    # a scale of either sign is a scale
    ("noise_pair", "scale", "negative"),
}


def changes(name: str):
    """(argument, what is wrong, arguments) of everything that the operator must refuse."""
    given = valid()[name]
    for argument, value in given.items():
        kinds = {}
        tensors = TENSORS | (EXPANDED if (name, argument) in WRITTEN else {})
        if isinstance(value, torch.Tensor):
            kinds = tensors
            if not {argument, (name, argument)} & OPTIONAL:
                kinds = kinds | {"None": lambda t: None}
        elif isinstance(value, str):
            kinds = WORDS
        elif isinstance(value, int | float):
            kinds = NUMBERS
        elif isinstance(value, list):
            kinds = {f"of {kind}": lambda v, to=to: [to(v[0])] for kind, to in tensors.items()}
            kinds |= {"one more": lambda v: v * 2, "a tensor": lambda v: v[0]}
        elif argument == "residual":
            for i in range(3):
                kinds |= {
                    f"{kind} at {i}": lambda v, to=to, i=i: (*v[:i], to(v[i]), *v[i + 1 :])
                    for kind, to in TENSORS.items()
                }
            kinds["no gate"] = lambda v: v[:1]
        elif argument == "second":
            for i in range(2):
                kinds |= {
                    f"{kind} at {i}": lambda v, to=to, i=i: (*v[:i], to(v[i]), *v[i + 1 :])
                    for kind, to in (TENSORS | {"None": lambda t: None}).items()
                }
            kinds |= {
                "one": lambda v: v[:1],
                "three": lambda v: v + v[:1],
                "a tensor": lambda v: v[0],
            }
        elif argument == "betas":
            kinds = {"one number": lambda v: 0.9, "three": lambda v: (*v, 0.9)}
        assert kinds, argument
        for kind, change in kinds.items():
            if (name, argument, kind) not in LEGAL:
                yield argument, kind, given | {argument: change(value)}
    yield "backend", "another word", given | {"backend": "fastest"}
    yield "backend", "a list", given | {"backend": ["torch"]}


def signature(name: str) -> set[str]:
    return set(inspect.signature(getattr(ops, name)).parameters)


# a word of its own in every message: the dtype of a tensor, not an argument of that name
ALL_ARGUMENTS = set().union(*map(signature, ops.__all__)) - {"dtype"}
# the documented names of what is in an argument
INSIDE = {"residual": {"y", "gate", "y_bias"}}


@pytest.mark.parametrize("name", ops.__all__)
def test_every_refusal_names_the_operator_and_its_own_arguments(name):
    own = signature(name)
    own |= set().union(*(INSIDE.get(argument, set()) for argument in own))
    count = 0
    for argument, kind, arguments in changes(name):
        try:
            getattr(ops, name)(**arguments)
        except ValueError as error:
            message = str(error)
        else:
            pytest.fail(f"{name} takes {argument}: {kind}")
        told = (argument, kind, message)
        assert message.startswith(f"{name}: ") and "\n" not in message, told
        words = set(re.findall(r"\w+", message.removeprefix(name)))
        assert words & ALL_ARGUMENTS <= own, told
        count += 1
    assert count > 10


@pytest.mark.parametrize("name", sorted({*ops.__all__} - {"attention"}))
def test_an_unknown_backend_is_told_those_that_the_operator_has(name, monkeypatch):
    """And where the word came from, and whose it is."""
    own = ", 'cuda'" if name == "ema_update_" else ""
    known = rf"^{name}: backend must be one of \('auto', 'triton', 'torch'{own}\), got "
    with pytest.raises(ValueError, match=known + "'numpy'$"):
        getattr(ops, name)(**valid()[name], backend="numpy")
    monkeypatch.setenv("SRA_FAST_BACKEND", "numpy")
    with pytest.raises(ValueError, match=known + "'numpy' from SRA_FAST_BACKEND$"):
        getattr(ops, name)(**valid()[name])
    monkeypatch.setenv("SRA_FAST_BACKEND", "cuda")
    message = known + "'cuda' from SRA_FAST_BACKEND, which only ema_update_ takes$"
    if name == "ema_update_" and DEVICE == "cpu":
        message = "^ema_update_: backend='cuda' needs CUDA tensors"
    if name != "ema_update_" or DEVICE == "cpu":
        with pytest.raises(ValueError, match=message):
            getattr(ops, name)(**valid()[name])


@pytest.mark.parametrize("name", ops.__all__)
def test_what_is_refused_is_refused_for_its_change(name):
    getattr(ops, name)(**valid()[name])


@pytest.mark.skipif(DEVICE == "cuda", reason="host tensors")
@pytest.mark.parametrize("name", sorted({*ops.__all__} - {"attention"}))
def test_host_tensors_have_no_triton(name, monkeypatch):
    """Also where the reference would run in any case: fp64, nothing to do, autocast."""
    monkeypatch.delenv("TRITON_INTERPRET")
    given = valid()[name]
    with pytest.raises(ValueError, match=f"^{name}: backend='triton' needs CUDA tensors"):
        getattr(ops, name)(**given, backend="triton")
    wide = {
        key: value.double() if isinstance(value, torch.Tensor) and value.dtype == torch.float32
        else value
        for key, value in given.items()
    }  # fmt: skip
    monkeypatch.setenv("SRA_FAST_BACKEND", "triton")
    with (
        pytest.raises(ValueError, match=f"^{name}: backend='triton' needs CUDA tensors"),
        torch.autocast("cpu", torch.bfloat16),
    ):
        getattr(ops, name)(**wide)


def test_a_second_derivative_names_the_operator():
    if DEVICE == "cuda":
        pytest.skip("the interpreter's")
    given = valid()
    branch = ("gated_residual", "gated_residual_norm")
    for name in (*branch, "adaln", "gated_residual_adaln", "adaln_linear", "adaln_mlp"):
        # the gradient of the x of an addition is a copy
        which = "y" if name in branch else "x"
        arguments = given[name] | {which: given[name][which].requires_grad_()}
        # with a group its norm is a call of its own
        arguments.pop("second", None)
        out = getattr(ops, name)(**arguments, backend="triton")
        while isinstance(out, tuple):
            out = out[-1]
        (first,) = torch.autograd.grad(out.square().sum(), arguments[which], create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{name}: can be differentiated once"):
            first.sum().backward()


torch.manual_seed(0)
W, W1, W2 = torch.randn(12, D) / 4, torch.randn(12, D) / 4, torch.randn(D, 12) / 4
MODULATED = {
    "adaln": lambda x, y, g, s, c, **o: ops.adaln(x, s, c, **o),
    "gated_residual": lambda x, y, g, s, c, **o: ops.gated_residual(x, y, g + s + c, **o),
    "gated_residual_adaln": lambda x, y, g, s, c, **o: ops.gated_residual_adaln(x, y, g, s, c, **o),
    "gated_residual_norm": lambda x, y, g, s, c, **o: ops.gated_residual_norm(x, y, g + s + c, **o),
    "adaln_linear": lambda x, y, g, s, c, **o: ops.adaln_linear(
        x, s, c, W.to(x), residual=(y, g), **o
    ),
    "adaln_mlp": lambda x, y, g, s, c, **o: ops.adaln_mlp(
        x, s, c, W1.to(x), None, W2.to(x), residual=(y, g), recompute=True, **o
    ),
}
SHAPES = {"[B, 1, D]": (B, 1, D), "[1, D]": (1, D), "[D]": (D,), "[1, 1, D]": (1, 1, D)}


def outputs_and_gradients(fn, leaves):
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = fn(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    loss = sum((o * o.detach().cos()).sum() for o in out)
    return [*out, *torch.autograd.grad(loss, leaves, allow_unused=True)]


def assert_alike(first, second, atol=1e-5):
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODULATED)
def test_modulation_of_every_shape(name, shape, backend):
    """The same as the vector of every image written out; gradients have the given shapes."""
    x, y = random(2, B, T, D)
    vectors = random(3, *SHAPES[shape])
    written_out = lambda x, y, *vectors: MODULATED[name](
        x, y, *(v.expand(B, 1, D)[:, 0].contiguous() for v in vectors), backend="torch"
    )
    found = outputs_and_gradients(lambda *a: MODULATED[name](*a, backend=backend), [x, y, *vectors])
    assert_alike(found, outputs_and_gradients(written_out, [x, y, *vectors]), atol=1e-4)
    # without a gradient, as in the teacher
    with torch.no_grad():
        again = MODULATED[name](x, y, *vectors, backend=backend)
    again = again if isinstance(again, tuple) else (again,)
    assert_alike(again, found[: len(again)], atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_vector_per_image_is_none_per_token(backend):
    """[B, 1, D] broadcasts over tokens, beside [B, D]; with one token the two mean the same."""
    x = random(B, T, D)
    shift, scale = random(2, B, D)
    expected = ops.adaln(x, shift, scale, backend=backend)
    for given in ((shift[:, None], scale), (shift, scale[:, None])):
        assert torch.equal(ops.adaln(x, *given, backend=backend), expected)
    per_token = (shift[:, None].expand(B, T, D), scale[:, None].expand(B, T, D))
    assert_alike([ops.adaln(x, *per_token, backend=backend)], [expected])
    one = ops.adaln(x[:, :1], shift[:, None], scale[:, None], backend=backend)
    assert torch.equal(one, ops.adaln(x[:, :1], shift, scale, backend=backend))
    # [B, G, D] with one group keeps its meaning
    group = torch.zeros(B, T, dtype=torch.long, device=DEVICE)
    grouped = ops.adaln(x, shift[:, None], scale[:, None], group=group, backend=backend)
    assert_alike([grouped], [expected])
    with pytest.raises(ValueError, match=r"^adaln_linear: expected .*got .*scale \[2, 3, 16\]"):
        ops.adaln_linear(x, *per_token, W.to(x), backend=backend)


def test_shared_vectors_compile():
    fn = MODULATED["gated_residual_adaln"]
    leaves = [random(B, T, D), random(B, T, D), random(B, 1, D), random(1, D), random(D)]
    call = lambda *a: fn(*a, backend="triton" if DEVICE == "cpu" else None)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_alike(outputs_and_gradients(compiled, leaves), outputs_and_gradients(call, leaves))


WITHOUT_BIAS = {
    "linear_gelu": lambda x, b1, b2, **o: ops.linear_gelu(x, W.to(x), b1, **o),
    "linear_swiglu": lambda x, b1, b2, **o: ops.linear_swiglu(x, W.to(x), b1, **o),
    "adaln_linear": lambda x, b1, b2, **o: ops.adaln_linear(
        x, x[:, 0], x[:, 1], W.to(x), b1, parts=3, **o
    )[1],
    "adaln_mlp": lambda x, b1, b2, **o: ops.adaln_mlp(
        x, x[:, 0], x[:, 1], W1.to(x), b1, W2.to(x), b2, **o
    ),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", WITHOUT_BIAS)
def test_layers_without_a_bias(name, backend):
    """The same as with a bias of zeros."""
    x = random(B, T, D)
    zeros = (x.new_zeros(12), x.new_zeros(D))
    fn = WITHOUT_BIAS[name]
    found = outputs_and_gradients(lambda x: fn(x, None, None, backend=backend), [x])
    assert_alike(found, outputs_and_gradients(lambda x: fn(x, *zeros, backend="torch"), [x]), 1e-4)
    with torch.no_grad():
        out = fn(x, None, None, backend=backend)
    assert_alike([out] if name.startswith("linear") else [*out], found[:-1], 1e-4)


def test_numbers_that_compare_with_nothing_are_refused():
    x = random(B, T, D)
    with pytest.raises(ValueError, match="^align_distance: expected a finite beta >= 0, got nan"):
        ops.align_distance(x, x, "smooth_l1", beta=NOT_A_NUMBER)
    with pytest.raises(ValueError, match="^adaln: expected a finite eps >= 0, got nan"):
        ops.adaln(x, x[0, 0], x[0, 0], NOT_A_NUMBER)
