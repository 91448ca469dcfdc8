import pytest
import torch
from golden import Golden, assert_matches, relative_error
from torch import nn

from sra_fast import ops
from sra_fast.alignment.ema_teacher import EMATeacher, EMATeacherConfig
from sra_fast.alignment.objective import SRAObjective
from sra_fast.alignment.schedule import align_weight, alignment_phases, is_over
from sra_fast.config.schema import AlignConfig
from sra_fast.diffusion.flow_matching import FlowMatching
from sra_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from sra_fast.diffusion.micro_batch import MicroBatch, Times
from sra_fast.models import ClassBackbone, ClassLabels
from sra_fast.models.layers import timestep_features

NO_DROP = torch.zeros(6, dtype=bool)


def objective(golden, process, **align):
    """Student with the weights ``sd``, teacher with ``ema``, truncated at block 3."""
    student = golden.model()
    ema = golden.tree("ema")
    teacher = ClassBackbone(8, 2, 4, 32, depth=3, num_heads=2, num_classes=10).eval()
    teacher.load_state_dict({k: ema[k] for k in teacher.state_dict()})
    cfg = EMATeacherConfig(student_layer=2, teacher_layer=3, **align)
    return SRAObjective(student, [EMATeacher(cfg, teacher)], process).train()


def sit_loss(model, golden, weight=0.2, drop=NO_DROP):
    # y_drop already contains the null class
    condition = ClassLabels(golden["y_drop"], drop)
    times = Times(golden["t"], golden["t_teacher"])
    return model(MicroBatch(golden["x0"], condition, golden["noise"], times), [weight])


@pytest.mark.parametrize(
    "kind, key", [("smooth_l1", "align_sml1"), ("l1", "align_l1"), ("l2", "align_l2")]
)
def test_distances_match_the_published_code(kind, key):
    golden = Golden("SiT")
    distance = ops.align_distance(golden["student_feat"], golden["teacher_feat"], kind).mean()
    assert_matches(distance, golden[key])


@pytest.mark.parametrize(
    "kind, key", [("cosine_token", "align_cos"), ("cosine_patch", "align_cos_patch")]
)
def test_cosine_distances_match_the_published_code(kind, key):
    golden = Golden("SiT")
    distance = ops.align_distance(golden["student_feat"], golden["teacher_feat"], kind)
    assert_matches(distance, golden[key].mean(1))


def test_sit_loss_and_gradients_match_the_published_code():
    golden = Golden("SiT")
    model = objective(golden, FlowMatching())
    loss, parts = sit_loss(model, golden)
    assert_matches(loss, golden["total_loss_sml1_0.2"])
    assert_matches(parts["align"], golden["align_sml1"])
    assert_matches(parts["denoise"], golden["denoise_loss"].mean())
    loss.backward()
    gradients = {n: p.grad for n, p in model.student.named_parameters()}
    expected = golden.tree("grad")
    assert set(gradients) == set(expected)
    for name, gradient in gradients.items():
        assert_matches(gradient, expected[name])
    assert all(p.grad is None for p in model.teacher.parameters())


def test_one_sinusoid_for_the_times_of_both_branches(monkeypatch):
    """In one call, and with the numbers of two."""
    golden = Golden("SiT")
    calls = []
    model = objective(golden, FlowMatching())
    cos = torch.Tensor.cos
    monkeypatch.setattr(torch.Tensor, "cos", lambda phase: calls.append(phase.shape) or cos(phase))
    sit_loss(model, golden)
    assert calls == [(12, 128)]
    model.student.eval()
    x = golden["x0"]
    y = golden["y_drop"]
    for t in (golden["t"], 1000 * golden["t_teacher"]):
        assert torch.equal(model.student(x, timestep_features(t), y), model.student(x, t, y))


def test_optimizer_step_and_ema_match_the_published_code():
    golden = Golden("SiT")
    model = objective(golden, FlowMatching())
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-4, weight_decay=0)
    sit_loss(model, golden)[0].backward()
    norm = nn.utils.clip_grad_norm_(model.student.parameters(), 1.0)
    assert_matches(norm, golden["grad_norm"])
    optimizer.step()
    after = golden.tree("after")
    ema = golden.tree("ema")
    ema_after = golden.tree("ema_after")
    for name, p in model.student.named_parameters():
        assert_matches(p.data, after[name])
        assert_matches(torch.lerp(ema[name], p.data, 1 - 0.9999), ema_after[name])


