"""Weights of the official releases: same outputs as under their own conventions, which are written out here."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import assert_matches

from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.official_weights import (
    convert,
    first_channels,
    interpolant,
    model_config,
    reverse_time,
)
from sra_fast.config.cli import parse_train
from sra_fast.diffusion.samplers import sample
from sra_fast.models import DiT
from sra_fast.training.plan import make_run_plan

ROOT = Path(__file__).parents[2]
C, P, SIZE, HEADS = 3, 2, 8, 2
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
    """A network with every parameter random; without its ap_head its state dict is that of both releases: 2C channels."""
    model, generator = DiT(**{**TINY, **sizes}).eval(), torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.15)
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
    """The official forward pass: 2C channels ``[B, 2C, H, W]`` of raw time; only the inside of the blocks is ours."""
    sd = net.state_dict()
    tokens = (
        F.conv2d(x, sd["x_embedder.proj.weight"], sd["x_embedder.proj.bias"], stride=P)
        .flatten(2)
        .mT
        + sd["pos_embed"]
    )
    phase = time.double()[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    c = (
        net.t_embedder.mlp(torch.cat([phase.cos(), phase.sin()], dim=1).float())
        + sd["y_embedder.embedding_table.weight"][y]
    )
    for block in net.blocks:
        tokens, (branch, gate, _) = block(tokens, F.silu(c))
        tokens = tokens + gate[:, None] * branch
    h = norm(tokens, *net.final_layer.adaLN_modulation(c).chunk(2, dim=1))
    patches = net.final_layer.linear(h).unflatten(2, (P * P, 2 * x.shape[1]))  # channels fastest
    return F.fold(patches.permute(0, 3, 2, 1).flatten(1, 2), (SIZE, SIZE), P, stride=P)


def official_velocity(net, x, u, y):
    """dx/du of the official SiT: u = 0 is noise, u = 1 data; the second half of the channels is not used."""
    return official(net, x, u, y)[:, : x.shape[1]]


def batch(channels=C):
    torch.manual_seed(1)
    t = torch.tensor([0.0, 1.0, 0.5, 0.04, 0.96, 0.31])
    return torch.randn(6, channels, SIZE, SIZE), t, torch.arange(6)  # 5 is the null class


@torch.no_grad()
def test_converted_sit_is_the_official_one_in_reversed_time():
    net, (x, t, y) = release(), batch()
    state = weights(net)
    model = convert(state, model_config(state, "SiT-S/2", HEADS))
    assert model.family == "SiT" and model(x, t, y).shape == x.shape
    expected = -official_velocity(net, x, 1 - t, y)
    assert_matches(model(x, t, y), expected, 1e-5)
    # the times matter in this network: a conversion without the reversal is far off
    assert (expected + official_velocity(net, x, t, y)).abs().max() > 0.05 * expected.abs().max()
    assert all(torch.equal(state[name], value) for name, value in weights(net).items()), (
        "the source is left alone"
    )


@torch.no_grad()
def test_sampling_follows_the_official_ode():
    net, (z, _, y), steps = release(), batch(), 10
    model = convert(weights(net), model_config(weights(net), "SiT-S/2", HEADS))
    x = z.double()
    for i in range(steps):  # u from 0, noise, to 1, data
        x = x + official_velocity(net, x.float(), torch.full((len(y),), i / steps), y) / steps
    assert_matches(sample(model, z, y, "euler", steps), x, 1e-5)


@torch.no_grad()
def test_converted_dit_is_the_official_one():
    net, (x, _, y) = release(), batch()
    t = torch.tensor([0, 999, 500, 1, 250, 731])
    state = weights(net)
    model = convert(state, model_config(state, "DiT-S/2", HEADS))
    assert model.family == "DiT" and model.learn_sigma
    assert_matches(model(x, t, y), official(net, x, t, y), 1e-5)


def test_reversal_and_cut_are_exact():
    torch.manual_seed(0)
    weight = torch.randn(7, 256)
    assert_matches(reverse_time(reverse_time(weight)), weight, 1e-6)  # a reflection
    rows = torch.arange(P * P * 2 * C).reshape(P * P, 2 * C)
    assert torch.equal(first_channels(rows.flatten(), P, C), rows[:, :C].flatten())
    # weights with C channels, of a SiT trained without the unused half, pass through
    assert torch.equal(first_channels(rows.flatten(), P, 2 * C), rows.flatten())


def test_projection_head_is_fresh_and_seeded():
    state = weights(release())
    cfg = model_config(state, "SiT-S/2", HEADS)
    a, b, other = (convert(state, cfg, seed).ap_head.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert a["linear1.weight"].std() > 0 and not torch.equal(
        a["linear1.weight"], other["linear1.weight"]
    )


def command(*args):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "sra_fast/import_weights.py", *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )


@torch.no_grad()
@pytest.mark.parametrize("layout", ["release", "training"])
def test_file_to_file_samples_and_starts_a_run(tmp_path, layout):
    digits = dict(in_channels=1, num_classes=10)
    net, (x, t, y) = release(**digits), batch(1)
    args = argparse.Namespace(path_type="GVP", prediction="velocity")
    training = {
        "ema": weights(net),
        "model": weights(release(1, **digits)),
        "opt": {},
        "args": args,
    }
    torch.save(weights(net) if layout == "release" else training, tmp_path / "official.pt")
    out = tmp_path / "new" / "init.safetensors"
    done = command(
        "--from", tmp_path / "official.pt", "--model", "SiT-S/2", "--num_heads", HEADS, "--out", out
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model, path = load_model(str(out))
    assert path == ("linear" if layout == "release" else "cosine")
    assert_matches(model(x, t, y), -official_velocity(net, x, 1 - t, y), 1e-5)
    sizes = [f"--model.{key}={value}" for key, value in {**TINY, **digits}.items()]
    run = [
        "--model.name",
        "SiT-S/2",
        *sizes,
        *["--align.student_layer", "1", "--align.teacher_layer", "2", "--data.name", "digits"],
    ]
    start = make_run_plan(parse_train([*run, "--train.init_from", str(out)])[0], None).initial[
        "ema"
    ]
    assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="made with 2 heads, the model has 4"):
        make_run_plan(
            parse_train([*run, "--model.num_heads", "4", "--train.init_from", str(out)])[0], None
        )


def broken(change) -> dict:
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
            "none of a SiT or DiT: they have no pos_embed",
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


def test_other_processes_are_refused():
    assert (
        interpolant(None)
        == interpolant(argparse.Namespace(path_type="Linear", prediction="velocity"))
        == "linear"
    )
    for args in (
        dict(path_type="VP", prediction="velocity"),
        dict(path_type="Linear", prediction="score"),
    ):
        with pytest.raises(ValueError, match="--path-type Linear or GVP and --prediction velocity"):
            interpolant(argparse.Namespace(**args))


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
        done = command("--model", "SiT-XL/2", *args)
        assert (
            done.returncode == 2
            and message in done.stderr.splitlines()[-1]
            and "Traceback" not in done.stderr
        )
    assert not (tmp_path / "a.safetensors").exists()
