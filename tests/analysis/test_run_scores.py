"""All scores of a tiny run: their values against direct computations, the cache, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_config import config

from sra_fast.analysis import probing, run_scores
from sra_fast.analysis.alignment_rows import distance_rows, norm_rows
from sra_fast.analysis.features import split
from sra_fast.analysis.linear_probe import probe_layers
from sra_fast.analysis.run_scores import ScoreOptions, check_for, score_run
from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.schema import DataConfig
from sra_fast.data.digits import Digits
from sra_fast.data.training_data import TrainingData
from sra_fast.evaluation import classifier
from sra_fast.evaluation.held_out import HeldOutImages, HeldOutLoss, held_out_loss
from sra_fast.sampling import conditions as what_to_sample
from sra_fast.training.plan import make_plan, make_run_plan
from sra_fast.training.run import run
from sra_fast.zero.process_group import init_distributed

OPTIONS = ScoreOptions(
    held_out_images=30,
    time_bins=4,
    samples=129,
    probe_images=200,
    probe_times=[0.2, 0.6],
    distance_images=12,
    batch=16,
)
STEPS = (
    "--train.steps 6 --train.save_every 3 --train.log_every 6 --train.ema_decay 0.5 --optim.lr 0.01 "
    "--sample.method euler --sample.steps 2"
).split()


def train(out, *args):
    cfg = config(*STEPS, "--train.out", str(out), *args)
    # the digits' own scores at the end take longer than the run
    plan = make_run_plan(cfg)
    plan.data.evaluation = None
    run(plan, init_distributed())
    return out / "000"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {"sra": train(folder / "sra"), "plain": train(folder / "plain", "--align", "none")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for feature networks, which are small here."""
    folder = tmp_path_factory.mktemp("cache")
    recipe = classifier.Recipe(width=8, features=16, epochs=(2, 2))
    made = classifier.feature_network
    patch = pytest.MonkeyPatch()
    patch.setattr(
        run_scores, "feature_network", lambda data, cache, device: made(data, cache, device, recipe)
    )
    yield folder
    patch.undo()


def test_every_score_is_what_it_says(runs, cache):
    found = score_run(runs["sra"], OPTIONS, cache)
    folder = runs["sra"] / "scores/ema"
    assert json.loads((folder / "scores.json").read_text()) == found
    model = load_model(str(runs["sra"])).model

    expected = held_out_loss(model, "linear", HeldOutImages(Digits(), 30, 4), batch=16)
    held = HeldOutLoss.load(folder / "held_out.npz")
    assert np.array_equal(held.losses, expected.losses)
    assert found["held_out"] == expected.mean() and found["held_out_bins"] == [*expected.bins()]
    assert held.about["step"] == found["made_of"]["step"] == 6

    assert found["frechet"] > found["frechet_floor"] > 0
    assert 0 <= found["label_accuracy"] <= 1 and 0.5 < found["classifier_accuracy"] <= 1

    # the same probe as probe.py's
    parts = split(DataConfig(name="digits"), model)
    probed = probe_layers(
        model, "linear", parts, [0.2, 0.6], [1, 2, 3, 4], how="mean", count=200, draws=1, batch=16
    )
    assert found["probe_rows"] == probed.rows and len(probed.rows) == 10
    means = {
        layer: np.mean([row["accuracy"] for row in probed.rows if row["layer"] == layer])
        for layer in range(1, 5)
    }
    assert found["probe"] == pytest.approx(max(means.values()))
    assert found["probe_early"] == pytest.approx(means[1])

    assert found["norm_rows"] == norm_rows(model, "linear", parts[1].read(12, 0), [0.2, 0.6], 16)
    assert found["feature_norm"] == pytest.approx(
        np.mean([row["norm"] for row in found["norm_rows"]])
    )
    assert found["made_of"]["chance"] == probed.chance
    assert found["made_of"]["align"] == {
        "target": "ema_teacher",
        "student_layer": 2,
        "teacher_layer": 3,
        "head": "mlp",
        "distance": "smooth_l1",
        "t_max": 0.2,
    }
    assert found["align_distance"] == pytest.approx(
        np.mean([row["distance"] for row in found["distance_rows"]])
    )


