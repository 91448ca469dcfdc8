"""Options, heads and losses of every alignment target; a pair of targets; a whole run of each."""

import json
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from golden import assert_matches
from tiny_config import read_config
from torch import nn
from toy_text import MODEL as TEXT_MODEL
from toy_text import ToyText

from sra_fast import ops
from sra_fast.alignment.cached_features import spatial_norm
from sra_fast.alignment.heads import ConvHead, FeatureHead, LatentHead
from sra_fast.alignment.objective import add_heads, inputs_of, make_objective
from sra_fast.alignment.schedule import align_weights
from sra_fast.alignment.target import compare
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.cli import parse_train
from sra_fast.config.schema import Config
from sra_fast.data import training_data
from sra_fast.data.training_data import TrainingData
from sra_fast.diffusion.draws import draw
from sra_fast.diffusion.micro_batch import MicroBatch, NoisyImages
from sra_fast.models import ClassLabels
from sra_fast.training.plan import fill_in, make_plan, make_run_plan
from sra_fast.training.provenance import _check_compared, changes
from sra_fast.training.run import run
from sra_fast.training.trainer import build
from sra_fast.utils.registry import TARGETS
from sra_fast.zero.process_group import init_distributed

pytestmark = pytest.mark.usefixtures("rooms")

# the tiny model without SRA's options
MODEL = (
    "--model.name SiT-S/2 --model.input_size 8 --model.in_channels 1 --model.num_classes 10 "
    "--model.hidden_size 32 --model.depth 4 --model.num_heads 2 "
    "--data.name digits --train.global_batch 8 --train.precision fp32"
).split()
# of labels, and of captions
FAMILIES = {"SiT": (), "MMDiT": tuple(TEXT_MODEL.split())}
WITHOUT_STORED = ["self_flow", "dual_time", "vae_latent", "layer_sync", "dispersive"]


def config(*args: str) -> Config:
    cfg = parse_train([*MODEL, *args])[0]
    fill_in(cfg)
    return cfg


def filled(name: str, model: str, *args: str):
    cfg = parse_train(["--model", model, "--align", name, *args])[0]
    fill_in(cfg)
    return cfg


@pytest.mark.parametrize(
    "name, layers",
    [
        ("self_flow", {"SiT-B/2": (4, 8), "SiT-L/2": (7, 17), "SiT-XL/2": (8, 20)}),
        ("dual_time", {"SiT-B/2": (3, 8), "SiT-L/2": (6, 16), "SiT-XL/2": (8, 20)}),
        ("layer_sync", {"SiT-B/2": (3, 7), "SiT-L/2": (7, 14), "SiT-XL/2": (8, 16)}),
        ("vae_latent", {"SiT-B/2": (2, None), "SiT-L/2": (8, None), "SiT-XL/2": (8, None)}),
        ("dispersive", {"SiT-B/2": (3, None), "SiT-L/2": (6, None), "SiT-XL/2": (7, None)}),
        ("cached_features", {"SiT-B/2": (4, None), "SiT-L/2": (8, None), "SiT-XL/2": (8, None)}),
    ],
)
def test_default_layers_are_the_papers(name, layers):
    for model, expected in layers.items():
        align = filled(name, model).align
        deeper = getattr(align, "teacher_layer", getattr(align, "deep_layer", None))
        assert (align.student_layer, deeper) == expected, model


def test_a_depth_that_is_the_named_size_s_own_changes_no_layer():
    layers = lambda name, *args: (
        (align := filled(name, "SiT-B/2", *args).align).student_layer,
        getattr(align, "teacher_layer", None),
    )
    for name in ("ema_teacher", "vae_latent", "cached_features"):
        assert layers(name, "--model.depth", "12") == layers(name)
        # another depth has the rule's
        assert layers(name, "--model.depth", "16") != layers(name)


def test_default_weights_are_the_papers():
    found = {name: TARGETS[name].config().weight for name in TARGETS if name != "none"}
    assert found == {
        "ema_teacher": 0.2,
        "self_flow": 0.8,
        "dual_time": 0.5,
        "vae_latent": 1.0,
        "layer_sync": 0.2,
        "dispersive": 0.5,
        "cached_features": 0.5,
    }
    assert all(TARGETS[name].config().target == name for name in found)


