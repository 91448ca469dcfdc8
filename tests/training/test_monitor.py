"""The monitor makes pictures and scores of the weights and leaves training undisturbed."""

import json
import math

import numpy as np
import pytest
import torch
from bare_training import train
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_config import config
from toy_data import write_latents

from sra_fast.config.cli import parse_train
from sra_fast.data.dataset import make_dataset
from sra_fast.data.digits import Digits
from sra_fast.evaluation.extractors import Extractor
from sra_fast.evaluation.held_out import HeldOutImages, HeldOutLoss, held_out_loss
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance
from sra_fast.plots import report

# as it is before a test replaces it
from sra_fast.plots.report import plot_loss
from sra_fast.training import loop, run_folder, saving
from sra_fast.training import monitor as monitors
from sra_fast.training.checks import check_config
from sra_fast.training.monitor_files import losses_of, picture_of
from sra_fast.training.plan import make_plan, make_run_plan
from sra_fast.training.rows import read_rows
from sra_fast.training.run import run as whole_run
from sra_fast.training.signals import Stopped, StopSignals
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed

ARGS = (
    "--train.steps 4 --train.log_every 1 --optim.lr 0.01 --sample.method euler --sample.steps 2 "
    "--monitor.every 2 --monitor.count 12 --monitor.grid 7 --monitor.batch 5"
).split()


def run(folder, *args, watched=True):
    folder.mkdir()
    cfg = config(*ARGS, *args)
    device = init_distributed()
    trainer = build(make_plan(cfg), device)
    data = make_dataset(cfg)
    monitor = monitors.Monitor(cfg, device, folder, data) if watched else None
    return [row["loss"] for row in train(trainer, data, folder, monitor=monitor)]


@pytest.mark.parametrize(
    "seconds, expected",
    [(math.inf, [[1], [1, 2, 3, 4]]), (0.0, [[1], [1, 2], [1, 2, 3], [1, 2, 3, 4]])],
)
def test_the_loss_is_drawn_at_the_last_checkpoint_and_not_too_often_before(
    seconds, expected, tmp_path, monkeypatch
):
    drawn = []
    monkeypatch.setattr(loop, "REDRAW", seconds)
    monkeypatch.setattr(
        report, "plot_loss", lambda path, rows: drawn.append([row["step"] for row in rows])
    )
    run(tmp_path / "run", "--train.save_every", "1", watched=False)
    assert drawn == expected


