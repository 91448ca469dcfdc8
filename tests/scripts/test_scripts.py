"""The commands of the README, run as a user types them: through the DeepSpeed launcher, killed, resumed, sampled."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
TINY = [
    "--config",
    "configs/digits.yaml",
    "--model.hidden_size",
    "32",
    "--model.depth",
    "4",
    "--model.num_heads",
    "2",
    "--align.student_layer",
    "2",
    "--align.teacher_layer",
    "3",
    "--train.global_batch",
    "16",
    "--train.log_every",
    "2",
    "--sample.steps",
    "2",
]


def environment() -> dict:
    """On the CPU, without the variables of a process group that another test has made in this process."""
    launcher = {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    return {
        **{k: v for k, v in os.environ.items() if k not in launcher},
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def script(name, *args, **kwargs):
    return subprocess.run(
        [sys.executable, f"sra_fast/{name}.py", *map(str, args)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A finished 24-step run, launched by `deepspeed` on two processes with a DeepSpeed JSON."""
    out = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "deepspeed.launcher.runner",
            "--num_accelerators",
            "2",
            "--master_port",
            free_port(),
            "sra_fast/train.py",
            *TINY,
            "--train.steps",
            "24",
            "--train.save_every",
            "8",
            "--train.out",
            str(out),
            "--deepspeed",
            "--deepspeed_config",
            "configs/deepspeed/zero2.json",
        ],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (out / "000/summary.json").exists(), done.stderr[-3000:]
    return out / "000", done


