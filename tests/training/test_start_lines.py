"""What a run says before its first step."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_config import config

from sra_fast.data.dataset import make_dataset
from sra_fast.data.facts import DataFacts
from sra_fast.training import start_lines as module
from sra_fast.training.checks import check_config
from sra_fast.training.flops import training_flops
from sra_fast.training.plan import Plan, fill_in, make_plan
from sra_fast.training.start_lines import idle_warnings, say_start, start_lines

FOLDER = Path("runs/x/000")


def trainer(cfg, world: int = 1, stage: int = 1, micro: int = 8, accumulation: int = 1):
    """What the lines need of a trainer: 1000 x 12 + 345 parameters, on a CPU, without a graph."""
    shapes = {"a": torch.Size([1000, 12]), "b": torch.Size([345])}
    return SimpleNamespace(
        cfg=cfg,
        plan=Plan(cfg, {}, stage, micro, accumulation, world),
        masters=SimpleNamespace(shapes=shapes),
        device=torch.device("cpu"),
        graphed=None,
        averages=cfg.train.averages,
    )


class Latents:
    """Facts of a set of latents that is not there."""

    def __init__(self, **facts):
        self.held = DataFacts("latents", (4, 32, 32), 1000, "data/imagenet256", **facts)

    def __len__(self):
        return 1_281_167

    def facts(self):
        return self.held


def test_the_six_lines_of_a_digits_run(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cfg = config("--train.steps", "400", "--train.precision", "fp32", "--train.save_every", "100")
    plain, aligned = training_flops(cfg)
    assert start_lines(trainer(cfg), make_dataset(cfg), FOLDER) == [
        "run      runs/x/000 (new)",
        "model    SiT-S/2, 12.3 k parameters; target ema_teacher and head add "
        f"{100 * (aligned - plain) / plain:.1f}% to the FLOPs of the plain step; EMA 48.2 KiB",
        "data     digits: 1437 images, 10 classes; pixels 1 x 8 x 8 in [-1, 1]",
        "machine  1 process on CPU (2 threads), fp32, ZeRO 1, no CUDA graph, blocks not compiled",
        # 1437 // 8 = 179 steps in an epoch
        "steps    0 to 400 (2.2 epochs), batch 8 = 1 process x 8 images x 1 micro-step; "
        "checkpoint every 100 steps, every 30 minutes and at the end, the newest 3 kept, no samples "
        "while training",
        "curves   runs/x/000/stats.jsonl; loss.png at checkpoints; "
        "tensorboard --logdir runs/x/000/tensorboard",
    ]


def test_a_resumed_run_on_latents_with_other_loggers(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    cfg = config("--align", "none", "--monitor.every", "50", "--train.compile", "true")
    cfg.train.loggers = ["csv", "wandb"]
    cfg.train.global_batch = 256
    found = start_lines(trainer(cfg, 2, 3, 32, 4), Latents(scale=0.5, shift=0.25), FOLDER, 70)
    assert found[0] == "run      runs/x/000 (resumed after step 70)"
    assert found[1].endswith("parameters; no alignment; EMA 48.2 KiB over all processes")
    assert found[2].endswith(
        "latents of data/imagenet256: 1281167 images, 1000 classes; "
        "latents 4 x 32 x 32, scale 0.5, shift 0.25"
    )
    assert found[3].endswith(
        "2 processes on CPU (1 thread each), bf16, ZeRO 3, no CUDA graph, compiled blocks"
    )
    assert "70 to 400000 (79.9 epochs), batch 256 = 2 processes x 32 images x 4 micro" in found[4]
    assert found[4].endswith("samples every 50 steps while training")
    assert found[5].endswith("stats.jsonl; loss.png at checkpoints; stats.csv; wandb")
    # stage 0 keeps the EMA whole
    assert start_lines(trainer(cfg, 2, 0), Latents(), FOLDER)[1].endswith("on each process")
    assert "shift" not in start_lines(trainer(cfg), Latents(), FOLDER)[2]
    by_channel = Latents(scale=[0.5, 0.7, 1.0, 2.0], shift=[0.0, 0.1, -0.5, 0.0])
    expected = "scale 0.5 to 2, by channel, shift -0.5 to 0.1, by channel"
    assert expected in start_lines(trainer(cfg), by_channel, FOLDER)[2]


def test_captions_are_named():
    class Captions(Latents):
        def facts(self):
            text = {"name": "clip", "tokens": 77, "width": 768}
            return replace(super().facts(), text=text)

    found = start_lines(trainer(config("--align", "none")), Captions(), FOLDER)
    assert "1281167 images, captions of 77 x 768 (clip); latents" in found[2]


@pytest.mark.parametrize(
    "stage, where", [(0, "192.9 KiB on each process"), (1, "192.9 KiB over all processes")]
)
def test_averages_are_counted(stage, where):
    """12345 fp32 parameters four times: the EMA and three further averages."""
    averages = "{a: {decay: 0.9}, b: {sigma_rel: 0.05}, c: {sigma_rel: 0.1}}"
    cfg = config("--train.averages", averages)
    lines = start_lines(trainer(cfg, world=2, stage=stage), make_dataset(cfg), FOLDER)
    assert lines[1].endswith(f"; EMA and 3 averages {where}")


@pytest.mark.parametrize(
    "args, said",
    [
        (
            "--align.hold 1 --align.decay 1",
            "align.hold, align.decay, because align.schedule is const",
        ),
        ("--align.hold 1 --align.decay 1 --align.schedule steps", None),
        ("--align.schedule epochs", None),
        (
            '--align.decay 9 --align.milestones {"5":0.1} --align.schedule milestones',
            "align.decay, bec",
        ),
        ("--align2 layer_sync --align2.hold 3", "align2.hold, because align2.schedule is constant"),
        # options of a target that is turned off are another run's
        ("--align none", None),
        (
            "--monitor.count 5 --monitor.grid 4",
            "monitor.count, monitor.grid, because monitor.every is",
        ),
        ("--monitor.count 5 --monitor.every 4", None),
        ("--optim.min_lr 1e-5", "optim.min_lr, because optim.schedule is constant"),
        ("--optim.min_lr 1e-5 --optim.schedule cosine", None),
    ],
)
def test_options_that_nothing_reads_are_a_warning(args, said, capsys):
    cfg = config("--train.precision", "fp32", *args.split())
    fill_in(cfg)
    check_config(cfg)
    say_start(trainer(cfg), make_dataset(cfg), FOLDER)
    lines = capsys.readouterr().err.splitlines()[6:]
    assert len(lines) == (said is not None)
    assert said is None or lines[0].startswith(f"warning: nothing reads {said}")


@pytest.mark.parametrize("given, left", [("hold", "decay is 1000"), ("decay", "hold is 149")])
def test_steps_in_place_of_epochs_are_a_warning(given, left, capsys):
    words = f"--train.precision fp32 --align.schedule steps --align.{given} 5000"
    cfg = config(*words.split())
    check_config(cfg)
    say_start(trainer(cfg), make_dataset(cfg), FOLDER)
    (line,) = capsys.readouterr().err.splitlines()[6:]
    assert line == (
        f"warning: align.{left} steps, its default, which is the paper's number of epochs"
    )


@pytest.mark.parametrize(
    "model, args, warned",
    [
        ("DiT-S/2", "", True),
        ("DiT-S/2", "--align.weight 0.04", False),
        ("DiT-S/2", "--align self_flow", False),
        ("SiT-S/2", "", False),
    ],
)
def test_the_papers_lambda_of_sit_is_none_of_dit(model, args, warned):
    cfg = config("--model", model, *args.split())
    found = idle_warnings(cfg)
    assert len(found) == warned
    assert not warned or "align.weight is 0.2, the paper's for SiT; for DiT it has" in found[0]


def test_bf16_on_a_cpu_is_one_warning(capsys):
    for precision, warnings in (("bf16", 1), ("fp32", 0)):
        cfg = config("--train.precision", precision)
        say_start(trainer(cfg), make_dataset(cfg), FOLDER)
        out, err = capsys.readouterr()
        # stdout is for the summary
        assert out == ""
        assert len(err.splitlines()) == 6 + warnings
        assert err.count("bf16 is slow on a CPU, set --train.precision fp32") == warnings


@pytest.mark.parametrize(
    "args, origin, said",
    [
        ("--train.steps 2000", None, "after 2000 steps 82% of the weights that are sampled (ema, "),
        ("--train.steps 20000", None, "a smaller --train.ema_decay, such as 0.999, or more steps"),
        ("--train.steps 6 --train.ema_decay 0.99", None, "--train.ema_decay, such as 0.5407, or"),
        ("--train.steps 6 --train.ema_decay 0.5407", None, None),
        (
            "--train.steps 30 --train.ema_decay 0.95",
            None,
            "smaller --train.ema_decay, such as 0.8843",
        ),
        ("--train.steps 30 --train.ema_decay 0.8843", None, None),
        # 5 %
        ("--train.steps 29900", None, "5% of the weights"),
        ("--train.steps 30000", None, None),
        ("--train.steps 2000 --train.ema_decay 0.99", None, None),
        # the random weights have no part in it
        ("--train.steps 2000", "weights of w.safetensors", None),
        ("--train.steps 2000 --sample.weights model", None, None),
        ("--train.steps 2000 --sample.weights wide", None, None),
        ("--train.steps 2000 --sample.weights slow", None, "(slow, of decay 0.9995) will still"),
        ("--train.steps 2000 --sample.weights slow", None, "smaller --train.averages.slow.decay"),
    ],
)
def test_an_average_that_is_mostly_its_beginning_is_a_warning(args, origin, said, capsys):
    averages = "{slow: {decay: 0.9995}, wide: {sigma_rel: 0.1}}"
    words = ["--train.precision", "fp32", "--train.averages", averages, *args.split()]
    if "ema_decay" not in args:
        words += ["--train.ema_decay", "0.9999"]
    cfg = config(*words)
    say_start(trainer(cfg), make_dataset(cfg), FOLDER, origin=origin)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (6 if said is None else 7)
    assert said is None or (lines[6].startswith("warning: after ") and said in lines[6])


def test_counts_of_a_trainer_that_is_built():
    """The parameters are counted as the model has them, and the plan is the one that runs."""
    from sra_fast.training.trainer import build
    from sra_fast.zero.process_group import init_distributed

    cfg = config("--train.micro_batch", "4")
    built = build(make_plan(cfg), init_distributed())
    lines = start_lines(built, make_dataset(cfg), FOLDER)
    count = sum(p.numel() for p in cfg.model.build().parameters())
    assert f"{count / 1000:.1f} k parameters" in lines[1]
    assert "batch 8 = 1 process x 4 images x 2 micro-steps" in lines[4]


@pytest.mark.parametrize(
    "number, text",
    [(7, "7"), (1234, "1.2 k"), (675_100_000, "675.1 M"), (2_500_000_000, "2.5 G")],
)
def test_short_counts(number, text):
    assert module._short(number) == text


@pytest.mark.parametrize(
    "number, text", [(7, "7 B"), (3 * 2**19, "1.5 MiB"), (675_100_000 * 4, "2.5 GiB")]
)
def test_sizes_in_bytes(number, text):
    assert module._bytes(number) == text
