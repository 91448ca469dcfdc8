import pytest
import torch
from golden import Golden, assert_matches
from torch.utils.flop_counter import FlopCounterMode

from sra_fast.models import (
    SIZES,
    ClassLabels,
    DiT,
    MMDiT,
    SiT,
    arguments_from_state_dict,
    arguments_of,
    create_model,
    preset,
)
from sra_fast.models.layers import Block

TINY = dict(
    input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=4, num_heads=2, num_classes=5
)


def randomise(model, seed=0):
    """adaLN-Zero makes a fresh network constant: give every parameter a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def batch(model, count=4):
    torch.manual_seed(1)
    x = torch.randn(count, model.in_channels, model.input_size, model.input_size)
    return x, torch.rand(count), torch.randint(model.num_classes, (count,))


def flops(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_sit_matches_the_published_code():
    golden = Golden("SiT")
    model = golden.model()
    prediction, features = model(
        golden["xt"],
        golden["t"],
        ClassLabels(golden["y_drop"], torch.zeros(6, dtype=bool)),
        depths=(2,),
    )
    assert_matches(prediction, golden["v_pred"])
    assert_matches(model.ap_head(features.after[2]), golden["student_feat"])


def test_compiled_blocks_take_more_shapes_than_torch_s_limit(monkeypatch):
    """A job's batches, with and without guidance, all go through one code."""
    torch.compiler.reset()
    compile_it = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **options: compile_it(self, backend="eager", **options),
    )
    model = randomise(SiT(**TINY)).eval()
    expected = [model(*batch(model, count)) for count in range(1, 13)]
    with torch._dynamo.config.patch(recompile_limit=8):
        model.compile_blocks()
        for count, eager in enumerate(expected, start=1):
            torch.testing.assert_close(model(*batch(model, count)), eager, atol=1e-6, rtol=1e-6)
    torch.compiler.reset()


def test_teacher_features_match_the_published_code():
    golden = Golden("SiT")
    teacher = golden.model("ema").eval()
    features = teacher.features(
        golden["xt_teacher"], golden["t_teacher"], golden["y_drop"], depth=3
    )
    assert_matches(features, golden["teacher_feat"])


@pytest.mark.parametrize("family", ["SiT", "DiT"])
def test_state_dict_is_the_published_one(family):
    """The same names in the same order, which numbers the published code's optimizer state."""
    golden = Golden(family)
    model = golden.model()
    expected = golden.tree("sd")
    assert list(model.state_dict()) == list(expected)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_arguments_from_state_dict_round_trip():
    for family in (SiT, DiT):
        model = family(**TINY, qk_norm=True, mlp_ratio=2.0)
        found, arguments = arguments_from_state_dict(model.state_dict(), num_heads=2)
        assert found is family
        found(**arguments).load_state_dict(model.state_dict(), strict=True)
        # the norms of the queries show the width of a head
        assert arguments_from_state_dict(model.state_dict()) == (found, arguments)
        assert arguments_of(model) == arguments
    with pytest.raises(ValueError, match="num_heads cannot be read from weights of width 32"):
        arguments_from_state_dict(SiT(**TINY).state_dict())
    state = model.state_dict()
    del state["pos_embed"]
    with pytest.raises(ValueError, match="input_size cannot be read"):
        arguments_from_state_dict(state)
    assert arguments_from_state_dict(state, input_size=8)[1]["input_size"] == 8
    state["x_embedder.proj.weight"] = torch.zeros(32, 12)
    with pytest.raises(ValueError, match=r"should be \[D, C, p, p\], it is \[32, 12\]"):
        arguments_from_state_dict(state)
    # what shapes do not tell can be given
    without_null = DiT(**{**TINY, "class_dropout_prob": 0.0}, learn_sigma=False)
    found, arguments = arguments_from_state_dict(
        without_null.state_dict(), 2, num_classes=5, family="DiT"
    )
    assert found is DiT and arguments["num_classes"] == 5 and arguments["class_dropout_prob"] == 0
    found(**arguments).load_state_dict(without_null.state_dict(), strict=True)


def test_a_ratio_gives_back_the_width_of_the_mlp_that_it_is_of():
    """704 * (960 / 704) is 959.99..., and so on."""
    with torch.device("meta"):
        for width in range(64, 3073, 64):
            sizes = range(192, 4 * width + 1, 192)
            blocks = [Block(width, 1, size / width, qk_norm=False) for size in sizes]
            assert [block.mlp.fc1.out_features for block in blocks] == [*sizes]