@pytest.mark.parametrize("name", [*WITHOUT_STORED, "cached_features"])
def test_common_options_are_in_every_target(name):
    """lambda's schedules and the cheaper forms, wherever they make sense."""
    options = {item.name for item in fields(TARGETS[name].config)}
    assert {"schedule", "stop_at_step", "every", "milestones", "weight"} <= options
    assert ("fraction" in options) == (name != "dispersive"), "it repels whole batches"
    teacher = {"teacher_dtype", "teacher_graph", "teacher_stream"}
    assert (teacher <= options) == (name in ("self_flow", "dual_time"))


@pytest.mark.parametrize(
    "args",
    [
        "--align layer_sync --align.t_max 0.1",
        "--align layer_sync --align.head mlp",
        "--align dispersive --align.distance l1",
        "--align dispersive --align.fraction 0.5",
        "--align vae_latent --align.teacher_layer 3",
        "--align self_flow --align.t_max 0.1",
        "--align cached_features --align.teacher_dtype fp8",
        "--align2 layer_sync --align2.t_max 0.1",
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(args, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train(args.split())
    assert stopped.value.code == 2
    assert args.split()[-2] in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        ("--align self_flow --align.second_share 0", r"align.second_share must lie in \(0, 1\)"),
        ("--align self_flow --align.student_layer 4", "student_layer 4 and teacher_layer 3"),
        ("--align dual_time --align.first_share 0.01", "of the 16 tokens must leave both groups"),
        ("--align dual_time --align.first_share 1", "of the 16 tokens must leave both groups"),
        ("--align dual_time --align.full_share 1", r"align.full_share must lie in \[0, 1\)"),
        ("--align dual_time --align.full_share 0.3", "align.full_share of the 8 images"),
        (
            "--align dual_time --align.two_times false --align.separate false",
            "both false: that is target ema_teacher",
        ),
        ("--align dual_time --align.t_max 1.5", r"align.t_max must lie in \[0, 1\], got 1.5"),
        ("--align layer_sync --align.deep_layer 5", r"deep_layer <= depth \(4\)"),
        (
            "--align layer_sync --align.student_layer 2 --align.deep_layer 2",
            "align.deep_layer must be deeper than align.student_layer 2, got 2",
        ),
        ("--align dispersive --train.micro_batch 1", "at least 2 images per micro-batch, got 1"),
        ("--align vae_latent --align.stop_at_step -1", "align.stop_at_step must be at least 1"),
        (
            "--align dual_time --align.full_share 0.25 --align.fraction 0.5",
            r"align.full_share 0.25 needs all images to be aligned",
        ),
        (
            "--align dual_time --align.full_share 0.25 --align2 vae_latent --align2.fraction 0.5",
            r"align.full_share 0.25 needs all images to be aligned",
        ),
        (
            "--align vae_latent --align.channel_mean [.nan] --align.channel_std [1]",
            r"align.channel_mean must be finite, got \[nan\]",
        ),
        ("--align dispersive --align.temperature 0", "align.temperature must be positive"),
        ("--align vae_latent --align.channel_mean [0.0]", "go together, got"),
        (
            "--align vae_latent --align.channel_mean [0,1] --align.channel_std [1,1]",
            "must hold 1 finite numbers",
        ),
        ("--align cached_features", "align.feature_width must be at least 1, got None"),
        (
            "--align cached_features --align.feature_width 8 --align.target_norm spatial "
            "--model.input_size 2",
            "align.target_norm spatial needs at least 2 tokens per image, got 1",
        ),
        (
            "--align dual_time --align.first_share .inf",
            "^align.first_share must be finite, got inf",
        ),
        (
            "--align vae_latent --align2 dual_time --align2.first_share .nan",
            "^align2.first_share must be finite, got nan",
        ),
        (
            "--align vae_latent --align.distance l1 --align.beta .inf",
            "^align.beta must be finite, got inf",
        ),
        (
            "--align cached_features --align.feature_width 8 --align.spatial_mean .nan",
            "^align.spatial_mean must be finite, got nan",
        ),
        ("--align vae_latent --align.beta 0", "align.beta must be positive"),
        ("--align vae_latent --align.fraction 0.3", "align.fraction of the 8 images"),
        ("--align none --align2 vae_latent", "align2 is a second target: it needs align"),
        ("--align vae_latent --align2 vae_latent", "the same target vae_latent"),
        ("--align self_flow --align2 dual_time", "only one of two targets can have an EMA"),
        (
            "--align self_flow --align2 dispersive --align2.temperature 0",
            "align2.temperature must be positive",
        ),
        (
            "--align self_flow --align2 vae_latent --align2.fraction 0.3",
            "align2.fraction of the 8 images",
        ),
        ("--align vae_latent --align.student_layer 9", r"align.student_layer must lie in \[1, 4\]"),
    ],
)
def test_bad_input_is_one_line(args, message):
    cfg = parse_train([*MODEL, *args.split()])[0]
    if "student_layer 4" in args:
        cfg.align.teacher_layer = 3
    with pytest.raises(ValueError, match=message) as error:
        make_plan(cfg, world=1)
    assert "\n" not in str(error.value)


def test_numbers_are_looked_at_before_the_data(tmp_path):
    args = ["--align", "vae_latent", "--align.beta", ".inf", "--train.out", str(tmp_path / "runs")]
    cfg = parse_train([*MODEL, *args, "--data.name", "latents", "--data.path", str(tmp_path)])[0]
    with pytest.raises(ValueError, match="^align.beta must be finite, got inf"):
        make_run_plan(cfg)
    assert not any(tmp_path.iterdir())


def test_stored_features_go_with_their_target():
    cfg = parse_train([*MODEL, "--align", "cached_features"])[0]
    with pytest.raises(ValueError, match="align.target cached_features needs data.features"):
        make_run_plan(cfg)


def objective_of(*args: str):
    cfg = config(*args)
    torch.manual_seed(0)
    student = cfg.model.build()
    add_heads(student, cfg)
    for p in student.parameters():
        nn.init.normal_(p, std=0.1)
    network = None
    for align in cfg.alignments.values():
        depth = TARGETS[align.target].network_depth(align)
        if depth is not None:
            network = cfg.model.build_teacher(depth).eval()
    return cfg, make_objective(cfg, student, network).train()


def batch_of(objective, count: int = 8) -> MicroBatch:
    draws = draw(0, 0, 0, (count, 1, 8, 8), "cpu", drop_prob=0.1, posterior=False, tokens=16)
    labels = torch.arange(count) % 10
    condition = ClassLabels(labels)
    if objective.student.conditioning == "text":
        text = ToyText(labels)
        condition = text.condition(text.tensors(range(count)))
    x0 = torch.randn(count, 1, 8, 8)
    external = torch.randn(count, 16, 24)
    told = condition.dropped(draws.drop)
    return MicroBatch(x0, told, draws.noise, objective.times(draws), external)


# the latent head


def test_size_of_the_latent_head_is_the_papers():
    """8.3 M parameters for B, 18.6 M for XL, with a linear last layer."""
    for width, millions in ((768, 8.3), (1152, 18.6)):
        head = LatentHead(width, 16, modulated=False)
        assert sum(p.numel() for p in head.parameters()) == pytest.approx(1e6 * millions, rel=5e-3)


@pytest.mark.parametrize("last_layer", ["adaln", "linear"])
def test_latent_head_is_written_out(last_layer):
    """Five layers with SiLU, the last one after SiT's modulated norm."""
    torch.manual_seed(0)
    head = LatentHead(32, 12, modulated=last_layer == "adaln")
    for p in head.parameters():
        nn.init.normal_(p, std=0.2)
    x, c = torch.randn(3, 16, 32), torch.randn(3, 32)
    hidden = x
    for layer in (0, 2, 4, 6):
        hidden = nn.functional.silu(head.mlp[layer](hidden))
    if last_layer == "adaln":
        shift, scale = head.modulation(c)[:, None].chunk(2, dim=-1)
        hidden = nn.functional.layer_norm(hidden, (64,), eps=1e-6) * (1 + scale) + shift
    assert_matches(head(x, c), head.linear(hidden))
    # a conditioning for each group of tokens
    if last_layer == "adaln":
        both = torch.stack([c, 2 * c], 1)
        group = torch.randint(2, (3, 16))
        expected = torch.where(group[..., None] == 0, head(x, c), head(x, 2 * c))
        assert_matches(head(x, both, group), expected)


def test_latents_are_those_of_the_patches():
    """In the order of SiT's output, of mean 0 and deviation 1."""
    align = "--align vae_latent --align.channel_mean [0.5] --align.channel_std [2.0]"
    cfg, objective = objective_of(*align.split())
    seen = {}
    target = objective.targets[0]
    batch = batch_of(objective)
    latents = target._latents

    def recorded(inputs):
        seen["latents"] = latents(inputs)
        return seen["latents"]

    target._latents = recorded
    _, parts = objective(batch, [1.0])
    images = objective.student.unpatchify(seen["latents"])
    assert_matches(images, (batch.x0 - 0.5) / 2)
    assert parts["align"] > 0
    plain = config("--align", "vae_latent", "--align.zscore", "false").align
    assert plain.channel_mean is None


@pytest.mark.parametrize("posterior", [False, True])
def test_means_of_the_posterior_are_the_target_if_asked_for(posterior):
    cfg, objective = objective_of("--align", "vae_latent", "--align.latent", "mean")
    assert objective.needs_mean
    batch = batch_of(objective)
    mean = torch.randn_like(batch.x0) if posterior else None
    batch = MicroBatch(batch.x0, batch.condition, batch.noise, batch.times, None, mean)
    noisy = NoisyImages.make(objective.process, batch, 2)
    latents = objective.targets[0]._latents(
        inputs_of(objective.targets[0], noisy, torch.zeros(len(noisy.batch), 256))
    )
    expected = batch.x0 if mean is None else mean
    assert_matches(objective.student.unpatchify(latents), expected)


def test_statistics_of_latents_are_made_in_parts(monkeypatch):
    """All images, with draws of their posterior, a few at a time."""
    torch.manual_seed(0)
    moments = torch.rand(10, 4, 4, 4) + torch.tensor([3.0, -1.0, 0.5, 1.0]).view(1, 4, 1, 1)

    class Moments(TrainingData):
        posterior = True
        shape = (2, 4, 4)
        labels = torch.zeros(10)

        def __getitems__(self, indices):
            return moments[indices], self.labels[indices]

        def to_latent(self, images, noise):
            mean, std = images.chunk(2, 1)
            return mean + std * noise

    monkeypatch.setattr(training_data, "AT_ONCE", 4)
    means, deviations = Moments().channel_statistics()
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn((count, 2, 4, 4), generator=generator) for count in (4, 4, 2)]
    latents = Moments().to_latent(moments, torch.cat(noise)).double()
    assert means == pytest.approx(latents.mean((0, 2, 3)).tolist(), rel=1e-9)
    expected = latents.std((0, 2, 3), correction=0).tolist()
    assert deviations == pytest.approx(expected, rel=1e-9)


