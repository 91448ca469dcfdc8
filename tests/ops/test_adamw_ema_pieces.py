"""The optimizer step with a gradient in pieces, as autograd leaves it."""

from itertools import pairwise

import pytest
import torch
from test_adamw_ema import HYPER, fp8_copy, make, step_all

from sra_fast.kernels import adamw_ema as kernels
from sra_fast.ops.adamw_ema import adamw_ema_

# pieces [begin, end) of 3000 elements: across blocks of 1024, at their borders, several in one,
# gaps, ragged ends
PIECES = {
    "one": [(0, 3000)],
    "borders": [(0, 1024), (1024, 2048), (2048, 3000)],
    "gaps": [(8, 500), (1016, 1032), (1096, 2900)],
    "many": [(i, i + 24) for i in range(0, 2960, 40)],
    "ragged": [(0, 1001), (1008, 1009), (1016, 2999)],
    "a late one": [(2992, 3000)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cuts", PIECES.values(), ids=PIECES)
def test_a_gradient_in_pieces(cuts, dtype, device):
    """The same bits as from one piece with zeros in the gaps; nothing is read past the end of a
    piece.
    """
    state, (whole, *_) = make(3000, device, dtype)
    keep = torch.zeros(3000, dtype=torch.bool, device=device)
    pieces = []
    for begin, end in cuts:
        keep[begin:end] = True
        # among NaNs, as a matrix where it can be
        room = torch.full((end - begin + 32,), float("nan"), device=device, dtype=dtype)
        room[16 : 16 + end - begin] = whole[begin:end]
        piece = room[16 : 16 + end - begin]
        pieces.append((begin, piece.view(2, -1) if len(piece) % 2 == 0 else piece))
    results = []
    for grad in (torch.where(keep, whole, 0), pieces):
        held = {k: v.clone() for k, v in state.items()}
        step_all(
            adamw_ema_,
            held,
            [grad, grad],
            **HYPER,
            decay=0.7,
            clip_scale=torch.tensor(0.37, device=device),
            backend="triton",
        )
        results.append(held)
    assert all(torch.equal(results[0][name], results[1][name]) for name in state)
    held = {k: v.clone() for k, v in state.items()}
    step_all(
        adamw_ema_,
        held,
        [pieces, pieces],
        **HYPER,
        decay=0.7,
        clip_scale=torch.tensor(0.37, device=device),
        backend="torch",
    )
    torch.testing.assert_close(held["param"], results[0]["param"], atol=1e-6, rtol=1e-6)


def test_pieces_and_a_copy_in_segments(device):
    """The two tables do not disturb each other: the same bits as from a gradient in one piece, in
    the ragged end too.
    """
    N = 3001
    cuts = [0, 8, 1032, 2040, 3001]
    results = []
    for in_pieces in (False, True):
        state, (grad, *_) = make(N, device)
        # in fp32: the interpreter rounds to e4m3 wrongly
        copy = fp8_copy(N, [10, 1024, 1024, 2500, N], device, torch.float32)
        begins = cuts[:-1] if in_pieces else None
        # each at an address of its own, that aligns every access
        pieces = [grad[begin:end].clone() for begin, end in pairwise(cuts)]
        kernels.adamw_ema_(
            state["param"],
            pieces if in_pieces else grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            state["weights"],
            state["ema"],
            *copy[:4],
            None,
            1,
            3e-2,
            0.8,
            0.95,
            1e-3,
            0.1,
            0.7,
            begins,
        )
        assert copy.values.abs().max() == 448 and (copy.amax > 0).sum() == 4
        results.append([state["param"], state["ema"], copy.values, copy.amax])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_pieces_follow_their_addresses(device):
    """Tables are cached by layout and by address: other tensors give other numbers."""
    state, grads = make(64, device)
    for grad in grads[:3]:
        before = {k: v.clone() for k, v in state.items()}
        step_all(
            adamw_ema_,
            state,
            [[(0, grad[:32].clone()), (32, grad[32:].clone())]],
            **HYPER,
            backend="triton",
        )
        step_all(adamw_ema_, before, [grad], **HYPER, backend="triton")
        assert torch.equal(state["param"], before["param"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_that_share_a_vector(dtype, device):
    """Pieces that begin and end anywhere are copied and padded with zeros; the copies overlap."""
    state, (grad, *_) = make(3000, device, dtype)
    cuts = [0, 3, 4, 9, 10, 11, 1021, 1027, 2051, 3000]
    pieces = [(begin, grad[begin:end]) for begin, end in pairwise(cuts)]
    same = {k: v.clone() for k, v in state.items()}
    step_all(adamw_ema_, state, [pieces], **HYPER, backend="triton")
    step_all(adamw_ema_, same, [grad], **HYPER, backend="triton")
    assert torch.equal(state["param"], same["param"]) and torch.equal(
        state["exp_avg_sq"], same["exp_avg_sq"]
    )


@pytest.mark.parametrize(
    "pieces, message",
    [
        (lambda g: [], "at least one, got list of"),
        (lambda g: [g], r"got list of \['Tensor'\]"),
        (lambda g: [(0.0, g)], "first element, tensor"),
        (lambda g: ((i, g) for i in [0]), "got <class 'generator'>"),
        (lambda g: [(0, g[:8]), (4, g[8:])], r"piece 1 is \[4, 36\), the one before ends at 8"),
        (lambda g: [(8, g[:8]), (0, g[:8])], "ascending order"),
        (lambda g: [(0, g[:8]), (40, g[8:])], r"within 40 elements: piece 1 is \[40, 72\)"),
        (lambda g: [(-8, g)], "ascending order"),
        (lambda g: [(0, g[:8]), (8, g[8:].bfloat16())], "piece 1: torch.bfloat16"),
        (lambda g: [(0, g[:8]), (8, g[8:].to("meta"))], "piece 1: .*meta"),
        (lambda g: [(0, g[::2])], "piece 0: .*contiguous False"),
        (lambda g: [(0, g.long())], "grad fp32, bf16 or fp16"),
        (lambda g: [(0, g[:8]), (8, g[8:].to_sparse())], "piece 1 of grad as a dense tensor"),
        (
            lambda g: [(0, torch.nested.nested_tensor([g]))],
            "piece 0 of grad as a dense tensor, got a nested one",
        ),
    ],
)
def test_pieces_that_do_not_fit_are_named(pieces, message, device):
    state, (grad, *_) = make(40, device)
    with pytest.raises(ValueError, match=message):
        step_all(adamw_ema_, state, [pieces(grad)], **HYPER)