@torch.no_grad()
def test_norms_and_distances_by_hand(runs):
    """In fp64, an image at a time: features of the two noisy inputs, head, mean over tokens."""
    student, teacher = (load_model(str(runs["sra"]), name) for name in ("model", "ema"))
    images = split(DataConfig(name="digits"), teacher.model)[1].read(5, 0)
    # gaps are drawn anew for another seed: this pair has none, and there both see one input
    student.config["align"]["t_max"] = 0.0
    align, rows = distance_rows(student, teacher, images, [0.4], 2)
    norms = norm_rows(teacher.model, "linear", images, [0.4], 2)
    exact = [loaded.model.double() for loaded in (student, teacher)]
    x = (0.6 * images.x0 + 0.4 * images.noise).double()
    t = torch.full((5,), 0.4).double()
    predicted = exact[0].ap_head(exact[0].features(x, t, images.labels, 2))
    target = exact[1].features(x, t, images.labels, 3)
    error = (predicted - target).abs()
    smooth = torch.where(error < 0.05, error.square() / 0.1, error - 0.025)
    assert align["t_max"] == 0 and rows[0]["time"] == 0.4
    assert rows[0]["distance"] == pytest.approx(float(smooth.mean()), rel=1e-4)
    cosine = 1 - torch.cosine_similarity(predicted, target, dim=-1).mean()
    assert rows[0]["cosine"] == pytest.approx(float(cosine), rel=1e-3)
    for row in norms:
        found = exact[1].features(x, t, images.labels, row["layer"]).norm(dim=-1).mean()
        assert row["norm"] == pytest.approx(float(found), rel=1e-4)


def test_the_teacher_sees_an_earlier_time(runs):
    """A gap changes the distance, the same for the same seed."""
    student, teacher = (load_model(str(runs["sra"]), name) for name in ("model", "ema"))
    images = split(DataConfig(name="digits"), teacher.model)[1].read(8, 0)
    measured = [
        distance_rows(student, teacher, images, [0.5], batch, seed)[1][0]["distance"]
        for batch, seed in ((8, 0), (3, 0), (8, 1))
    ]
    assert measured[0] == pytest.approx(measured[1], rel=1e-5) != pytest.approx(measured[2])
    student.config["align"]["t_max"] = 0.0
    _, rows = distance_rows(student, teacher, images, [0.5], 8)
    assert rows[0]["distance"] != pytest.approx(measured[0], rel=1e-3)


def test_a_plain_run_is_compared_by_the_rule_and_without_a_head(runs, cache):
    options = replace(OPTIONS, held_out_images=0, samples=0, probe_images=0)
    found = score_run(runs["plain"], options, cache)
    assert found["made_of"]["align"] == {
        "target": "none",
        "student_layer": 1,
        "teacher_layer": 3,
        "head": "none",
        "distance": "smooth_l1",
        "t_max": 0.2,
    }
    absent = {"held_out", "frechet", "probe", "probe_rows"}
    assert not absent & found.keys() and found["align_distance"] > 0
    assert not (runs["plain"] / "scores/ema/held_out.npz").exists()


