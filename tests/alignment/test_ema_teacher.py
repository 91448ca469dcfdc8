"""Which images the teacher sees; and on a GPU, graph and stream against the plain call."""

import contextlib
import threading
from unittest.mock import MagicMock

import pytest
import torch
from golden import Golden
from test_objective import NO_DROP, objective, sit_loss

from sra_fast import ops
from sra_fast.alignment.ema_teacher import EMATeacher, EMATeacherConfig
from sra_fast.alignment.schedule import align_weight, aligned_images
from sra_fast.alignment.target import Inputs
from sra_fast.config.schema import AlignConfig
from sra_fast.diffusion.flow_matching import FlowMatching
from sra_fast.diffusion.micro_batch import MicroBatch, NoisyImages, Times
from sra_fast.diffusion.process import Noised
from sra_fast.models import ClassBackbone, ClassLabels
from sra_fast.models.layers import timestep_features
from sra_fast.utils.cuda_graph import Graphed

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("fraction, batch", [(0.5, 6), (1 / 3, 6), (0.25, 32), (5 / 6, 6)])
def test_fraction_of_every_micro_batch(fraction, batch):
    chosen = aligned_images(fraction, batch, CPU)
    assert len(chosen) == round(fraction * batch) and len(set(chosen.tolist())) == len(chosen)
    # two micro-batches choose what one batch of twice the size does
    assert torch.equal(
        torch.cat([chosen, chosen + batch]), aligned_images(fraction, 2 * batch, CPU)
    )


@pytest.mark.parametrize("fraction, batch", [(0.3, 64), (0.5, 1), (1 / 3, 64)])
def test_fraction_that_does_not_divide_is_named(fraction, batch):
    with pytest.raises(ValueError, match=f"align.fraction .* {batch} images"):
        aligned_images(fraction, batch, CPU)


def test_fraction_is_the_mean_over_its_images(monkeypatch):
    golden = Golden("SiT")
    distance = ops.align_distance
    compared = []

    def recorded(features, target, *args, **kwargs):
        compared.append((features, target))
        return distance(features, target, *args, **kwargs)

    monkeypatch.setattr(ops, "align_distance", recorded)
    _, parts = sit_loss(objective(golden, FlowMatching(), fraction=0.5), golden)
    sit_loss(objective(golden, FlowMatching(), fraction=1.0), golden)
    half, whole = compared
    chosen = aligned_images(0.5, 6, CPU)
    for ours, all_images in zip(half, whole, strict=True):
        torch.testing.assert_close(ours, all_images[chosen])
    features, target = whole
    expected = distance(features[chosen], target[chosen], "smooth_l1", beta=0.05).mean()
    assert parts["align"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_every_kth_step_at_k_times_the_weight():
    cfg = AlignConfig(weight=0.2, every=3, stop_at_step=7)
    assert [align_weight(cfg, s, 0) for s in range(9)] == pytest.approx(
        [0.6, 0, 0, 0.6, 0, 0, 0.6, 0, 0]
    )


def test_a_capture_restricts_only_its_own_thread(monkeypatch):
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


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_graph_of_the_step_has_a_second_stream_by_default(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    target = EMATeacher(EMATeacherConfig(teacher_stream=asked), ClassBackbone(8, 2, 4, 64, 1, 2))
    assert (target.stream is not None) == (asked is True)
    target.will_be_captured()
    assert (target.stream is not None) == (asked is not False)


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
        ClassBackbone(8, 2, 4, 64, depth=3, num_heads=2, num_classes=10)
        .cuda()
        .bfloat16()
        .requires_grad_(False)
    )
    for p in teacher.parameters():
        p.normal_(std=0.1)
    plain = EMATeacher(EMATeacherConfig(), teacher)
    other = EMATeacher(EMATeacherConfig(teacher_graph=graph, teacher_stream=stream), teacher)
    for _ in range(4):
        x = torch.randn(6, 4, 8, 8, device="cuda")
        t = torch.rand(6, device="cuda")
        labels = ClassLabels(torch.randint(10, (6,), device="cuda"), NO_DROP.cuda())
        images = aligned_images(0.5, 6, x.device)
        results = []
        for target in (plain, other):
            batch = MicroBatch(x, labels, x, Times(t, t))
            noisy = NoisyImages(batch, x, x, Noised(x, t, x, t, x, x), 2)
            target.start(Inputs(noisy, timestep_features(t), images))
            results.append(target.result().clone())
        torch.testing.assert_close(*results, rtol=0, atol=0)
        teacher.blocks[0].mlp.fc1.weight.mul_(1.1)  # a replay reads the weights as they are now
