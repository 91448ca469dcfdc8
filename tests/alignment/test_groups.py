"""Groups of tokens: a network that gives each token its group's conditioning is the one that
computes it for every token; separated groups are images of their own.
"""

import pytest
import torch
from golden import assert_matches

from sra_fast.config.cli import parse_train
from sra_fast.diffusion.draws import draw
from sra_fast.diffusion.flow_matching import FlowMatching
from sra_fast.diffusion.gaussian_diffusion import GaussianDiffusion
from sra_fast.diffusion.micro_batch import MicroBatch, NoisyImages, Times
from sra_fast.models import ClassLabels, SiT, TokenGroups
from sra_fast.models.layers import Block, patches_of
from sra_fast.utils.registry import TARGETS

pytestmark = pytest.mark.usefixtures("rooms")

B, T = 4, 16
LABELS = ClassLabels(torch.tensor([0, 3, 3, 9]), torch.tensor([False, True, False, False]))


def network(**more) -> SiT:
    torch.manual_seed(0)
    model = SiT(8, 2, 4, 32, depth=3, num_heads=2, num_classes=10, **more)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def random_order() -> torch.Tensor:
    return torch.rand(B, T).argsort(1)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(B, 4, 8, 8), torch.rand(B, 2)


def test_arrange_and_restore_are_inverse():
    order = random_order()
    groups = TokenGroups(torch.zeros(B, T, dtype=torch.int32), order)
    tokens = torch.randn(B, T, 5)
    arranged = groups.arrange(tokens)
    for b in range(B):
        for i in range(T):
            assert torch.equal(arranged[b, i], tokens[b, order[b, i]])
    assert torch.equal(groups.restore(arranged), tokens)
    # one table for all images
    assert torch.equal(groups.arrange(tokens[:1]), groups.arrange(tokens[:1].expand(B, -1, -1)))


def test_values_of_groups_in_the_order_of_the_image():
    order = random_order()
    index = torch.tensor([0] * 4 + [1] * 12).expand(B, T)
    values = torch.randn(B, 2)
    found = TokenGroups(index, order).per_token(values)
    for b in range(B):
        first = set(order[b, :4].tolist())
        assert all(found[b, i] == values[b, 0 if i in first else 1] for i in range(T))


def test_selection_of_images():
    order = random_order()
    index = torch.randint(2, (B, T))
    lengths = ((4, 12), (16,), (4, 12), (16,))
    groups = TokenGroups(index, order, lengths).select(torch.tensor([1, 2]), [1, 2])
    assert torch.equal(groups.index, index[1:3]) and torch.equal(groups.order, order[1:3])
    assert groups.segments == ((16,), (4, 12))
    same = TokenGroups(index, None, (4, 12)).select(torch.tensor([3]), [3])
    assert same.segments == (4, 12) and same.order is None


def test_groups_with_one_time_are_no_groups():
    """Prediction and features, whatever the groups and the order."""
    model = network()
    x, t = inputs()
    t = t[:, :1].expand(-1, 2)
    expected, plain = model(x, t[:, 0], LABELS, depths=(2,))
    for order in (None, random_order()):
        groups = TokenGroups(torch.randint(2, (B, T)), order)
        prediction, found = model(x, t, LABELS, depths=(2,), groups=groups)
        assert_matches(prediction, expected)
        assert_matches(groups.restore(found.after[2]), plain.after[2])
        assert_matches(model.features(x, t, LABELS, 2, groups), found.after[2], 1e-6)


def test_modulation_is_computed_for_groups_not_for_tokens():
    model = network()
    x, t = inputs()
    seen = []
    for module in model.modules():
        if isinstance(module, Block):
            linear = module.adaLN_modulation[1]
            linear.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    model(x, t, LABELS, groups=TokenGroups(torch.randint(2, (B, T))))
    assert seen == [(B, 2, 6 * 32)] * 3


def test_order_changes_nothing_without_separation():
    """The sequence is permuted, the image's tokens keep their groups."""
    model = network()
    x, t = inputs()
    order = random_order()
    index = torch.tensor([0] * 4 + [1] * 12).expand(B, T)
    permuted = TokenGroups(index, order)
    in_place = TokenGroups(permuted.restore(index))
    assert_matches(model(x, t, LABELS, groups=permuted), model(x, t, LABELS, groups=in_place))


