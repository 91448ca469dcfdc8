"""Named averages in checkpoints, snapshots of power-function averages, reconstruction."""

import json
import math
import shutil
from dataclasses import asdict

import pytest
import torch
from bare_training import save
from tiny_config import config

from sra_fast.checkpoint.average_snapshots import (
    SNAPSHOT,
    read_snapshot,
    reconstruct,
    remove_after,
    snapshot_folders,
)
from sra_fast.checkpoint.formats import Options, export
from sra_fast.checkpoint.load_model import load_model
from sra_fast.checkpoint.manifest import Progress, read_manifest
from sra_fast.checkpoint.signed_json import DamagedCheckpoint, render
from sra_fast.checkpoint.sources import find_weights
from sra_fast.config.cli import save_config
from sra_fast.config.schema import Average, SampleConfig
from sra_fast.data.digits import Digits
from sra_fast.sampling import run as sampling
from sra_fast.training import provenance, run_folder, saving
from sra_fast.training import run as ends
from sra_fast.training.checks import check_config
from sra_fast.training.plan import make_plan
from sra_fast.training.saver import prune
from sra_fast.training.store_averages import is_due, store
from sra_fast.training.trainer import build
from sra_fast.utils.power_profile import Profile, exponent, fit, products
from sra_fast.zero.process_group import init_distributed

AVERAGES = "{slow: {decay: 0.99}, narrow: {sigma_rel: 0.05}, wide: {sigma_rel: 0.1}}"
STEPS = 240
EVERY = 30


def make(*args: str):
    words = ("--train.zero_stage", "1", "--train.average_snapshots", str(EVERY), *args)
    cfg = config("--train.averages", AVERAGES, "--train.steps", str(STEPS), *words)
    return build(make_plan(cfg), init_distributed())


def weights_of(step: int, trainer, base: list, directions: list) -> None:
    """Put the masters on a path: a drift that slows down, and a swing of another phase each."""
    drift = math.sqrt(step / STEPS)
    for flat, start, direction in zip(trainer.masters.flats, base, directions, strict=True):
        flat.copy_(start + drift * direction + 0.3 * torch.sin(step / 20 + 10 * direction))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``(run folder, {step: parameters})`` of a run whose weights follow a given path."""
    trainer = make()
    run = tmp_path_factory.mktemp("run")
    save_config(trainer.cfg, run / "config.yaml")
    generator = torch.Generator().manual_seed(1)
    base = [flat.clone() for flat in trainer.masters.flats]
    directions = [torch.randn(flat.shape, generator=generator).to(flat.device) for flat in base]
    history = []
    for step in range(1, STEPS + 1):
        weights_of(step, trainer, base, directions)
        trainer.guard.counts[0] = step
        for average in trainer.averages.values():
            average.update()
        history.append(trainer.weights("model"))
        if is_due(trainer.cfg.train, step):
            store(trainer, run, step, Digits().facts())
        if step % 120 == 0:
            save(trainer, run / "checkpoints", Progress(step), 0, Digits().facts())
    return run, history, trainer


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(trained[0], tmp_path / "run")


def direct(history: list, sigma_rel: float) -> dict:
    """The average of a width over all steps, in fp64, from the definition's shares."""
    power = exponent(sigma_rel) + 1
    count = len(history)
    shares = [((i + 1) ** power - i**power) / count**power for i in range(count)]
    return {
        name: sum(s * held[name].double() for s, held in zip(shares, history, strict=True))
        for name in history[0]
    }


def distance(one: dict, other: dict) -> float:
    return math.sqrt(
        sum(
            float((one[k].double().flatten() - v.flatten()).square().sum())
            for k, v in other.items()
        )
    )


def test_snapshots_are_due_every_so_often_and_at_the_end():
    cfg = config("--train.averages", AVERAGES, "--train.average_snapshots", "4").train
    cfg.steps = 10
    assert [step for step in range(1, 11) if is_due(cfg, step)] == [4, 8, 10]
    cfg.average_snapshots = 0
    assert not any(is_due(cfg, step) for step in range(1, 11))


