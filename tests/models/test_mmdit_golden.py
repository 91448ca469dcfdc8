"""MMDiT against the published text-to-image model of REPA."""

import pytest
import torch
from golden import Golden, assert_matches

from sra_fast.alignment.ema_teacher import EMATeacher, EMATeacherConfig
from sra_fast.alignment.objective import SRAObjective
from sra_fast.diffusion.flow_matching import FlowMatching
from sra_fast.diffusion.micro_batch import MicroBatch, Times
from sra_fast.models import MMDiT, TextBackbone, TextFeatures, arguments_from_state_dict

LAYER = 2
WEIGHT = 0.2


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("mmdit_repa")


def weights(golden) -> dict[str, torch.Tensor]:
    """The published state dict, with SRA's head and without REPA's."""
    state = golden.tree("sd")
    return {
        name: value.float() for name, value in state.items() if not name.startswith("projectors.")
    }


def network(golden, device) -> MMDiT:
    state = weights(golden)
    family, arguments = arguments_from_state_dict(state, num_heads=2)
    model = family(**arguments)
    model.load_state_dict(state, strict=True)
    return model.to(device)


def captions(golden, device) -> TextFeatures:
    empty = TextFeatures(golden["empty"])
    return TextFeatures(golden["context"], empty=empty).dropped(golden["drop"]).to(device)


def test_the_state_dict_is_the_published_one(golden):
    """The same names in the same order, which numbers the published code's optimizer state."""
    theirs = [name for name in golden.tree("sd") if not name.startswith(("projectors.", "ap_head"))]
    ours = [name for name in network(golden, "cpu").state_dict() if not name.startswith("ap_head")]
    assert sorted(ours) == sorted(theirs)
    parameters = [name for name in theirs if name != "pos_embed"]
    assert [name for name in ours if name != "pos_embed"] == parameters


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_outputs_and_gradients_match_the_published_code(golden, backend, monkeypatch, device):
    monkeypatch.setenv("SRA_FAST_BACKEND", backend)
    model = network(golden, device).train()
    inputs = (golden["xt"].to(device), golden["t"].to(device), captions(golden, device))
    prediction, features = model(*inputs, depths=(1, 2, 3))
    assert_matches(prediction.cpu(), golden["v_pred"])
    for depth, found in features.after.items():
        assert_matches(found.cpu(), golden[f"after/{depth}"])
    loss = (prediction.cpu() - (golden["noise"] - golden["x0"])).square().flatten(1).mean(1)
    assert_matches(loss, golden["denoise_loss"])
    expected = golden.tree("grad")
    trained = {n: p for n, p in model.named_parameters() if not n.startswith("ap_head.")}
    assert set(expected) == set(trained)
    gradients = torch.autograd.grad(loss.mean(), list(trained.values()))
    for name, gradient in zip(trained, gradients, strict=True):
        assert_matches(gradient.cpu(), expected[name])


def test_captions_between_the_blocks_match_the_published_code(golden):
    model = network(golden, "cpu")
    stream = model.begin(golden["xt"], golden["t"], captions(golden, "cpu"))
    for depth, block in enumerate(model.blocks[:2], start=1):
        stream.through(block)
        y, gate, bias = stream.context_pending
        assert bias is None
        context = stream.context + gate[:, None] * y
        assert_matches(context, golden[f"context_after/{depth}"])


def test_the_objective_is_sra_with_the_published_network_on_both_sides(golden):
    student = network(golden, "cpu")
    sizes = {name: getattr(student, name) for name in ("input_size", "patch_size", "in_channels")}
    teacher = TextBackbone(
        **sizes,
        hidden_size=student.hidden_size,
        depth=LAYER,
        num_heads=student.num_heads,
        mlp_ratio=student.mlp_ratio,
        context_size=student.context_size,
        model_depth=student.depth,
    )
    # the file's teacher has the student's weights, reversed along their last dimension
    state = {n: p.detach().flip(-1) for n, p in student.named_parameters()}
    state["pos_embed"] = student.pos_embed
    teacher.load_state_dict({name: state[name] for name in teacher.state_dict()})
    cfg = EMATeacherConfig(student_layer=LAYER, teacher_layer=LAYER)
    model = SRAObjective(student, [EMATeacher(cfg, teacher.eval())], FlowMatching()).train()
    times = Times(golden["t"], golden["t_teacher"])
    batch = MicroBatch(golden["x0"], captions(golden, "cpu"), golden["noise"], times)
    loss, parts = model(batch, [WEIGHT])
    assert_matches(parts["align"], golden["align_sml1"])
    assert_matches(parts["denoise"], golden["denoise_loss"].mean())
    assert_matches(loss, golden["total_loss"])
    assert_matches(
        teacher.features(golden["xt_teacher"], golden["t_teacher"], batch.condition),
        golden["teacher_feat"],
    )
    loss.backward()
    denoising, alignment = golden.tree("grad"), golden.tree("align_grad")
    assert len(alignment) == 46
    for name, parameter in student.named_parameters():
        parts = [held[name] for held in (denoising, alignment) if name in held]
        assert_matches(parameter.grad, sum(parts))
    assert all(p.grad is None for p in teacher.parameters())