@pytest.mark.parametrize(
    "family, more",
    [
        (SiT, dict(num_classes=5)),
        (DiT, dict(num_classes=5)),
        (MMDiT, dict(context_size=8, context_tokens=4, pooled_size=0)),
    ],
)
def test_the_arguments_of_a_model_give_back_its_shapes(family, more):
    shapes = lambda model: {name: value.shape for name, value in model.state_dict().items()}
    sizes = dict(input_size=8, patch_size=2, hidden_size=704, depth=1, num_heads=11)
    with torch.device("meta"):
        model = family(**sizes, **more, mlp_ratio=960 / 704)
        rebuilt = [family(**arguments_of(model))]
        found, arguments = arguments_from_state_dict(model.state_dict(), 11)
        rebuilt.append(found(**arguments))
    expected = shapes(model)
    assert 960 in {shape[0] for name, shape in expected.items() if name.endswith("fc1.bias")}
    assert [shapes(other) for other in rebuilt] == [expected, expected]


# parameters in millions: DiT, Table 1 (trainable, without the projection head); the paper rounds
# one
@pytest.mark.parametrize(
    "name, millions", [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675)]
)
def test_paper_sizes(name, millions):
    with torch.device("meta"):
        model = create_model(name)
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("ap_head"))
    assert round(count / 1e6) == millions


def test_every_preset_builds():
    for family in ("SiT", "DiT"):
        for size, (depth, width, heads) in SIZES.items():
            for patch in (2, 4, 8):
                cls, arguments = preset(f"{family}-{size}/{patch}")
                assert cls.family == family
                assert arguments == dict(
                    depth=depth, hidden_size=width, num_heads=heads, patch_size=patch
                )
    with pytest.raises(ValueError, match="expected a model name"):
        create_model("SiT-XXL/2")


@pytest.mark.parametrize("family, out", [(SiT, 3), (DiT, 6)])
def test_any_square_input_and_channels(family, out):
    model = randomise(family(**{**TINY, "input_size": 12, "patch_size": 4}, qk_norm=True)).eval()
    assert model(*batch(model)).shape == (4, out, 12, 12)
    single = randomise(DiT(**TINY, learn_sigma=False)).eval()
    assert single(*batch(single)).shape == (4, 3, 8, 8)


def test_patches_land_where_they_came_from():
    """A network whose blocks are identities and whose final layer is linear moves no patch."""
    model = SiT(**TINY).eval()
    x, t, y = batch(model, 1)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    base = model(x, t, y)
    moved = x.clone()
    moved[:, :, 2:4, 4:6] += 1  # patch (1, 2)
    changed = (model(moved, t, y) - base).abs().amax(1)[0] > 0
    assert changed[2:4, 4:6].all() and changed.sum() == 4


def test_qk_norm_bounds_the_logits():
    model = randomise(SiT(**TINY, qk_norm=True)).eval()
    x, t, y = batch(model)
    before = model(x, t, y)
    model.blocks[0].attn.qkv.weight.data[:64] *= (
        100  # queries and keys: the norm removes their scale
    )
    model.blocks[0].attn.qkv.bias.data[:64] *= 100
    assert_matches(model(x, t, y), before, 1e-4)


def test_truncated_forward_is_exact_and_costs_nothing_more():
    model = randomise(SiT(**TINY)).eval()
    args = batch(model)
    _, found = model(*args, depths=(1, 3))
    assert torch.equal(model.features(*args, depth=3), found.after[3])
    assert torch.equal(model.features(*args, depth=1), found.after[1])
    embed = flops(lambda: model.embed(*args))
    per_block = (flops(lambda: model.features(*args, depth=4)) - embed) / 4
    for depth in (1, 2, 3):
        assert (
            flops(lambda depth=depth: model.features(*args, depth=depth))
            == embed + depth * per_block
        )
    with pytest.raises(ValueError, match="depth"):
        model.features(*args, depth=5)