def test_run_folder_is_complete(whole_run):
    folder, done = whole_run
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "stats.jsonl",
        "tensorboard",
        "loss.png",
        "samples.png",
        "checkpoints",
        "ema.safetensors",
        "summary.json",
        "deepspeed.json",
    }
    summary = json.loads((folder / "summary.json").read_text())
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert printed == [summary] and summary["run_dir"] == str(folder)
    assert "zero_stage: 2" in (folder / "config.yaml").read_text(), (
        "the stage that ran, not the default"
    )
    assert json.loads((folder / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 2
    for key in ("images_per_s", "label_accuracy", "frechet", "loss_first", "loss_last"):
        assert np.isfinite(summary[key])
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, *range(2, 25, 2)]
    assert (
        rows[0]["loss"] == summary["loss_first"]
        and rows[-1]["loss"] == summary["loss_last"] < rows[0]["loss"]
    )
    assert {
        "denoise",
        "align",
        "align_weight",
        "grad_norm",
        "student_norm",
        "teacher_norm",
        "lr",
        "epoch",
        "images_per_s",
    } <= set(rows[0])
    assert sorted(p.name for p in (folder / "checkpoints").glob("step_*")) == [
        f"step_{s:08d}" for s in (8, 16, 24)
    ]
    # ten rows of ten samples, a gap, ten real digits
    assert Image.open(folder / "samples.png").size == (6 * (20 * 9 + 4), 6 * 10 * 9)


def test_checkpoint_does_not_store_the_teacher(whole_run):
    state = torch.load(
        whole_run[0] / "checkpoints/step_00000024/mp_rank_00_model_states.pt", weights_only=False
    )
    assert state["module"] and not [
        name for name in state["module"] if name.startswith("teacher.") and "pos_embed" not in name
    ]


def test_killed_run_goes_on_where_it_was(tmp_path):
    """SIGKILL in the middle; the resumed run ends with the same weights, bit for bit, and one log without gaps."""
    args = [*TINY, "--train.steps", "60", "--train.save_every", "4"]
    assert script("train", *args, "--train.out", tmp_path / "a").returncode == 0
    killed = subprocess.Popen(
        [sys.executable, "sra_fast/train.py", *args, "--train.out", str(tmp_path / "b")],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    latest = tmp_path / "b/000/checkpoints/latest"
    deadline = time.monotonic() + 120
    while not latest.exists() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert latest.exists() and not (tmp_path / "b/000/summary.json").exists(), "killed in time"
    done = script("train", *args, "--train.out", tmp_path / "b", "--train.resume", "auto")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["000"]
    a, b = (load_file(tmp_path / x / "000/ema.safetensors") for x in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    steps = [
        [
            (r["step"], r["loss"])
            for r in map(json.loads, (tmp_path / x / "000/stats.jsonl").read_text().splitlines())
        ]
        for x in "ab"
    ]
    assert [s for s, _ in steps[1]] == sorted({s for s, _ in steps[1]})
    assert dict(steps[0])[60] == dict(steps[1])[60]


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
    ],
)
def test_bad_input_is_one_line(tmp_path, args, message):
    done = script("train", *TINY, "--train.out", tmp_path / "never", *args)
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2 and errors[-1].startswith("error: ") and message in errors[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "never").exists()


def test_resume_refuses_another_run(whole_run):
    done = script("train", *TINY, "--train.zero_stage", "2", "--train.resume", whole_run[0])
    assert (
        done.returncode == 2
        and "made with world_size 2, this run has 1" in done.stderr.splitlines()[-1]
    )


def test_sampling_from_a_run_and_from_its_checkpoint(whole_run, tmp_path):
    common = (
        "--count",
        12,
        "--batch",
        5,
        "--columns",
        4,
        "--sample.steps",
        3,
        "--sample.guidance",
        2.0,
    )
    for source, name in (
        (whole_run[0], "run"),
        (whole_run[0] / "checkpoints/step_00000024", "checkpoint"),
    ):
        done = script("sample", "--checkpoint", source, "--out", tmp_path / name, *common)
        assert done.returncode == 0, done.stderr[-2000:]
    run, again = (np.load(tmp_path / name / "samples.npz") for name in ("run", "checkpoint"))
    assert run["arr_0"].shape == (12, 8, 8, 1) and run["arr_0"].dtype == np.uint8
    assert run["arr_1"].tolist() == [i % 10 for i in range(12)], (
        "the class count comes from the checkpoint"
    )
    assert np.array_equal(run["arr_0"], again["arr_0"])
    assert Image.open(tmp_path / "run/samples.png").size == (4 * 9, 3 * 9)
    done = script(
        "sample", "--checkpoint", whole_run[0], "--out", tmp_path / "other", *common, "--batch", 12
    )
    assert (
        np.abs(np.load(tmp_path / "other/samples.npz")["arr_0"].astype(int) - run["arr_0"]).max()
        <= 1
    ), "any batch size"


@pytest.mark.parametrize(
    "args, message",
    [
        (("--checkpoint", "nowhere"), "no checkpoint at nowhere"),
        (("--checkpoint", "{run}", "--sample.method", "ddim"), "method for SiT must be one of"),
        (("--checkpoint", "{run}", "--classes", "[10]"), "classes must lie in [0, 10)"),
        (("--checkpoint", "{run}", "--sample.weights", "model"), "EMA weights only"),
    ],
)
def test_sampling_names_what_is_wrong(whole_run, tmp_path, args, message):
    done = script("sample", "--out", tmp_path, *(a.format(run=whole_run[0]) for a in args))
    assert (
        done.returncode != 0
        and message in done.stderr.splitlines()[-1]
        and "Traceback" not in done.stderr
    )


def test_dit_on_latents_from_disk(tmp_path):
    """Moments in the reference's layout through preprocessing-free training, import of its .pt and DDIM sampling."""
    folder, rng = tmp_path / "data/vae-sd/00000", np.random.default_rng(0)
    folder.mkdir(parents=True)
    labels = [[f"00000/img-{i:03d}.npy", i % 3] for i in range(32)]
    for name, _ in labels:
        np.save(folder.parent / name, rng.random((2, 8, 8), dtype=np.float32))
    (folder.parent / "dataset.json").write_text(json.dumps({"labels": labels}))
    args = [
        *TINY,
        "--model.name",
        "DiT-S/2",
        "--model.num_classes",
        3,
        "--data.name",
        "latents",
        "--data.path",
        tmp_path / "data",
        "--data.num_workers",
        1,
        "--sample.method",
        "auto",
        "--train.steps",
        4,
        "--train.precision",
        "bf16",
    ]
    done = script(
        "train",
        *args,
        "--train.out",
        tmp_path / "runs",
        "--train.export",
        '["reference","safetensors"]',
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs/000"
    row = json.loads((run / "stats.jsonl").read_text().splitlines()[-1])
    assert row["vb"] > 0 and row["denoise"] > 0
    more = script(
        "train",
        *args,
        "--train.steps",
        6,
        "--train.out",
        tmp_path / "more",
        "--train.init_from",
        run / "reference.pt",
    )
    assert more.returncode == 0, more.stderr[-2000:]
    assert [
        json.loads(l)["step"] for l in (tmp_path / "more/000/stats.jsonl").read_text().splitlines()
    ] == [6]
    other = script(
        "train",
        *args,
        "--train.out",
        tmp_path / "no",
        "--train.init_from",
        run / "reference.pt",
        "--model.num_heads",
        4,
    )
    assert (
        other.returncode == 2
        and "made with 2 heads, the model has 4" in other.stderr.splitlines()[-1]
    )
    other = script(
        "train",
        *args,
        "--train.out",
        tmp_path / "no",
        "--train.init_from",
        run / "ema.safetensors",
        "--model.depth",
        5,
    )
    assert (
        other.returncode == 2
        and "blocks.4.adaLN_modulation.1.bias should be [192], it is absent" in other.stderr
    )
    for checkpoint in (run / "reference.pt", run):
        sampled = script(
            "sample",
            "--checkpoint",
            checkpoint,
            "--out",
            tmp_path / "s",
            "--count",
            3,
            "--num_heads",
            2,
            "--sample.method",
            "ddim",
            "--sample.steps",
            3,
        )
        assert sampled.returncode == 0, sampled.stderr[-2000:]
        assert np.load(tmp_path / "s/samples.npz")["arr_0"].shape == (3, 8, 8, 1)