@pytest.mark.parametrize("sigma_rel", [0.05, 0.065, 0.08, 0.1, 0.12])
def test_an_average_that_was_never_made(trained, sigma_rel):
    """Against the sum of the weights of all steps.

    Two errors are allowed: that of the profile, times its norm and that of the path around its mean
    (Cauchy-Schwarz), and fp16's 2^-11 of each stored weight, times the coefficients. The second is
    an upper bound: roundings are not all alike.
    """
    run, history, _ = trained
    snapshot, found = reconstruct(run, sigma_rel)
    expected = direct(history, sigma_rel)
    wanted = Profile(sigma_rel, STEPS)
    held = [Profile(s, t) for t in range(EVERY, STEPS + 1, EVERY) for s in (0.05, 0.1)]
    made = fit(held, wanted)
    mean = {key: sum(held[key].double() for held in history) / STEPS for key in history[0]}
    spread = math.sqrt(sum(distance(held, mean) ** 2 for held in history))
    norm = math.sqrt(float(products([wanted], [wanted])[0, 0]))
    size = math.sqrt(sum(float(value.square().sum()) for value in expected.values()))
    rounding = 2**-11 * sum(map(abs, made.coefficients)) * size
    error = distance(found, expected)
    assert error <= made.error * norm * spread + rounding
    assert snapshot.step == snapshot.updates == STEPS
    if sigma_rel not in (0.05, 0.1):
        # far nearer than either that is stored
        nearest = min(distance(direct(history, s), expected) for s in (0.05, 0.1))
        assert error < nearest / 4


def test_every_name_gives_its_weights(trained):
    """From the run's folder, a checkpoint and a snapshot."""
    run, _, trainer = trained
    for name in ("slow", "narrow", "wide", "model", "ema"):
        loaded = load_model(str(run), name)
        assert (loaded.weights, loaded.step) == (name, STEPS)
        expected = trainer.weights(name)
        state = loaded.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    for path in ("", "checkpoints/step_00000240", "ema/step_00000240"):
        loaded = load_model(str(run / path), "power:0.08")
        assert (loaded.weights, loaded.step) == ("power:0.08", STEPS)
        assert loaded.facts.name == "digits" and loaded.config["train"]["steps"] == STEPS
        state = loaded.model.state_dict()
        expected = reconstruct(run, 0.08)[1]
        assert all(torch.equal(state[key].flatten(), value) for key, value in expected.items())
    # no later snapshot than the checkpoint
    assert load_model(str(run / "checkpoints/step_00000120"), "power:0.08").step == 120


def test_an_export_passes_for_no_other_average(run, tmp_path):
    export(Options(str(run), str(tmp_path / "slow.safetensors"), weights="slow"))
    export(Options(str(run), str(tmp_path / "folder"), weights="power:0.08"))
    export(Options(str(run), str(run / "ema.safetensors")))
    # the export in a run's folder is of the EMA
    assert find_weights(str(run), "slow") == run / "checkpoints/step_00000240"
    slow = load_model(str(tmp_path / "slow.safetensors"))
    assert slow.weights == "slow"
    expected = load_model(str(run), "slow").model.state_dict()
    assert all(torch.equal(slow.model.state_dict()[key], value) for key, value in expected.items())
    assert load_model(str(tmp_path / "slow.safetensors"), "slow").weights == "slow"
    assert load_model(str(tmp_path / "folder")).weights == "power:0.08"
    assert "the average power:0.08 of the weights" in (tmp_path / "folder/README.md").read_text()
    for name in ("wide", "model", "power:0.08"):
        with pytest.raises(ValueError, match=f"holds no weights '{name}', only slow; "):
            load_model(str(tmp_path / "slow.safetensors"), name)
    for name in ("wide", "model"):
        with pytest.raises(ValueError, match=f"no weights '{name}', only ema; "):
            load_model(str(run / "ema.safetensors"), name)
    with pytest.raises(ValueError, match="format published has student and EMA, got weights slow"):
        export(Options(str(run), str(tmp_path / "w.pt"), weights="slow"))


