"""How the row kernels cut their work, and the bytes they move for it."""
import pytest
import torch
from conftest import DEVICE
from rows import count_bytes

from sra_fast.kernels import _rows
from sra_fast.ops import gated_residual  # registers the operators

ops = torch.ops.sra_fast
counted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter loads and stores")
B, T, S = 1, 12, 4


def arrays(D, *shapes):
    torch.manual_seed(0)
    return [torch.randn(*shape, D, device=DEVICE) for shape in shapes]


def bytes_of(monkeypatch, op, *args):
    with count_bytes(monkeypatch) as moved:
        out = op(*args)
    return sum(moved.values()), out


@counted
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("D", [72, 1152])
def test_bytes_gated_residual(D, with_bias, monkeypatch):
    """Exactly what the docstring of kernels/gated_residual.py states; a bias is read once per program."""
    x, y, dx, gate, bias = arrays(D, (B, T), (B, T), (B, T), (B,), ())
    bias = bias if with_bias else None
    P, n = _rows.split_rows(x, 1, 2)[0], int(with_bias)
    moved, _ = bytes_of(monkeypatch, ops.gated_residual_fwd, x, y, bias, gate, None)
    assert moved == 3 * S * B * T * D + (1 + n) * S * P * B * D
    moved, _ = bytes_of(monkeypatch, ops.gated_residual_bwd, dx, y, bias, gate, None)
    assert moved == 3 * S * B * T * D + (8 + S) * P * B * D + S * B * D + n * ((8 + S) * P * B * D + 4 * B * D)


@counted
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("D", [72, 1152])
def test_bytes_gated_residual_adaln(D, with_bias, monkeypatch):
    x, y, dx, dh, gate, shift, scale, bias = arrays(D, *[(B, T)] * 4, *[(B,)] * 3, ())
    bias = bias if with_bias else None
    n, P = int(with_bias), _rows.split_rows(x, 1, 2)[0]
    moved, out = bytes_of(monkeypatch, ops.gated_residual_adaln_fwd, x, y, bias, gate, shift, scale, None, 1e-6, False)
    assert moved == 4 * S * B * T * D + (3 + n) * S * P * B * D + 8 * B * T
    x_new, _, mean, rstd = out
    P = _rows.split_rows(x, 1, 4)[0]
    args = (dx, dh, x_new, y, bias, gate, scale, None, mean, rstd)
    moved, _ = bytes_of(monkeypatch, ops.gated_residual_adaln_bwd, *args)
    expected = 6 * S * B * T * D + (24 + 2 * S) * P * B * D + 3 * S * B * D + 8 * B * T
    assert moved == expected + n * ((8 + S) * P * B * D + 4 * B * D)


@counted
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("D", [72, 1152])
def test_bytes_adaln(D, per_token, monkeypatch):
    x, dy, shift, scale = arrays(D, *[(B, T)] * 2, *[(B, T) if per_token else (B,)] * 2)
    P = _rows.split_rows(x, 1, 3 if per_token else 1)[0]
    moved, (_, mean, rstd) = bytes_of(monkeypatch, ops.adaln_fwd, x, shift, scale, None, 1e-6, False)
    # where every token has its own vectors, the loads ahead of the loop go unused; the compiler drops them
    assert moved == (4 if per_token else 2) * S * B * T * D + 2 * S * P * B * D + 8 * B * T
    P = _rows.split_rows(x, 1, 3 if per_token else 2)[0]
    moved, _ = bytes_of(monkeypatch, ops.adaln_bwd, dy, x, scale, None, mean, rstd)
    if per_token:
        assert moved == 5 * S * B * T * D + S * P * B * D + 8 * B * T
    else:
        assert moved == 3 * S * B * T * D + (16 + S) * P * B * D + 2 * S * B * D + 8 * B * T


@counted
def test_a_row_of_a_group_is_moved_once(monkeypatch):
    """With groups every row is still read and written by one program only."""
    x, y, gate = arrays(72, (B, T), (B, T), (B, 3))
    group = torch.tensor([[0, 1, 0, 0, 2, 1, 1, 0, 2, 0, 0, 0]], device=DEVICE)
    P = _rows.split_rows(x, 3, 2)[0]
    moved, _ = bytes_of(monkeypatch, ops.gated_residual_fwd, x, y, None, gate, group)
    assert moved == 3 * S * B * T * 72 + S * P * 3 * B * 72 + 8 * 3 * B * T


def test_width_is_cut_without_waste():
    expected = {64: (64, 0), 72: (64, 8), 384: (256, 128), 768: (512, 256), 1152: (1024, 128), 1000: (1024, 0)}
    assert {D: (_rows.width_config(D)["HEAD"], _rows.width_config(D)["TAIL"]) for D in expected} == expected


@pytest.mark.parametrize("images, steps", [(1, 1), (1, 512), (32, 128), (64, 128), (256, 128), (1000, 512), (3, 7)])
def test_splits_fill_the_device(images, steps):
    slots = 3 * 132
    splits = _rows.num_splits(images, steps, slots)
    assert 1 <= splits <= steps
    # idle slots of the last wave and the uneven last split cost at most a third, where there is work for every slot
    waves, length = -(-images * splits // slots), -(-steps // splits)
    if images * steps >= 4 * slots:
        assert waves * slots * length <= 1.34 * images * steps