def test_statistics_are_of_images_from_all_over_the_set(monkeypatch):
    """Images often lie in the order of their classes."""
    monkeypatch.setattr(training_data, "LOOKED_AT", 4)

    class Sorted(TrainingData):
        shape = (1, 2, 2)

        def __init__(self, count):
            self.labels = torch.arange(count)

        def __getitems__(self, indices):
            indices = torch.as_tensor(indices)
            return indices.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), self.labels[indices]

    for count in (1, 3, 4, 5, 7, 8, 11):
        means, _ = Sorted(count).channel_statistics()
        assert means == pytest.approx([(count - 1) / 2], abs=0.26)


def test_statistics_are_those_of_the_data():
    cfg = parse_train([*MODEL, "--align", "vae_latent"])[0]
    plan = make_run_plan(cfg)
    images, _ = plan.data.__getitems__(list(range(len(plan.data))))
    assert cfg.align.channel_mean == pytest.approx([images.double().mean().item()], rel=1e-6)
    expected = images.double().std(correction=0).item()
    assert cfg.align.channel_std == pytest.approx([expected], rel=1e-6)


# heads in the order of the image


@pytest.mark.parametrize("head", ["mlp", "conv"])
def test_own_heads_see_the_image_in_its_own_order(head):
    """Under groups that are permuted the loss is that of the same tokens in place."""
    features = f"--align2 cached_features --align2.head {head} --align2.feature_width 24"
    args = "--align dual_time --align.student_layer 2 --align.teacher_layer 3 --align.weight 0.5"
    losses = []
    for separate in ("true", "false"):
        words = f"{args} --align.separate {separate} {features} --align2.student_layer 1".split()
        _, objective = objective_of(*words)
        torch.manual_seed(1)
        batch = batch_of(objective)
        if separate == "true":
            # only the order is to differ
            groups = batch.times.groups
            object.__setattr__(groups, "segments", None)
        loss, parts = objective(batch, [0.0, 1.0])
        losses.append(parts["align2"])
        assert "align" not in parts
    assert_matches(*losses)