def test_separated_groups_do_not_see_each_other():
    """A change of one group's tokens, time included, leaves the other group's prediction."""
    model = network()
    x, t = inputs()
    order = random_order()
    index = torch.tensor([0] * 4 + [1] * 12).expand(B, T)
    groups = TokenGroups(index, order, (4, 12))
    first = patches_of(model(x, t, LABELS, groups=groups), 2)
    other = x.clone()
    patches = torch.zeros(B, T).scatter_(1, order[:, :4], 1.0)
    pixels = patches.view(B, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    other = other + pixels
    t2 = t.clone()
    t2[:, 0] = 0.9
    changed = patches_of(model(other, t2, LABELS, groups=groups), 2)
    moved = (first - changed).abs().amax((2, 3, 4)) > 1e-6
    assert torch.equal(moved, patches.bool())
    # without separation everything moves
    together = TokenGroups(index, order)
    first = patches_of(model(x, t, LABELS, groups=together), 2)
    changed = patches_of(model(other, t2, LABELS, groups=together), 2)
    assert ((first - changed).abs().amax((2, 3, 4)) > 1e-6).all()


@pytest.mark.parametrize("recompute", ["none", "norm", "full"])
def test_gradients_with_kernels_and_without(monkeypatch, device, recompute):
    x, t = inputs()
    order = random_order()
    index = torch.tensor([0] * 4 + [1] * 12, dtype=torch.int32).expand(B, T).contiguous()
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SRA_FAST_BACKEND", backend)
        model = network(recompute=recompute, defer_bias=True).train().to(device)
        groups = TokenGroups(index.to(device), order.to(device), (4, 12))
        prediction, found = model(
            x.to(device), t.to(device), LABELS.to(device), depths=(2,), groups=groups
        )
        loss = prediction.square().sum() + found.after[2].square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append([prediction, *(g for g in gradients if g is not None)])
    for off, on in zip(*results, strict=True):
        assert (on - off).abs().max() <= 2e-5 * off.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_noise_of_every_patch(path):
    """Against whole images at either time, and per pixel."""
    process = FlowMatching(path)
    x0, t = inputs()
    noise = torch.randn_like(x0)
    teacher = t / 2
    groups = TokenGroups(torch.randint(2, (B, T)), random_order())
    batch = MicroBatch(x0, LABELS, noise, Times(t, teacher, groups))
    noisy = NoisyImages.make(process, batch, 2)
    member = groups.restore(groups.index)
    for group in (0, 1):
        whole = process.corrupt(x0, noise, t[:, group], teacher[:, group])
        for ours, images in ((noisy.x, whole.x), (noisy.x_teacher, whole.x_teacher)):
            mine = patches_of(ours, 2)[member == group]
            assert_matches(mine, patches_of(images, 2)[member == group], 1e-6)
        # the loss of a prediction that is right for this group's tokens
        prediction = whole.target
        error = noisy.losses(process, prediction)["denoise"]
        if path == "linear":
            assert error < 1e-10
    one = MicroBatch(x0, LABELS, noise, Times(t, t.amin(1), groups))
    clean = NoisyImages.make(process, one, 2)
    expected = process.corrupt(x0, noise, t.amin(1), t.amin(1)).x
    assert_matches(clean.x_teacher, expected, 1e-6)


def test_variational_bound_of_every_patch():
    """DiT's losses with two equal times are those of whole images."""
    process = GaussianDiffusion()
    x0, _ = inputs()
    noise = torch.randn_like(x0)
    t = torch.tensor([0, 10, 500, 999])
    prediction = torch.randn(B, 8, 8, 8)
    whole = NoisyImages.make(process, MicroBatch(x0, LABELS, noise, Times(t, t)), 2)
    both = t[:, None].expand(-1, 2)
    groups = TokenGroups(torch.randint(2, (B, T)))
    batch = MicroBatch(x0, LABELS, noise, Times(both, both, groups))
    grouped = NoisyImages.make(process, batch, 2)
    expected = whole.losses(process, prediction)
    found = grouped.losses(process, prediction)
    assert set(found) == set(expected) == {"denoise", "vb"}
    for name, value in expected.items():
        assert_matches(found[name], value, 1e-5)


def options(*args: str):
    model = "--model.input_size 8 --model.in_channels 4 --model.depth 4 --model.hidden_size 32"
    cfg, _ = parse_train([*f"--model SiT-S/2 {model} --model.num_heads 2".split(), *args])
    return cfg


def drawn(*args: str, batch: int = 4096) -> Times:
    cfg = options(*args)
    kind = TARGETS[cfg.align.target]
    target = kind(cfg.align, network())
    shape = (batch, 1, 1, 1)
    draws = draw(0, 3, 0, shape, "cpu", drop_prob=0.1, posterior=False, tokens=T)
    return target.times(FlowMatching(t_max=0.2), draws)


def test_times_of_self_flow():
    times = drawn("--align", "self_flow")
    assert torch.equal(times.teacher, times.student.amin(1)) and times.teacher_groups is None
    assert times.groups.order is None and times.groups.segments is None
    # independent and uniform
    assert torch.corrcoef(times.student.t())[0, 1].abs() < 0.05
    assert (times.student.mean(0) - 0.5).abs().max() < 0.02
    count = times.groups.index.sum(1)
    # each token for itself: the number of second tokens is binomial
    assert abs(count.float().mean() - 4) < 0.1 and abs(count.float().var() - 3) < 0.3


def test_times_of_dual_time():
    times = drawn("--align", "dual_time")
    assert times.teacher_groups is times.groups and times.groups.segments == (4, 12)
    gap = times.student - times.teacher
    inside = times.teacher > 0
    assert gap.min() >= 0 and gap.max() <= 0.2 and abs(gap[inside].mean() - 0.1) < 0.01
    assert torch.corrcoef(gap[inside.all(1)].t())[0, 1].abs() < 0.05
    assert torch.equal(times.groups.index[0], torch.tensor([0] * 4 + [1] * 12).int())
    # every token is in the first group equally often
    first = torch.bincount(times.groups.order[:, :4].flatten(), minlength=T) / 4096
    assert (first - 0.25).abs().max() < 0.03
    one = drawn("--align", "dual_time", "--align.two_times", "false")
    assert torch.equal(one.student[:, 0], one.student[:, 1])
    assert not torch.equal(one.teacher[:, 0], one.teacher[:, 1]), "as published: two gaps"
    together = drawn("--align", "dual_time", "--align.separate", "false")
    assert together.groups.segments is None and together.groups.order is None
    assert torch.equal(together.groups.index, times.groups.restore(times.groups.index))


def test_some_images_are_not_cut():
    times = drawn("--align", "dual_time", "--align.full_share", "0.25", batch=8)
    segments = times.groups.segments
    assert [len(lengths) for lengths in segments] == [1, 2, 2, 2] * 2
    assert (times.groups.index[::4] == 1).all()
    assert (times.groups.index.float().mean(1)[1:4] == 0.75).all()


def test_draws_of_groups_change_no_other_number():
    common = dict(drop_prob=0.1, posterior=True, flip=True)
    shape = (5, 4, 8, 8)
    plain = draw(1, 2, 30, shape, "cpu", **common)
    more = draw(1, 2, 30, shape, "cpu", tokens=T, **common)
    for name in ("noise", "posterior", "uniform", "gap", "drop", "flip"):
        assert torch.equal(getattr(plain, name), getattr(more, name)), name
    assert plain.second is None and more.second.shape == (5, 2) and more.tokens.shape == (5, T)
    # a function of (seed, step, image) only
    later = draw(1, 2, 33, (2, 4, 8, 8), "cpu", tokens=T, **common)
    assert torch.equal(more.tokens[3:], later.tokens) and torch.equal(more.second[3:], later.second)


def test_wrong_shapes_are_named():
    model = network()
    x, t = inputs()
    groups = TokenGroups(torch.zeros(B, T, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"t \[B, G\] or \[B, G, 256\], groups of \[B, 16\] tok"):
        model(x, t[:, 0], LABELS, groups=groups)
    with pytest.raises(ValueError, match=r"groups \[4, 9\]"):
        model(x, t, LABELS, groups=TokenGroups(torch.zeros(B, 9)))


def test_compiled_blocks_take_groups_and_segments():
    """fullgraph, with groups that are separated in some of the images."""
    torch.compiler.reset()
    x, t = inputs()
    index = torch.tensor([0] * 4 + [1] * 12, dtype=torch.int32).repeat(B, 1)
    index[1] = 1
    groups = TokenGroups(index, random_order(), ((4, 12), (16,), (4, 12), (4, 12)))
    results = []
    for compiled in (False, True):
        model = network(defer_bias=True).train()
        if compiled:
            model.compile_blocks()
        prediction = model(x, t, LABELS, groups=groups)
        gradients = torch.autograd.grad(
            prediction.square().sum(), [p for n, p in model.named_parameters() if "blocks" in n]
        )
        results.append([prediction, *gradients])
    for eager, fused in zip(*results, strict=True):
        assert_matches(fused, eager, 1e-4)