@pytest.mark.parametrize("family", [SiT, DiT])
def test_all_features_are_the_features_of_every_depth(family):
    model = randomise(family(**TINY)).eval()
    args = batch(model)
    layers = list(model.all_features(*args))
    assert len(layers) == model.depth
    for depth, features in enumerate(layers, start=1):
        assert torch.equal(features, model.features(*args, depth=depth))
    once = flops(lambda: model.features(*args))
    assert flops(lambda: list(model.all_features(*args))) == once, "one pass"


def test_features_cost_no_product():
    model = randomise(SiT(**TINY)).eval()
    args = batch(model)
    assert flops(lambda: model(*args, depths=(1, 2))) == flops(lambda: model(*args)) > 0


@pytest.mark.parametrize("prob, share", [(0.0, 0.0), (0.3, 0.3), (1.0, 1.0)])
def test_label_dropout_follows_its_setting(prob, share):
    model = SiT(**{**TINY, "class_dropout_prob": prob}).train()
    table = model.y_embedder.embedding_table
    assert table.num_embeddings == 5 + (prob > 0)
    torch.manual_seed(0)
    y = torch.arange(4000) % 5
    dropped = (model.y_embedder(ClassLabels(y)) != table(y)).any(1).float().mean().item()
    assert abs(dropped - share) < 0.03 and (prob not in (0, 1) or dropped == share)
    model.eval()
    assert torch.equal(model.y_embedder(ClassLabels(y)), table(y))


def test_drop_mask_means_the_null_class():
    model = randomise(SiT(**TINY)).train()
    x, t, y = batch(model)
    drop = torch.tensor([True, False, True, False])
    expected = model.eval()(x, t, torch.where(drop, model.num_classes, y))
    assert torch.equal(model.train()(x, t, ClassLabels(y, drop)), expected)
    assert torch.equal(model.eval()(x, t, ClassLabels(y, drop)), expected)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(input_size=9), "multiple of patch_size"),
        (dict(hidden_size=34), "multiple of 4"),
        (dict(num_heads=3), "num_heads"),
        (dict(class_dropout_prob=1.5), "class_dropout_prob"),
        (dict(depth=0), "at least 1"),
    ],
)
def test_rejects_impossible_sizes(change, message):
    with pytest.raises(ValueError, match=message):
        SiT(**{**TINY, **change})


def test_rejects_inputs_that_do_not_fit():
    model = SiT(**TINY)
    x, t, y = batch(model)
    for args in ((x[:, :2], t, y), (x, t[:2], y), (x, t, y[:2]), (x[..., :4], t, y)):
        with pytest.raises(ValueError, match="expected x"):
            model(*args)
    with pytest.raises(ValueError, match=r"expected labels \[B\], got \[4, 1\]"):
        model(x, t, y[:, None])
    with pytest.raises(ValueError, match=r"depths must lie in \[1, \d\], got \[2, 9\]"):
        model(x, t, y, depths=(9, 2))


def test_aligning_does_not_change_the_prediction():
    model = randomise(SiT(**TINY)).eval()
    args = batch(model)
    assert_matches(model(*args, depths=(2,))[0], model(*args), 1e-6)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_kernels_on_and_off_are_the_same_program(monkeypatch, device, qk_norm):
    """Prediction, features and every gradient with the Triton kernels and with the references."""
    model = randomise(SiT(**{**TINY, "depth": 2}, qk_norm=qk_norm)).to(device)
    x, t, y = (a.to(device) for a in batch(model, 2))
    results = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("SRA_FAST_BACKEND", backend)
        condition = ClassLabels(y, torch.tensor([True, False], device=device))
        prediction, found = model(x, t, condition, depths=(1,))
        out = prediction, model.ap_head(found.after[1])
        gradients = torch.autograd.grad(
            sum(o.square().sum() for o in out), list(model.parameters())
        )
        results.append([*out, model.features(x, t, ClassLabels(y, y < 0), depth=1), *gradients])
    largest = max(off.abs().max() for off in results[0])
    for off, on in zip(
        *results, strict=True
    ):  # the bias of the keys' norm has no gradient but rounding noise
        assert (on - off).abs().max() <= 2e-5 * max(off.abs().max(), 1e-3 * largest)


def test_unknown_backend_is_named(monkeypatch):
    model = SiT(**TINY)
    args = batch(model)
    monkeypatch.setenv("SRA_FAST_BACKEND", "tensorflow")
    with pytest.raises(ValueError, match="backend must be one of"):
        model(*args)
