"""``train.init_from``: what fits is taken, the rest is fresh and listed, other networks are
refused.
"""

import argparse
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign import network, prefixed, run_folder, same, weights
from safetensors.torch import save_file
from tiny_config import config

from sra_fast.checkpoint.export import write_export
from sra_fast.data.facts import DataFacts
from sra_fast.models import DiT, arguments_of
from sra_fast.training import saving
from sra_fast.training.initial import read_initial
from sra_fast.training.plan import make_run_plan
from sra_fast.training.run import run
from sra_fast.training.start_lines import start_lines
from sra_fast.training.trainer import build
from sra_fast.zero.process_group import init_distributed

STEPS = ("--train.steps", "2", "--train.precision", "fp32", "--train.log_every", "1")
# a fresh network of the same seed
FRESH_SEED = 5
TABLE = "y_embedder.embedding_table.weight"


def initial_of(path, *args) -> dict:
    return read_initial(config(*STEPS, "--train.init_from", str(path), *args))


def trainer_from(path, *args):
    """A trainer on the digits that starts from weights."""
    plan = make_run_plan(
        config(*STEPS, "--train.seed", str(FRESH_SEED), "--train.init_from", str(path), *args)
    )
    initial = plan.initial
    origin = initial["origin"]
    trainer = build(plan.plan, init_distributed(), initial.get("model", initial.get("ema")))
    start = saving.start_from(trainer, initial)
    # what the user sees
    line = start_lines(trainer, plan.data, Path("runs/000"), start, origin)[0]
    assert line == f"run      runs/000 (new, {origin})"
    return trainer, start


def student_and_ema(trainer) -> tuple[dict, dict]:
    masters = trainer.masters
    return masters.gather(masters.flats), trainer.ema.full()


def fresh_state(*args) -> dict:
    plan = make_run_plan(config(*STEPS, "--train.seed", str(FRESH_SEED), *args))
    return student_and_ema(build(plan.plan, init_distributed()))[0]


@pytest.fixture(autouse=True)
def said(caplog):
    """What users see: nothing below a warning."""
    caplog.set_level(logging.WARNING, "sra_fast")


def test_an_exact_fit_is_taken_whole(tmp_path, caplog):
    model = network()
    save_file(prefixed(weights(model), "module."), tmp_path / "w.safetensors")
    found = initial_of(tmp_path / "w.safetensors")
    assert same(found["ema"], weights(model))
    assert found["origin"] == f"from {tmp_path}/w.safetensors"
    # nothing is left out: no warning
    assert caplog.text == ""


def test_a_run_folder_starts_a_run(tmp_path):
    model = network()
    run_folder(tmp_path, model)
    for path in (tmp_path, tmp_path / "checkpoints/step_00000007"):
        found = initial_of(path)
        assert same(found["ema"], weights(model))
        # its optimizer is not continued, so neither is its step count
        assert "steps" not in found and "opt" not in found


