"""Training learns: digits, a few hundred steps, with SRA and without, kernels off."""

import pytest
import torch

from sra_fast.config.cli import parse_train
from sra_fast.data.digits import Digits
from sra_fast.evaluation.digits import evaluate_digits
from sra_fast.training.loop import train
from sra_fast.training.plan import make_run_plan
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed

CONFIG = [
    "--model.name",
    "SiT-S/2",
    "--model.input_size",
    "8",
    "--model.in_channels",
    "1",
    "--model.num_classes",
    "10",
    "--model.hidden_size",
    "64",
    "--model.depth",
    "4",
    "--model.num_heads",
    "2",
    "--align.student_layer",
    "1",
    "--align.teacher_layer",
    "3",
    "--data.name",
    "digits",
    "--train.global_batch",
    "32",
    "--train.steps",
    "300",
    "--train.precision",
    "fp32",
    "--train.ema_decay",
    "0.98",
    "--train.log_every",
    "50",
    "--optim.lr",
    "0.002",
    "--optim.warmup_steps",
    "30",
    "--sample.method",
    "euler",
]


@pytest.mark.parametrize("align", ["ema_teacher", "none"])
def test_training_learns(tmp_path, monkeypatch, align):
    monkeypatch.setenv("SRA_FAST_BACKEND", "torch")
    plan = make_run_plan(parse_train([*CONFIG, "--align.target", align])[0], None)
    trainer = build(plan.plan, init_distributed())
    rows = train(trainer, plan.data, tmp_path)
    first, last = rows[0], rows[-1]
    # the velocity's variance, 1.7, is the loss of a network that predicts nothing
    assert first["denoise"] > 1.5 and last["denoise"] < 0.5 * first["denoise"], (first, last)
    if align == "none":
        assert "align" not in last and last["align_weight"] == 0
    else:
        # the projected student explains most of the teacher's features
        assert last["align"] < 0.25 * first["align"], (first, last)
        assert last["student_norm"] > 0.5 * last["teacher_norm"]


def test_teacher_in_any_precision_trains_alike(tmp_path):
    """bf16 training with a bf16, an fp32 and an fp8 teacher: the same loss to a fraction of a percent, not the same bits."""
    curves = {}
    for dtype in ("auto", "fp32", "fp8"):
        args = [
            "--train.precision",
            "bf16",
            "--align.teacher_dtype",
            dtype,
            "--train.steps",
            "20",
            "--train.log_every",
            "5",
        ]
        plan = make_run_plan(parse_train([*CONFIG, *args])[0], None)
        (tmp_path / dtype).mkdir()
        curves[dtype] = [
            row["loss"]
            for row in train(build(plan.plan, init_distributed()), plan.data, tmp_path / dtype)
        ]
    for dtype in ("fp32", "fp8"):
        assert (
            curves[dtype] == pytest.approx(curves["auto"], rel=1e-2)
            and curves[dtype] != curves["auto"]
        )


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="300 steps take hours in Triton's interpreter"
)
def test_kernels_on_and_off_learn_alike(tmp_path, monkeypatch):
    """The same loss curve with the Triton kernels and with the references, to rounding at first, within 2 % at the end."""
    curves = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SRA_FAST_BACKEND", backend)
        plan = make_run_plan(parse_train([*CONFIG, "--train.log_every", "10"])[0], None)
        (tmp_path / backend).mkdir()
        curves.append(
            [
                row["loss"]
                for row in train(
                    build(plan.plan, init_distributed()), plan.data, tmp_path / backend
                )
            ]
        )
    off, on = curves
    assert on[:3] == pytest.approx(off[:3], rel=1e-4)
    assert on[-5:] == pytest.approx(off[-5:], rel=2e-2)


def test_scores_tell_good_from_bad():
    real, noise = Digits(held_out=True), torch.rand(360, 1, 8, 8) * 2 - 1
    good, bad = evaluate_digits(real.images, real.labels), evaluate_digits(noise, real.labels)
    shuffled = evaluate_digits(real.images, real.labels.roll(1))
    assert good["label_accuracy"] == good["svm_accuracy"] > 0.95 and good[
        "frechet"
    ] == pytest.approx(0, abs=1e-4)
    assert bad["label_accuracy"] < 0.3 and bad["frechet"] > 10 * good["frechet_train"]
    assert shuffled["label_accuracy"] < 0.3
