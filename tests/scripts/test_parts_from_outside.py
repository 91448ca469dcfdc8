"""Parts outside of the package, used by the programs: a model family that knows nothing of this
engine's options, and a learning-rate schedule.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, environment

PARTS = """
import torch
import torch.nn.functional as F
from torch import nn

from sra_fast.models.backbone import Backbone, DiffusionTransformer, Stream
from sra_fast.models.layers import LabelEmbedder
from sra_fast.utils.registry import LR_SCHEDULES, MODEL_FAMILIES


class MlpBlock(nn.Module):
    def __init__(self, width, share):
        super().__init__()
        self.share = share
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x, c, pending):
        return x + self.share * F.gelu(self.linear(self.norm(x + c[:, None]))), None


class MlpBackbone(Backbone):
    def __init__(
        self,
        input_size,
        patch_size,
        in_channels,
        hidden_size,
        depth,
        num_heads,
        num_classes,
        share=1.0,
    ):
        super().__init__(
            input_size, patch_size, in_channels, hidden_size, depth, num_heads, 0.0, None
        )
        self.num_classes = num_classes
        self.share = share
        self._make_embedders()
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, 0.0)
        self._make_pos_embed()
        self.blocks = nn.ModuleList(MlpBlock(hidden_size, share) for _ in range(depth))
        self._init_backbone()

    def own_arguments(self):
        return dict(num_classes=self.num_classes, share=self.share)

    @property
    def has_null(self):
        return False

    def begin(self, x, t, condition, groups=None):
        condition = self.as_condition(condition)
        self._check_inputs(x, t, condition, groups)
        c = self.t_embedder(self._time(t, groups)) + self.y_embedder(condition)
        return Stream(self._image_tokens(x, groups), F.silu(c), groups)


@MODEL_FAMILIES.register("Mlp")
class Mlp(DiffusionTransformer, MlpBackbone):
    family = "Mlp"
    backbone = MlpBackbone

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._make_output()


@LR_SCHEDULES.register("squared")
def squared(progress):
    return 1 - progress**2
"""
MODEL = (
    "--config digits.yaml --model.name Mlp-S/2 --model.hidden_size 32 --model.depth 4 "
    "--model.num_heads 2 --model.options.share 0.5 --train.steps 4 --train.log_every 1 "
    "--optim.schedule squared "
    "--sample.guidance 1"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the programs are started: the module lies there, and is on no path."""
    made = tmp_path_factory.mktemp("outside")
    (made / "my_parts.py").write_text(PARTS)
    (made / "digits.yaml").write_text((ROOT / "configs/digits.yaml").read_text())
    return made


def call(folder: Path, program: str, words: str, parts: str = "my_parts"):
    environ = {**environment(), "SRA_FAST_IMPORT": parts}
    command = [sys.executable, str(ROOT / f"sra_fast/{program}.py"), *words.split()]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


def refused(done) -> str:
    """The line with which a program ended; a warning may stand before it."""
    assert done.returncode == 2 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def samples_of(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as samples:
        return samples["arr_0"]


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    done = call(folder, "train", f"{MODEL} --train.out runs")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs/000"


def test_every_program_has_the_parts(folder, trained):
    done = call(folder, "sample", "--checkpoint runs/000 --count 4 --sample.steps 2 --out samples")
    assert done.returncode == 0, done.stderr[-3000:]
    assert samples_of(folder / "samples").shape == (4, 8, 8, 1)
    # shapes do not tell `share`: both kinds of file do
    images = samples_of(folder / "samples")
    for suffix in (".safetensors", ".pt"):
        exported = f"--checkpoint runs/000 --out weights{suffix}"
        done = call(folder, "export", exported)
        assert done.returncode == 0, done.stderr[-3000:]
        again = f"--checkpoint weights{suffix} --count 4 --sample.steps 2 --out from{suffix}"
        done = call(folder, "sample", again)
        assert done.returncode == 0, done.stderr[-3000:]
        assert np.array_equal(samples_of(folder / f"from{suffix}"), images)
    # partitioned parameters are gathered by its own blocks
    done = call(folder, "train", f"{MODEL} --train.out three --train.zero_stage 3")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [(folder / run / "000/stats.jsonl").read_text() for run in ("runs", "three")]
    assert rows[0].count("\n") == rows[1].count("\n") == 4


@pytest.mark.parametrize(
    "words, message",
    [
        ("--train.recompute full", "error: train.recompute means nothing to a Mlp, whose backbone"),
        ("--train.residual fp32", "error: train.residual means nothing to a Mlp, whose backbone"),
        ("--model.options.part 2", "error: expected in model.options what a Mlp has there (share)"),
        ("--model.options.share half", "error: model.options.share: expected a number, got 'half'"),
        ("--model.qk_norm true", "error: model.qk_norm means nothing to a Mlp, got True: leave it"),
        (
            "--sample.guidance 2",
            "error: sample.guidance 2.0 needs a model that knows the null class",
        ),
        (
            "--align self_flow",
            "error: align.target self_flow gives the tokens of an image two times",
        ),
    ],
)
def test_what_a_family_does_not_know_is_refused(folder, words, message):
    assert refused(call(folder, "train", f"{MODEL} {words}")).startswith(message)


@pytest.mark.parametrize("program", ["train", "sample", "export"])
def test_a_module_that_does_not_exist_is_one_line(folder, program):
    line = refused(call(folder, program, "", "my_parts,my_partz"))
    assert line.startswith("error: SRA_FAST_IMPORT names my_partz, and there is no module my_partz")


def test_an_error_inside_of_a_module_is_its_own(folder):
    (folder / "broken.py").write_text("import my_partz\n")
    done = call(folder, "sample", "", "broken")
    assert done.returncode == 1 and "ModuleNotFoundError: No module named 'my_partz'" in done.stderr
