"""Weights of the official releases give the outputs of the official forward pass, which is written
out here.
"""

import argparse

import pytest
import torch
import torch.nn.functional as F
from golden import assert_matches
from launch import call, error_of, launch

from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.official_weights import (
    convert,
    first_channels,
    import_file,
    interpolant_name,
    model_config,
    reverse_time,
)
from sra_fast.config.cli import parse_train
from sra_fast.diffusion.samplers import sample
from sra_fast.models import DiT
from sra_fast.training.plan import make_run_plan

C = 3
P = 2
SIZE = 8
HEADS = 2
TINY = dict(
    input_size=SIZE,
    patch_size=P,
    in_channels=C,
    hidden_size=32,
    depth=3,
    num_heads=HEADS,
    num_classes=5,
)


def release(seed=0, **sizes) -> DiT:
    """Random parameters and 2C output channels. Without the ap_head the state dict is that of a
    release.
    """
    model = DiT(**{**TINY, **sizes}).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.15)
    return model


def sit_release(seed=0, **sizes) -> DiT:
    """A release of SiT: nothing has trained the second half of its outputs."""
    model = release(seed, **sizes)
    for p in model.final_layer.linear.parameters():
        p.data.unflatten(0, (P * P, 2, -1))[:, 1] = 0
    return model


def weights(model) -> dict:
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith("ap_head")
    }