def test_dispersive_loss_compares_patches_with_patches():
    """Also where every image has its tokens in an order of its own."""
    args = "--align dual_time --align.student_layer 2 --align.teacher_layer 3".split()
    values = []
    for separate in ("true", "false"):
        words = [*args, "--align.separate", separate, "--align2", "dispersive"]
        _, objective = objective_of(*words)
        torch.manual_seed(1)
        batch = batch_of(objective)
        if separate == "true":
            object.__setattr__(batch.times.groups, "segments", None)
        values.append(objective(batch, [0.0, 1.0])[1]["align2"])
    assert_matches(*values)


@pytest.mark.parametrize("every, runs", [(1, [True] * 4), (2, [True, False] * 2)])
def test_teacher_is_refreshed_for_its_own_steps_only(every, runs):
    """A second target without a network does not make it gather its weights."""
    args = f"--align self_flow --align.every {every} --align2 layer_sync".split()
    cfg = parse_train([*MODEL, *args])[0]
    trainer = build(make_plan(cfg), init_distributed())
    found = [trainer.teacher_runs(list(align_weights(cfg, step, 0).values())) for step in range(4)]
    assert found == runs


def test_convolution_head_is_one_over_the_image():
    torch.manual_seed(0)
    head = ConvHead(8, 5)
    x = torch.randn(2, 16, 8)
    images = x.transpose(1, 2).reshape(2, 8, 4, 4)
    expected = nn.functional.conv2d(images, head.conv.weight, head.conv.bias, padding=1)
    assert_matches(head(x, x[:, 0]), expected.flatten(2).transpose(1, 2))