@pytest.mark.parametrize(
    "path, name, message",
    [
        ("", "fast", "expected weights of ema, model, narrow, slow, wide, power:SIGMA, got 'fast'"),
        ("", "main", "expected weights of ema, .* got 'main'"),
        ("", "power:0.5", r"weights power:0.5: expected a relative width in \[1e-06, 0.2887\]"),
        ("", "power:wide", "expected weights power:SIGMA, as power:0.1, got 'power:wide'"),
        ("", "power:0.01", "its profile would be wrong by .*%, expected at most 10%; two widths"),
        ("checkpoints", "power:0.1", "has no weights power:0.1: expected a run folder"),
        ("ema/step_00000240", "ema", "is a snapshot of averages: expected weights power:SIGMA"),
    ],
)
def test_other_names_are_one_line(trained, path, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(trained[0] / path), name)
    assert "\n" not in str(caught.value)


def test_without_snapshots(run):
    shutil.rmtree(run / "ema")
    for path in ("", "checkpoints/step_00000240"):
        with pytest.raises(ValueError, match="has no weights power:0.1: expected .* found none"):
            load_model(str(run / path), "power:0.1")
    with pytest.raises(
        ValueError, match="made from a run's snapshots: expected some .* found none"
    ):
        reconstruct(run, 0.1)
    with pytest.raises(ValueError, match="expected weights of ema, model, narrow, slow, wide, got"):
        load_model(str(run), "fast")


def test_one_width_alone_says_so(run, caplog):
    for path in snapshot_folders(run):
        _edited(path, lambda held: held["averages"].pop("wide"))
    with pytest.raises(ValueError, match=r"8 averages of width 0.05 .* wrong by .*; two widths"):
        reconstruct(run, 0.1)
    reconstruct(run, 0.051)
    assert "with two widths it would be less" in caplog.text


def _edited(path, change) -> None:
    """Write a snapshot's own file anew."""
    held = json.loads((path / SNAPSHOT).read_text())["snapshot"]
    change(held)
    (path / SNAPSHOT).write_text(render("snapshot", held))


def test_averages_that_began_later_are_left_out(run):
    for path in snapshot_folders(run):
        _edited(path, lambda held: held["averages"]["wide"].update(since=3.0))
    with pytest.raises(ValueError, match=r"\(wide began later and cannot be used with them\)"):
        reconstruct(run, 0.1)


def test_damaged_and_unfinished_snapshots_are_left_out(run, caplog):
    newest = snapshot_folders(run)[0]
    file = newest / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert reconstruct(run, 0.1)[0].step == 210
    assert "step_00000240 is left out, it is damaged: rank_00000.safetensors has" in caplog.text
    (run / "ema/step_00000210" / SNAPSHOT).unlink()
    assert reconstruct(run, 0.1)[0].step == 180
    (run / "ema/step_00000180" / SNAPSHOT).write_text("{}")
    assert reconstruct(run, 0.1)[0].step == 150
    text = (run / "ema/step_00000150" / SNAPSHOT).read_text()
    (run / "ema/step_00000150" / SNAPSHOT).write_text(text.replace('"step": 150', '"step": 151'))
    with pytest.raises(DamagedCheckpoint, match="another SHA-256"):
        read_snapshot(run / "ema/step_00000150")
    _edited(run / "ema/step_00000120", lambda held: held.update(format=9))
    with pytest.raises(ValueError, match="another version of sra-fast"):
        reconstruct(run, 0.1)


def test_pruning_leaves_them_and_going_back_removes_them(run):
    before = snapshot_folders(run)
    cfg = config("--train.keep", "1").train
    prune(run / "checkpoints", cfg)
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000240"]
    assert snapshot_folders(run) == before and len(before) == 8
    (run / "ema/step_00000060" / SNAPSHOT).unlink()
    assert remove_after(run, 240) == 0
    assert len(snapshot_folders(run)) == 7 and not (run / "ema/step_00000060").exists()


def test_resuming_an_earlier_step_removes_later_snapshots(run):
    lines = run_folder.settle(run, run / "checkpoints/step_00000120")
    assert "snapshots of averages after step 120 are removed: 4" in lines
    assert [path.name for path in snapshot_folders(run)] == [
        f"step_{step:08d}" for step in (120, 90, 60, 30)
    ]
    assert run_folder.settle(run, run / "checkpoints/step_00000120") == []


