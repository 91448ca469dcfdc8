"""AdamW with the EMA in its pass: against torch's, in DeepSpeed, and with gradients of NaN."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from bare_training import train
from tiny_config import config

from sra_fast.data.dataset import make_dataset
from sra_fast.training.plan import make_plan
from sra_fast.training.trainer import build
from sra_fast.zero.optimizer import AdamWEMA
from sra_fast.zero.process_group import init_distributed

SETTINGS = dict(lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


def pair():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (33,))]
    return ours, [torch.nn.Parameter(p.detach().clone()) for p in ours]


def set_gradients(step, *sides):
    generator = torch.Generator().manual_seed(step)
    for both in zip(*sides, strict=True):
        gradient = torch.randn(both[0].shape, generator=generator)
        for p in both:
            p.grad = gradient.clone()


def test_steps_of_torchs_adamw_and_of_ours_can_alternate():
    ours, theirs = pair()
    a = AdamWEMA(ours, ema_decay=0.5, **SETTINGS)
    b = torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(3):
        set_gradients(step, ours, theirs)
        a.step()
        b.step()
    third = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    c = torch.optim.AdamW(third, **SETTINGS)
    # torch's AdamW continues from our state
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    set_gradients(3, ours, theirs, third)
    for optimizer in (a, b, c):
        optimizer.step()
    for p, q, r in zip(ours, theirs, third, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(r, q, rtol=1e-6, atol=1e-6)
        assert a.state[p]["step"] == b.state[q]["step"] == 4


def test_ema_copy_and_clipping_in_the_same_pass():
    ours, theirs = pair()
    a = AdamWEMA(ours, ema_decay=0.75, **SETTINGS)
    b = torch.optim.AdamW(theirs, **SETTINGS)
    ema = [p.detach().clone() for p in ours]
    a.copies = {p: torch.zeros_like(p, dtype=torch.bfloat16) for p in ours}
    for p in ours:
        a.state[p]["ema"] = p.detach().clone()
    set_gradients(0, ours, theirs)
    a.clip_scale = torch.tensor(0.5)
    for q in theirs:
        q.grad *= 0.5
    a.step()
    b.step()
    for p, q, mean in zip(ours, theirs, ema, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a.state[p]["ema"], 0.75 * mean + 0.25 * q, rtol=1e-6, atol=1e-6)
        assert torch.equal(a.copies[p], a.state[p]["ema"].bfloat16())


def run(tmp_path, *args, ds=None):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds or {}))
    cfg = config("--train.steps", "6", "--train.log_every", "1", *args)
    trainer = build(make_plan(cfg, str(path)), init_distributed())
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    return trainer, [row["loss"] for row in train(trainer, make_dataset(cfg), folder)]


@pytest.mark.parametrize("stage", ["1", "2"])
def test_accumulation_of_bf16_gradients_in_fp32(tmp_path, stage, capsys):
    """Both implementations work when DeepSpeed keeps other gradients or has another optimizer.

    It keeps other gradients at stage 2 and has another optimizer at stage 1.
    """
    ds = {"data_types": {"grad_accum_dtype": "fp32"}}
    args = (
        f"--train.precision bf16 --train.zero_stage {stage} --train.micro_batch 4 --optim.lr 0.003"
    )
    fused, plain = (
        run(tmp_path, *args.split(), "--optim.implementation", name, ds=ds)[1]
        for name in ("fused", "torch")
    )
    assert fused == pytest.approx(plain, rel=1e-3)
    assert fused[-1] < fused[0]
    # at stage 1 DeepSpeed prints how much memory is used, where a run's summary is to stand alone
    assert capsys.readouterr().out == ""


def test_one_process_leaves_gradients_where_they_are_unless_they_accumulate_in_fp32(tmp_path):
    args = ["--train.precision", "bf16", "--train.micro_batch", "4"]
    for stage, ds, alone in (
        ("1", {}, True),
        ("2", {}, True),
        ("2", {"data_types": {"grad_accum_dtype": "fp32"}}, False),
    ):
        trainer, _ = run(tmp_path, *args, "--train.zero_stage", stage, ds=ds)
        assert trainer.engine.optimizer.step.takes_gradients == alone
        assert trainer.engine.enable_backward_allreduce != alone
        assert bool(trainer.engine.optimizer._grad_acc_hooks) != alone


def test_every_stage_clips_alike(tmp_path):
    """To a fifth of the norm or less. With this eps AdamW depends on the scale of the gradients."""
    args = "--train.precision bf16 --optim.eps 0.1 --optim.lr 0.01 --optim.clip"
    clipped = f"{args} 0.05 --train.zero_stage"
    runs = [run(tmp_path, *f"{clipped} {stage}".split()) for stage in range(4)]
    free = run(tmp_path, *f"{args} 0".split())[1]
    for trainer, losses in runs:
        assert float(trainer.grad_norm) > 0.25 and losses == pytest.approx(runs[1][1], rel=1e-4)
    assert free != pytest.approx(runs[1][1], rel=1e-2)


@pytest.mark.parametrize(
    "stage, precision", [("0", "fp32"), ("0", "bf16"), ("1", "bf16"), ("2", "fp32"), ("3", "bf16")]
)
def test_gradients_that_are_not_numbers_stop_the_run(tmp_path, monkeypatch, stage, precision):
    """DeepSpeed does not look for them. The norm shows them one log interval later, and nothing is
    saved.
    """
    from sra_fast.alignment.objective import SRAObjective

    forward = SRAObjective.forward

    def poisoned(self, *args):
        loss, parts = forward(self, *args)
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss, parts

    monkeypatch.setattr(SRAObjective, "forward", poisoned)
    with pytest.raises(FloatingPointError, match="gradients not finite"):
        run(tmp_path, "--train.zero_stage", stage, "--train.precision", precision)
    assert not list(tmp_path.glob("*/checkpoints"))


@pytest.mark.parametrize("stage, waits", [(1, 0), (3, 2)])
def test_stage_3_gathers_only_what_was_written(monkeypatch, stage, waits):
    """The stream in which DeepSpeed gathers parameters does not wait for the update: a race on a
    GPU.
    """
    trainer = build(make_plan(config("--train.zero_stage", str(stage))), init_distributed())
    calls = []
    if trainer.device.type == "cuda":
        # kernels ask for the current stream as well: it has to be a real one
        monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda self: calls.append(1))
    else:
        stream = SimpleNamespace(synchronize=lambda: calls.append(1))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        trainer.device = torch.device("cuda")
    trainer.after_step(teacher_runs=False)
    trainer.refresh_teacher()
    assert len(calls) == waits


@pytest.mark.parametrize("policy", ["none", "norm", "full"])
def test_recomputation_reaches_the_students_blocks(policy):
    trainer = build(make_plan(config("--train.recompute", policy)), init_distributed())
    assert {block.recompute for block in trainer.student.blocks} == {policy}
    assert {block.recompute for block in trainer.engine.module.teacher.blocks} == {"none"}