def test_feature_head_has_three_layers():
    head = FeatureHead(8, 12, 5)
    x = torch.randn(2, 16, 8)
    silu = nn.functional.silu
    expected = head.mlp[4](silu(head.mlp[2](silu(head.mlp[0](x)))))
    assert_matches(head(x, x[:, 0]), expected)


def test_spatial_norm_of_a_constant_channel_is_finite():
    assert torch.equal(spatial_norm(torch.full((1, 4, 2), 3.0)), torch.zeros(1, 4, 2))


# the objective with one target and with two


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [*WITHOUT_STORED, "cached_features"])
def test_without_weight_it_is_the_plain_loss_and_no_head_is_trained(name, family):
    more = ["--align.feature_width", "24"] if name == "cached_features" else []
    _, objective = objective_of(*FAMILIES[family], "--align", name, *more)
    batch = batch_of(objective)
    loss, parts = objective(batch, [0.0])
    assert set(parts) == {"denoise"} and loss == parts["denoise"]
    loss.backward()
    heads = [p for head in objective.heads.values() for p in head.parameters()]
    assert heads and all(p.grad.abs().max() == 0 for p in heads)
    # every parameter has a gradient in every step
    assert all(p.grad is not None for p in objective.student.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["ema_teacher", *WITHOUT_STORED, "cached_features"])
def test_every_parameter_has_a_gradient_and_lambda_scales_the_loss(name, family):
    more = ["--align.feature_width", "24"] if name == "cached_features" else []
    _, objective = objective_of(*FAMILIES[family], "--align", name, *more)
    batch = batch_of(objective)
    once, parts = objective(batch, [1.0])
    twice, _ = objective(batch, [torch.tensor(2.0)])
    assert_matches(twice - once, parts["align"], 1e-4)
    twice.backward()
    assert all(p.grad is not None for p in objective.student.parameters())
    own = [n for n, _ in objective.student.named_parameters() if n.startswith("align_heads")]
    assert bool(own) == (name in ("vae_latent", "cached_features"))


