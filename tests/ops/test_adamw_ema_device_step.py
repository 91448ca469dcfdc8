"""The optimizer step whose number, and whether it is taken, are on the device."""

import pytest
import torch
from conftest import assert_kernel_close
from test_adamw_ema import CUTS, HYPER, OUTPUTS, SIZES, device_step, fp8_copy, make, step_all
from test_adamw_ema_pieces import PIECES
from triton import knobs

from sra_fast.kernels import adamw_ema as kernels
from sra_fast.ops.adamw_ema import DeviceStep, adamw_ema_, adamw_ema_ref_

BACKENDS = ("triton", "torch")


def update(state, grad, step, backend, **kw):
    buffers = {name: state.get(name) for name in OUTPUTS}
    moments = (state["exp_avg"], state["exp_avg_sq"])
    adamw_ema_(state["param"], grad, *moments, step, **buffers, **HYPER, **kw, backend=backend)


def copies(state):
    return {name: value.clone() for name, value in state.items()}


def same_bits(one, other):
    """Equal bit for bit, NaNs and the signs of zeros included."""
    return all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


def after_two_updates(N, device, dtype=torch.float32):
    """Buffers with moments, and what is there besides: a negative zero, rounded copies."""
    state, grads = make(N, device, dtype)
    step_all(adamw_ema_, state, grads[:2], **HYPER, decay=0.7, backend="torch")
    state["ema"][0] = -0.0
    return state, grads[2:]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 1000, 10**6])