def test_what_is_not_finite_is_not_stored(trained, tmp_path, caplog):
    trainer = trained[2]
    flat = trainer.averages["wide"].flats[0]
    before = flat[3].clone()
    # finite in fp32
    flat[3] = 1e5
    store(trainer, tmp_path, 3)
    flat[3] = before
    assert not list((tmp_path / "ema").iterdir())
    assert "step 3 are not stored: ema.wide/" in caplog.text
    assert "is not finite in fp16" in caplog.text
    # again, where one was before
    store(trainer, tmp_path, 3)
    store(trainer, tmp_path, 3)
    assert [path.name for path in snapshot_folders(tmp_path)] == ["step_00000003"]


def test_checkpoints_say_how_averages_are_made(trained):
    manifest = read_manifest(trained[0] / "checkpoints/step_00000240")
    assert manifest.emas == {
        "main": {"decay": trained[2].cfg.train.ema_decay},
        "slow": {"decay": 0.99, "since": 0.0},
        "narrow": {"sigma_rel": 0.05, "since": 0.0},
        "wide": {"sigma_rel": 0.1, "since": 0.0},
    }


def test_a_resumed_run_begins_and_drops_averages(trained, caplog):
    """A new one is a copy of the restored weights; those that stay are restored bit for bit."""
    run, _, before = trained
    averages = "{wide: {sigma_rel: 0.1}, slow: {decay: 0.5}, new: {sigma_rel: 0.2}}"
    cfg = config("--train.averages", averages, "--train.zero_stage", "1")
    trainer = build(make_plan(cfg), init_distributed())
    saving.load(trainer, run / "checkpoints/step_00000240")
    assert "the average new begins with the weights of step 240" in caplog.text
    assert "the average narrow of the checkpoint is dropped" in caplog.text
    restored = {name: trainer.weights(name) for name in ("model", "ema", "wide", "slow", "new")}
    for name, source in {**{name: name for name in restored}, "new": "model"}.items():
        expected = before.weights(source)
        assert all(torch.equal(restored[name][key], value) for key, value in expected.items())
    since = {name: average.since for name, average in trainer.averages.items()}
    assert since == {"wide": 0, "slow": 0, "new": before.guard.counts[0]}


@pytest.mark.parametrize(
    "changed, message",
    [
        ("{wide: {sigma_rel: 0.11}}", "wide was made with {'sigma_rel': 0.1}, this run has"),
        ("{wide: {decay: 0.9}}", "wide was made with {'sigma_rel': 0.1}, this run has"),
        ("{slow: {sigma_rel: 0.1}}", "slow was made with {'decay': 0.99}, this run has"),
    ],
)
def test_the_same_name_for_another_average_is_refused(trained, changed, message):
    cfg = config("--train.averages", changed, "--train.zero_stage", "1")
    trainer = build(make_plan(cfg), init_distributed())
    with pytest.raises(ValueError, match=message) as caught:
        saving.load(trainer, trained[0] / "checkpoints/step_00000240")
    assert str(caught.value).startswith("cannot resume") and "\n" not in str(caught.value)


def going_on(averages: str):
    """Arguments that continue the fixture's run to twice the steps, with fewer snapshots."""
    words = ("--train.steps", str(2 * STEPS), "--train.average_snapshots", "120")
    return config("--train.averages", averages, "--sample.weights", "power:0.07", *words)


def test_a_run_that_goes_on_has_what_it_samples(trained, run):
    """As it would be found at its end: the averages of a snapshot count by when they began."""
    narrow, wide = "narrow: {sigma_rel: 0.05}", "wide: {sigma_rel: 0.1}"
    path = run / "checkpoints/step_00000240"
    manifest = read_manifest(path)
    as_before = going_on(f"{{{narrow}, {wide}}}")
    provenance.check_weights(path, manifest, as_before)
    # one of them was not there before, and the other does not do alone
    for average in (narrow, wide):
        other = average.replace("narrow", "new").replace("wide", "new")
        kept = wide if average == narrow else narrow
        cfg = going_on(f"{{{kept}, {other}}}")
        check_config(cfg)
        message = (
            "cannot resume .*240: sample.weights power:0.07, without new, which began later than "
            "others, cannot be made from this run's snapshots: its profile would be wrong by"
        )
        with pytest.raises(ValueError, match=message) as caught:
            provenance.check_weights(path, manifest, cfg)
        assert "\n" not in str(caught.value)
    # of both there are only old snapshots
    cfg = going_on("{a: {sigma_rel: 0.05}, b: {sigma_rel: 0.1}}")
    with pytest.raises(ValueError, match="without a, b, which began later"):
        provenance.check_weights(path, manifest, cfg)
    # a run without snapshots begins with them: all that it has began at once
    shutil.rmtree(run / "ema")
    provenance.check_weights(path, manifest, cfg)
    provenance.check_weights(path, manifest, as_before)
    cfg.train.steps = STEPS
    with pytest.raises(ValueError, match="is made from snapshots, and the run has none"):
        provenance.check_weights(path, manifest, cfg)
    cfg.sample.weights = "a"
    provenance.check_weights(path, manifest, cfg)