@pytest.mark.parametrize("family", FAMILIES)
def test_fraction_takes_the_first_images_of_a_cycle(family):
    for name in ("vae_latent", "layer_sync", "dual_time"):
        common = [*FAMILIES[family], "--align", name, "--align.student_layer", "2"]
        _, whole = objective_of(*common)
        _, half = objective_of(*common, "--align.fraction", "0.5")
        torch.manual_seed(3)
        batch = batch_of(whole)
        found = {}
        for key, objective in (("whole", whole), ("half", half)):
            target = objective.targets[0]
            original = target.projected

            def recorded(*args, key=key, original=original, found=found):
                found[key] = original(*args)
                return found[key]

            target.projected = recorded
            objective(batch, [1.0])
        assert_matches(found["half"], found["whole"][::2])


def test_two_losses_are_added():
    first = "--align self_flow --align.student_layer 2 --align.teacher_layer 3".split()
    second = "--align2 vae_latent --align2.student_layer 1".split()
    _, both = objective_of(*first, *second)
    batch = batch_of(both)
    loss, parts = both(batch, [0.5, 2.0])
    expected = parts["denoise"] + 0.5 * parts["align"] + 2.0 * parts["align2"]
    assert_matches(loss, expected)
    assert {"student_norm", "teacher_norm", "student_norm2", "teacher_norm2"} <= set(parts)
    # each by itself is the same number
    only_first, one = both(batch, [0.5, 0.0])
    only_second, other = both(batch, [0.0, 2.0])
    assert_matches(one["align"], parts["align"])
    assert_matches(other["align2"], parts["align2"])
    assert "align2" not in one and "align" not in other


def test_compare_gives_the_norms():
    features = torch.full((2, 3, 4), 2.0)
    found = compare(features, 2 * features, "cosine_patch", 0.05)
    assert found["align"].abs() < 1e-6
    assert (found["student_norm"], found["teacher_norm"]) == (4.0, 8.0)


# whole runs

