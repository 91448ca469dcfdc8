"""The commands of the README: a run through the DeepSpeed launcher, killed, resumed, sampled and exported.

Argument errors are tested in this process; every script is also launched at least once as a user does it.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from launch import (
    ROOT,
    accelerate,
    call,
    call_console,
    deepspeed,
    environment,
    error_of,
    launch,
    torchrun,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from toy_data import write_vae

from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.schema import DiffusionConfig

TINY = (
    "--config configs/digits.yaml --model.hidden_size 32 --model.depth 4 --model.num_heads 2 "
    "--align.student_layer 2 --align.teacher_layer 3 --train.global_batch 16 --train.log_every 2 --sample.steps 2"
).split()


WHOLE_RUN = (
    *TINY,
    *"--train.steps 24 --train.save_every 8 --train.ema_decay 0.8".split(),
    *"--deepspeed --deepspeed_config configs/deepspeed/zero2.json".split(),
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A finished run of 24 steps, launched by `deepspeed` on two processes with a DeepSpeed JSON."""
    out = tmp_path_factory.mktemp("whole")
    done = deepspeed("train", *WHOLE_RUN, "--train.out", out)
    assert (out / "000/summary.json").exists(), done.stderr[-3000:]
    return out / "000", done


def rows_of(run) -> list[dict]:
    """What a run has logged."""
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def test_run_folder_is_complete(whole_run):
    folder, done = whole_run
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "data.json",
        "stats.jsonl",
        "tensorboard",
        "loss.png",
        "samples.png",
        "checkpoints",
        "lock",
        "ema.safetensors",
        "summary.json",
        "deepspeed.json",
    }
    summary = json.loads((folder / "summary.json").read_text())
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert printed == [summary]
    assert summary["run_dir"] == str(folder)
    for key in ("images_per_s", "label_accuracy", "frechet", "loss_first", "loss_last"):
        assert np.isfinite(summary[key])
    # the stage of DeepSpeed's JSON, not the default
    assert "zero_stage: 2" in (folder / "config.yaml").read_text()
    assert json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2

    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [1, *range(2, 25, 2)]
    assert rows[0]["loss"] == summary["loss_first"]
    assert rows[-1]["loss"] == summary["loss_last"] < rows[0]["loss"]
    logged = "denoise align align_weight grad_norm student_norm teacher_norm lr epoch images_per_s"
    assert set(logged.split()) <= set(rows[1])
    steps = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    assert steps == ["step_00000008", "step_00000016", "step_00000024"]
    # ten rows of ten samples, a gap, ten real digits
    assert Image.open(folder / "samples.png").size == (6 * (20 * 9 + 4), 6 * 10 * 9)


def losses_of(out) -> list[float]:
    return [row["loss"] for row in rows_of(out / "000")]


def test_every_launcher_gives_the_same_losses(whole_run, tmp_path):
    """Bit for bit with as many processes, to rounding with another number."""
    folder, _ = whole_run
    two = losses_of(folder.parent)
    done = torchrun("train", *WHOLE_RUN, "--train.out", tmp_path / "torchrun")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "torchrun") == two

    done = call("train", *WHOLE_RUN, "--train.out", tmp_path / "python")
    assert done.returncode == 0, done.stderr[-3000:]
    one = losses_of(tmp_path / "python")
    assert one == pytest.approx(two, rel=1e-4)

    pytest.importorskip("accelerate")
    done = accelerate("train", *WHOLE_RUN, "--train.out", tmp_path / "accelerate")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "accelerate") == one


def test_a_start_is_six_lines(whole_run):
    """The run folder first, and nothing of DeepSpeed's but its launcher's lines on stdout."""
    folder, done = whole_run
    before_the_bar = done.stderr.partition("0%|")[0].splitlines()
    names = [line.split()[0] for line in before_the_bar if line.strip()]
    assert names == ["run", "model", "data", "machine", "steps", "curves"], before_the_bar
    assert before_the_bar[0] == f"run      {folder} (new)"
    # not from launcher/runner.py nor launcher/launch.py
    said = [line for line in done.stdout.splitlines() if line.startswith("[20")]
    launcher = ("[runner.py", "[launch.py", "[real_accelerator.py")
    assert all(any(part in line for part in launcher) for line in said), said


