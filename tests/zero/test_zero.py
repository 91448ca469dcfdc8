"""Sharded EMA, teacher, resuming and export in every ZeRO stage and precision.

On the CPU, with one process and with two.
"""

import argparse
import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import assert_matches, relative_error
from PIL import Image
from zero_worker import (
    BOTH,
    FP8,
    NAMES,
    STEPS,
    TARGETS,
    TORCH,
    VARIANTS,
    dataset,
    runs,
    tiny,
)

from sra_fast.alignment.objective import add_heads, make_objective
from sra_fast.alignment.schedule import align_weights
from sra_fast.checkpoint import sources
from sra_fast.checkpoint.average_snapshots import reconstruct, snapshot_folders
from sra_fast.checkpoint.load_model import load_model
from sra_fast.data.order import ShuffledBatches
from sra_fast.diffusion.draws import draw
from sra_fast.diffusion.micro_batch import MicroBatch
from sra_fast.evaluation.held_out import HeldOutLoss
from sra_fast.training.rows import read_rows
from sra_fast.utils import registry

HERE = Path(__file__).parents[1]
STEADY = [name for name in FP8 if "moving" not in name]
WORLDS = (1, 2)
RUNS = [(name, world) for world in WORLDS for name in runs(world)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results[world]``: folder with the outcomes of ``zero_worker.py`` on that many processes."""
    folders = {}
    for world in WORLDS:
        folders[world] = tmp_path_factory.mktemp(f"world{world}")
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node={world}"
        done = subprocess.run(
            [sys.executable, *launcher.split(), str(HERE / "zero_worker.py"), str(folders[world])],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=900,
        )
        # a launcher may abort after everything is done
        last = folders[world] / f"imported_3.rank{world - 1}.pt"
        assert last.exists(), done.stderr[-4000:]
    return folders


def read(results, world, name, rank=0):
    return _read(results[world] / f"{name}.rank{rank}.pt")


@functools.cache
def _read(file: Path) -> dict:
    # mapped: many tests read the same files, which together are large
    return torch.load(file, weights_only=True, mmap=True)


def independent_run(*args):
    """The same training in plain PyTorch: one process, one batch, a whole EMA model in fp32."""
    cfg = tiny(1, "fp32", *args)
    data = dataset(cfg)
    torch.manual_seed(cfg.train.seed)
    student = cfg.model.build()
    add_heads(student, cfg)
    ema = copy.deepcopy(student).eval()
    depths = [registry.TARGETS[a.target].network_depth(a) for a in cfg.alignments.values()]
    depth = next((depth for depth in depths if depth is not None), None)
    teacher = None if depth is None else cfg.model.build_teacher(depth).eval()
    model = make_objective(cfg, student, teacher).train()
    optimizer = torch.optim.AdamW(
        student.parameters(), eps=cfg.optim.eps, weight_decay=cfg.optim.weight_decay
    )
    batches = ShuffledBatches(len(data), 0, 24, 1, 0, 1, 0, STEPS)
    losses = []
    for step, indices in enumerate(batches):
        if teacher is not None:
            state = ema.state_dict()
            teacher.load_state_dict({name: state[name] for name in teacher.state_dict()})
        x0, told, external = data.split(data.__getitems__(indices))
        options = dict(drop_prob=cfg.model.class_dropout_prob, posterior=False)
        tokens = student.num_tokens if model.has_groups else 0
        d = draw(0, step, 0, x0.shape, torch.device("cpu"), tokens=tokens, **options)
        optimizer.zero_grad()
        condition = data.condition(told).dropped(d.drop)
        batch = MicroBatch(x0, condition, d.noise, model.times(d), external)
        loss, _ = model(batch, list(align_weights(cfg, step, 0).values()))
        loss.backward()
        if cfg.optim.clip:
            torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.optim.clip)
        optimizer.param_groups[0]["lr"] = 0.003 * min(1, (step + 1) / (cfg.optim.warmup_steps or 1))
        optimizer.step()
        for old, new in zip(ema.parameters(), student.parameters(), strict=True):
            old.data.mul_(0.9).add_(new.data, alpha=0.1)
        losses.append(loss.item())
    return dict(student.named_parameters()), dict(ema.named_parameters()), losses


@pytest.fixture(scope="module")
def independent():
    return functools.cache(independent_run)


@pytest.mark.parametrize(
    "name, world",
    [run for run in RUNS if run[0].startswith("fp32") or run[0] in {**VARIANTS, **TARGETS}],
)
def test_fp32_is_the_independent_run(results, independent, world, name):
    """Weights, EMA and losses of every stage, process count and variant against PyTorch alone."""
    # with accumulation, too: the independent run sees one batch
    args = {**VARIANTS, **TARGETS}.get(name, (0, ""))[1]
    weights, ema, losses = independent(*args.format(micro=24).split())
    ours = read(results, world, name)["whole"]
    # differences of features that are alike: their rounding is a larger part of the gradient
    tolerance = 5e-5 if "dispersive" in name else 1e-5
    for key in weights:
        assert_matches(ours["master"][key], weights[key].data, tolerance)
        assert_matches(ours["ema"][key], ema[key].data, tolerance)
    assert ours["loss"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_masters_start_in_full_precision(results, world, name):
    """The fp32 initialisation, bit for bit. DeepSpeed would start bf16 runs from rounded
    weights.
    """
    torch.manual_seed(0)
    initial = dict(tiny(1, "fp32").model.build().named_parameters())
    ours = read(results, world, name)["whole"]["initial"]
    assert all(torch.equal(ours[key], value.data) for key, value in initial.items())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_ema_is_the_average_of_the_masters(results, world, name):
    """Against an EMA that is recomputed from whole masters in each step.

    It would notice mixed-up parameters, or an average of rounded weights.
    """
    ours = read(results, world, name)["whole"]
    assert ours["ema"].keys() == ours["watched_ema"].keys()
    for key, expected in ours["watched_ema"].items():
        assert relative_error(ours["ema"][key], expected) <= 1e-6, key


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [*NAMES, *TORCH])
def test_averages_are_those_of_the_masters(results, world, name):
    """Against sums of the whole masters of all steps in fp64, with the shares of the definitions.

    gamma is rounded to three digits there, which changes a share by 1e-3 of itself, and the average
    by that part of what the weights have moved in six steps.
    """
    for rank in range(world):
        ours = read(results, world, name, rank)["whole"]
        for average, expected in ours["expected averages"].items():
            moved = 0
            for key, value in expected.items():
                found = ours[f"average {average}"][key]
                distance = (ours["master"][key] - ours["initial"][key]).abs().max()
                assert (found - value).abs().max() <= 1e-3 * distance + 1e-6, (average, key)
                moved += (found - ours["ema"][key]).abs().max() > 1e-3 * distance
            assert moved > 10, "it is not the EMA"


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_snapshots_hold_the_power_function_averages(results, world, name):
    """Those of the last step, in fp16; every rank has written its part."""
    run = results[world] / name
    assert [path.name for path in snapshot_folders(run)] == ["step_00000006", "step_00000004"]
    snapshot, found = reconstruct(run, 0.1)
    assert (snapshot.step, snapshot.updates, len(snapshot.files)) == (6, 6, world)
    assert snapshot.averages == {"wide": {"sigma_rel": 0.1, "since": 0.0}}
    expected = read(results, world, name)["whole"]["average wide"]
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.allclose(value, expected[key].flatten(), rtol=2**-10, atol=1e-7), key


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_teacher_is_the_ema_on_every_rank(results, world, name):
    dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
    for rank in range(world):
        ours = read(results, world, name, rank)["whole"]
        assert len(ours["teacher"]) == 7 + 3 * 10 and not any(
            k.startswith(("ap_head", "final_layer", "blocks.3")) for k in ours["teacher"]
        )
        for key, value in ours["teacher"].items():
            assert torch.equal(value, ours["ema"][key].to(dtype).float()), key


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", STEADY)
def test_fp8_teacher_is_the_ema_rounded_on_every_rank(results, world, name):
    both = [read(results, world, name, rank)["whole"] for rank in range(world)]
    teacher = both[0]["teacher"]
    ema = both[0]["ema"]
    assert all(
        torch.equal(other["teacher"][key], value)
        for other in both
        for key, value in teacher.items()
    )
    scaled = [key.removesuffix("_scale") for key in teacher if key.endswith("_scale")]
    # parameters outside of the blocks and in three of them; an MMDiT's third block has no output of
    # the captions
    counts = (16, 12 + 3 * 20 - 6) if "mmdit" in name else (9, 7 + 3 * 10)
    assert (len(scaled), len(teacher) - len(scaled)) == counts
    for key in set(ema) & set(teacher):
        value = teacher[key]
        if key not in scaled:
            assert torch.equal(value, ema[key].bfloat16().float()), key
            continue
        scale = teacher[key + "_scale"]
        assert 32 < value.abs().max() <= 256, "the range of e4m3 is used, with room left"
        error = (value * scale - ema[key]).abs()
        assert (error <= 2**-4 * ema[key].abs() + 2**-10 * scale).all(), key


@pytest.mark.parametrize("world", WORLDS)
def test_fp8_teachers_agree(results, world):
    """Losses: of the stages and optimizers to rounding, and close to those of a bf16 teacher."""
    losses = [
        read(results, world, name)["whole"]["loss"]
        for name in ("bf16_1", "fp8_0", "fp8_1", "fp8_torch_0", "fp8_torch_1")
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=5e-3) and other != losses[0]
        assert other == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_ema_is_sharded(results, name):
    """Each of two ranks holds half of the EMA, plus padding. Stage 0 partitions nothing."""
    total = 4 * sum(v.numel() for v in read(results, 1, name)["whole"]["ema"].values())
    if name.endswith("0"):
        total *= 2
    held = [read(results, 2, name, rank)["whole"]["ema_bytes"] for rank in range(2)]
    assert total <= sum(held) <= 1.05 * total and max(held) <= 0.55 * total


@pytest.mark.parametrize("name", sorted(BOTH))
def test_two_processes_give_the_losses_of_one(results, name):
    one, two = (read(results, world, name)["whole"] for world in WORLDS)
    tolerance = 2e-3 if name.startswith("bf16") or name in FP8 else 1e-5
    assert len(one["loss"]) == STEPS
    assert two["loss"] == pytest.approx(one["loss"], rel=tolerance)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=10 * tolerance)


@pytest.mark.parametrize("graph, deepspeeds", [("graph_1", "fp32_1"), ("bf16_graph_2", "bf16_2")])
def test_gradients_added_up_after_the_backward_pass_are_deepspeeds(results, graph, deepspeeds):
    """Bit for bit: on two processes a share is half of a gradient, and its sum has one order."""
    for rank in range(2):
        ours, theirs = (read(results, 2, name, rank)["whole"] for name in (graph, deepspeeds))
        for part in ("loss", "grad_norm"):
            assert ours[part] == theirs[part]
        for part in ("master", "ema", "teacher", "exp_avg", "exp_avg_sq"):
            for key, value in theirs[part].items():
                assert torch.equal(ours[part][key], value), (part, key)


def test_two_processes_share_the_samples_of_one(results):
    pictures = [
        np.asarray(Image.open(results[w] / "monitored/samples/step_00000006.png")).astype(int)
        for w in WORLDS
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1 and len(np.unique(pictures[0])) > 20


def test_two_processes_measure_the_held_out_loss_of_one(results):
    """Of the EMA, with its weights partitioned; the resumed half measures nothing here."""
    for step in (3, 6):
        one, two = (
            HeldOutLoss.load(results[w] / f"monitored_loss/held_out/step_{step:08d}.npz")
            for w in WORLDS
        )
        assert one.key == two.key and len(one.losses) == 40
        # the weights differ by rounding
        np.testing.assert_allclose(one.losses, two.losses, rtol=1e-4)
        rows = [
            read_rows(results[w] / "monitored_loss/held_out.jsonl")[step // 3 - 1] for w in WORLDS
        ]
        assert rows[0]["step"] == rows[1]["step"] == step
        assert rows[0]["mean"] == one.mean() and rows[0]["bins"] == one.bins().tolist()
    assert not (results[1] / "monitored_loss/samples").exists()


def test_accumulation_gives_the_losses_of_one_batch(results):
    one, four = (read(results, 1, name)["whole"] for name in ("fp32_1", "accumulated"))
    assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_all_stages_agree(results, world):
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 2e-3)):
        losses = [
            read(results, world, f"{precision}_{stage}")["whole"]["loss"] for stage in range(4)
        ]
        for other in losses[1:]:
            assert other == pytest.approx(losses[0], rel=tolerance)


@pytest.mark.parametrize("name, world", RUNS)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(results, world, name):
    for rank in range(world):
        both = read(results, world, name, rank)
        whole = both["whole"]
        resumed = both["resumed"]
        parts = {"master", "ema", "teacher", "exp_avg", "exp_avg_sq"}
        parts |= {"average slow", "average wide"}
        # after the stop nothing reads the teacher, and only loading still refreshes it
        stopped = name in ("stopped_alignment", "dual_time_2")
        for part in parts - ({"teacher"} if stopped else set()):
            for key, value in whole[part].items():
                assert torch.equal(resumed[part][key], value), (part, key)
        first = {"fp8_moving": 2, "fp8_moving_every": 4}.get(name, STEPS // 2)
        assert resumed["loss"] == whole["loss"][first:]
        assert resumed["grad_norm"] == whole["grad_norm"][first:]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", NAMES)
def test_exports_hold_the_run(results, world, name):
    ours = read(results, world, name)["resumed"]
    held = sources.read_published(str(results[world] / f"{name}.published.pt"))
    assert set(held) == {"model", "ema", "opt", "args", "epoch", "steps"}
    assert isinstance(held["args"], argparse.Namespace) and held["steps"] == STEPS
    loaded = load_model(str(results[world] / f"{name}.safetensors"))
    model, path = loaded.model, loaded.path
    assert path == "linear"
    for key, value in ours["ema"].items():
        assert torch.equal(held["ema"][key], value) and torch.equal(model.state_dict()[key], value)
        assert torch.equal(held["model"][key], ours["master"][key])
    student = tiny(1, "fp32").model.build()
    student.load_state_dict(held["model"], strict=True)
    # the published code's parameter list begins with its position embedding
    parameters = [torch.nn.Parameter(student.pos_embed, requires_grad=False), *student.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    optimizer.load_state_dict(held["opt"])
    for key, p in student.named_parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], ours["exp_avg"][key])
        assert optimizer.state[p]["step"] == STEPS


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_published_checkpoint_imports_whole(results, world, stage):
    source = read(results, world, "fp32_1")["resumed"]
    ours = read(results, world, f"imported_{stage}")
    assert ours["step"] == STEPS
    for part in ("master", "ema", "exp_avg", "exp_avg_sq"):
        for key, value in source[part].items():
            assert torch.equal(ours[part][key], value), (part, key)
    for key, value in ours["teacher"].items():
        assert torch.equal(value, source["ema"][key])
