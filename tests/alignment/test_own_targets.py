"""Targets that somebody else writes: what works with nothing but the page of CONTRIBUTING.md, and
the one line for each fault that a run would not show.
"""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from test_every_target import MODEL, batch_of
from torch import nn

from sra_fast.alignment.checks import COLUMNS, check_found
from sra_fast.alignment.ema_teacher import EMATeacher, EMATeacherConfig
from sra_fast.alignment.heads import FeatureHead
from sra_fast.alignment.objective import add_heads, make_objective
from sra_fast.alignment.target import AP_HEAD, Target, own_head, trained_heads
from sra_fast.alignment.teacher_target import TeacherTarget
from sra_fast.config.cli import parse_train
from sra_fast.config.schema import AlignConfig, DistanceConfig
from sra_fast.models.backbone import Backbone
from sra_fast.training import flops
from sra_fast.training.flops import forward_flops
from sra_fast.training.plan import fill_in, make_run_plan
from sra_fast.training.run import run
from sra_fast.utils.registry import TARGETS
from sra_fast.zero.process_group import init_distributed

NAME = "somebodys"


@pytest.fixture
def registered(monkeypatch):
    """Registers a class under ``NAME`` for one test."""
    # FLOPs are remembered by the options, which say nothing of the class
    monkeypatch.setattr(flops, "_forward_flops", {})
    yield TARGETS.register(NAME)
    TARGETS.remove(NAME)


def configuration(*args: str):
    cfg = parse_train([*MODEL, "--align", NAME, *args])[0]
    fill_in(cfg)
    return cfg


def objective_of(*args: str):
    """As the trainer makes it, with weights that are not zero."""
    cfg = configuration(*args)
    torch.manual_seed(0)
    student = cfg.model.build()
    add_heads(student, cfg)
    for p in student.parameters():
        nn.init.normal_(p, std=0.1)
    depth = TARGETS[NAME].network_depth(cfg.align)
    network = None if depth is None else cfg.model.build_teacher(depth).eval()
    return make_objective(cfg, student, network).train()


class Plain(Target):
    """The student's features shall be small."""

    def loss(self, student, features, inputs):
        return {"align": self.projected(student, features, inputs).float().square().mean()}


# parameters and buffers


class OwnLayer(Plain):
    def __init__(self, align, network):
        super().__init__(align, network)
        self.proj = nn.Linear(32, 8)


class OwnScale(EMATeacher):
    """Beside a network, whose parameters are none of the target's."""

    config = EMATeacherConfig

    def __init__(self, align, network):
        super().__init__(align, network)
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("kind, names", [(OwnLayer, "proj.weight, proj.bias"), (OwnScale, "scale")])
def test_a_parameter_that_nothing_trains_is_named(kind, names, registered):
    registered(kind)
    with pytest.raises(ValueError) as error:
        objective_of()
    assert str(error.value) == (
        f"align.target somebodys has trainable parameters {names}: "
        "expected them in the module that make_head returns"
    )


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_no_checkpoint_keeps_says_so(persistent, registered):
    @registered
    class Counting(EMATeacher):
        def __init__(self, align, network):
            super().__init__(align, network)
            # frozen layers are made again, as buffers that are not persistent
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.register_buffer("count", torch.zeros(()), persistent=persistent)

    if not persistent:
        assert objective_of().targets[0].count == 0
        return
    with pytest.raises(ValueError, match=r"^align.target somebodys has persistent buffers count, "):
        objective_of()


# heads


class OwnHead(EMATeacher):
    """SRA's target, of which only the head is another one."""

    @classmethod
    def make_head(cls, align, model):
        width = model.arguments()["hidden_size"]
        return FeatureHead(width, 16, width)


def test_make_head_is_all_that_a_head_needs(registered):
    registered(OwnHead)
    objective = objective_of()
    own = objective.student.get_submodule("align_heads.somebodys")
    assert isinstance(own, FeatureHead)
    loss, _ = objective(batch_of(objective), [1.0])
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in own.parameters())
    assert all(p.grad.abs().max() == 0 for p in objective.student.ap_head.parameters())
    # from the options of a checkpoint, too
    stored = SimpleNamespace(target=NAME, head="mlp")
    assert trained_heads([stored]) == {"align_heads.somebodys"}


