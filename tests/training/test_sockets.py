"""New parts enter through their sockets: everything below is defined here and nowhere else.

A toy alignment target, sampler, model family and data set train ten steps together, from the
command line to samples and scores.
"""

from dataclasses import dataclass

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_config import TINY

from sra_fast.alignment.target import AP_HEAD, Target, compare
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.cli import parse_train
from sra_fast.config.schema import DistanceConfig
from sra_fast.data.training_data import TrainingData
from sra_fast.diffusion.samplers import sample
from sra_fast.models import SiT
from sra_fast.training.plan import make_run_plan
from sra_fast.training.run import run
from sra_fast.utils import registry
from sra_fast.zero.process_group import init_distributed


@dataclass
class ToyTargetConfig(DistanceConfig):
    """Alignment to fixed random features."""

    toy_scale: float = 1.0
    """size of the target features"""


class ToyTarget(Target):
    """Targets that depend on the noisy input only, and need no network."""

    config = ToyTargetConfig
    calls = 0

    @classmethod
    def head_name(cls, align):
        return AP_HEAD

    def start(self, inputs):
        x = inputs.select(inputs.noisy.x_teacher)
        tokens = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
        self.target = self.align.toy_scale * tokens.repeat(1, 1, 8)
        # FLOPs are counted on tensors without data
        ToyTarget.calls += not x.is_meta

    def loss(self, student, features, inputs):
        predicted = self.projected(student, features, inputs)
        return compare(predicted, self.target, self.align.distance, self.align.beta)


class ToySiT(SiT):
    """A SiT whose prediction is halved."""

    family = "Toy"

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if isinstance(outputs, tuple):
            return outputs[0] / 2, outputs[1]
        return outputs / 2


class ToyData(TrainingData):
    """Sixty-four constant images of two classes."""

    shape = (1, 8, 8)
    num_classes = 2
    in_memory = True
    evaluation = "toy"

    def __init__(self):
        self.labels = torch.arange(64) % 2

    def __getitems__(self, indices):
        labels = self.labels[indices]
        images = (2.0 * labels - 1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        return images, labels


class ToySampler:
    """One large Euler step."""

    process = "flow_matching"
    steps = (1, 1)
    state_dtype = torch.float32

    def __call__(self, guided, x, num_steps, path, shift, noise):
        return x - guided(x, torch.ones((), device=x.device), inside=False)


class ToyEvaluation:
    """The mean brightness of what was generated."""

    num_images = 8
    columns = 4
    gap_after = None
    scale = 1

    def scores(self, images, labels):
        return {"brightness": float(images.mean())}

    def picture(self, images, labels):
        return images


@pytest.fixture
def toys():
    parts = [
        (registry.TARGETS, ToyTarget),
        (registry.MODEL_FAMILIES, ToySiT),
        (registry.SAMPLERS, ToySampler),
        (registry.EVALUATIONS, ToyEvaluation),
        (registry.DATASETS, lambda data: ToyData()),
    ]
    names = ["toy", "Toy", "toy", "toy", "toy"]
    for (socket, part), name in zip(parts, names, strict=True):
        socket.register(name)(part)
    yield
    for (socket, _), name in zip(parts, names, strict=True):
        socket.remove(name)


ARGS = (
    "--model.name Toy-S/2 --model.input_size 8 --model.in_channels 1 --model.num_classes 2 "
    "--model.hidden_size 32 --model.depth 4 --model.num_heads 2 "
    "--data.name toy --sample.method toy --sample.steps 1 "
    "--align.target toy --align.toy_scale 0.5 --align.student_layer 2 "
    "--train.steps 10 --train.log_every 1 --train.global_batch 8 --train.precision fp32 "
    # a replay calls no Python, and the calls are counted
    "--train.graph false"
).split()


def test_toy_parts_train_ten_steps(toys, tmp_path):
    cfg, _ = parse_train([*ARGS, "--train.out", str(tmp_path)])
    assert isinstance(cfg.align, ToyTargetConfig) and cfg.align.toy_scale == 0.5
    ToyTarget.calls = 0
    plan = make_run_plan(cfg)
    assert isinstance(plan.data, ToyData)
    summary = run(plan, init_distributed())
    assert ToyTarget.calls == 10
    assert summary["loss_last"] < summary["loss_first"]
    assert -1.5 < summary["brightness"] < 1.5
    # the samples at the end are in TensorBoard too
    events = EventAccumulator(f"{summary['run_dir']}/tensorboard")
    events.Reload()
    shown = events.Images("samples/final")
    picture = Image.open(f"{summary['run_dir']}/samples.png")
    assert [(image.step, image.width, image.height) for image in shown] == [(10, *picture.size)]

    # the run folder is enough to sample from it
    loaded = load_model(summary["run_dir"])
    model, path = loaded.model, loaded.path
    assert isinstance(model, ToySiT)
    noise = torch.randn(2, 1, 8, 8)
    labels = torch.tensor([0, 1])
    images = sample(model, noise, labels, "toy", 1, path=path)
    expected = noise - model(noise, torch.ones(2), labels)
    assert torch.equal(images, expected)
    assert images[1].mean() > images[0].mean(), "the classes are bright and dark"


def test_options_belong_to_their_target(toys, capsys):
    with pytest.raises(SystemExit):
        parse_train([*ARGS, "--align.teacher_layer", "3"])
    assert "--align.teacher_layer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_train([*TINY, "--align.toy_scale", "3"])
    assert "--align.toy_scale" in capsys.readouterr().err


def test_choices_come_from_the_registries(toys, capsys):
    for option in ("--align.target", "--sample.method", "--data.name"):
        with pytest.raises(SystemExit):
            parse_train([option, "nothing"])
        message = capsys.readouterr().err
        assert "toy" in message and "nothing" in message
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    assert "--align.teacher_layer" in capsys.readouterr().out


def test_a_name_is_registered_once():
    socket = registry.Registry("part", "a.room")
    with pytest.raises(ValueError, match="^expected a part, got 'a' before any is registered: imp"):
        socket["a"]
    socket.register("a")(int)
    socket.register("a")(int)
    with pytest.raises(ValueError, match="the part 'a' is registered twice"):
        socket.register("a")(float)
    with pytest.raises(ValueError, match="expected a part of a, got 'b'"):
        socket["b"]
