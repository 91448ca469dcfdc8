"""The training of ``zero_worker.py`` on one GPU, with the kernels: every ZeRO stage and precision."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import relative_error
from zero_worker import CASES, STEPS

from sra_fast.engine import checkpoint
from sra_fast.engine.build import build
from sra_fast.engine.cli import parse_train
from sra_fast.engine.distributed import init_distributed
from sra_fast.engine.loop import train

# one group: its workers share what the subprocess has found
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"), pytest.mark.xdist_group("training")]
NAMES = [f"{precision}_{stage}" for stage, precision in CASES]


@pytest.fixture(autouse=True)
def nothing_saved(monkeypatch):
    """What runs here ends with gigabytes of a checkpoint that nothing reads."""
    monkeypatch.setattr(checkpoint, "save", lambda *args: None)


class RandomLatents:
    """512 latents of noise with labels, the same in every run."""

    shape, posterior = (4, 32, 32), False

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.images, self.labels = torch.randn(512, *self.shape, generator=generator), torch.arange(512) % 1000

    def __len__(self):
        return len(self.labels)

    def __getitems__(self, indices):
        return self.images[indices], self.labels[indices]

    def to_latent(self, images, noise):
        return images


@pytest.mark.parametrize("precision, early, late", [("fp32", 1e-4, 1e-2), ("bf16", 2e-3, 2e-2)])
def test_kernels_and_references_train_sit_b2_alike(tmp_path, monkeypatch, precision, early, late):
    """200 steps of SiT-B/2 on random latents: the Triton kernels against SRA_FAST_BACKEND=torch, the whole loss curve."""
    curves = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SRA_FAST_BACKEND", backend)
        cfg = parse_train([
            "--model.name", "SiT-B/2", "--align.student_layer", "3", "--align.teacher_layer", "8", "--train.global_batch", "16",
            "--train.steps", "200", "--train.log_every", "5", "--train.save_every", "1000", "--train.precision", precision,
            "--data.num_workers", "0", "--optim.warmup_steps", "20",
        ])[0]
        (tmp_path / backend).mkdir()
        trainer = build(cfg, init_distributed())
        curves[backend] = [row["loss"] for row in train(trainer, RandomLatents(), tmp_path / backend)]
    assert len(curves["torch"]) > 40 and curves["torch"][-1] < curves["torch"][0]
    assert curves["triton"][:4] == pytest.approx(curves["torch"][:4], rel=early)
    assert curves["triton"] == pytest.approx(curves["torch"], rel=late)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="needs e4m3 products")
def test_fp8_teacher_with_graph_and_stream(tmp_path):
    """50 steps of SiT-S/2: the same loss curve to a fraction of a percent, however the teacher runs; scales are powers of two."""
    curves = {}
    for name, extra in {"bf16": "", "fp8": "--align.teacher_dtype fp8", "every": "--align.teacher_dtype fp8 --align.every 2",
                        "graph": "--align.teacher_dtype fp8 --align.teacher_graph true --align.teacher_stream true"}.items():  # fmt: skip
        cfg = parse_train([
            "--model.name", "SiT-S/2", "--align.student_layer", "3", "--align.teacher_layer", "8", "--train.global_batch", "16",
            "--train.steps", "50", "--train.log_every", "5", "--train.save_every", "1000", "--train.precision", "bf16",
            "--data.num_workers", "0", "--train.ema_decay", "0.9", "--optim.lr", "1e-3", *extra.split(),
        ])[0]
        (tmp_path / name).mkdir()
        trainer = build(cfg, init_distributed())
        curves[name] = [row["loss"] for row in train(trainer, RandomLatents(), tmp_path / name)]
        if name != "bf16":
            scales = torch.tensor(trainer.teacher.state())
            assert len(scales) == 24 and (torch.frexp(scales).mantissa == 0.5).all()
            ema = trainer.ema.full()
            layers = {n: m for n, m in trainer.engine.module.teacher.named_modules() if hasattr(m, "weight_scale")}
            for key, layer in layers.items() if name != "every" else ():
                error = (layer.weight.float() * layer.weight_scale).cpu() - ema[f"{key}.weight"]
                assert (error.abs() <= 2**-4 * ema[f"{key}.weight"].abs() + 2**-10 * layer.weight_scale.cpu()).all(), key
    assert curves["fp8"] == pytest.approx(curves["bf16"], rel=1e-2) and curves["fp8"] != curves["bf16"]
    assert curves["graph"] == pytest.approx(curves["fp8"], rel=2e-3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of the cases that came to their end, by name; a process of its own, which no launcher puts into another session."""
    folder = tmp_path_factory.mktemp("cuda")
    command = [sys.executable, str(Path(__file__).with_name("zero_worker.py")), str(folder), "stages"]
    environ = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=900)
    print(done.stderr[-4000:])
    paths = {name: folder / f"{name}.rank0.pt" for name in NAMES}
    return {name: torch.load(path, weights_only=True, map_location="cpu") for name, path in paths.items() if path.exists()}


@pytest.mark.parametrize("name", NAMES)
def test_ema_and_teacher(results, name):
    ours, dtype = results[name]["whole"], torch.bfloat16 if name.startswith("bf16") else torch.float32
    for key, expected in ours["watched_ema"].items():
        assert relative_error(ours["ema"][key], expected) <= 1e-6, key
    for key, value in ours["teacher"].items():
        assert torch.equal(value, ours["ema"][key].to(dtype).float()), key


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 5e-3)])
def test_stages_agree_and_learn(results, precision, tolerance):
    losses = [results[f"{precision}_{stage}"]["whole"]["loss"] for stage in range(4)]
    assert len(losses[0]) == STEPS and losses[0][-1] < losses[0][0]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=tolerance)
    assert losses[0] == pytest.approx(results["fp32_1"]["whole"]["loss"], rel=5e-3)


@pytest.mark.parametrize("name", NAMES)
def test_resumed_run_goes_on(results, name):
    whole, resumed = results[name]["whole"], results[name]["resumed"]
    assert resumed["loss"] == pytest.approx(whole["loss"][STEPS // 2 :], rel=5e-3 if name.startswith("bf16") else 1e-4)