def test_scores_are_read_back_for_the_same_weights_and_options(runs, cache, monkeypatch):
    options = replace(OPTIONS, samples=0, probe_images=0, distance_images=0)
    checkpoints = runs["plain"] / "checkpoints"
    first = score_run(checkpoints / "step_00000003", options, cache)
    folder = runs["plain"] / "scores/ema/step_00000003"
    assert (
        first["made_of"]["step"] == 3 and json.loads((folder / "scores.json").read_text()) == first
    )
    assert {path.name for path in (checkpoints / "step_00000003").iterdir()} == {
        "manifest.json",
        "rank_00000.safetensors",
    }
    student = score_run(checkpoints / "step_00000003", replace(options, weights="model"), cache)
    assert student["held_out"] != first["held_out"]
    last = score_run(runs["plain"], options, cache)
    assert last["held_out"] != first["held_out"]
    pair = [
        HeldOutLoss.load(runs["plain"] / f"scores/{name}/held_out.npz")
        for name in ("ema/step_00000003", "ema")
    ]
    assert pair[0].paired(pair[1]).mean() == pytest.approx(first["held_out"] - last["held_out"])

    calls = []
    measure = run_scores.held_out_loss
    monkeypatch.setattr(
        run_scores, "held_out_loss", lambda *a, **k: (calls.append(1), measure(*a, **k))[1]
    )
    assert score_run(checkpoints / "step_00000003", options, cache) == first and not calls
    # other options, other weights in the folder, or losses that are gone: made anew
    score_run(runs["plain"], replace(options, seed=1), cache)
    assert len(calls) == 1
    (folder / "scores.json").write_text(
        json.dumps({**first, "made_of": {**first["made_of"], "digest": "another"}})
    )
    assert score_run(checkpoints / "step_00000003", options, cache) == first
    (folder / "held_out.npz").unlink()
    assert score_run(checkpoints / "step_00000003", options, cache) == first
    (folder / "scores.json").write_text("{")
    assert score_run(checkpoints / "step_00000003", options, cache) == first
    assert len(calls) == 4
    # losses of other images, of other weights, and none
    whole = (folder / "held_out.npz").read_bytes()
    assert first["made_of"]["held_out_key"] == HeldOutLoss.load(folder / "held_out.npz").key
    measure(load_model(str(runs["plain"])).model, "linear", HeldOutImages(Digits(), 9)).save(
        folder / "held_out.npz"
    )
    assert score_run(checkpoints / "step_00000003", options, cache) == first
    for content in ((folder.parent / "held_out.npz").read_bytes(), whole[:-1], b""):
        (folder / "held_out.npz").write_bytes(content)
        assert score_run(checkpoints / "step_00000003", options, cache) == first
        assert (folder / "held_out.npz").read_bytes() == whole
    assert len(calls) == 8
    assert score_run(checkpoints / "step_00000003", options, cache) == first
    assert len(calls) == 8
    # losses that are no part of the scores do not lie beside them
    none = replace(options, held_out_images=0, distance_images=5)
    made_of = score_run(checkpoints / "step_00000003", none, cache)["made_of"]
    assert made_of["held_out_key"] is made_of["chance"] is None
    assert not (folder / "held_out.npz").exists()


def test_student_and_teacher_of_a_checkpoint_are_probed(runs, tmp_path, monkeypatch):
    """probe.py sees the weights and the step that were asked for: six steps hardly change rows."""
    probed = []
    measure = probing.probe_layers
    monkeypatch.setattr(
        probing,
        "probe_layers",
        lambda model, *a, **k: (probed.append(model), measure(model, *a, **k))[1],
    )
    for weights in ("ema", "model"):
        for step in (3, 6):
            checkpoint = str(runs["sra"] / f"checkpoints/step_{step:08d}")
            options = probing.Options(checkpoint, weights, str(tmp_path))
            report = probing.run(
                replace(options, times=[0.2], layers=[2], images=20, draws=1, batch=16)
            )
            assert (report["weights"], report["step"]) == (weights, step)
            expected = load_model(checkpoint, weights).model.state_dict()
            found = probed[-1].state_dict()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
    sums = {model.blocks[0].mlp.fc1.weight.sum().item() for model in probed}
    assert len(sums) == 4


def test_scores_do_not_depend_on_what_was_drawn_before(runs, cache):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(score_run(runs["sra"], OPTIONS, cache))
        (runs["sra"] / "scores/ema/scores.json").unlink()
    assert found[0] == found[1]


def test_a_run_on_other_data_is_not_scored(runs, cache, monkeypatch):
    facts = json.loads((runs["sra"] / "data.json").read_text())
    assert facts["fingerprint"] == Digits().fingerprint

    class Others(Digits):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.fingerprint = "0" * 64

    monkeypatch.setattr(run_scores, "make_dataset", lambda cfg: Others())
    with pytest.raises(ValueError, match="was trained on other data than there are now.*images"):
        score_run(runs["sra"], replace(OPTIONS, seed=9), cache)


def test_data_without_a_held_out_share_are_refused(tmp_path, cache):
    images = (Digits().images[:40, 0, :, :, None].numpy() + 1) * 127
    labels = np.arange(40) % 10
    np.savez(tmp_path / "x.npz", arr_0=images.astype(np.uint8), arr_1=labels)
    folder = train(
        tmp_path / "out", "--data.name", "pixels", "--data.path", str(tmp_path / "x.npz")
    )
    with pytest.raises(ValueError, match=r"\(preprocess.py --holdout\), .*x.npz has none"):
        score_run(folder, OPTIONS, cache)


