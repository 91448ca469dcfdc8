"""MMDiT against its definition in plain PyTorch (SD3, arXiv 2403.03206), and its conditioning."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden import assert_matches, relative_error
from test_models import flops, randomise
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sra_fast import ops
from sra_fast.config.cli import parse_train
from sra_fast.models import (
    ClassLabels,
    MMDiT,
    TextBackbone,
    TextFeatures,
    TokenGroups,
    create_model,
    preset,
)
from sra_fast.models.fp8 import fp8_layers, use_fp8
from sra_fast.models.layers import sincos_pos_embed, timestep_features
from sra_fast.models.mmdit import JointBlock
from sra_fast.training.flops import forward_flops
from sra_fast.training.plan import fill_in

L, E, P = 5, 12, 7
TINY = dict(
    input_size=8,
    patch_size=2,
    in_channels=3,
    hidden_size=32,
    depth=3,
    num_heads=2,
    context_size=E,
    context_tokens=L,
    pooled_size=P,
)


def captions(count=4, pooled=True, masked=True, seed=1) -> TextFeatures:
    """Features of captions and of the empty prompt; nobody has decided which are dropped."""
    generator = torch.Generator().manual_seed(seed)
    drawn = lambda *shape: torch.randn(shape, generator=generator)

    def make(batch: int, lengths: torch.Tensor) -> TextFeatures:
        mask = torch.arange(L) < lengths[:, None] if masked else None
        return TextFeatures(drawn(batch, L, E), drawn(batch, P) if pooled else None, mask)

    lengths = 1 + torch.arange(count) % L
    return replace(make(count, lengths), empty=make(1, torch.tensor([2])))


def batch(model, count=4, drop=(1,), **kind):
    torch.manual_seed(1)
    x = torch.randn(count, model.in_channels, model.input_size, model.input_size)
    text = captions(count, bool(model.pooled_size), **kind)
    dropped = torch.zeros(count, dtype=torch.bool)
    dropped[list(drop)] = True
    return x, torch.rand(count), text.dropped(dropped)


def reference(model: MMDiT, x, t, text: TextFeatures, depth: int | None = None):
    """The prediction, or the image tokens after block ``depth``, written out."""
    weights = dict(model.named_parameters())
    linear = lambda name, value: F.linear(value, weights[f"{name}.weight"], weights[f"{name}.bias"])
    silu_mlp = lambda name, value: linear(f"{name}.2", F.silu(linear(f"{name}.0", value)))

    def normed(value, shift, scale):
        normal = F.layer_norm(value, value.shape[-1:], eps=1e-6)
        return normal * (1 + scale[:, None]) + shift[:, None]

    tokens, pooled, mask = text.tokens, text.pooled, text.mask
    for i in range(len(text)):
        if text.drop[i]:
            tokens = torch.cat([tokens[:i], text.empty.tokens, tokens[i + 1 :]])
            if pooled is not None:
                pooled = torch.cat([pooled[:i], text.empty.pooled, pooled[i + 1 :]])
            if mask is not None:
                mask = torch.cat([mask[:i], text.empty.mask, mask[i + 1 :]])
    heads, width = model.num_heads, model.hidden_size
    patches = F.unfold(x, model.patch_size, stride=model.patch_size).transpose(1, 2)
    image = F.linear(
        patches, weights["x_embedder.proj.weight"].flatten(1), weights["x_embedder.proj.bias"]
    )
    image = image + sincos_pos_embed(model.input_size // model.patch_size, width)
    context = linear("context_embedder", tokens)
    c = silu_mlp("t_embedder.mlp", timestep_features(t * model.time_scale))
    if pooled is not None:
        c = c + silu_mlp("y_embedder.mlp", pooled)
    c = F.silu(c)
    B, T = image.shape[:2]
    readable = torch.ones(B, L + T, dtype=torch.bool)
    if mask is not None:
        readable[:, :L] = mask
    for i in range(model.depth if depth is None else depth):
        streams = {"context_block": context, "x_block": image}
        modulations = {}
        joint = []
        for name, stream in streams.items():
            name = f"joint_blocks.{i}.{name}"
            last = name.endswith("context_block") and i == model.depth - 1
            modulation = linear(f"{name}.adaLN_modulation.1", c).chunk(2 if last else 6, dim=1)
            modulations[name] = modulation
            qkv = linear(f"{name}.attn.qkv", normed(stream, *modulation[:2]))
            parts = [part.view(B, -1, heads, width // heads) for part in qkv.chunk(3, dim=2)]
            for number, norm in enumerate(("ln_q", "ln_k")):
                if f"{name}.attn.{norm}.weight" in weights:
                    part = parts[number]
                    root = part.square().mean(-1, keepdim=True).add(1e-6).sqrt()
                    parts[number] = part / root * weights[f"{name}.attn.{norm}.weight"]
            joint.append(parts)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(*joint, strict=True))
        scores = q @ k.transpose(2, 3) / (width // heads) ** 0.5
        scores = scores.masked_fill(~readable[:, None, None], -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        results = []
        for (name, modulation), stream, attended in zip(
            modulations.items(), streams.values(), (out[:, :L], out[:, L:]), strict=True
        ):
            if len(modulation) == 2:
                results.append(None)
                continue
            _, _, gate, shift, scale, gate_mlp = modulation
            stream = stream + gate[:, None] * linear(f"{name}.attn.proj", attended)
            hidden = linear(f"{name}.mlp.fc1", normed(stream, shift, scale))
            hidden = linear(f"{name}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
            results.append(stream + gate_mlp[:, None] * hidden)
        context, image = results
    if depth is not None:
        return image
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    patches = linear("final_layer.linear", normed(image, shift, scale))
    p, grid = model.patch_size, model.input_size // model.patch_size
    patches = patches.view(B, grid, grid, p, p, model.out_channels)
    return torch.einsum("nhwpqc->nchpwq", patches).reshape(x.shape)


def gradients(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    "kind, options",
    [
        ({}, {"qk_norm": True}),
        ({"masked": False}, {"pooled_size": 0}),
        ({}, {"time_scale": 1000.0, "defer_bias": True, "recompute": "norm"}),
    ],
)
def test_model_is_its_definition(monkeypatch, backend, kind, options):
    """Prediction, features and the gradients of every parameter, with captions that are dropped."""
    monkeypatch.setenv("SRA_FAST_BACKEND", backend)
    model = randomise(MMDiT(**{**TINY, **options}))
    args = batch(model, **kind)
    prediction, found = model(*args, depths=(1, 2))
    expected = reference(model, *args)
    assert_matches(prediction, expected)
    for depth, features in found.after.items():
        assert_matches(features, reference(model, *args, depth=depth))
    target = torch.randn_like(prediction)
    alike = lambda value: (value - target).square().mean()
    ours = gradients(alike(prediction) + found.after[2].square().mean(), model)
    theirs = gradients(alike(expected) + reference(model, *args, depth=2).square().mean(), model)
    largest = max(value.abs().max() for value in theirs.values())
    for name, value in theirs.items():
        # a bias of the keys changes nothing: its gradient is rounding
        assert (ours[name] - value).abs().max() <= 1e-5 * max(value.abs().max(), 1e-2 * largest)
    trained = {name for name, value in ours.items() if value.abs().max() > 0}
    idle = set(ours) - trained
    assert all(name.startswith("ap_head.") for name in idle), idle


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
def test_teacher_is_the_first_blocks_of_the_student(options):
    """Under the same names, and without what nothing reads."""
    model = randomise(MMDiT(**{**TINY, **options})).eval()
    args = batch(model)
    for depth in (1, 2, 3):
        teacher = TextBackbone(**{**TINY, **options, "depth": depth}, model_depth=3).eval()
        state = model.state_dict()
        teacher.load_state_dict({name: state[name] for name in teacher.state_dict()})
        expected = model(*args, depths=(depth,))[1].after[depth]
        assert torch.equal(teacher.features(*args), expected)
        assert torch.equal(model.features(*args, depth=depth), expected)
        unread = f"joint_blocks.{depth - 1}.context_block."
        assert not any(
            name.startswith(unread + part)
            for part in ("mlp", "attn.proj", "attn.ln_q")
            for name in teacher.state_dict()
        )
    for expected, found in zip((1, 2, 3), model.all_features(*args), strict=True):
        assert_matches(found, model.features(*args, depth=expected))
    with pytest.raises(ValueError, match="depth"):
        model.features(*args, depth=4)


def test_teacher_costs_exactly_its_share():
    """Its blocks, but for what captions would go on with: nothing of them is read after it."""
    # without data: PyTorch does not count attention on a CPU
    model = MMDiT(**TINY).eval().to("meta")
    args = tuple(item.to("meta") for item in batch(model, masked=False))
    count = len(args[0])
    D, T = TINY["hidden_size"], model.num_tokens

    def block(last: bool) -> int:
        image = 2 * T * 12 * D * D + 2 * 6 * D * D
        # keys and values, the modulation; and the queries, the projection, the MLP
        text = 2 * L * 2 * D * D + 2 * 6 * D * D
        rows = T
        if not last:
            text += 2 * L * 10 * D * D
            rows = T + L
        attention = 2 * 2 * rows * (T + L) * D
        return count * (image + text + attention)

    embed = flops(lambda: model.begin(*args))
    for depth in (1, 2):
        teacher = TextBackbone(**{**TINY, "depth": depth}, model_depth=3).eval().to("meta")
        expected = embed + (depth - 1) * block(last=False) + block(last=True)
        assert flops(lambda teacher=teacher: teacher.features(*args)) == expected
        assert flops(lambda depth=depth: model.features(*args, depth=depth)) == expected


def test_flops_of_a_step_are_those_of_the_formula():
    """REPA's model at 256 pixels, with SRA: the student, and a teacher of 18 of its 24 blocks."""
    cfg = parse_train(["--model", "MMDiT-REPA/2", "--align", "ema_teacher"])[0]
    fill_in(cfg)
    assert (cfg.align.student_layer, cfg.align.teacher_layer) == (6, 18)
    D, T, text = 768, 256, 77
    stream = lambda tokens, products: 2 * tokens * products * D * D
    attention = lambda queries: 4 * queries * (T + text) * D
    modulation = 2 * 6 * D * D
    embed = 2 * T * 16 * D + 2 * D * (256 + D) + 2 * text * 768 * D
    block = stream(T + text, 12) + 2 * modulation + attention(T + text)
    # nothing reads the caption after the last block
    unread = stream(text, 10) + attention(text)
    found = forward_flops(cfg)
    assert found["align_teacher"] == embed + 18 * block - unread
    # the student's last block has two modulations of the caption
    output = 2 * T * 16 * D + 2 * 2 * D * D
    assert found["student"] == embed + 24 * block - unread - 2 * 4 * D * D + output
    assert found["attention"] == 23 * attention(T + text) + attention(T)


