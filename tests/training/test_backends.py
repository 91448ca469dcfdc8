"""A whole training step with the kernels, in Triton's interpreter, is the one with the
references.
"""

import pytest
import torch
from bare_training import train
from golden import assert_matches
from zero_worker import tiny

from sra_fast.data.dataset import make_dataset
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_cuda.py compares whole curves on a GPU"
)


def run(folder, stage, backend, monkeypatch, *args):
    monkeypatch.setenv("SRA_FAST_BACKEND", backend)
    small = (
        "--model.patch_size 4 --model.depth 3 --align.teacher_layer 2 "
        "--train.global_batch 4 --train.steps 2 --train.save_every 100"
    )
    cfg = tiny(stage, "fp32", *small.split(), *args)
    trainer = build(make_plan(cfg), init_distributed())
    (folder / backend).mkdir()
    rows = train(trainer, make_dataset(cfg), folder / backend)
    return (
        [row["loss"] for row in rows],
        trainer.masters.gather(trainer.masters.flats),
        trainer.ema.full(),
    )


@pytest.mark.parametrize("stage, recompute", [(1, "none"), (1, "norm"), (3, "norm"), (3, "full")])
def test_kernels_and_references_take_the_same_steps(tmp_path, monkeypatch, stage, recompute):
    """At stage 3 a block's operators read the weights of several layers that ZeRO has gathered."""
    ours = run(tmp_path, stage, "triton", monkeypatch, "--train.recompute", recompute)
    theirs = run(tmp_path, stage, "torch", monkeypatch)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and len(set(ours[0])) == 2
    for state, expected in zip(ours[1:], theirs[1:], strict=True):
        for name, value in expected.items():
            assert_matches(state[name], value, 1e-5)