RUNS = {
    "self_flow": "--align self_flow",
    "dual_time": "--align dual_time --align.full_share 0.25",
    "vae_latent": "--align vae_latent",
    "layer_sync": "--align layer_sync",
    "dispersive": "--align dispersive",
    "two": "--align dual_time --align2 vae_latent --align2.every 2",
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_each_target(tmp_path, caplog, name):
    """Training, resuming from the middle, samples and their scores, weights for other programs."""
    args = f"{RUNS[name]} --train.steps 6 --train.save_every 3 --train.log_every 1".split()
    args += ["--sample.method", "euler", "--sample.steps", "2"]
    out = ["--train.out", str(tmp_path)]
    cfg = parse_train([*MODEL, *args, *out])[0]
    summary = run(make_run_plan(cfg), init_distributed())
    folder = tmp_path / "000"
    rows = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(row["align"] is not None for row in rows)
    if name == "two":
        # each second step has none
        assert [("align2" in row, row["align2_weight"]) for row in rows] == [
            (True, 2.0),
            (False, 0.0),
        ] * 3
    assert summary["loss_last"] < summary["loss_first"] and "label_accuracy" in summary

    # the saved configuration reads back, with what was measured on the data
    assert read_config(folder / "config.yaml").align == cfg.align
    # heads of the target are no part of the model
    loaded = load_model(str(folder))
    from_checkpoint = load_model(str(folder / "checkpoints/step_00000006"))
    for key, value in loaded.model.state_dict().items():
        assert not key.startswith("align_heads")
        assert torch.equal(value, from_checkpoint.model.state_dict()[key])

    if name == "vae_latent":
        middle = ["--train.resume", str(folder / "checkpoints/step_00000003")]
        other = parse_train([*MODEL, *args, *out, *middle, "--align.last_layer", "linear"])[0]
        with pytest.raises(ValueError, match="made with align.last_layer adaln, this run has lin"):
            make_run_plan(other)
        # a new run from its weights: the head is said to be fresh
        start = ["--train.init_from", str(folder), "--train.out", str(tmp_path / "new")]
        caplog.clear()
        make_run_plan(parse_train([*MODEL, *args, *start])[0])
        assert "fresh: the head align_heads.vae_latent, which no model has" in caplog.text

    middle = str(folder / "checkpoints/step_00000003")
    if name == "dispersive":
        # fewer images that repel each other are another loss
        other = parse_train([*MODEL, *args, "--train.micro_batch", "4", "--train.resume", middle])
        with pytest.raises(ValueError, match="compared 8 images with each other, this run has 4"):
            make_run_plan(other[0])

    # resumed from the middle: the same rows, bit for bit
    again = parse_train([*MODEL, *args, *out, "--train.resume", middle])[0]
    run(make_run_plan(again), init_distributed())
    resumed = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    for before, after in zip(rows[3:], resumed[3:], strict=True):
        for key in ("loss", "align", "grad_norm", "align2"):
            assert before.get(key) == after.get(key)


@pytest.mark.parametrize(
    "over, micro, world, message",
    [
        ("process", 4, 2, None),
        # the size stays, the number of processes does not
        ("process", 4, 1, None),
        ("process", None, 2, None),
        ("process", None, 1, "compared 4 images with each other, this run has 8"),
        ("all", 4, 2, None),
        ("all", None, 1, None),
        ("all", 2, 2, "compared 8 images with each other, this run has 4"),
    ],
)
def test_a_loss_of_a_micro_batch_goes_on_with_its_size(over, micro, world, message):
    """A run of 8 images on two processes, 4 each, is resumed."""
    dispersive = ("--align", "dispersive", "--align.over", over)
    manifest = Mock(world=2, step=3, settings=asdict(config(*dispersive)))
    cfg = config(*dispersive, *([] if micro is None else ["--train.micro_batch", str(micro)]))
    refused = pytest.raises(ValueError, match=f"^cannot resume here: align.target .*{message}")
    with refused if message else nullcontext():
        _check_compared(Path("here"), manifest, cfg, world)
    # with another target, or another one before, or where it is over, there is nothing to keep
    _check_compared(Path("here"), manifest, config("--align", "layer_sync"), 1)
    over = config(*dispersive, "--align.stop_at_step", "3")
    _check_compared(Path("here"), manifest, over, 1)
    manifest.settings = asdict(config("--align", "layer_sync"))
    _check_compared(Path("here"), manifest, cfg, world)


def test_settings_of_a_version_with_one_target_are_the_same():
    """Sections and options that did not exist had their defaults."""
    after = asdict(config("--align", "self_flow"))
    before = json.loads(json.dumps(after))
    del before["align2"], before["data"]["features"], before["sample"]["time_shift"]
    for name in ("time_mean", "time_std", "time_shift"):
        del before["diffusion"][name]
    assert changes(before, after) == {}
    two = asdict(config("--align", "self_flow", "--align2", "layer_sync"))
    assert changes(before, two)["align2.target"] == ("absent", "layer_sync")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_takes_groups_and_two_targets(family):
    """The tensors of a batch, and back."""
    words = [*FAMILIES[family], *RUNS["two"].split(), "--align2.student_layer", "1"]
    _, objective = objective_of(*words)
    batch = batch_of(objective)
    back = batch.with_tensors(batch.tensors())
    assert back.times.groups.segments == batch.times.groups.segments
    for ours, theirs in zip(back.tensors(), batch.tensors(), strict=True):
        assert ours is theirs
    assert torch.equal(back.times.teacher, batch.times.teacher)


def test_backend_measurement_has_the_segments(monkeypatch):
    """Attention is measured for the shapes that run, before a compiler traces the blocks."""
    seen = []
    attention = ops.attention

    def recorded(q, k, v, **options):
        seen.append((q.shape[0], options.get("segments"), q.requires_grad))
        return attention(q, k, v, **options)

    monkeypatch.setattr(ops, "attention", recorded)
    monkeypatch.setattr("sra_fast.models.SiT.compile_blocks", lambda self: None)
    monkeypatch.setattr("sra_fast.models.Backbone.compile_blocks", lambda self: None)
    args = "--align dual_time --align.fraction 0.5 --train.compile true".split()
    cfg = parse_train([*MODEL, *args])[0]
    build(make_plan(cfg), init_distributed())
    assert seen == [(8, (4, 12), True), (4, (4, 12), False)]