def test_sinusoids_are_those_of_scaled_times():
    """A training step computes them once for student and teacher."""
    model = randomise(MMDiT(**{**TINY, "time_scale": 1000.0})).eval()
    x, t, text = batch(model)
    assert_matches(model(x, model.sinusoid(t), text), model(x, t, text))


def test_a_backward_pass_is_two_forwards_but_for_the_inputs():
    """No gradient of what the features of captions are multiplied with is computed."""
    sizes = ["--model.depth", "2", "--model.pooled_size", str(P)]
    cfg = parse_train(["--model", "MMDiT-S/2", "--align", "none", *sizes])[0]
    fill_in(cfg)
    part = forward_flops(cfg)
    with torch.device("meta"):
        model = cfg.model.build()
        args = torch.zeros(1, 4, 32, 32), torch.zeros(1), cfg.model.any_condition(1)
        with FlopCounterMode(display=False) as counter:
            model(*args).sum().backward()
    assert counter.get_total_flops() == 3 * part["student"] - part["inputs"]


def test_what_is_masked_or_dropped_is_not_seen():
    model = randomise(MMDiT(**TINY, qk_norm=True)).eval()
    x, t, text = batch(model, drop=(1, 3))
    before = model(x, t, text)
    tokens = text.tokens.clone()
    tokens[~text.mask] = 100.0
    tokens[[1, 3]] = -100.0
    pooled = text.pooled.clone()
    pooled[[1, 3]] = 50.0
    assert torch.equal(model(x, t, replace(text, tokens=tokens, pooled=pooled)), before)
    # each of them is seen where it is there
    for name in ("tokens", "pooled"):
        other = replace(text, **{name: getattr(text, name) + 1})
        changed = (model(x, t, other) - before).abs().amax((1, 2, 3)) > 1e-6
        assert changed.tolist() == [True, False, True, False]
    everything = replace(text, mask=torch.ones_like(text.mask))
    assert (model(x, t, everything) - before).abs().amax((1, 2, 3))[0] > 1e-6
    nothing = text.empty.select(torch.zeros(4, dtype=torch.int64))
    assert_matches(model(x, t, text.null()), model(x, t, nothing))


