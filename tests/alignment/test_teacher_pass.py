"""Which images the teacher sees; and on a GPU, graph and stream against the plain call."""

import contextlib
import threading
from unittest.mock import MagicMock

import pytest
import torch
from golden import Golden
from test_objective import NO_DROP, objective, sit_loss

from sra_fast.alignment.objective import align_weight
from sra_fast.alignment.teacher_pass import TeacherPass, chosen_images
from sra_fast.config.schema import AlignConfig
from sra_fast.diffusion.flow_matching import FlowMatching
from sra_fast.models import Backbone
from sra_fast.utils.cuda_graph import Graphed

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("fraction, batch", [(0.5, 6), (1 / 3, 6), (0.25, 32), (5 / 6, 6)])
def test_fraction_of_every_micro_batch(fraction, batch):
    chosen = chosen_images(fraction, batch, CPU)
    assert len(chosen) == round(fraction * batch) and len(set(chosen.tolist())) == len(chosen)
    # two micro-batches choose what one batch of twice the size does
    assert torch.equal(torch.cat([chosen, chosen + batch]), chosen_images(fraction, 2 * batch, CPU))


@pytest.mark.parametrize("fraction, batch", [(0.3, 64), (0.5, 1), (1 / 3, 64)])
def test_fraction_that_does_not_divide_is_named(fraction, batch):
    with pytest.raises(ValueError, match=f"align.fraction .* {batch} images"):
        chosen_images(fraction, batch, CPU)


def test_fraction_is_the_mean_over_its_images():
    golden = Golden("SiT")
    whole, half = (objective(golden, FlowMatching(), fraction=f) for f in (1.0, 0.5))
    seen, expected = [], []
    for model, record in ((half, seen), (whole, expected)):
        compare = model._compare
        model._compare = lambda f, t, compare=compare, record=record: (
            record.append((f, t)) or compare(f, t)
        )
    (_, parts), _ = sit_loss(half, golden), sit_loss(whole, golden)
    chosen = chosen_images(0.5, 6, CPU)
    for ours, all_images in zip(seen[0], expected[0], strict=True):
        torch.testing.assert_close(ours, all_images[chosen])
    assert parts["align"] == pytest.approx(
        half._compare(*(t[chosen] for t in expected[0]))["align"].item(), rel=1e-6
    )


def test_every_kth_step_at_k_times_the_weight():
    cfg = AlignConfig(weight=0.2, every=3, stop_at_step=7)
    assert [align_weight(cfg, s, 0) for s in range(9)] == pytest.approx(
        [0.6, 0, 0, 0.6, 0, 0, 0.6, 0, 0]
    )


def test_a_capture_restricts_its_own_thread_alone(monkeypatch):
    """PyTorch's default forbids the loader's thread to pin memory during it, which ends both."""
    modes = []

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode="global"):
        modes.append(capture_error_mode)
        yield

    for name in (
        "Stream",
        "CUDAGraph",
        "current_stream",
        "stream",
        "graph_pool_handle",
        "reset_peak_memory_stats",
    ):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", capture)
    Graphed(torch.neg)(torch.ones(2))
    assert modes == ["thread_local"]


@needs_gpu
def test_memory_is_pinned_while_a_graph_is_captured():
    pinned = []

    def pins_beside(x):
        thread = threading.Thread(target=lambda: pinned.append(torch.ones(1 << 20).pin_memory()))
        thread.start()
        thread.join()
        return x + 1

    x = torch.zeros(4, device="cuda")
    assert torch.equal(Graphed(pins_beside)(x), x + 1) and len(pinned) == 4


@needs_gpu
@pytest.mark.parametrize("graph, stream", [(True, False), (False, True), (True, True)])
def test_graph_and_stream_give_the_features_of_the_plain_call(graph, stream):
    torch.manual_seed(0)
    teacher = (
        Backbone(8, 2, 4, 64, depth=3, num_heads=2, num_classes=10)
        .cuda()
        .bfloat16()
        .requires_grad_(False)
    )
    for p in teacher.parameters():
        p.normal_(std=0.1)
    plain = TeacherPass(teacher, AlignConfig())
    other = TeacherPass(teacher, AlignConfig(teacher_graph=graph, teacher_stream=stream))
    for _ in range(4):
        x, t, y = (
            torch.randn(6, 4, 8, 8, device="cuda"),
            torch.rand(6, device="cuda"),
            torch.randint(10, (6,), device="cuda"),
        )
        results = []
        for teacher_pass in (plain, other):
            teacher_pass.start(x, t, y, NO_DROP.cuda(), chosen=chosen_images(0.5, 6, x.device))
            results.append(teacher_pass.result().clone())
        torch.testing.assert_close(*results, rtol=0, atol=0)
        teacher.blocks[0].mlp.fc1.weight.mul_(1.1)  # a replay reads the weights as they are now