def test_no_head_means_the_own_one_too(registered):
    registered(OwnHead)
    objective = objective_of("--align.head", "none")
    assert not objective.student.align_heads
    assert trained_heads([objective.targets[0].align]) == set()
    loss, _ = objective(batch_of(objective), [1.0])
    loss.backward()


def test_a_target_that_inherits_a_head_has_its_own_name(registered):
    @registered
    class Inherited(TARGETS["cached_features"]):
        pass

    objective = objective_of("--align.feature_width", "24")
    assert list(objective.student.align_heads) == [NAME]
    loss, _ = objective(batch_of(objective), [1.0])
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in objective.student.align_heads[NAME].parameters())


def test_names_of_the_heads_stay():
    names = {
        name: TARGETS[name].head_name(TARGETS[name].config()) for name in TARGETS if name != "none"
    }
    assert names == {
        "ema_teacher": "ap_head",
        "self_flow": "ap_head",
        "dual_time": "ap_head",
        "vae_latent": "align_heads.vae_latent",
        "cached_features": "align_heads.cached_features",
        "layer_sync": None,
        "dispersive": None,
    }


class NamedOtherwise(OwnHead):
    @classmethod
    def head_name(cls, align):
        return AP_HEAD


class PlainLayer(OwnHead):
    @classmethod
    def make_head(cls, align, model):
        return nn.Linear(32, 32)


class NamedOnly(EMATeacher):
    @classmethod
    def head_name(cls, align):
        return own_head(NAME)


@pytest.mark.parametrize(
    "kind, message",
    [
        (NamedOtherwise, "make_head makes the head align_heads.somebodys, got head_name ap_head"),
        (PlainLayer, "make_head must return a Head .*, got Linear"),
        (NamedOnly, "make_head must return a Head .*, got NoneType"),
    ],
)
def test_a_head_that_would_not_run_is_refused(kind, message, registered):
    registered(kind)
    with pytest.raises(ValueError, match=f"^align.target somebodys: {message}"):
        objective_of()


# networks and depths


def depth_of(depth):
    return classmethod(lambda cls, align: depth)


@pytest.mark.parametrize("depth", [50, 0, 5])
def test_a_network_is_no_deeper_than_the_model(depth, registered):
    registered(type("Deep", (EMATeacher,), {"network_depth": depth_of(depth)}))
    message = rf"network_depth must lie in \[1, 4\], the blocks of the model, got {depth}"
    with pytest.raises(ValueError, match=f"^align.target somebodys: {message}"):
        objective_of()


def test_a_teacher_has_a_depth(registered):
    registered(type("None_", (TeacherTarget,), {"network_depth": depth_of(None)}))
    with pytest.raises(ValueError, match=r"network_depth must lie in \[1, 4\], .*, got None"):
        objective_of()


@pytest.mark.parametrize("depths", [(99,), (0, 2), (2, 5)])
def test_depths_that_the_student_does_not_have(depths, registered):
    registered(type("Far", (EMATeacher,), {"depths": depths}))
    message = rf"^align.target somebodys: depths must lie in \[1, 4\], .* got \[{depths[0]}"
    with pytest.raises(ValueError, match=message):
        objective_of()


@pytest.mark.parametrize("depth, got", [(None, "none"), (2, "one of 2")])
def test_the_network_is_the_one_that_the_target_needs(depth, got, registered):
    registered(EMATeacher)
    cfg = configuration("--align.teacher_layer", "3")
    network = None if depth is None else cfg.model.build_teacher(depth)
    with pytest.raises(ValueError, match=f"somebodys needs a network of 3 blocks, got {got}"):
        make_objective(cfg, cfg.model.build(), network)


@dataclass
class OwnTeacherConfig(DistanceConfig):
    """A teacher without SRA's options."""

    @property
    def largest_gap(self) -> float:
        return 0.5


class OwnTeacher(TeacherTarget):
    """What a teacher needs, and nothing that SRA's has besides."""

    config = OwnTeacherConfig
    network_depth = depth_of(3)

    def loss(self, student, features, inputs):
        predicted = self.projected(student, features, inputs)
        return {"align": (predicted.float() - self.result().float()).square().mean()}