def test_conditioning_keeps_its_promises():
    for kind in ({}, {"pooled": False}, {"masked": False}, {"pooled": False, "masked": False}):
        text = captions(**kind)
        assert not text.is_decided and len(text) == 4
        decided = text.dropped(torch.tensor([True, False, False, True]))
        # all of them others: what a graph is replayed with
        others = [~t if t.dtype == torch.bool else t + 1 for t in decided.tensors()]
        pairs = zip(decided.with_tensors(*others).tensors(), others, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        # nobody has decided: in a graph that means that nothing is dropped
        assert not text.with_tensors(*text.tensors()).drop.any()
        assert all(tensor.is_meta for tensor in decided.to("meta").tensors())
        part = decided.select(torch.tensor([3, 1]))
        assert part.drop.tolist() == [True, False]
        assert torch.equal(part.tokens, text.tokens[[3, 1]])
        both = text.concatenated(decided)
        assert len(both) == 8 and both.drop.tolist() == [False] * 4 + decided.drop.tolist()
        assert torch.equal(both.seen().tokens[4], text.empty.tokens[0])
        assert torch.equal(both.seen().tokens[0], text.tokens[0])
        # the same empty prompt may be there twice
        assert text.concatenated(captions(**kind)).drop is None
        halves = decided.select(slice(0, 2)).concatenated(decided.select(slice(2, 4)))
        assert torch.equal(halves.seen().tokens, decided.seen().tokens)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TextFeatures(torch.zeros(2, 3)), r"expected tokens \[B, L, E\], got \[2, 3\]"),
        (
            lambda: TextFeatures(torch.zeros(2, 3, 4), pooled=torch.zeros(3, 4)),
            r"expected pooled \[B, P\] for tokens \[2, 3, 4\], got \[3, 4\]",
        ),
        (
            lambda: TextFeatures(torch.zeros(2, 3, 4), mask=torch.ones(2, 3)),
            r"expected mask \[B, L\] for tokens \[2, 3, 4\], got \[2, 3\] of torch.float32",
        ),
        (
            lambda: replace(captions(), empty=captions(2)),
            r"expected tokens of the empty prompt \[1, 5, 12\] .*got \[2, 5, 12\]",
        ),
        (
            lambda: replace(captions(), empty=captions(1, pooled=False)),
            r"expected pooled of the empty prompt \[1, 7\] .*got None",
        ),
        (
            lambda: replace(captions(), empty=None).dropped(torch.zeros(4, dtype=torch.bool)),
            "expected captions with the features of the empty prompt",
        ),
        # one entry would decide for all
        (lambda: captions().dropped(torch.tensor([True])), r"expected drop \[4\] .*, got \[1\] of"),
        (
            lambda: ClassLabels(torch.zeros(2, dtype=torch.int64), torch.zeros(2)),
            r"expected drop \[2\] of torch.bool, got \[2\] of torch.float32",
        ),
        (
            lambda: captions(masked=False).concatenated(captions()),
            "of one kind, got tokens, pooled, empty and tokens, pooled, mask, empty",
        ),
        (
            lambda: captions().concatenated(captions(seed=2)),
            "expected captions with the same empty prompt",
        ),
        (
            lambda: MMDiT(**{**TINY, "context_tokens": 9})(*batch(MMDiT(**TINY))),
            "expected captions of 9 tokens of 12 and a pooled feature of 7, got 5 tokens",
        ),
        (
            lambda: MMDiT(**{**TINY, "context_size": 9})(*batch(MMDiT(**TINY))),
            "expected captions of 5 tokens of 9",
        ),
        (
            lambda: MMDiT(**TINY)(*batch(MMDiT(**{**TINY, "pooled_size": 0}))),
            "a pooled feature of 7, got 5 tokens of 12 and 0",
        ),
        (
            lambda: MMDiT(**TINY)(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2)),
            r"expected tokens \[B, L, E\], got \[2\]",
        ),
        (
            lambda: create_model("SiT-S/2", depth=1)(
                torch.zeros(4, 4, 32, 32), torch.zeros(4), captions()
            ),
            "expected a conditioning of ClassLabels, got TextFeatures",
        ),
        (lambda: MMDiT(**{**TINY, "context_tokens": 0}), "context_tokens of at least 1"),
        (
            lambda: MMDiT(**{**TINY, "time_scale": 0.0}),
            "time_scale must be a positive number, got 0.0",
        ),
        (lambda: MMDiT(**{**TINY, "position_step": math.inf}), "other than 0, got 0.0 and inf"),
        (lambda: MMDiT(**{**TINY, "position_step": 0.0}), "other than 0, got 0.0 and 0.0"),
        (
            lambda: MMDiT(**{**TINY, "position_start": math.nan}),
            "finite position_start .*, got nan and 1",
        ),
        (lambda: preset("SiT-REPA/2"), r"expected a model name \{.*\}-\{S,B,L,XL\}/"),
        (lambda: preset("MMDiT-XXL/2"), r"-\{S,B,L,XL,REPA\}/\{2,4,8\}, got 'MMDiT-XXL/2'"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_any_number_of_tokens_where_none_is_said():
    model = randomise(MMDiT(**{**TINY, "context_tokens": None})).eval()
    x, t, text = batch(model, masked=False)
    longer = replace(text, tokens=torch.cat([text.tokens, text.tokens], 1), empty=None, drop=None)
    assert model(x, t, longer).shape == x.shape


def test_presets():
    """SiT's sizes; REPA's model, whose adaLN sees the time only."""
    assert preset("MMDiT-B/4")[1] == dict(depth=12, hidden_size=768, num_heads=12, patch_size=4)
    family, arguments = preset("MMDiT-REPA/2")
    assert family is MMDiT
    sizes = dict(depth=24, hidden_size=768, num_heads=24, pooled_size=0, patch_size=2)
    assert arguments == sizes
    with torch.device("meta"):
        names = create_model("MMDiT-REPA/2").state_dict()
    assert not any(name.startswith("y_embedder.") for name in names)
    last = "joint_blocks.23.context_block."
    assert {name.removeprefix(last) for name in names if name.startswith(last)} == {
        "attn.qkv.weight",
        "attn.qkv.bias",
        "adaLN_modulation.1.weight",
        "adaLN_modulation.1.bias",
    }
    assert [*names[last + "adaLN_modulation.1.weight"].shape] == [2 * 768, 768]


def test_a_fresh_model_predicts_nothing_and_its_blocks_are_identities():
    model = MMDiT(**TINY).eval()
    x, t, text = batch(model)
    assert torch.equal(model(x, t, text), torch.zeros_like(x))
    assert torch.equal(model.features(x, t, text, 1), model.features(x, t, text, 3))
    for embedder in (model.t_embedder, model.y_embedder):
        assert embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("masked", [False, True])
def test_groups_of_tokens(masked):
    """Groups of one time are no groups; with separation, nothing passes from group to group."""
    model = randomise(MMDiT(**TINY, qk_norm=True)).eval()
    x, t, text = batch(model, masked=masked)
    index = (torch.arange(16) < 6).int().expand(4, -1)
    same = t[:, None].expand(-1, 2)
    assert_matches(model(x, same, text, groups=TokenGroups(index)), model(x, t, text))
    times = torch.stack([t, t.flip(0)], 1)
    # an image that is not cut is as it always is, caption included; its other time says nothing
    for segments in (None, ((16,),) * 4):
        whole = TokenGroups(torch.ones_like(index), segments=segments)
        assert_matches(model(x, times.flip(1), text, groups=whole), model(x, t, text))
    order = torch.stack([torch.randperm(16) for _ in range(4)])
    runs = ((torch.arange(16) >= 6).int()).expand(4, -1)
    separate = TokenGroups(runs, order, (6, 10))
    before = model(x, times, text, groups=separate)
    assert_matches(before, model(x, times, text, groups=TokenGroups(runs, order, ((6, 10),) * 4)))
    # a pixel of the first group's first token
    patch = int(order[0, 0])
    moved = x.clone()
    moved[0, :, 2 * (patch // 4), 2 * (patch % 4)] += 1.0
    changed = (model(moved, times, text, groups=separate) - before).abs().amax(1) > 1e-7
    touched = {(row // 2) * 4 + column // 2 for row, column in changed[0].nonzero().tolist()}
    assert touched == set(order[0, :6].tolist())
    assert not changed[1:].any()
    if masked:
        tokens = text.tokens.masked_fill(~text.mask[..., None], 100.0)
        unseen = replace(text, tokens=tokens)
        assert torch.equal(model(x, times, unseen, groups=separate), before)


def test_recompute_and_fp32_stream_change_nothing():
    model = randomise(MMDiT(**TINY, qk_norm=True))
    args = batch(model)
    expected = gradients(model(*args).square().mean(), model)
    for options in ({"recompute": "full"}, {"residual_dtype": torch.float32}):
        other = MMDiT(**TINY, qk_norm=True, **options)
        other.load_state_dict(model.state_dict())
        found = gradients(other(*args).square().mean(), other)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    stream = other.bfloat16().begin(*args)
    assert stream.tokens.dtype == stream.context.dtype == torch.float32


def test_compiled_blocks_are_the_eager_ones():
    model = randomise(MMDiT(**TINY))
    args = batch(model)
    prediction, found = model(*args, depths=(2,))
    expected = gradients(prediction.square().mean() + found.after[2].square().mean(), model)
    for block in model.blocks:
        # without a code generator: a whole graph is what is asked for
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    prediction, found = model(*args, depths=(2,))
    compiled = gradients(prediction.square().mean() + found.after[2].square().mean(), model)
    for name, value in expected.items():
        assert relative_error(compiled[name], value) < 1e-5 or value.abs().max() < 1e-7, name


@pytest.mark.parametrize("last", [False, True])
def test_traces_whole_with_the_kernels_on_cuda_tensors(monkeypatch, last):
    """As ``test_block.py`` traces a block of SiT: fake tensors stand for those of a GPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with torch.device("meta"):
        block = JointBlock(64, 4, 4.0, qk_norm=True, context_output=not last).to(torch.bfloat16)
    graphs = []
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda:0"):
        for module in block.modules():
            for name, p in module._parameters.items():
                fake = torch.empty(p.shape, dtype=p.dtype)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)
        x, context = (torch.empty(2, size, 64, dtype=torch.bfloat16) for size in (16, L))
        c = torch.empty(2, 64, dtype=torch.bfloat16)
        # queries are those of both streams, or of the image alone
        queries = 16 if last else 16 + L
        sizes = (2, queries, 4, 16, 16 + L, 4)
        key = (x.device, x.dtype, *sizes, (False,) * 3, None, False)
        monkeypatch.setitem(ops.attention.__globals__["_chosen"], key, "math")
        keep_graph = lambda graph, example: graphs.append(graph) or graph.forward
        traced = torch.compile(block, fullgraph=True, backend=keep_graph)
        pending = lambda stream: (stream.clone(), c.clone(), None)
        x_new, _, context_new, _ = traced(x, c, pending(x), context, c, pending(context), last=last)
    assert x_new.device.type == "cuda" and (context_new is None) == last
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1
    # both half-blocks of the image, and of the text as far as it goes on
    assert sum("gated_residual_adaln_fwd" in name for name in called) == (3 if last else 4)
    assert sum("qk_norm_rope_fwd" in name for name in called) == 2
    assert any("sdpa_kernel" in name for name in called), "the measured backend is in the graph"


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="needs e4m3 products",
)
@pytest.mark.parametrize("grouped", [False, True])
def test_features_in_fp8(device, grouped):
    sizes = {**TINY, "hidden_size": 64}
    network = randomise(TextBackbone(**{**sizes, "depth": 3}, model_depth=4, qk_norm=True))
    network = network.requires_grad_(False).eval().to(device)
    x, t, text = batch(network)
    groups = None
    if grouped:
        # far apart, so that the wrong one is noticed
        t = torch.stack([t, 1 + 50 * t], 1)
        groups = TokenGroups((torch.arange(16, device=device) % 2).int().expand(4, -1))
    args = (x.to(device), t.to(device), text.to(device), None, groups)
    exact = network.features(*args)
    error = lambda found: ((found.float() - exact).norm() / exact.norm()).item()
    low = copy.deepcopy(network).bfloat16()
    in_bf16 = error(low.features(*args))
    state = copy.deepcopy(low.state_dict())
    use_fp8(low)
    in_fp8 = error(low.features(*args))
    assert in_bf16 < 0.02 and 2 * in_bf16 < in_fp8 < 0.06, (in_bf16, in_fp8)
    # without queries: the same keys and values
    stream = low.blocks[0].context_block
    told = torch.randn(4, L, 64).bfloat16().to(device)
    heads = [stream.heads(told, *told[:, :2].unbind(1), None, queries=asked)[1] for asked in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(heads[0], heads[1][1:], strict=True))
    changed = {name for name, value in low.state_dict().items() if value.dtype != state[name].dtype}
    # three of each stream, but for the MLP that the last block's captions do without
    assert changed == fp8_layers(low).keys() and len(changed) == 3 * 3 * 2 - 2