def test_dit_loss_matches_the_published_code():
    golden = Golden("DiT")
    model = objective(golden, GaussianDiffusion(), weight=0.04)
    teacher_times = (golden["t"] - golden["gap"]).clamp(1, 999)
    condition = ClassLabels(golden["y_drop"], NO_DROP)
    times = Times(golden["t"], teacher_times)
    loss, parts = model(MicroBatch(golden["x0"], condition, golden["noise"], times), [0.04])
    assert_matches(loss, golden["total_loss"])
    assert_matches(parts["align"], golden["align_sml1"])


def test_both_branches_drop_the_same_labels():
    golden = Golden("SiT")
    model = objective(golden, FlowMatching())
    drop = torch.tensor([True, False, True, False, True, False])
    seen = []
    for network in (model.student, model.teacher):
        table = network.y_embedder.embedding_table
        table.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    sit_loss(model, golden, drop=drop)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], torch.where(drop, 10, golden["y_drop"]))


def test_without_alignment_the_teacher_does_not_run():
    golden = Golden("SiT")
    model = objective(golden, FlowMatching())
    model.teacher.features = None  # calling it would fail
    loss, parts = sit_loss(model, golden, weight=0.0)
    assert_matches(loss, golden["denoise_loss"].mean())
    assert set(parts) == {"denoise"}
    loss.backward()
    assert all(p.grad.abs().max() == 0 for p in model.student.ap_head.parameters())


def test_full_precision_teacher_of_a_half_precision_student():
    golden = Golden("SiT")
    model = objective(golden, FlowMatching())
    model.student.bfloat16()
    loss, parts = sit_loss(model, golden)
    assert relative_error(parts["align"], golden["align_sml1"]) < 0.02
    loss.backward()


def test_published_lambda_schedule():
    """0.2 up to epoch 149, then 2 * 0.1^((e - 149) / 1000 + 1); at 512 px 99 and 800."""
    for hold, decay in ((149, 1000), (99, 800)):
        cfg = AlignConfig(weight=0.2, schedule="epochs", hold=hold, decay=decay)
        for epoch in (0, hold, hold + 1, 400, 800):
            expected = 2 * 0.1 ** (((epoch - hold) / decay + 1) if epoch > hold else 1)
            assert align_weight(cfg, 10**6, epoch) == pytest.approx(expected, rel=1e-12)


def test_other_lambda_schedules():
    assert align_weight(AlignConfig(weight=0.5), 10**6, 900) == 0.5
    steps = AlignConfig(weight=0.4, schedule="steps", hold=100, decay=50)
    assert [align_weight(steps, s, 0) for s in (0, 100)] == [0.4, 0.4]
    assert align_weight(steps, 150, 0) == pytest.approx(0.04)
    milestones = AlignConfig(weight=0.4, schedule="milestones", milestones={10: 0.2, 20: 0.0})
    assert [align_weight(milestones, s, 0) for s in (9, 10, 19, 20)] == [0.4, 0.2, 0.2, 0.0]
    stop = AlignConfig(weight=0.5, stop_at_step=7)
    assert [align_weight(stop, s, 0) for s in (6, 7)] == [0.5, 0.0]
    assert align_weight(AlignConfig(target="none"), 0, 0) == 0.0


@pytest.mark.parametrize(
    "options, last",
    [
        ({}, None),
        ({"stop_at_step": 7}, 6),
        ({"weight": 0.0}, -1),
        ({"schedule": "milestones", "milestones": {3: 0.0, 5: 0.1, 9: 0.0}}, 8),
        ({"schedule": "milestones", "milestones": {3: 0.0}, "every": 2}, 2),
        ({"schedule": "steps", "hold": 0, "decay": 1}, None),
        ({"target": "none"}, -1),
    ],
)
def test_a_target_is_over_after_its_last_step(options, last):
    cfg = AlignConfig(**options)
    over = [is_over(cfg, step) for step in range(500)]
    assert over == [last is not None and step > last for step in range(500)]


@pytest.mark.parametrize("schedule, now", [("steps", (400, 0)), ("epochs", (0, 10**6))])
def test_a_decaying_lambda_never_reaches_zero(schedule, now):
    """A step without alignment is another program, which a run with a graph has to know before."""
    decaying = AlignConfig(schedule=schedule, hold=0, decay=1)
    weightless = AlignConfig(weight=0.0, schedule=schedule, hold=0, decay=1000)
    assert alignment_phases(decaying) == {True}
    assert 0 < align_weight(decaying, *now) < 1e-300
    assert align_weight(weightless, *now) == 0


def test_dropped_labels_are_not_left_to_each_network():
    """The student would drop labels at random and the teacher none, without an error."""
    golden = Golden("SiT")
    model = objective(golden, FlowMatching())
    with pytest.raises(ValueError, match="says which entries are dropped"):
        sit_loss(model, golden, drop=None)