@pytest.mark.parametrize(
    "held, message",
    [
        ({"samples": "3"}, "scores.samples must be int, got '3'"),
        ({"samples": True}, "scores.samples must be int, got True"),
        ({"weights": 1}, "scores.weights must be str, got 1"),
        # a covariance of 128 features
        ({"samples": 128}, "scores.samples must be 0 or at least 129, got 128"),
        ({"samples": -1}, "scores.samples must be 0 or at least 129, got -1"),
        ({"batch": 0}, "scores.batch must be at least 1, got 0"),
        ({"probe_images": 3}, "scores.probe_images must be 0 or at least 10"),
        ({"held_out_images": 1}, "scores.held_out_images must be 0 or at least 2, got 1"),
        ({"distance_images": -1}, "scores.distance_images must be at least 0, got -1"),
        (dict.fromkeys(run_scores.PARTS, 0), "scores need some images, got 0 of held_out_images, "),
        ({"probe_times": [0.5, 1.5]}, r"times must lie in \[0, 1\]"),
        ({"probe_times": 0.5}, "scores.probe_times must be numbers, got 0.5"),
        ({"probe_pool": "max"}, "scores.probe_pool must be one of auto, mean"),
    ],
)
def test_options_that_make_no_sense_are_one_line(held, message):
    with pytest.raises(ValueError, match=message):
        ScoreOptions(**held).check()
    with pytest.raises(ValueError, match=message):
        score_run("anywhere", ScoreOptions(**held))


class Few(Digits):
    """Digits of some classes, with another share."""

    def __init__(self, keep=lambda labels: labels >= 0, held_out_keep=None, held_out=False):
        super().__init__(held_out)
        self.kept = (keep, held_out_keep or keep)
        rows = self.kept[held_out](self.labels)
        self.images, self.labels = self.images[rows], self.labels[rows]

    def held_out_split(self):
        parts = (self, Few(*self.kept, held_out=True))
        return [(part, np.arange(len(part))) for part in parts]


def test_what_a_run_cannot_be_scored_on_is_known_before_it():
    cfg = make_plan(config(*STEPS, "--train.averages", "{slow: {decay: 0.9}}")).cfg
    check_for(ScoreOptions(), cfg, Digits())
    check_for(ScoreOptions(weights="slow"), cfg, Digits())
    first = lambda count: lambda labels: torch.arange(len(labels)) < count
    cases = [
        (ScoreOptions(samples=3), Digits(), "scores.samples must be 0 or at least 129, got 3"),
        (
            ScoreOptions(weights="fast"),
            Digits(),
            "scores.weights: expected weights of ema, model, slow, got 'fast'",
        ),
        (ScoreOptions(weights="power:0.1"), Digits(), "scores.weights power:0.1 is made from snap"),
        (
            ScoreOptions(),
            Few(held_out_keep=first(128)),
            r"at least 129 held-out images, digits has 128: scores: \{samples: 0\} leaves it out",
        ),
        (ScoreOptions(), Few(first(128), first(300)), "129 training images, digits has 128: "),
        (
            ScoreOptions(),
            Few(lambda labels: labels == 4, first(200)),
            r"expected images of at least two, digits has only class 4: scores: \{samples: 0\}",
        ),
        (
            ScoreOptions(samples=0),
            Few(lambda labels: labels == 4),
            r"a probe needs images of several classes, digits has only class 4 among .* \{probe_images",
        ),
        (ScoreOptions(samples=0), Few(held_out_keep=first(1)), "at least 2 images, digits holds"),
        (ScoreOptions(samples=0), Few(held_out_keep=first(0)), "scores need images that no run"),
        (ScoreOptions(), Unsplit(), "scores need images that no run trains on"),
    ]
    for options, data, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            check_for(options, cfg, data)
        assert "\n" not in str(caught.value)
    # left out, they are not asked for
    check_for(ScoreOptions(samples=0, probe_images=0), cfg, Few(lambda labels: labels == 4))
    cfg.model.class_dropout_prob = 0.0
    with pytest.raises(ValueError, match=r"class_dropout_prob > 0\): scores: \{probe_images: 0\}"):
        check_for(ScoreOptions(), cfg, Digits())
    check_for(ScoreOptions(probe_images=0), cfg, Digits())
    cfg.model.num_classes = 9
    with pytest.raises(ValueError, match="knows 9 classes, .* of digits have the label 9"):
        check_for(ScoreOptions(probe_images=0), cfg, Digits())