def test_checkpoint_does_not_store_the_teacher(whole_run):
    """Four numbers of each of the student's parameters, and the files of both ranks beside it."""
    folder = whole_run[0] / "checkpoints/step_00000024"
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", "rank_00000.safetensors", "rank_00001.safetensors"}
    pieces = [load_file(path) for path in folder.glob("rank_*")]
    kinds = Counter(key.split("/")[0] for held in pieces for key in held)
    assert set(kinds) == {"master", "exp_avg", "exp_avg_sq", "ema.main"}
    parameters = load_model(str(whole_run[0])).model.parameters()
    stored = sum(value.numel() for held in pieces for value in held.values())
    assert stored == 4 * sum(p.numel() for p in parameters)


def test_a_killed_run_resumes(tmp_path):
    """SIGKILL in the middle: the resumed run ends with the same weights, bit for bit, and one log without gaps."""
    args = [*TINY, "--train.steps", "60", "--train.save_every", "4"]
    assert call("train", *args, "--train.out", tmp_path / "a").returncode == 0
    killed = subprocess.Popen(
        [sys.executable, "sra_fast/train.py", *args, "--train.out", str(tmp_path / "b")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # kill it once it has a checkpoint
    latest = tmp_path / "b/000/checkpoints/latest"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert latest.exists()
    assert not (tmp_path / "b/000/summary.json").exists(), "it was killed too late"

    done = launch("train", *args, "--train.out", tmp_path / "b", "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["000"]
    a = load_file(tmp_path / "a/000/ema.safetensors")
    b = load_file(tmp_path / "b/000/ema.safetensors")
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [row["step"] for row in rows_of(tmp_path / "b/000")]
    assert steps == sorted(set(steps))
    losses_a, losses_b = (
        {row["step"]: row["loss"] for row in rows_of(tmp_path / f"{x}/000")} for x in "ab"
    )
    assert losses_a[60] == losses_b[60]


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ("--data.name", "latents", "--data.path", "nowhere"),
            "data.path must hold a folder vae-sd",
        ),
        (("--align.teacher_layer", "5"), "got student_layer 2 and teacher_layer 5"),
        (("--train.micro_batch", "3"), "multiple of micro_batch 3 x 1 processes, got 16"),
        (("--train.resume", "nowhere"), "train.resume must name a run folder"),
        (("--train.init_from", "README.md"), "no checkpoint that can be read safely"),
        (("--model.num_classes", "9"), "labels must lie in [0, 9)"),
        (("--train.out", "README.md/runs"), "is no writable folder"),
        (("--train.loggers", "[mlflow]"), "expected a logger of tensorboard, csv, wandb, got"),
    ],
)
def test_bad_input_is_one_line(tmp_path, args, message):
    done = call("train", *TINY, "--train.out", tmp_path / "never", *args)
    assert done.returncode == 2
    line = error_of(done)
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "never").exists()


def test_resume_refuses_another_run(whole_run):
    done = call("train", *WHOLE_RUN, "--train.seed", "1", "--train.resume", whole_run[0])
    assert done.returncode == 2
    assert "it was made with train.seed 0, this run has 1" in error_of(done)


def images_of(folder) -> np.ndarray:
    with np.load(folder / "samples.npz") as held:
        return held["arr_0"]


def test_sampling_from_a_run_and_from_its_checkpoint(whole_run, tmp_path):
    run = whole_run[0]
    checkpoint = run / "checkpoints/step_00000024"
    settings = "--count 12 --columns 4 --sample.steps 3 --sample.guidance 2.0 --batch".split()
    done = launch("sample", "--checkpoint", run, "--out", tmp_path / "run", *settings, 5)
    assert done.returncode == 0, done.stderr[-2000:]
    images = images_of(tmp_path / "run")
    assert images.shape == (12, 8, 8, 1)
    assert images.dtype == np.uint8
    # the class count comes from the checkpoint
    labels = np.load(tmp_path / "run/samples.npz")["arr_1"]
    assert labels.tolist() == [i % 10 for i in range(12)]
    assert Image.open(tmp_path / "run/samples.png").size == (4 * 9, 3 * 9)

    # the same weights, read from the export and from the EMA's shards
    out = tmp_path / "checkpoint"
    done = call("sample", "--checkpoint", checkpoint, "--out", out, *settings, 5)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.array_equal(images_of(out), images)

    # another batch size changes at most the rounding
    out = tmp_path / "batch"
    done = call("sample", "--checkpoint", run, "--out", out, *settings, 12)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(images_of(out).astype(int) - images).max() <= 1