def test_numbers_of_the_host_and_of_the_device_give_the_same_step(count, backend, device):
    state, (grad, *_) = make(1152 + 7, device)
    clip = torch.tensor(0.37, device=device)
    truth = {k: v.double() if v.dtype == torch.float32 else v.clone() for k, v in state.items()}
    host = copies(state)
    update(truth, grad.double(), count, "torch", clip_scale=clip, decay=0.7)
    update(host, grad, count, backend, clip_scale=clip, decay=0.7)
    update(state, grad, device_step(count, True, device), backend, clip_scale=clip, decay=0.7)
    for name in ("param", "exp_avg", "exp_avg_sq", "ema"):
        assert_kernel_close(state[name].double(), host[name].double(), truth[name], floor=3e-7)
    # in half precision what was rounded may differ by one unit
    torch.testing.assert_close(state["weights"], host["weights"], rtol=2**-7, atol=1e-7)
    torch.testing.assert_close(state["ema_copy"], host["ema_copy"], rtol=2**-7, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("N", SIZES)
def test_an_update_that_is_not_taken_changes_no_bit(N, backend, value, device):
    """And the count may be 0: the first update of a run."""
    state, (grad, *_) = after_two_updates(N, device)
    grad[N // 2] = value
    before = copies(state)
    for count, clip in ((0, None), (3, torch.tensor(value, device=device))):
        step = device_step(count, False, device)
        update(state, grad, step, backend, clip_scale=clip, decay=0.7)
        assert same_bits(state, before)
    # the same call changes everything when it is taken
    grad[N // 2] = 1.0
    update(state, grad, device_step(3, True, device), backend, decay=0.7)
    assert not any(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("cuts", PIECES.values(), ids=PIECES)
def test_pieces_that_are_not_taken(cuts, device):
    state, (grad, *_) = after_two_updates(3000, device, torch.bfloat16)
    grad[cuts[0][0]] = float("nan")
    pieces = [(begin, grad[begin:end].clone()) for begin, end in cuts]
    before = copies(state)
    update(state, pieces, device_step(3, False, device), "triton", decay=0.7)
    assert same_bits(state, before)
    whole = copies(state)
    for _, piece in pieces:
        piece.nan_to_num_()
    gradient = torch.zeros_like(grad)
    for begin, piece in pieces:
        gradient[begin : begin + len(piece)] = piece
    step = device_step(3, True, device)
    update(state, pieces, step, "triton", decay=0.7)
    update(whole, gradient, step, "triton", decay=0.7)
    assert same_bits(state, whole)


@pytest.mark.parametrize("N, ends", CUTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_in_e4m3_that_is_not_taken(N, ends, backend, device):
    """Neither its values nor its largest magnitudes move. With eps 0 lanes without data hold
    NaN.
    """
    state, (grad, *_) = after_two_updates(N, device)
    state.pop("ema_copy")
    interpreted = backend == "triton" and knobs.runtime.interpret
    copy = fp8_copy(N, ends, device, *[torch.float32] * interpreted)
    copy.measure_(state["ema"] * 0.5)
    copy.store_(state["ema"] * 0.5)
    held = {**state, "values": copy.values, "amax": copy.amax}
    before = copies(held)
    grad[-1] = float("nan")
    step = device_step(3, False, device)
    moments = (state["exp_avg"], state["exp_avg_sq"])
    if interpreted:
        # the interpreter rounds to e4m3 wrongly: the launcher stores fp32 what it would round
        outputs = (state["weights"], state["ema"], *copy[:4], None)
        kernels.adamw_ema_(
            state["param"], grad, *moments, *outputs, 0, 3e-2, 0.8, 0.95, 0.0, 0.1, 0.7,
            numbers=step.numbers,
        )  # fmt: skip
    else:
        outputs = {"weights": state["weights"], "ema": state["ema"], "ema_copy": copy}
        settings = HYPER | {"eps": 0.0}
        adamw_ema_(
            state["param"], grad, *moments, step, **settings, **outputs, decay=0.7, backend=backend
        )
    assert same_bits(held, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_factor_of_the_learning_rate(backend, device):
    """It multiplies the decay of the weights, too; a factor of 1 changes no bit."""
    state, (grad, *_) = after_two_updates(300, device)
    half = copies(state)
    one = copies(state)
    expected = copies(state)
    update(half, grad, device_step(3, True, device, 0.5), backend, decay=0.7)
    update(one, grad, device_step(3, True, device, 1.0), backend, decay=0.7)
    update(state, grad, device_step(3, True, device), backend, decay=0.7)
    assert same_bits(one, state)
    buffers = {name: expected[name] for name in OUTPUTS}
    moments = (expected["exp_avg"], expected["exp_avg_sq"])
    settings = HYPER | {"lr": HYPER["lr"] / 2}
    adamw_ema_(
        expected["param"], grad, *moments, 3, **settings, **buffers, decay=0.7, backend=backend
    )
    torch.testing.assert_close(half["param"], expected["param"], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(half["param"], state["param"], rtol=1e-4, atol=0)


def test_the_reference_in_fp64_without_a_read(device):
    """On every device the reference selects, it does not look: fake tensors have nothing to read."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state = {name: torch.ones(8, dtype=torch.float64) for name in ("p", "g", "m", "v", "ema")}
        one = torch.ones((), dtype=torch.float64)
        step = device_step(1, True, "cpu")._replace(numbers=torch.stack([one] * 4))
        adamw_ema_ref_(
            state["p"], state["g"], state["m"], state["v"], step, lr=0.1, ema=state["ema"]
        )


def test_compiled_without_a_break(device):
    """The numbers are made and used in one graph."""
    state, (grad, *_) = after_two_updates(40, device)
    same = copies(state)
    taken = torch.tensor(True, device=device)
    count = torch.tensor(3.0, dtype=torch.float64, device=device)

    def step(state, grad, count, taken):
        numbers = DeviceStep.of(count, HYPER["betas"], taken)
        update(state, grad, numbers, "triton", decay=0.7)

    torch.compile(step, fullgraph=True, backend="aot_eager")(state, grad, count, taken)
    step(same, grad, count, taken)
    assert same_bits(state, same)


def test_numbers_are_those_of_the_formulas(device):
    beta1, beta2 = HYPER["betas"]
    for count, taken in ((1, True), (7, False)):
        numbers = device_step(count, taken, device, 0.25).numbers.tolist()
        expected = [1 / (1 - beta1**count), (1 - beta2**count) ** -0.5, 0.25, float(taken)]
        assert numbers == pytest.approx(expected, rel=1e-14)