class Unsplit(TrainingData):
    """Data of which a run trains on all images."""

    name = "unsplit"
    labels = torch.arange(5)


def test_a_run_is_checked_as_its_plan_is(runs, cache, monkeypatch):
    few = Few(held_out_keep=lambda labels: torch.arange(len(labels)) < 100)
    monkeypatch.setattr(run_scores, "make_dataset", lambda cfg: few)
    with pytest.raises(ValueError, match="at least 129 held-out images, digits has 100"):
        score_run(runs["sra"], replace(OPTIONS, seed=5), cache)


@pytest.mark.parametrize("num_classes", [10, 20])
def test_a_model_that_knows_the_data_comes_to_the_floor(num_classes, runs, cache, monkeypatch):
    """Also where some classes are rare, and where the model has more of them than the data."""
    share = 0.5 ** torch.arange(10.0)

    def rare(labels):
        places = [(labels[: i + 1] == label).sum() for i, label in enumerate(labels)]
        counts = labels.bincount(minlength=10)
        return torch.tensor(
            [p <= max(1, c) for p, c in zip(places, (share * counts)[labels], strict=True)]
        )

    data = Few(rare)
    model = config(*STEPS, "--model.num_classes", str(num_classes)).model
    model.fill_in((1, 8, 8), num_classes)
    loaded = replace(load_model(str(runs["plain"])), model=model.build().eval())
    given = []

    def perfect(model, conditions, *args):
        """Training images of the classes that are asked for; noise for what it has not seen."""
        labels = conditions.numbers
        given.append(labels)
        draw = torch.Generator().manual_seed(3)
        found = []
        for label in labels:
            rows = (data.labels == label).nonzero().flatten()
            noise = torch.randn(1, 8, 8, generator=draw)
            chosen = torch.randint(max(1, len(rows)), (1,), generator=draw)
            found.append(data.images[rows[chosen]][0] if len(rows) else noise)
        return torch.stack(found)

    monkeypatch.setattr(run_scores, "generate_for", perfect)
    options = replace(OPTIONS, samples=200)
    found = run_scores._samples(loaded, data, options, cache, torch.device("cpu"))
    assert found["frechet"] < 2 * found["frechet_floor"]
    held_out = data.held_out_split()[1][0].labels.bincount(minlength=10) / len(
        Few(rare, held_out=True)
    )
    made = given[0].bincount(minlength=10) / 200
    assert len(made) == 10 and (made - held_out).abs().max() <= 1 / 200
    monkeypatch.setattr(
        what_to_sample, "labels_like", lambda count, labels: torch.arange(count) % num_classes
    )
    balanced = run_scores._samples(loaded, data, options, cache, torch.device("cpu"))
    assert balanced["frechet"] > 2 * found["frechet"]
    assert balanced["frechet_floor"] == found["frechet_floor"]


def test_numbers_beside_lists_and_what_they_are_made_of(runs, cache):
    """A study takes every number for a score: there is none of another kind."""
    found = score_run(runs["sra"], OPTIONS, cache)
    numbers = {name for name, value in found.items() if isinstance(value, int | float)}
    assert numbers == {
        *("held_out", "frechet", "frechet_floor", "label_accuracy", "classifier_accuracy"),
        *("probe", "probe_early", "align_distance", "feature_norm"),
    }
    assert found.keys() - numbers == {
        *("held_out_bins", "probe_rows", "norm_rows", "distance_rows", "made_of"),
    }


def test_a_run_that_goes_on_is_not_mixed(runs, cache, monkeypatch):
    """The student of another step than the weights that were scored."""
    load = run_scores.load_model

    def later(path, weights):
        return replace(load(path, weights), step=9 if weights == "model" else 6)

    monkeypatch.setattr(run_scores, "load_model", later)
    options = replace(OPTIONS, seed=4, held_out_images=0, samples=0, probe_images=0)
    with pytest.raises(ValueError, match="went on while it was scored: expected step 6, got 9"):
        score_run(runs["sra"], options, cache)


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="expected a run folder or a checkpoint folder, got"):
        score_run(tmp_path / "absent", OPTIONS)
    with pytest.raises(ValueError, match="holds neither an export nor a checkpoint"):
        score_run(tmp_path, OPTIONS)