class BareTeacher(Target):
    """A network that the target runs itself, of all the target sees."""

    config = AlignConfig
    network_depth = depth_of(3)

    def loss(self, student, features, inputs):
        noisy = inputs.noisy
        deep = self.network.features(noisy.x_teacher, inputs.sinusoid, noisy.batch.condition)
        return {"align": (self.projected(student, features, inputs) - deep).square().mean()}


def test_a_teacher_of_ones_own_sees_the_aligned_images_at_the_teachers_times(registered):
    registered(OwnTeacher)
    objective = objective_of("--align.fraction", "0.5", "--align.student_layer", "1")
    batch = batch_of(objective)
    gap = batch.times.student - batch.times.teacher
    assert 0.2 < gap.max() <= 0.5 and gap.min() >= 0
    _, parts = objective(batch, [1.0])
    t = batch.times.teacher[::2]
    x0, noise = batch.x0[::2], batch.noise[::2]
    x = (1 - t).view(-1, 1, 1, 1) * x0 + t.view(-1, 1, 1, 1) * noise
    deep = objective.teacher.features(x, t, batch.condition.select(slice(None, None, 2)))
    assert not deep.requires_grad, "a network that follows the EMA is frozen"
    seen = batch.times.student.view(-1, 1, 1, 1)
    _, student = objective.student(
        (1 - seen) * batch.x0 + seen * batch.noise, batch.times.student, batch.condition, depths=[1]
    )
    expected = (student.after[1][::2] - deep).square().mean()
    torch.testing.assert_close(parts["align"], expected.detach())


@pytest.mark.parametrize("kind", [OwnTeacher, BareTeacher])
def test_weights_are_complete_when_the_network_runs(kind, registered, monkeypatch):
    registered(kind)
    objective = objective_of()
    events = []
    objective.targets[0].follow(lambda: events.append("waited"))
    features = Backbone.features
    monkeypatch.setattr(
        Backbone, "features", lambda *args, **kw: events.append("ran") or features(*args, **kw)
    )
    objective(batch_of(objective), [1.0])
    assert events[0] == "waited" and events.count("ran") == 1


@pytest.mark.parametrize("kind", [OwnTeacher, BareTeacher])
def test_flops_of_a_network_are_those_of_the_ema_teacher(kind, registered):
    """However the target runs it; they have no backward pass."""
    registered(kind)
    found = forward_flops(configuration())
    sra = parse_train([*MODEL, "--align", "ema_teacher", "--align.teacher_layer", "3"])[0]
    fill_in(sra)
    assert found["align_teacher"] == forward_flops(sra)["align_teacher"] > 0
    assert found["align"] == 0, "these have no head"


@pytest.mark.parametrize("kind", [OwnTeacher, BareTeacher])
def test_a_teacher_of_ones_own_trains(kind, registered, tmp_path):
    registered(kind)
    args = "--train.steps 6 --train.log_every 1 --sample.steps 2 --train.out".split()
    cfg = parse_train([*MODEL, "--align", NAME, *args, str(tmp_path)])[0]
    summary = run(make_run_plan(cfg), init_distributed())
    rows = [json.loads(line) for line in (tmp_path / "000/stats.jsonl").read_text().splitlines()]
    # at the beginning every block is the identity
    assert len(rows) == 6 and rows[-1]["align"] > 0
    assert summary["loss_last"] < summary["loss_first"]
    # no column of the log is free for what a target returns
    assert set(rows[-1]) - set(COLUMNS) == {"denoise", "align"}


# what the loss returns


def returning(make):
    """A target whose loss returns ``make(loss)``, of a loss that is right."""

    class Returning(Plain):
        def loss(self, student, features, inputs):
            return make(super().loss(student, features, inputs)["align"])

    return Returning


