"""The bounds check that every test of an interpreted kernel runs under (conftest.py) finds bad
accesses.
"""

import pytest
import torch
from conftest import DEVICE

from sra_fast.kernels import adaln, gated_residual

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's loads and stores")
B, T, D = 2, 12, 72


def launch(x=(B, T, D), y=(B, T, D), gate=(B, 3, D), group=(B, T)):
    """Launch on the front of one allocation per tensor that holds B more images: memory that a bad
    access may touch.
    """

    def front(shape, **kw):
        return torch.zeros(shape[0] + B, *shape[1:], **kw)[: shape[0]]

    return gated_residual.gated_residual_fwd(
        front(x), front(y), None, front(gate), front(group, dtype=torch.int64)
    )


def test_what_fits_passes():
    assert launch().shape == (B, T, D)


@pytest.mark.parametrize(
    "short",
    [{"group": (1, T)}, {"y": (1, T, D)}, {"y": (B, T - 1, D)}, {"gate": (1, 3, D)}],
    ids=str,
)
def test_a_load_past_the_end_is_found(short):
    with pytest.raises(Exception, match="create_masked_load: .* lie in none"):
        launch(**short)


def test_a_store_past_the_end_is_found():
    x = torch.zeros(B, T, D)
    mod = torch.zeros(B, D)
    scale = torch.zeros(B, T)
    with pytest.raises(Exception, match="create_masked_store: 1 elements lie in none"):
        adaln.adaln_fwd(x, mod, mod, None, 1e-6, False, y_scale=scale[:, :-1])
