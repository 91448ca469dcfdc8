"""The whole optimizer step: against fp64, torch.optim.AdamW, slices, e4m3 copies, bad input."""

import pytest
import torch
from conftest import assert_kernel_close
from triton import knobs

from sra_fast.kernels import adamw_ema as kernels
from sra_fast.ops.adamw_ema import DeviceStep, _op, adamw_ema_, adamw_ema_ref_
from sra_fast.ops.fp8 import Fp8Copy, power_of_two_multiplier
from sra_fast.ops.quantize_rows import E4M3

SIZES = [
    2048,
    1000,
    5,
    1152 * 3 + 7,
]  # whole blocks; multiple of 8 only; less than one vector; ragged
# large enough for every term to show in five steps
HYPER = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}
HALF = [torch.bfloat16, torch.float16]
OUTPUTS = ("weights", "ema", "ema_copy")


def make(N, device, grad_dtype=torch.float32, half=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    param, ema = torch.randn(2, N, device=device)
    state = {
        "param": param,
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
        "ema": ema,
    }
    state |= {
        k: torch.full((N,), float("nan"), device=device, dtype=half)
        for k in ("weights", "ema_copy")
    }
    # from 1e-6 to 1: eps matters for some elements and not for others
    scale = 10 ** (-6 * torch.rand(N, device=device))
    return state, [(torch.randn(N, device=device) * scale).to(grad_dtype) for _ in range(5)]


def step_all(fn, state, grads, first=1, **kw):
    buffers = {k: state.get(k) for k in OUTPUTS}
    for k, grad in enumerate(grads, first):
        fn(state["param"], grad, state["exp_avg"], state["exp_avg_sq"], k, **buffers, **kw)


def check(state, grads, **kw):
    """Five steps of the kernel against fp64, with the reference in fp32 as the yardstick.

    Copies are rounded.
    """
    truth = {k: v.double() if v.dtype == torch.float32 else v.clone() for k, v in state.items()}
    same = {k: v.clone() for k, v in state.items()}
    step_all(adamw_ema_ref_, truth, [g.double() for g in grads], **kw)
    step_all(adamw_ema_ref_, same, grads, **kw)
    step_all(adamw_ema_, state, grads, backend="triton", **kw)
    for name in ("param", "exp_avg", "exp_avg_sq", "ema"):
        if name in state:
            assert_kernel_close(state[name].double(), same[name].double(), truth[name], floor=3e-7)
    for name, source in (("weights", "param"), ("ema_copy", "ema")):
        if name in state:
            # the interpreter truncates to bf16, a GPU rounds
            unit = 2**-7 if state[name].dtype == torch.bfloat16 else 2**-11
            torch.testing.assert_close(state[name].float(), state[source], rtol=unit, atol=1e-7)


def device_step(count, taken, device, lr_factor=None):
    """Update number ``count`` of ``HYPER``, on the device."""
    tensor = lambda value: torch.tensor(value, device=device)
    factor = None if lr_factor is None else tensor(lr_factor).double()
    return DeviceStep.of(tensor(count).double(), HYPER["betas"], tensor(taken), factor)


@pytest.mark.parametrize("half", HALF, ids=str)
@pytest.mark.parametrize("N", SIZES)
def test_step(N, half, device):
    check(
        *make(N, device, half=half),
        **HYPER,
        decay=0.7,
        clip_scale=torch.tensor(0.37, device=device),
    )


@pytest.mark.parametrize("grad_dtype", HALF, ids=str)
def test_half_precision_gradients(grad_dtype, device):
    check(
        *make(300, device, grad_dtype),
        **HYPER,
        decay=0.7,
        clip_scale=torch.tensor([4.0], device=device),
    )


@pytest.mark.parametrize("present", [(), ("weights",), ("ema",), ("ema", "ema_copy")], ids=str)
def test_optional_buffers(present, device):
    """A buffer that is left out is neither needed nor touched."""
    state, grads = make(70, device)
    check(
        {k: v for k, v in state.items() if k not in OUTPUTS or k in present},
        grads,
        **HYPER,
        decay=0.2,
    )
    for name in set(OUTPUTS) - set(present) - {"ema"}:
        assert state[name].isnan().all()


def fp8_copy(N, ends, device, dtype=E4M3):
    """An e4m3 copy with multipliers from 2^6 to 2^16, and segments whose amax is 0 or 100."""
    S = len(ends)
    multiplier = 2.0 ** (torch.arange(S) * 7 % 11 + 6).float()
    amax = 100.0 * (torch.arange(S) % 3 == 1).float()
    values = torch.zeros(N, dtype=dtype)
    return Fp8Copy.of(*(x.to(device) for x in (values, multiplier, amax)), ends)


def rounded_to_e4m3(x, copy):
    """What must be stored, in fp64: x times its segment's multiplier, at most 448; and each
    element's segment.
    """
    index = torch.bucketize(torch.arange(len(x)), copy.ends.cpu(), right=True)
    return (x.cpu().double() * copy.multiplier.cpu()[index].double()).clamp(-448, 448), index


# one segment; borders in a block, at its end, an empty one; many small ones; only the ragged end is
# in another segment
CUTS = [
    (2048, [2048]),
    (3000, [10, 1024, 1024, 2500, 3000]),
    (1100, [*range(7, 1100, 31), 1100]),
    (1029, [1024, 1029]),
]


@pytest.mark.parametrize("N, ends", CUTS, ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_copy_in_e4m3(N, ends, backend, device):
    state, grads = make(N, device)
    state.pop("ema_copy")
    # from nearly nothing to what saturates, whatever else was drawn
    state["ema"].mul_(torch.linspace(0.1, 30, N, device=device))
    # the interpreter rounds to e4m3 wrongly: there the kernel stores fp32 what it would round
    exact = backend == "triton" and knobs.runtime.interpret
    copy = fp8_copy(N, ends, device, torch.float32 if exact else E4M3)
    seen = copy.amax.clone()
    clip = torch.tensor(0.5, device=device)
    weights = state["weights"]
    ema = state["ema"]
    buffers = (state["param"], grads[0], state["exp_avg"], state["exp_avg_sq"])
    if exact:  # without eps what the kernel computes beyond the end is NaN
        kernels.adamw_ema_(
            *buffers, weights, ema, *copy[:4], clip, 1, 3e-2, 0.8, 0.95, 0.0, 0.1, 0.7
        )
    else:
        outputs = {"weights": weights, "ema": ema, "ema_copy": copy}
        adamw_ema_(
            *buffers,
            1,
            **HYPER | {"eps": 0.0},
            clip_scale=clip,
            decay=0.7,
            backend=backend,
            **outputs,
        )
    expected, index = rounded_to_e4m3(state["ema"], copy)
    error = (copy.values.cpu().double() - expected).abs()
    assert (error <= (1e-6 * expected.abs() if exact else 2**-4 * expected.abs() + 2**-10)).all()
    assert (expected.abs() == 448).any() and (expected.abs() < 100).any(), (
        "both sides of the limit are met"
    )
    largest = torch.zeros(len(ends)).scatter_reduce_(0, index, state["ema"].abs().cpu(), "amax")
    assert torch.equal(copy.amax.cpu(), torch.maximum(largest, seen.cpu()))


def test_an_e4m3_copy_of_nan_is_nan(device):
    state, grads = make(40, device)
    state["ema"][7] = float("nan")
    copy = fp8_copy(40, [40], device, torch.float32 if knobs.runtime.interpret else E4M3)
    kernels.adamw_ema_(
        state["param"],
        grads[0],
        state["exp_avg"],
        state["exp_avg_sq"],
        None,
        state["ema"],
        *copy[:4],
        None,
        1,
        1e-3,
        0.9,
        0.999,
        1e-8,
        0.0,
        0.9,
    )
    assert copy.values.float().isnan().nonzero().tolist() == [[7]]


def test_power_of_two_multiplier(device):
    amax = torch.tensor([0.0, 1e-45, 1e-37, 1e-20, 0.7, 1.0, 3.99, 4.0, 1e10, 3e38], device=device)
    multiplier = power_of_two_multiplier(amax)
    assert (torch.frexp(multiplier).mantissa == 0.5).all() and multiplier.isfinite().all(), (
        "powers of two"
    )
    assert multiplier.reciprocal().isfinite().all() and (multiplier.reciprocal() > 0).all()
    assert ((multiplier * amax)[3:] >= 64).all() and (multiplier * amax < 128).all()


def test_e4m3_copy_without_memory():
    """Meta tensors work for this form of the operator, too."""
    N = 100
    full = [torch.empty(100, device="meta") for _ in range(5)]
    copy = Fp8Copy.of(torch.empty(N, dtype=E4M3, device="meta"), full[0][:2], full[1][:2], [40, N])
    adamw_ema_(*full[:4], 1, lr=0.1, ema=full[4], ema_copy=copy)


def test_defaults_are_the_papers(device):
    """AdamW 1e-4, no decay, EMA 0.9999: the moves are small, so differences are compared."""
    state, grads = make(200, device)
    before = {k: v.double() for k, v in state.items()}
    truth = {k: v.clone() for k, v in before.items()}
    step_all(adamw_ema_, state, grads, lr=1e-4, backend="triton")
    step_all(adamw_ema_ref_, truth, [g.double() for g in grads], lr=1e-4)
    for name, unit in (("param", 3e-7), ("ema", 3e-7)):
        moved = state[name].double() - before[name]
        expected = truth[name] - before[name]
        assert expected.abs().max() > 1e-4
        # the storage rounds at 1.2e-7 of values up to 4, five times
        torch.testing.assert_close(moved, expected, atol=5 * unit, rtol=1e-5)


def test_continues_torch_adamw_and_back(device):
    """Two steps of torch.optim.AdamW, two of ours on its state and one of torch's on ours equal
    five of torch's.
    """
    state, grads = make(777, device)
    ours, theirs = (torch.nn.Parameter(state["param"].clone()) for _ in range(2))
    mixed, plain = (torch.optim.AdamW([p], **HYPER, foreach=False) for p in (ours, theirs))
    for grad in grads:
        theirs.grad = grad
        plain.step()
    for k, grad in enumerate(grads, 1):
        ours.grad = grad
        if k in (3, 4):
            entry = mixed.state[ours]
            adamw_ema_(
                ours, grad, entry["exp_avg"], entry["exp_avg_sq"], k, **HYPER, backend="triton"
            )
            entry["step"] += 1
        else:
            mixed.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    for name, unit in (("exp_avg", 1e-6), ("exp_avg_sq", 1e-6), ("step", 0)):
        torch.testing.assert_close(
            mixed.state[ours][name], plain.state[theirs][name], atol=unit * 0.1, rtol=unit
        )


def test_slices_of_a_flat_buffer(device):
    """A rank's shard at any offset; its neighbors stay untouched."""
    for start, stop in ((16, 96), (3, 1100), (1, 4)):
        full, grads = make(1200, device)
        before = {k: v.clone() for k, v in full.items()}
        check(
            {k: v[start:stop] for k, v in full.items()},
            [g[start:stop] for g in grads],
            **HYPER,
            decay=0.5,
        )
        for name, x in full.items():
            torch.testing.assert_close(
                x[:start], before[name][:start], rtol=0, atol=0, equal_nan=True
            )
            torch.testing.assert_close(
                x[stop:], before[name][stop:], rtol=0, atol=0, equal_nan=True
            )


def test_a_zero_gradient_only_decays(device):
    state, _ = make(40, device)
    expected = state["param"] * (1 - 3e-2 * 0.1)
    step_all(adamw_ema_, state, [torch.zeros(40, device=device)], **HYPER, backend="triton")
    torch.testing.assert_close(state["param"], expected)
    assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_the_ends_of_the_average_are_exact(device):
    for decay in (0.0, 1.0):
        state, grads = make(100, device)
        old = state["ema"].clone()
        step_all(adamw_ema_, state, grads[:1], **HYPER, decay=decay, backend="triton")
        assert torch.equal(state["ema"], old if decay else state["param"])


def test_fp64_goes_to_the_reference(device):
    state, grads = make(20, device)
    state = {k: v.double() if v.dtype == torch.float32 else v for k, v in state.items()}
    truth = {k: v.clone() for k, v in state.items()}
    step_all(adamw_ema_, state, grads, **HYPER, backend="triton")
    step_all(adamw_ema_ref_, truth, grads, **HYPER)
    assert torch.equal(state["param"], truth["param"]) and torch.equal(
        state["ema_copy"], truth["ema_copy"]
    )


def test_any_shape_and_nothing(device):
    shaped, grads = make(60, device)
    flat = {k: v.clone() for k, v in shaped.items()}
    shaped = {k: v.view(3, 20) for k, v in shaped.items()}
    step_all(adamw_ema_, shaped, [g.view(3, 20) for g in grads], **HYPER, backend="triton")
    step_all(adamw_ema_, flat, grads, **HYPER, backend="triton")
    assert all(torch.equal(shaped[k].view(-1), flat[k]) for k in flat)
    empty, grads = make(0, device)
    step_all(adamw_ema_, empty, grads, **HYPER, backend="triton")


def test_autograd_sees_the_change(device):
    state, grads = make(30, device)
    versions = {k: v._version for k, v in state.items()}
    step_all(adamw_ema_, state, grads[:1], **HYPER, backend="triton")
    assert all(v._version > versions[k] for k, v in state.items())


def test_operator_registration_and_compile(device):
    state, grads = make(40, device)
    names = ("exp_avg", "exp_avg_sq", "weights", "ema", "ema_copy")
    clip = torch.tensor(0.5, device=device)
    args = (1, 1e-3, 0.9, 0.999, 1e-8, 0.01, 0.9)
    state["weights"].zero_(), state["ema_copy"].zero_()
    torch.library.opcheck(
        _op,
        (
            state["param"],
            grads[:1],
            *(state[k] for k in names),
            None,
            None,
            None,
            clip,
            *args,
            None,
            None,
        ),
    )
    moments = state["exp_avg"], state["exp_avg_sq"]
    torch.library.opcheck(
        _op, (state["param"], grads[:1], *moments, *[None] * 7, *args, None, None)
    )
    numbers = device_step(3, True, device).numbers
    pieces = [grads[0][:8], grads[1][16:32]]
    for given in (None, numbers):
        torch.library.opcheck(
            _op, (state["param"], pieces, *moments, *[None] * 7, *args, [8, 16], given)
        )
    same = {k: v.clone() for k, v in state.items()}
    fn = torch.compile(
        lambda s, g: step_all(adamw_ema_, s, [g], **HYPER, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    fn(state, grads[1])
    step_all(adamw_ema_ref_, same, grads[1:2], **HYPER)
    torch.testing.assert_close(state["param"], same["param"])
    torch.testing.assert_close(state["ema"], same["ema"])


def test_rejects_bad_input(device):
    state, (grad, *_) = make(10, device)
    p = state["param"]
    m = state["exp_avg"]
    v = state["exp_avg_sq"]
    good = {"param": p, "grad": grad, "exp_avg": m, "exp_avg_sq": v, "step": 1, "lr": 1e-3}
    for change, match in (
        ({"grad": grad[:9]}, "one shape"),
        ({"exp_avg": torch.zeros(20, device=device)[::2]}, "contiguous"),
        ({"ema": torch.zeros(10, device="meta")}, "one shape and device"),
        ({"exp_avg": m.bfloat16()}, "of one dtype, fp32 or fp64"),
        (
            {"param": p.half(), "exp_avg": m.half(), "exp_avg_sq": v.half()},
            "of one dtype, fp32 or fp64",
        ),
        ({"grad": grad.long()}, "grad fp32, bf16 or fp16"),
        ({"grad": grad.to(torch.float8_e5m2)}, "grad fp32, bf16 or fp16"),
        ({"weights": p.clone()}, "bf16 or fp16"),
        ({"ema_copy": p.bfloat16()}, "expected ema where"),
        ({"ema_copy": fp8_copy(10, [10], device)}, "expected ema where"),
        (
            {"ema": p.clone(), "ema_copy": fp8_copy(9, [9], device)},
            r"ema_copy.values as param, .* got \[9\]",
        ),
        (
            {"ema": p.clone(), "ema_copy": fp8_copy(10, [10], device, torch.bfloat16)},
            "e4m3, got .* torch.bfloat16",
        ),
        (
            {"ema": p.clone(), "ema_copy": fp8_copy(10, [10], device)._replace(bounds=(4, 10))},
            "ends .S. int64",
        ),
        ({"ema": p.clone(), "ema_copy": fp8_copy(10, [4, 9], device)}, r"end at 10, got \(4, 9\)"),
        ({"ema": p.clone(), "ema_copy": fp8_copy(10, [5, 4, 10], device)}, "never decrease"),
        (
            {
                "ema": p.clone(),
                "ema_copy": fp8_copy(10, [4, 10], device)._replace(
                    amax=torch.zeros(4, device=device)[::2]
                ),
            },
            "contiguous",
        ),
        (
            {
                "ema": p.clone(),
                "ema_copy": fp8_copy(10, [10], device)._replace(
                    values=torch.nested.nested_tensor([p])
                ),
            },
            "ema_copy.values as a dense tensor, got a nested one",
        ),
        ({"step": 0}, "step >= 1"),
        ({"step": torch.ones((), device=device)}, "or a DeviceStep, got tensor"),
        ({"step": DeviceStep([1.0] * 4)}, "step.numbers as a tensor, got list"),
        ({"step": DeviceStep(torch.ones(4, device=device))}, r"\[4\] fp64.* got .*float32"),
        ({"step": DeviceStep(torch.ones(3, device=device).double())}, r"\[4\] fp64.* got .*\[3\]"),
        ({"step": DeviceStep(torch.ones(4, device="meta").double())}, r"\[4\] fp64.* got .*meta"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"weight_decay": float("inf")}, "weight_decay=inf"),
        ({"betas": (0.9, 1.0)}, r"betas in \[0, 1\)"),
        ({"decay": 1.1}, "decay=1.1"),
        ({"clip_scale": torch.ones(2, device=device)}, "clip_scale with one number"),
    ):
        with pytest.raises(ValueError, match=match):
            adamw_ema_(**good | change)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_buffers_in_the_memory_of_others_are_refused(backend, device):
    state, (grad, *_) = make(40, device)
    good = state | {"grad": grad, "step": 1, "lr": 1e-3}
    halves = torch.zeros(60, device=device, dtype=torch.bfloat16)
    copy = fp8_copy(40, [10, 40], device)
    wide = torch.zeros(60, device=device)
    for change, second, first in (
        ({"exp_avg_sq": state["exp_avg"]}, "exp_avg_sq", "exp_avg"),
        ({"ema": state["param"]}, "ema", "param"),
        ({"grad": state["exp_avg"]}, "grad", "exp_avg"),
        ({"grad": state["param"]}, "grad", "param"),
        ({"ema_copy": state["weights"]}, "ema_copy", "weights"),
        ({"weights": halves[:40], "ema_copy": halves[20:]}, "ema_copy", "weights"),
        ({"exp_avg": wide[20:], "exp_avg_sq": wide[:40]}, "exp_avg_sq", "exp_avg"),
        ({"weights": state["param"].view(torch.bfloat16)[40:]}, "weights", "param"),
        ({"ema_copy": copy._replace(amax=copy.multiplier)}, "ema_copy.multiplier", "ema_copy.amax"),
        ({"clip_scale": state["ema"][3]}, "clip_scale", "ema"),
        ({"step": DeviceStep(state["ema"].view(torch.float64)[:4])}, "step.numbers", "ema"),
    ):
        arguments = good | change
        before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        message = f"^adamw_ema_: .* got {second} in the memory of {first}$"
        with pytest.raises(ValueError, match=message):
            adamw_ema_(**arguments, backend=backend)
        for name, old in before.items():
            torch.testing.assert_close(arguments[name], old, rtol=0, atol=0, equal_nan=True)
    # neighbours are no overlap
    buffer = torch.zeros(80, device=device)
    adamw_ema_(**good | {"exp_avg": buffer[40:], "exp_avg_sq": buffer[:40]}, backend=backend)
    assert buffer.all()