# fine-tuning: the changed sizes of the source, and the parameters that are fresh then
PATCHES = ["x_embedder.proj.weight"]
OUTPUTS = ["final_layer.linear.bias", "final_layer.linear.weight"]
TASKS = {
    "classes": (dict(num_classes=4), [TABLE]),
    "no null class": (dict(class_dropout_prob=0.0), [TABLE]),
    # as many rows: the last one is a class there and the null class here
    "a class for the null": (dict(num_classes=11, class_dropout_prob=0.0), [TABLE]),
    "resolution": (dict(input_size=16), ["pos_embed"]),
    "channels": (dict(in_channels=3), [*OUTPUTS, *PATCHES]),
    "patch": (dict(patch_size=4), [*OUTPUTS, "pos_embed", *PATCHES]),
    "all": (
        dict(num_classes=4, input_size=16, in_channels=3),
        [*OUTPUTS, "pos_embed", *PATCHES, TABLE],
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_fine_tuning_takes_what_fits(tmp_path, caplog, task):
    sizes, expected = TASKS[task]
    model = network(**sizes)
    ema = network(seed=1, **sizes)
    args = argparse.Namespace(num_classes=model.num_classes, num_heads=2)
    held = {"model": weights(model), "ema": weights(ema), "args": args, "steps": 100}
    torch.save(held, tmp_path / "w.pt")
    trainer, start = trainer_from(tmp_path / "w.pt")
    found_student, found_ema = student_and_ema(trainer)
    fresh = fresh_state()
    for name in fresh:
        sources = (fresh, fresh) if name in expected else (weights(model), weights(ema))
        assert torch.equal(found_student[name], sources[0][name]), name
        assert torch.equal(found_ema[name], sources[1][name]), name
    assert torch.equal(trainer.student.pos_embed.cpu(), network().pos_embed)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("started from")]
    assert len(lines) == 1
    for name in expected:
        shape = [*network().state_dict()[name].shape]
        theirs = [*weights(model)[name].shape]
        reason = "it is of 11 classes" if shape == theirs else f"it is {theirs}"
        assert f"{name} {shape} ({reason})" in lines[0]
    taken = len(fresh) - len(set(expected) - {"pos_embed"})
    assert f"{taken} of {len(fresh)} parameters" in lines[0]
    assert start == 0 and "step count are not taken" in lines[0]


def test_without_a_table_the_run_continues(tmp_path):
    """It is computed: everything fits."""
    model = network()
    held = published(model, list(model.parameters()))
    for key in ("model", "ema"):
        del held[key]["pos_embed"]
    torch.save(held, tmp_path / "w.pt")
    assert trainer_from(tmp_path / "w.pt")[1] == 1


@pytest.mark.parametrize("absent", ["ap_head.", "y_embedder."])
def test_absent_parts_are_fresh(tmp_path, caplog, absent):
    model = network()
    save_file(weights(model, [absent]), tmp_path / "w.safetensors")
    found_student, found_ema = student_and_ema(trainer_from(tmp_path / "w.safetensors")[0])
    fresh = fresh_state()
    for name in fresh:
        source = fresh if name.startswith(absent) else weights(model)
        assert torch.equal(found_student[name], source[name])
        assert torch.equal(found_ema[name], source[name])
        if name.startswith(absent):
            assert f"{name} {[*fresh[name].shape]} (it is absent)" in caplog.text


def test_two_steps_from_weights_of_another_task(tmp_path, capsys):
    """A whole run, from its folder's weights another one."""
    save_file(
        weights(network(num_classes=3, in_channels=4), ["ap_head."]), tmp_path / "w.safetensors"
    )
    args = ("--sample.method", "euler", "--sample.steps", "1", "--train.out", str(tmp_path / "a"))
    plan = make_run_plan(
        config(*STEPS, "--train.init_from", str(tmp_path / "w.safetensors"), *args)
    )
    summary = run(plan, init_distributed())
    assert summary["loss_last"] > 0
    # which weights the scores are of
    assert (summary["step"], summary["weights"]) == (2, "ema")
    said = capsys.readouterr().err
    assert f"(new, from {tmp_path}/w.safetensors, " in said and "resumed" not in said
    again = initial_of(summary["run_dir"], "--model.num_classes", "12")
    assert TABLE not in again["ema"] and "blocks.3.attn.qkv.weight" in again["ema"]


# refused


def in_config(file, model, facts=None, **diffusion):
    held = {"architecture": {"family": model.family, "arguments": arguments_of(model)}}
    held["diffusion"] = {"path": "linear", **diffusion}
    write_export(file, weights(model), held, None, facts)


@pytest.mark.parametrize(
    "model, message",
    [
        (network(depth=3), r"blocks.3.adaLN_modulation.1.bias should be \[192\], it is absent"),
        (network(depth=5), r"blocks.4.adaLN_modulation.1.bias should be absent, it is \[192\]"),
        (
            network(hidden_size=64),
            r"blocks.0.adaLN_modulation.1.bias should be \[192\], it is \[384\]",
        ),
        (network(mlp_ratio=2), r"blocks.0.mlp.fc1.bias should be \[128\], it is \[64\]"),
        (network(qk_norm=True), r"blocks.0.attn.k_norm.bias should be absent, it is \[16\]"),
        (network(num_heads=4), "was made with 4 heads, the model has 2"),
        (network(DiT), "trained with gaussian_diffusion, the model is trained with flow_matching"),
        (network(DiT, learn_sigma=False), "trained with gaussian_diffusion"),
    ],
)
def test_other_networks_are_refused(tmp_path, model, message):
    in_config(tmp_path / "w.safetensors", model)
    with pytest.raises(ValueError, match=message) as error:
        initial_of(tmp_path / "w.safetensors")
    assert str(error.value).startswith("train.init_from ") and "\n" not in str(error.value)


def test_other_processes_are_refused_by_shape_and_by_arguments(tmp_path):
    save_file(weights(network(DiT)), tmp_path / "w.safetensors")
    with pytest.raises(
        ValueError, match="makes 2 channels for each of the input, the model makes 1"
    ):
        initial_of(tmp_path / "w.safetensors")
    model = network(DiT, learn_sigma=False)
    torch.save(
        {"ema": weights(model), "args": argparse.Namespace(model="DiT-S/2")}, tmp_path / "w.pt"
    )
    with pytest.raises(ValueError, match="trained with gaussian_diffusion"):
        initial_of(tmp_path / "w.pt")
    state = weights(network(), ["ap_head."])
    torch.save({"ema": state, "args": argparse.Namespace(path_type="GVP")}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="official SiT, whose time runs backwards"):
        initial_of(tmp_path / "w.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = weights(network())
    state["blocks.2.mlp.fc2.bias"][1] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="blocks.2.mlp.fc2.bias has NaN or infinity"):
        initial_of(tmp_path / "w.safetensors")


@pytest.mark.parametrize("ours, theirs", [("cosine", "linear"), ("linear", "cosine")])
def test_another_interpolant_is_refused(tmp_path, ours, theirs):
    model = network()
    run = ("--diffusion.path", ours)
    in_config(tmp_path / "w.safetensors", model, path=theirs)
    args = argparse.Namespace(path_type=theirs, num_heads=2)
    torch.save({"ema": weights(model), "args": args}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        message = f"{name} was trained with the interpolant {theirs}, the run has --diffusion.path"
        with pytest.raises(ValueError, match=f"{message} {ours}"):
            initial_of(tmp_path / name, *run)
        assert same(initial_of(tmp_path / name, "--diffusion.path", theirs)["ema"], weights(model))
    args = argparse.Namespace(path_type="VP2", num_heads=2)
    torch.save({"ema": weights(model), "args": args}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="the interpolant VP2, the run has --diffusion.path"):
        initial_of(tmp_path / "w.pt", *run)


def test_a_direction_of_time_that_nothing_shows_is_said(tmp_path, caplog):
    """Interpolant and classes are the run's own."""
    model = network()
    torch.save(weights(model, ["ap_head."]), tmp_path / "w.pt")
    initial_of(tmp_path / "w.pt")
    said = "does not say how it was trained, assumed is noise at time 1, as in REPA and SRA"
    assert said in caplog.text and "interpolant" not in caplog.text
    assert "null class" not in caplog.text
    caplog.clear()
    torch.save(weights(model), tmp_path / "w.pt")
    initial_of(tmp_path / "w.pt")
    assert "assumed" not in caplog.text


def test_another_shift_of_times_is_said(tmp_path, caplog):
    """A run may learn other times, unlike another interpolant."""
    model = network()
    in_config(tmp_path / "w.safetensors", model, time_shift=3.0)
    args = argparse.Namespace(time_shift=3.0, num_heads=2)
    torch.save({"ema": weights(model), "args": args}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        caplog.clear()
        initial_of(tmp_path / name, "--diffusion.time_shift", "3")
        assert "time_shift" not in caplog.text
        initial_of(tmp_path / name)
        assert f"{name} is of diffusion.time_shift 3.0, the run has 1.0" in caplog.text
    in_config(tmp_path / "w.safetensors", model, time="lognormal", time_mean=0.5, time_shift=1.0)
    initial_of(tmp_path / "w.safetensors")
    said = (
        "is of diffusion.time lognormal, the run has uniform; of diffusion.time_mean 0.5, the run"
    )
    assert said in caplog.text
    save_file(weights(model), tmp_path / "plain.safetensors")
    caplog.clear()
    initial_of(tmp_path / "plain.safetensors", "--diffusion.time_shift", "3")
    assert "time_shift" not in caplog.text


def test_a_dit_has_no_interpolant(tmp_path):
    """Its exports say linear, whatever the run says."""
    in_config(tmp_path / "w.safetensors", network(DiT))
    run = ("--model.name", "DiT-S/2", "--diffusion.path", "cosine")
    assert same(initial_of(tmp_path / "w.safetensors", *run)["ema"], weights(network(DiT)))


# facts about the data

NAMES = [str(i) for i in range(10)]
LATENTS = DataFacts("latents", (1, 8, 8), 10, class_names=NAMES, scale=0.5)


@pytest.mark.parametrize(
    "theirs, message",
    [
        (dict(scale=0.18215), "trained on latents of scale 0.18215, .* have 0.5 .*latent_scale"),
        (dict(shift=0.1), "trained on latents of shift 0.1, the data of this run have 0 .*_shift"),
        (dict(scale=[0.25]), "latents of scale 0.25 to 0.25, by channel, .* have 0.5 .*_scale"),
        (dict(pixels=True, scale=1.0), "trained on pixels, the data of this run are latents"),
        (dict(path="/elsewhere"), None),
    ],
)
def test_inputs_of_another_kind_are_a_warning(tmp_path, caplog, theirs, message):
    in_config(tmp_path / "w.safetensors", network(), facts=replace(LATENTS, **theirs))
    cfg = config(*STEPS, "--train.init_from", str(tmp_path / "w.safetensors"))
    assert same(read_initial(cfg, LATENTS)["ema"], weights(network()))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (message is not None)
    assert message is None or re.search(message, lines[0])


def test_other_classes_of_the_same_number_are_fresh(tmp_path, caplog):
    names = [*NAMES[:8], "x", "y"]
    in_config(tmp_path / "w.safetensors", network(), facts=replace(LATENTS, class_names=names))
    cfg = config(*STEPS, "--train.init_from", str(tmp_path / "w.safetensors"))
    assert TABLE not in read_initial(cfg, LATENTS)["ema"]
    assert f"{TABLE} [11, 32] (its classes have other names, x for 8)" in caplog.text
    for unnamed in (LATENTS, replace(LATENTS, class_names=None)):
        in_config(tmp_path / "w.safetensors", network(), facts=unnamed)
        assert TABLE in read_initial(cfg, LATENTS)["ema"]
    # and a run asks with the facts of its data: those of the digits are named from zero to nine
    in_config(tmp_path / "w.safetensors", network(), facts=replace(LATENTS, class_names=names))
    args = ("--train.init_from", str(tmp_path / "w.safetensors"))
    caplog.clear()
    make_run_plan(config(*STEPS, *args))
    assert "trained on latents, the data of this run are pixels" in caplog.text


# optimizer states


def published(model, parameters) -> dict:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    optimizer.step()
    args = argparse.Namespace(num_heads=2)
    return {"model": weights(model), "ema": weights(model), "args": args, "steps": 1} | {
        "opt": optimizer.state_dict()
    }


def test_the_optimizer_continues_or_is_refused(tmp_path, caplog):
    model = network()
    table = torch.nn.Parameter(model.pos_embed, requires_grad=False)
    held = published(model, [table, *model.parameters()])
    torch.save(held, tmp_path / "w.pt")
    trainer, start = trainer_from(tmp_path / "w.pt")
    assert start == 1 and caplog.text == ""
    origin = initial_of(tmp_path / "w.pt")["origin"]
    assert origin == f"from {tmp_path}/w.pt, step 1, with its optimizer"
    moments = trainer.masters.gather(trainer.masters.state("exp_avg"))
    for number, name in enumerate(moments, start=1):
        assert torch.equal(moments[name], held["opt"]["state"][number]["exp_avg"])
    assert all(state["step"] == 1 for state in trainer.masters.optimizer_states())

    model = network()
    torch.save(published(model, list(model.parameters())[::-1]), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="init_from .*w.pt: the optimizer state exp_avg of x_emb"):
        initial_of(tmp_path / "w.pt")


def test_an_ema_without_a_head_does_not_stop_the_optimizer(tmp_path, caplog):
    """The student decides what continues; the EMA of the head begins as the student's."""
    model = network()
    held = published(model, list(model.parameters()))
    heads = [name for name in held["ema"] if name.startswith("ap_head.")]
    held["ema"] = {name: value for name, value in held["ema"].items() if name not in heads}
    held["ema"]["final_layer.linear.weight"] += 1
    torch.save(held, tmp_path / "w.pt")
    trainer, start = trainer_from(tmp_path / "w.pt")
    assert start == 1
    assert (
        f"; its EMA has no {', '.join(sorted(heads))}, which begin as the student's" in caplog.text
    )
    assert "fresh" not in caplog.text and "not taken" not in caplog.text
    student, ema = student_and_ema(trainer)
    for name in student:
        assert torch.equal(student[name], held["model"][name])
        assert torch.equal(ema[name], held["ema"].get(name, held["model"][name]))
    assert all(state["step"] == 1 for state in trainer.masters.optimizer_states())


def test_other_settings_of_a_run_that_goes_on_are_said(tmp_path, caplog):
    model = network()
    held = published(model, list(model.parameters()))
    held["args"] = argparse.Namespace(
        num_heads=2, cfg_prob=0.3, weighting="lognormal", t_max=0.2, block_out_s=2, loss_type="cos"
    )
    held["opt"]["param_groups"][0] |= {"lr": 7e-3, "betas": (0.5, 0.6), "weight_decay": 0.0}
    torch.save(held, tmp_path / "w.pt")
    initial_of(tmp_path / "w.pt")
    (said,) = [text for text in caplog.messages if "goes on" in text]
    assert said == (
        f"the run goes on from {tmp_path}/w.pt with other settings: "
        "optim.lr 0.0001 (it was 0.007), "
        "optim.betas (0.9, 0.999) (it was (0.5, 0.6)), model.class_dropout_prob 0.1 (it was 0.3), "
        "align.distance smooth_l1 (it was cosine_token)"
    )
    assert "w.pt is of diffusion.time lognormal, the run has uniform" in caplog.text
    caplog.clear()
    same = ("--optim.lr", "0.007", "--optim.betas", "[0.5,0.6]", "--diffusion.time", "lognormal")
    same += ("--model.class_dropout_prob", "0.3", "--align.distance", "cosine_token")
    initial_of(tmp_path / "w.pt", *same)
    assert "goes on" not in caplog.text
    # a plain run aligns nothing
    caplog.clear()
    initial_of(tmp_path / "w.pt", *same[:-2], "--align", "none")
    assert "goes on" not in caplog.text
    # other projects may have anything there
    held["args"].loss_type = ["cos"]
    torch.save(held, tmp_path / "w.pt")
    initial_of(tmp_path / "w.pt")
    assert "align.distance" not in caplog.text
    caplog.clear()
    # a new optimizer is a new run
    del held["opt"]
    torch.save(held, tmp_path / "w.pt")
    initial_of(tmp_path / "w.pt")
    assert "goes on" not in caplog.text


@pytest.mark.parametrize("opt", ["absent", None, {}, {"state": {}, "param_groups": []}])
def test_without_an_optimizer_state_the_run_starts_anew(tmp_path, caplog, opt):
    """A fresh optimizer at step 400000 would be beyond its warm-up."""
    held = {"model": weights(network()), "ema": weights(network()), "steps": 400_000, "epoch": 80}
    torch.save(held if opt == "absent" else {**held, "opt": opt}, tmp_path / "w.pt")
    _, start = trainer_from(tmp_path / "w.pt")
    assert start == 0
    assert "it has no optimizer state, so the run starts at step 0" in caplog.text
    found = initial_of(tmp_path / "w.pt")
    assert not {"opt", "steps", "epoch"} & set(found)
    assert found["origin"] == f"from {tmp_path}/w.pt"


def test_step_counts_and_optimizers_of_another_form_are_refused(tmp_path):
    model = network()
    held = published(model, list(model.parameters()))
    for change, message in (
        ({"steps": "1"}, "expected a number of steps in train.init_from .*w.pt, got '1'"),
        ({"opt": [1]}, r"w.pt: expected the optimizer's state_dict\(\), got a list"),
        (
            {"opt": {**held["opt"], "param_groups": [{"lr": 1}]}},
            "w.pt: the optimizer's param_groups should have params",
        ),
    ):
        torch.save({**held, **change}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=message) as error:
            initial_of(tmp_path / "w.pt")
        assert "\n" not in str(error.value)


def test_the_step_count_must_leave_steps(tmp_path):
    model = network()
    held = published(model, list(model.parameters()))
    torch.save({**held, "steps": 2}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="train.steps must exceed the 2 of train.init_from, got 2"):
        initial_of(tmp_path / "w.pt")