def norm(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def official(net: DiT, x, time, y):
    """The official forward pass, ``[B, 2C, H, W]``, at the given time. Only the inside of the
    blocks is ours.
    """
    sd = net.state_dict()
    patches = F.conv2d(x, sd["x_embedder.proj.weight"], sd["x_embedder.proj.bias"], stride=P)
    tokens = patches.flatten(2).mT + sd["pos_embed"]
    phase = time.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    features = torch.cat([phase.cos(), phase.sin()], dim=1).float()
    c = net.t_embedder.mlp(features) + sd["y_embedder.embedding_table.weight"][y]
    for block in net.blocks:
        tokens, (branch, gate, _) = block(tokens, F.silu(c))
        tokens = tokens + gate[:, None] * branch
    h = norm(tokens, *net.final_layer.adaLN_modulation(c).chunk(2, dim=1))
    # channels are fastest
    patches = net.final_layer.linear(h).unflatten(2, (P * P, 2 * x.shape[1]))
    return F.fold(patches.permute(0, 3, 2, 1).flatten(1, 2), (SIZE, SIZE), P, stride=P)


def official_velocity(net, x, u, y):
    """dx/du of the official SiT. u = 0 is noise and u = 1 data; the second half of the channels is
    not used.
    """
    return official(net, x, u, y)[:, : x.shape[1]]


def batch(channels=C):
    torch.manual_seed(1)
    t = torch.tensor([0.0, 1.0, 0.5, 0.04, 0.96, 0.31])
    # 5 is the null class
    return torch.randn(6, channels, SIZE, SIZE), t, torch.arange(6)


@torch.no_grad()
def test_converted_sit_is_the_official_one_in_reversed_time():
    net = release()
    x, t, y = batch()
    state = weights(net)
    model = convert(state, model_config(state, "SiT-S/2", HEADS))
    assert model.family == "SiT"
    assert model(x, t, y).shape == x.shape
    expected = -official_velocity(net, x, 1 - t, y)
    assert_matches(model(x, t, y), expected, 1e-5)
    # the times matter in this network: a conversion without the reversal is far off
    assert (expected + official_velocity(net, x, t, y)).abs().max() > 0.05 * expected.abs().max()
    # the source is not changed
    assert all(torch.equal(state[name], value) for name, value in weights(net).items())


@torch.no_grad()
def test_sampling_follows_the_official_ode():
    net = release()
    z, _, y = batch()
    steps = 10
    model = convert(weights(net), model_config(weights(net), "SiT-S/2", HEADS))
    x = z.double()
    # u from 0, noise, to 1, data
    for i in range(steps):
        x = x + official_velocity(net, x.float(), torch.full((len(y),), i / steps), y) / steps
    assert_matches(sample(model, z, y, "euler", steps), x, 1e-5)


@torch.no_grad()
def test_converted_dit_is_the_official_one():
    net = release()
    x, _, y = batch()
    t = torch.tensor([0, 999, 500, 1, 250, 731])
    state = weights(net)
    model = convert(state, model_config(state, "DiT-S/2", HEADS))
    assert model.family == "DiT"
    assert model.learn_sigma
    assert_matches(model(x, t, y), official(net, x, t, y), 1e-5)


def test_reversal_and_cut_are_exact():
    torch.manual_seed(0)
    weight = torch.randn(7, 256)
    # a reflection is its own inverse
    assert_matches(reverse_time(reverse_time(weight)), weight, 1e-6)
    rows = torch.arange(P * P * 2 * C).reshape(P * P, 2 * C)
    assert torch.equal(first_channels(rows.flatten(), P, C), rows[:, :C].flatten())
    # weights with C channels, of a SiT trained without the unused half, pass through
    assert torch.equal(first_channels(rows.flatten(), P, 2 * C), rows.flatten())


def test_projection_head_is_fresh_and_seeded():
    state = weights(release())
    cfg = model_config(state, "SiT-S/2", HEADS)
    a, b, other = (convert(state, cfg, seed).ap_head.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["linear1.weight"].std() > 0
    assert not torch.equal(a["linear1.weight"], other["linear1.weight"])


@torch.no_grad()
@pytest.mark.parametrize("layout, run_script", [("release", launch), ("training", call)])
def test_file_to_file_samples_and_starts_a_run(tmp_path, layout, run_script):
    digits = dict(in_channels=1, num_classes=10)
    net = sit_release(**digits)
    x, t, y = batch(1)
    args = argparse.Namespace(path_type="GVP", prediction="velocity")
    training = {
        "ema": weights(net),
        "model": weights(release(1, **digits)),
        "opt": {},
        "args": args,
    }
    torch.save(weights(net) if layout == "release" else training, tmp_path / "official.pt")
    out = tmp_path / "new" / "init.safetensors"
    model_args = ("--model", "SiT-S/2", "--num_heads", HEADS)
    source = tmp_path / "official.pt"
    done = run_script("import_weights", "--from", source, *model_args, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = load_model(str(out))
    model, path = loaded.model, loaded.path
    assert path == ("linear" if layout == "release" else "cosine")
    assert_matches(model(x, t, y), -official_velocity(net, x, 1 - t, y), 1e-5)
    sizes = [f"--model.{key}={value}" for key, value in {**TINY, **digits}.items()]
    run = [
        *("--model.name", "SiT-S/2", *sizes, "--data.name", "digits"),
        *("--align.student_layer", "1", "--align.teacher_layer", "2"),
        *("--train.init_from", str(out), "--diffusion.path", path),
    ]
    start = make_run_plan(parse_train(run)[0]).initial["ema"]
    assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
    cfg, _ = parse_train([*run, "--model.num_heads", "4"])
    with pytest.raises(ValueError, match="made with 2 heads, the model has 4"):
        make_run_plan(cfg)


def one_velocity(name, tensor):
    """Of an output layer with 2C rows a patch, the first C."""
    return first_channels(tensor, P, C) if name.startswith("final_layer.linear") else tensor


@torch.no_grad()
def test_a_sit_without_unused_outputs_is_said(tmp_path, caplog):
    """Nothing in it shows which way its time runs. What asks for a conversion gets one."""
    net = sit_release()
    source, out = tmp_path / "w.pt", tmp_path / "w.safetensors"
    torch.save({name: one_velocity(name, w) for name, w in weights(net).items()}, source)
    import_file(str(source), "SiT-S/2", str(out), HEADS)
    assert "is taken for weights of the official SiT, whose time runs backwards" in caplog.text
    x, t, y = batch()
    assert_matches(load_model(str(out)).model(x, t, y), -official_velocity(net, x, 1 - t, y), 1e-5)
    caplog.clear()
    # a release shows it
    torch.save(weights(net), source)
    import_file(str(source), "SiT-S/2", str(out), HEADS)
    assert "taken for weights of the official SiT" not in caplog.text


def test_weights_of_repa_are_not_turned_round(tmp_path):
    state = {name: one_velocity(name, w) for name, w in weights(sit_release()).items()}
    source, out = tmp_path / "last.pt", tmp_path / "w.safetensors"
    torch.save({**state, "projectors.0.0.weight": torch.zeros(4, 32)}, source)
    with pytest.raises(
        ValueError, match="heads of REPA .projectors.0.0.weight., whose time runs as"
    ):
        import_file(str(source), "SiT-S/2", str(out), HEADS)
    assert not out.exists()


@torch.no_grad()
def test_without_a_null_class_the_arguments_tell_the_classes(tmp_path, caplog):
    """Five rows are five classes, or four and the null class. A fork may have kept a default."""
    net = release(class_dropout_prob=0.0)
    source, out = tmp_path / "official.pt", tmp_path / "w.safetensors"
    cases = [(5, 5, 0.0), (None, 4, 0.1), (4, 4, 0.1), (1000, 4, 0.1), ("5", 4, 0.1)]
    for told, classes, dropout in cases:
        caplog.clear()
        args = argparse.Namespace(**({} if told is None else {"num_classes": told}))
        torch.save({"ema": weights(net), "args": args}, source)
        import_file(str(source), "DiT-S/2", str(out), HEADS)
        model = load_model(str(out)).model
        assert (model.num_classes, model.y_embedder.dropout_prob) == (classes, dropout)
        said = f"was made with num_classes {told}, and its class embedding has 5 rows"
        assert (said in caplog.text) == (told in (1000, "5"))
        assert ("it is taken for 4 and the null class" in caplog.text) == (told is None)
        x, t, _ = batch()
        y = torch.zeros(len(x), dtype=torch.long)
        assert_matches(model(x, t, y), net(x, t, y), 1e-6)


def broken(change) -> dict:
    """Official weights after ``change``."""
    state = weights(release())
    change(state)
    return state


@pytest.mark.parametrize(
    "state, name, heads, message",
    [
        (broken(lambda s: None), "SiT-S/2", None, "no SiT-S/2: depth should be 12, it is 3"),
        (broken(lambda s: None), "SiT-Z/2", None, "expected a model name"),
        (
            broken(lambda s: s.update({"ap_head.linear1.weight": torch.zeros(1)})),
            "SiT-S/2",
            2,
            "have a projection head",
        ),
        (broken(lambda s: s["pos_embed"].mul_(2)), "DiT-S/2", 2, "position embedding"),
        (
            broken(lambda s: s.update({"final_layer.linear.weight": torch.zeros(20, 32)})),
            "SiT-S/2",
            2,
            "should have 12 or 24 rows",
        ),
        (
            broken(lambda s: s.pop("pos_embed")),
            "SiT-S/2",
            2,
            "input_size cannot be read",
        ),
        (
            broken(lambda s: s.pop("final_layer.linear.bias")),
            "SiT-S/2",
            2,
            "have no final_layer.linear.bias",
        ),
        (broken(lambda s: s.pop("blocks.1.attn.qkv.bias")), "DiT-S/2", 2, "blocks.1.attn.qkv.bias"),
    ],
)
def test_other_weights_are_refused(state, name, heads, message):
    with pytest.raises(ValueError, match=message):
        convert(state, model_config(state, name, heads))


@pytest.mark.parametrize(
    "family, args, refused",
    [
        (
            "DiT",
            None,
            "expected --model DiT-..., .* looks like an official DiT, got --model SiT-S/2",
        ),
        (
            "SiT",
            None,
            "expected --model SiT-..., .* looks like an official SiT, got --model DiT-S/2",
        ),
        ("DiT", {"model": "DiT-S/2"}, "expected --model DiT-..., of which .* got --model SiT-S/2"),
        ("SiT", {"model": "SiT-S/2"}, "expected --model SiT-..., of which .* got --model DiT-S/2"),
        # trained without the unused half: only the arguments say it
        ("SiT", {"path_type": "Linear"}, "looks like an official SiT, got --model DiT-S/2"),
        ("DiT", {"model": "my/model.py"}, "looks like an official DiT, got --model SiT-S/2"),
    ],
)
def test_the_other_family_is_refused(tmp_path, family, args, refused):
    """It has the same shapes, and converted it would make noise."""
    net = sit_release() if family == "SiT" else release()
    held = {"ema": weights(net), "model": weights(net)}
    if args is not None:
        held["args"] = argparse.Namespace(**args)
    source = tmp_path / "w.pt"
    torch.save(held, source)
    out = str(tmp_path / "w.safetensors")
    other = {"SiT": "DiT-S/2", "DiT": "SiT-S/2"}[family]
    with pytest.raises(ValueError, match=refused) as error:
        import_file(str(source), other, out, HEADS)
    assert "\n" not in str(error.value) and not (tmp_path / "w.safetensors").exists()
    import_file(str(source), f"{family}-S/2", out, HEADS)
    assert load_model(out).model.family == family


def test_other_processes_are_refused():
    assert interpolant_name(None) == "linear"
    args = argparse.Namespace(path_type="Linear", prediction="velocity")
    assert interpolant_name(args) == "linear"
    for args in (
        dict(path_type="VP", prediction="velocity"),
        dict(path_type="Linear", prediction="score"),
    ):
        with pytest.raises(ValueError, match="--path-type Linear or GVP and --prediction velocity"):
            interpolant_name(argparse.Namespace(**args))


def test_bad_command_is_one_line(tmp_path):
    torch.save({"weights": 1}, tmp_path / "other.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    for args, message in (
        (
            ("--from", tmp_path / "other.pt", "--out", tmp_path / "a.safetensors"),
            "neither a SiT or DiT state dict",
        ),
        (
            ("--from", tmp_path / "empty.pt", "--out", tmp_path / "a.safetensors"),
            "empty.pt is no checkpoint",
        ),
        (
            ("--from", tmp_path / "other.pt", "--out", tmp_path / "a.pt"),
            "must end with .safetensors",
        ),
    ):
        done = call("import_weights", "--model", "SiT-XL/2", *args)
        assert done.returncode == 2
        assert message in error_of(done)
    assert not (tmp_path / "a.safetensors").exists()