@pytest.mark.parametrize(
    "args, message",
    [
        (("--checkpoint", "nowhere"), "no checkpoint at nowhere"),
        (
            ("--checkpoint", "{run}", "--sample.method", "ddim"),
            "sample.method for flow_matching must be one of",
        ),
        (("--checkpoint", "{run}", "--classes", "[10]"), "classes must lie in [0, 10)"),
        (
            ("--checkpoint", "{run}/ema.safetensors", "--sample.weights", "model"),
            "holds no weights 'model', only ema; the student is in a run",
        ),
    ],
)
def test_sampling_names_what_is_wrong(whole_run, tmp_path, args, message):
    args = [arg.format(run=whole_run[0]) for arg in args]
    done = call("sample", "--out", tmp_path, *args)
    assert done.returncode == 2
    assert message in error_of(done)


def metadata_of(file) -> dict:
    with safe_open(file, "pt") as f:
        return f.metadata()


def test_an_exported_checkpoint_is_what_training_exports(whole_run, tmp_path):
    run = whole_run[0]
    out = tmp_path / "new/ema.safetensors"
    done = launch("export", "--checkpoint", run, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == str(out)

    expected = load_file(run / "ema.safetensors")
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # the one in the run folder also says which of its checkpoints it is of
    of_the_run = {**metadata_of(run / "ema.safetensors")}
    assert of_the_run.pop("checkpoint")
    assert metadata_of(out) == of_the_run

    # sample.py reads it
    loaded = load_model(str(out))
    model, path = loaded.model, loaded.path
    assert path == "linear"
    assert model.num_classes == 10


def test_an_earlier_checkpoint_is_exported_with_its_step(whole_run, tmp_path):
    run = whole_run[0]
    out = tmp_path / "early.safetensors"
    checkpoint = run / "checkpoints/step_00000008"
    done = call_console("export", "--checkpoint", checkpoint, "--out", out)
    assert done.returncode == 0, done.stderr
    assert metadata_of(out)["step"] == "8"
    last = load_file(run / "ema.safetensors")
    early = load_file(out)
    assert not all(torch.equal(early[name], last[name]) for name in last)
    checkpoint_model = load_model(str(checkpoint)).model
    for name, value in checkpoint_model.state_dict().items():
        assert torch.equal(early[name], value)


@pytest.mark.parametrize(
    "checkpoint, out, message",
    [
        ("nowhere", "a.safetensors", "no checkpoint at nowhere"),
        ("README.md", "a.safetensors", "README.md is no checkpoint that can be read safely"),
        ("{run}/ema.safetensors", "a.pt", "has no model and no opt"),
        (
            "{run}",
            "a.npz",
            "expected out to end with .safetensors or .pt, or a folder (of any name",
        ),
        ("{run}", "file/a.safetensors", "out {tmp}/file cannot be made: "),
        ("{run}", "folder.safetensors", "out {tmp}/folder.safetensors cannot be written: Is a dir"),
        (
            "{tmp}/step_00000023",
            "a.safetensors",
            "step_00000023 is damaged: manifest.json is that of step 24",
        ),
        (
            "{tmp}/run",
            "a.safetensors",
            "step 24, is damaged: rank_00001.safetensors cannot be read",
        ),
    ],
)
def test_a_bad_export_is_one_line(whole_run, tmp_path, checkpoint, out, message):
    run = whole_run[0]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    # a checkpoint under the name of another step, and one without the file of a rank
    step = "checkpoints/step_00000024"
    shutil.copytree(run / step, tmp_path / "step_00000023")
    shutil.copytree(run / step, tmp_path / "run" / step)
    (tmp_path / "run" / step / "rank_00001.safetensors").unlink()
    checkpoint = checkpoint.format(run=run, tmp=tmp_path)
    done = call("export", "--checkpoint", checkpoint, "--out", tmp_path / out)
    assert done.returncode == 2
    assert message.format(tmp=tmp_path, run=run) in error_of(done)
    assert not (tmp_path / out).is_file()


def test_dit_on_latents_from_disk(tmp_path):
    """Moments in the published layout: train, start from the written .pt, sample with DDIM."""
    folder = tmp_path / "data/vae-sd/00000"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    labels = [[f"00000/img-{i:03d}.npy", i % 3] for i in range(32)]
    for name, _ in labels:
        np.save(folder.parent / name, rng.random((2, 8, 8), dtype=np.float32))
    (folder.parent / "dataset.json").write_text(json.dumps({"labels": labels}))
    args = [
        *TINY,
        *("--model.name", "DiT-S/2", "--model.num_classes", 3),
        *("--data.name", "latents", "--data.path", tmp_path / "data", "--data.num_workers", 1),
        *("--sample.method", "auto", "--train.steps", 4, "--train.precision", "bf16"),
    ]
    export = ("--train.export", '["published","safetensors"]')
    done = call("train", *args, "--train.out", tmp_path / "runs", *export)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs/000"
    last = rows_of(run)[-1]
    assert last["vb"] > 0
    assert last["denoise"] > 0
    # of the last step, as the published code counts and as an export of the checkpoint says
    done = call("export", "--checkpoint", run, "--out", tmp_path / "again.pt")
    assert done.returncode == 0, done.stderr[-2000:]
    files = (run / "published.pt", tmp_path / "again.pt")
    epochs = [torch.load(file, weights_only=False)["epoch"] for file in files]
    assert epochs == [last["epoch"]] * 2 == [1, 1]

    # two more steps from the weights, the EMA and the optimizer's state
    start = ("--train.init_from", run / "published.pt")
    done = call("train", *args, "--train.steps", 6, "--train.out", tmp_path / "more", *start)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["step"] for row in rows_of(tmp_path / "more/000")] == [6]

    done = call("train", *args, "--train.out", tmp_path / "no", *start, "--model.num_heads", 4)
    assert done.returncode == 2
    assert "made with 2 heads, the model has 4" in error_of(done)
    start = ("--train.init_from", run / "ema.safetensors")
    done = call("train", *args, "--train.out", tmp_path / "no", *start, "--model.depth", 5)
    assert done.returncode == 2
    assert "blocks.4.adaLN_modulation.1.bias should be [192], it is absent" in error_of(done)

    settings = "--count 3 --num_heads 2 --sample.method ddim --sample.steps 3".split()
    settings += ["--vae", write_vae(tmp_path / "vae", latent_channels=1)]
    for checkpoint in (run / "published.pt", run):
        done = call("sample", "--checkpoint", checkpoint, "--out", tmp_path / "s", *settings)
        assert done.returncode == 0, done.stderr[-2000:]
        assert images_of(tmp_path / "s").shape == (3, 64, 64, 3)