BAD_LOSSES = {
    "tensor": (lambda x: x, 'a dict with the loss as "align", got a tensor []'),
    "other name": (lambda x: {"loss": x}, 'a dict with the loss as "align", got a dict with loss'),
    "per image": (lambda x: {"align": x.expand(8)}, 'tensors [], got a tensor [8] as "align"'),
    "number": (lambda x: {"align": x, "more": 1.0}, 'tensors [], got a float as "more"'),
    "part": (lambda x: {"align": x, "denoise": x}, 'the log has "denoise" already'),
    "sum": (lambda x: {"align": x, "loss": x}, 'the log has "loss" already'),
    "column": (lambda x: {"align": x, "step": x}, 'the log has "step" already'),
    "detached": (lambda x: {"align": x.detach()}, "got torch.float32 without a gradient"),
    "counted": (lambda x: {"align": x.long()}, "got torch.int64 without a gradient"),
}


@pytest.mark.parametrize("fault", BAD_LOSSES)
def test_a_loss_that_would_have_no_effect_is_one_line(fault, registered):
    make, message = BAD_LOSSES[fault]
    registered(returning(make))
    objective = objective_of()
    with pytest.raises(ValueError) as error:
        objective(batch_of(objective), [1.0])
    line = str(error.value)
    assert line.startswith("align.target somebodys: loss must return ") and message in line
    assert "\n" not in line


def test_of_a_second_target_the_names_are_its_own(registered):
    """``student_norm2`` is free, and the line names the section."""
    registered(returning(lambda x: {"align": x, "student_norm": x.detach()}))
    args = "--align self_flow --align2 somebodys".split()
    cfg = parse_train([*MODEL, *args])[0]
    fill_in(cfg)
    network = cfg.model.build_teacher(cfg.align.teacher_layer).eval()
    objective = make_objective(cfg, cfg.model.build(), network).train()
    _, parts = objective(batch_of(objective), [1.0, 1.0])
    assert {"student_norm", "student_norm2", "align2"} <= set(parts)
    with pytest.raises(ValueError, match='^align2.target somebodys: .* the log has "align2"'):
        check_found("align2", objective.targets[1], {"align": parts["align"]}, {"align2"}, False)


def test_without_gradients_a_loss_needs_none(registered):
    registered(Plain)
    objective = objective_of()
    with torch.no_grad():
        loss, parts = objective(batch_of(objective), [1.0])
    assert loss == parts["denoise"] + parts["align"]


def test_the_check_reads_no_value(registered):
    """On tensors without data, and inside a graph of torch.compile that is whole."""
    registered(Plain)
    target = objective_of().targets[0]

    def checked(x):
        found = {"align": x.square().mean(), "more": x.detach().sum()}
        check_found("align", target, found, {"denoise"}, True)
        return found["align"]

    assert checked(torch.ones(3, device="meta", requires_grad=True)).is_meta
    compiled = torch.compile(checked, fullgraph=True, backend="eager")
    assert compiled(torch.ones(3, requires_grad=True)) == 1


# tensors without values


class ReadsInTheLoss(Plain):
    def loss(self, student, features, inputs):
        found = super().loss(student, features, inputs)
        return {**found, "more": torch.tensor(found["align"].item())}


class ReadsAtTheStart(Plain):
    def start(self, inputs):
        self.mean = inputs.noisy.x.cpu().mean()


class ReadsWhenMade(Plain):
    def __init__(self, align, network):
        super().__init__(align, network)
        self.basis = torch.eye(4).numpy()


class ReadsTheTimes(EMATeacher):
    def times(self, process, draws):
        if draws.uniform.max() > 2:
            raise AssertionError
        return super().times(process, draws)


@pytest.mark.parametrize("kind", [ReadsInTheLoss, ReadsAtTheStart, ReadsWhenMade, ReadsTheTimes])
def test_code_that_needs_values_says_so_before_the_first_step(kind, registered):
    registered(kind)
    with pytest.raises(ValueError) as error:
        forward_flops(configuration("--align.student_layer", "1"))
    line = str(error.value)
    assert line.startswith(
        "align.target somebodys: __init__, times, start and loss run once on meta tensors, "
    )
    assert "\n" not in line


def test_other_faults_keep_their_traceback(registered):
    @registered
    class Broken(Plain):
        def loss(self, student, features, inputs):
            return features.nothing

    with pytest.raises(AttributeError, match="nothing"):
        forward_flops(configuration("--align.student_layer", "2"))