def test_pictures_and_an_undisturbed_run(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot_loss", plot_loss)
    watched = run(tmp_path / "watched", "--train.save_every", "3", "--monitor.held_out", "12")
    assert Image.open(tmp_path / "watched/loss.png").size == (1320, 600)
    assert watched == run(tmp_path / "alone", watched=False)
    pictures = [Image.open(path) for path in sorted((tmp_path / "watched/samples").glob("*.png"))]
    assert [p.filename[-12:] for p in pictures] == ["00000002.png", "00000004.png"]
    assert pictures[0].size == (4 * 10 * 9, 4 * 9)
    assert not np.array_equal(*map(np.asarray, pictures)), "the EMA has moved"
    lines = (tmp_path / "watched/samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == [{"step": 2, "images": 12}, {"step": 4, "images": 12}]
    assert not (tmp_path / "alone/samples").exists()
    losses = read_rows(tmp_path / "watched/held_out.jsonl")
    assert [row["step"] for row in losses] == [2, 4]

    events = EventAccumulator(str(tmp_path / "watched/tensorboard"))
    events.Reload()
    shown = events.Images("samples/monitor")
    assert [(image.step, image.width, image.height) for image in shown] == [
        (step, *pictures[0].size) for step in (2, 4)
    ]
    found = [(event.step, event.value) for event in events.Scalars("samples/held_out")]
    assert found == [(row["step"], pytest.approx(row["mean"])) for row in losses]


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_the_held_out_loss_is_that_of_the_sampled_weights(weights, tmp_path):
    """Measured anew from the trainer's weights; no samples are made where none are asked for."""
    args = f"--monitor.count 0 --monitor.held_out 21 --sample.weights {weights} --train.seed 4"
    cfg = config(*ARGS, *args.split())
    device = init_distributed()
    trainer = build(make_plan(cfg), device)
    data = make_dataset(cfg)
    torch.manual_seed(9)
    train(trainer, data, tmp_path, monitor=monitors.Monitor(cfg, device, tmp_path, data))
    model = cfg.model.build().to(device).eval()
    model.load_state_dict(trainer.state_dict(trainer.weights(weights)))
    expected = held_out_loss(model, "linear", HeldOutImages(data, 21), batch=5, device=device)
    found = HeldOutLoss.load(tmp_path / "held_out/step_00000004.npz")
    assert np.array_equal(found.losses, expected.losses) and found.key == expected.key
    assert found.about == {"weights": weights, "step": 4}
    row = read_rows(tmp_path / "held_out.jsonl")[-1]
    assert (row["step"], row["mean"]) == (4, expected.mean())
    assert row["bins"] == expected.bins().tolist() and row["images"] == 21
    assert not (tmp_path / "samples.jsonl").exists() and not (tmp_path / "samples").exists()


def test_an_average_of_snapshots_is_not_there_yet(tmp_path):
    """The EMA is looked at, and the row says so."""
    cfg = config(*ARGS, "--monitor.held_out", "5", "--monitor.count", "0")
    device = init_distributed()
    trainer = build(make_plan(cfg), device)
    cfg.sample.weights = "power:0.1"
    monitors.Monitor(cfg, device, tmp_path, make_dataset(cfg)).look(trainer, 2)
    assert read_rows(tmp_path / "held_out.jsonl")[0]["weights"] == "ema"


def test_a_look_draws_no_number_of_the_run(tmp_path):
    cfg = config(*ARGS, "--monitor.held_out", "5")
    device = init_distributed()
    trainer = build(make_plan(cfg), device)
    monitor = monitors.Monitor(cfg, device, tmp_path, make_dataset(cfg))
    before = torch.get_rng_state()
    scores = monitor.look(trainer, 2)
    assert torch.equal(before, torch.get_rng_state()) and torch.is_grad_enabled()
    assert scores.keys() == {"step", "held_out", "images"}
    assert trainer.engine.module.training


def test_what_was_given_up_is_dropped(tmp_path):
    """A run that goes back to step 2 has no later rows, though it may never get as far again."""
    for folder in ("held_out", "samples"):
        (tmp_path / folder).mkdir()
    for step in (2, 4):
        losses_of(tmp_path, step).touch()
        picture_of(tmp_path, step).touch()
        for name in ("samples.jsonl", "held_out.jsonl"):
            with open(tmp_path / name, "a") as f:
                f.write(json.dumps({"step": step, "mean": None}) + "\n")
    for text in ("samples and held-out losses after step 2 are removed: 1", None):
        assert run_folder.remove_after(tmp_path, 2) == ([] if text is None else [text])
    for name in ("samples.jsonl", "held_out.jsonl"):
        assert (tmp_path / name).read_text() == '{"step": 2, "mean": null}\n'
    assert [path.name for path in (tmp_path / "held_out").iterdir()] == ["step_00000002.npz"]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_00000002.png"]


@pytest.mark.parametrize("every", ["2", "0"])
def test_a_run_that_goes_back_and_ends_earlier_has_no_later_losses(every, tmp_path):
    """Also where nobody looks any more."""
    args = f"--train.out {tmp_path} --train.save_every 2 --monitor.count 0 --monitor.held_out 5"
    plan = make_run_plan(config(*ARGS, *args.split()))
    # the digits' own scores at the end take longer than the run
    plan.data.evaluation = None
    whole_run(plan, init_distributed())
    folder = tmp_path / "000"
    first = (folder / "held_out.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in first] == [2, 4]
    args += f" --train.steps 3 --train.resume {folder}/checkpoints/step_00000002"
    args += f" --monitor.every {every}"
    plan = make_run_plan(config(*ARGS, *args.split()))
    plan.data.evaluation = None
    whole_run(plan, init_distributed())
    assert (folder / "held_out.jsonl").read_text().splitlines() == first[:1]
    assert [path.name for path in (folder / "held_out").iterdir()] == ["step_00000002.npz"]


def test_a_look_that_a_stop_left_out_is_made_when_the_run_goes_on(tmp_path):
    """Before its next step, so that nothing differs from an uninterrupted run; and only once."""
    args = "--monitor.held_out 5 --train.save_every 3 --optim.warmup_steps 3".split()
    device = init_distributed()

    def start(folder):
        folder.mkdir(exist_ok=True)
        cfg = config(*ARGS, *args)
        data = make_dataset(cfg)
        return build(make_plan(cfg), device), data, monitors.Monitor(cfg, device, folder, data)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trainer, data, monitor = start(whole)
    train(trainer, data, whole, monitor=monitor)
    trainer, data, monitor = start(stopped)
    stop = StopSignals()
    taken = trainer.after_step

    def after_step(teacher_runs):
        taken(teacher_runs)
        stop.code = 15 if trainer.guard.counts[0] == 2 else 0

    trainer.after_step = after_step
    with pytest.raises(Stopped, match="after step 2"):
        train(trainer, data, stopped, monitor=monitor, stop=stop)
    assert not (stopped / "held_out.jsonl").exists()

    for looks in (["look", "step", "step", "look"], ["step", "step", "look"]):
        done = []
        trainer, data, monitor = start(stopped)
        monitor.look = called(done, "look", monitor.look)
        trainer.after_step = called(done, "step", trainer.after_step)
        progress = saving.load(trainer, stopped / "checkpoints/step_00000002")
        train(trainer, data, stopped, progress, monitor)
        assert done == looks
        for name in ("held_out.jsonl", "samples.jsonl"):
            assert (stopped / name).read_text() == (whole / name).read_text()
        for step in (2, 4):
            pictures = [picture_of(folder, step).read_bytes() for folder in (whole, stopped)]
            assert pictures[0] == pictures[1]


def called(done, name, function):
    """The function, noted in ``done`` at each call."""

    def noted(*args):
        done.append(name)
        return function(*args)

    return noted


def test_what_a_run_has_not_looked_at(tmp_path):
    """A step that is due and lacks a row in one of the files that are asked for."""
    cfg = config(*ARGS, "--monitor.held_out", "5")
    device = init_distributed()
    trainer = build(make_plan(cfg), device)
    monitor = monitors.Monitor(cfg, device, tmp_path, make_dataset(cfg))
    missed = lambda: [step for step in range(7) if monitor.was_missed(trainer, step)]
    assert missed() == [2, 4, 6]
    (tmp_path / "held_out.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    assert missed() == [2, 4, 6]
    (tmp_path / "samples.jsonl").write_text('{"step": 4}\n')
    assert missed() == [2, 6]
    cfg.monitor.count = 0
    assert missed() == [6]


def test_images_of_the_held_out_loss_by_default(tmp_path):
    """As many as there may be, none for data without a held-out share, an error if asked for."""
    args = f"--train.out {tmp_path}/runs"
    assert make_run_plan(config(*ARGS, *args.split())).plan.cfg.monitor.held_out == 1024
    pixels = np.zeros((20, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", arr_0=pixels, arr_1=np.arange(20) % 10)
    args += f" --data.name pixels --data.path {tmp_path}/x.npz"
    assert make_run_plan(config(*ARGS, *args.split())).plan.cfg.monitor.held_out == 0
    with pytest.raises(ValueError, match=r"no run trains on \(preprocess.py --holdout\)"):
        make_run_plan(config(*ARGS, *f"{args} --monitor.held_out 5".split()))
    with pytest.raises(ValueError, match="monitor.count 0 needs a held-out share"):
        make_run_plan(config(*ARGS, *f"{args} --monitor.count 0".split()))


def test_a_single_held_out_image_is_none_by_default(tmp_path, monkeypatch):
    args = f"--train.out {tmp_path}/runs"
    split = Digits.held_out_split
    monkeypatch.setattr(
        Digits, "held_out_split", lambda data: [(part, rows[:1]) for part, rows in split(data)]
    )
    assert make_run_plan(config(*ARGS, *args.split())).plan.cfg.monitor.held_out == 0
    with pytest.raises(ValueError, match="needs at least 2 images, digits holds out 1"):
        make_run_plan(config(*ARGS, *f"{args} --monitor.held_out 5".split()))


def test_distance_to_an_fid_reference(tmp_path, monkeypatch):
    """The logged FID is that of the pictures' features: here their pixels, against the digits'."""
    seen = []

    def pixels(images):
        seen.append(images.flatten(1)[:, ::4].float())
        return seen[-1]

    monkeypatch.setattr(
        monitors, "inception_extractor", lambda path, device: Extractor("pixels", pixels, device)
    )
    digits = ((Digits().images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "digits.npz", arr_0=digits)
    (tmp_path / "weights").write_text("")
    files = f"--monitor.reference {tmp_path}/digits.npz --monitor.inception {tmp_path}/weights"
    run(tmp_path / "run", *files.split())
    rows = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    reference = fit_gaussian(digits.reshape(len(digits), -1)[:, ::4].astype(np.float32))
    samples = torch.cat([part for part in seen if len(part) in (5, 2)][-3:])
    expected = frechet_distance(fit_gaussian(samples.cpu().numpy()), reference)
    assert len(samples) == 12
    assert rows[-1]["fid"] == pytest.approx(expected, rel=1e-5)


def test_scores_that_are_made_again_are_not_there_twice(tmp_path):
    """A line that a killed process cut short does not hide those after it."""
    (tmp_path / "samples.jsonl").write_text(
        '{"step": 2, "images": 12}\n{"step": 4, "images": 12}\n{"step": 6, "im'
    )
    cfg = config(*ARGS)
    device = init_distributed()
    monitor = monitors.Monitor(cfg, device, tmp_path, make_dataset(cfg))
    monitor.look(build(make_plan(cfg), device), 4)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_every_process_needs_an_image(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "4")
    few = f"--monitor.count 3 --train.global_batch 8 --train.out {tmp_path}"
    cfg = config(*ARGS, *few.split())
    message = "monitor.count must be at least 1 for each of the 4 processes, got 3"
    with pytest.raises(ValueError, match=message):
        make_run_plan(cfg)


@pytest.mark.parametrize(
    "args, message",
    [
        ("--monitor.every -1", "monitor.every must not be negative"),
        ("--monitor.count 1", "monitor.count must be at least 2, or 0 for no samples, got 1"),
        ("--monitor.held_out -1", "monitor.held_out must be at least 2, or 0 for no held-out loss"),
        ("--monitor.held_out 1", "monitor.held_out must be at least 2, or 0 .*, got 1"),
        ("--monitor.grid 0", "monitor.grid must be at least 1, got 0"),
        ("--monitor.count 0 --monitor.held_out 0", "monitor.every needs something to look at"),
        ("--monitor.count 0 --monitor.reference x --monitor.inception y", "is for samples"),
        ("--monitor.reference x", "reference and monitor.inception go together"),
        ("--monitor.reference x --monitor.inception y", "there is no x"),
    ],
)
def test_what_a_monitor_lacks_is_named(args, message):
    cfg = config(*ARGS, *args.split())
    with pytest.raises(ValueError, match=message):
        check_config(cfg)


def test_latents_need_what_decodes_them(tmp_path):
    """The VAE that made the data, if it is still there; pixels need none."""
    args = "--model.name SiT-S/2 --train.global_batch 2 --monitor.every 1 --align none".split()
    write_latents(tmp_path)
    data = ("--data", str(tmp_path))
    with pytest.raises(ValueError, match="needs monitor.vae, the VAE that decodes the latents"):
        make_run_plan(parse_train([*args, *data])[0])
    listed = tmp_path / "vae-sd/dataset.json"
    content = json.loads(listed.read_text())
    (tmp_path / "vae").mkdir()
    listed.write_text(json.dumps({**content, "vae_path": str(tmp_path / "vae")}))
    plan = make_run_plan(parse_train([*args, *data])[0]).plan
    assert plan.cfg.monitor.vae == str(tmp_path / "vae")
    with pytest.raises(ValueError, match="monitor.vae is for latents, the data are pixels"):
        make_run_plan(config(*ARGS, "--monitor.vae", str(tmp_path / "vae")))