def test_what_is_foretold_of_a_run_is_what_it_finds(trained, run):
    """The error at the end of a run that is there, from a checkpoint in its middle."""
    path = run / "checkpoints/step_00000120"
    cfg = going_on("{narrow: {sigma_rel: 0.05}, wide: {sigma_rel: 0.1}}")
    cfg.train.steps, cfg.train.average_snapshots = STEPS, EVERY
    cfg.sample.weights = "power:0.02"
    with pytest.raises(ValueError) as found:
        reconstruct(run, 0.02)
    with pytest.raises(ValueError) as foretold:
        provenance.check_weights(path, read_manifest(path), cfg)
    errors = [str(e.value).split("wrong by ")[1].split(",")[0] for e in (found, foretold)]
    assert errors[0] == errors[1]


def test_older_weights_do_not_pass_for_those_of_the_last_step(trained, run):
    trainer = trained[2]
    trainer.cfg.sample.weights = "power:0.08"
    expected = trainer.state_dict(ends._weights_at_end(trainer, run))
    state = load_model(str(run), "power:0.08").model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    (run / "ema/step_00000240" / SNAPSHOT).unlink()
    with pytest.raises(ValueError, match="of step 240 in .*/ema, the newest .* is of step 210"):
        ends._weights_at_end(trainer, run)
    trainer.cfg.sample.weights = "ema"


def test_a_trainer_has_no_other_weights(trained):
    for name in ("fast", "main", "power:0.1"):
        with pytest.raises(
            ValueError, match="expected weights of this training, ema, model, slow, "
        ):
            trained[2].weights(name)


@pytest.mark.parametrize("name", ["model", "power:0.08"])
@pytest.mark.parametrize("form", ["w.safetensors", "folder"])
def test_an_export_is_read_under_the_name_of_its_weights(run, tmp_path, name, form):
    export(Options(str(run), str(tmp_path / form), weights=name))
    loaded = load_model(str(tmp_path / form), name)
    assert (loaded.weights, loaded.step) == (name, STEPS)
    expected = load_model(str(run), name).model.state_dict()
    assert all(torch.equal(loaded.model.state_dict()[key], expected[key]) for key in expected)
    for other in ("slow", "power:0.1"):
        with pytest.raises(ValueError, match=f"holds no weights '{other}', only {name}; "):
            load_model(str(tmp_path / form), other)


def test_sampling_takes_a_name(trained, tmp_path):
    """The images are those of the average, and samples.json says so."""
    run, _, trainer = trained
    for name in ("slow", "power:0.08"):
        options = sampling.Options(
            str(run), str(tmp_path / "out"), 4, sample=SampleConfig(weights=name, steps=2)
        )
        job = sampling.load_job(options)
        assert job.made_of == {"step": STEPS, "weights": name}
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    options.sample.weights = "slow"
    sampling.run(sampling.load_job(options))
    assert json.loads((tmp_path / "out/samples.json").read_text())["weights"] == "slow"


def test_a_checkpoint_of_before_there_were_averages(trained):
    """Nothing is said of options that it has not and the run does not use."""
    cfg = config()
    settings = json.loads(json.dumps(asdict(cfg)))
    del settings["train"]["averages"], settings["train"]["average_snapshots"]
    assert provenance.changes(settings, asdict(cfg)) == {}
    cfg.train.averages["slow"] = Average(decay=0.9)
    found = provenance.changes(settings, asdict(cfg))
    assert list(found) == ["train.averages"]