def test_a_shift_of_times_goes_from_training_to_samples(tmp_path):
    """Every form of a run's weights knows it, and samples are made at times that it shifts."""
    run = tmp_path / "runs/000"
    args = (*TINY, "--diffusion.time_shift", 3, "--train.save_every", 2)
    export = ("--train.export", '["published","safetensors"]')
    done = call("train", *args, *export, "--train.steps", 4, "--train.out", tmp_path / "runs")
    assert done.returncode == 0, done.stderr[-2000:]
    done = call("export", "--checkpoint", run, "--out", tmp_path / "folder")
    assert done.returncode == 0, done.stderr[-2000:]
    files = [run, run / "checkpoints/step_00000002", run / "published.pt", tmp_path / "folder"]
    for file in (*files, run / "ema.safetensors"):
        assert load_model(str(file)).diffusion == DiffusionConfig(time_shift=3.0), file

    few = ("--checkpoint", run, "--out", tmp_path / "out", "--count", 3, "--sample.steps", 3)
    done = call("sample", *few)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out/samples.json").read_text())["identity"]["time_shift"] == 3
    assert "time_shift" in error_of(call("sample", *few, "--sample.time_shift", 1))

    again = ("--train.resume", run, "--train.steps", 6)
    done = call("train", *args, *again, "--diffusion.time_shift", 2)
    assert "made with diffusion.time_shift 3.0, this run has 2.0" in error_of(done)
