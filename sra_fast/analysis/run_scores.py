"""All scores of a run's weights in one file: held-out loss, samples, probes, norms and distances.

They lie in ``<run>/scores/<weights>/scores.json``, those of a checkpoint folder in
``<run>/scores/<weights>/step_XXXXXXXX/scores.json``, with ``held_out.npz`` beside them. A second
call with the same options and weights reads the file.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch

from sra_fast.analysis.alignment_rows import distance_rows, mean_of, norm_rows
from sra_fast.analysis.features import Part, check_times, choose_layers, data_of, sizes_of
from sra_fast.analysis.linear_probe import choose_pool, probe_layers, train_count
from sra_fast.checkpoint import reading
from sra_fast.checkpoint.load_model import LoadedModel, load_model
from sra_fast.checkpoint.manifest import STEP_FOLDER
from sra_fast.config.averages import check_weights
from sra_fast.config.schema import Config, DataConfig, SampleConfig
from sra_fast.data.dataset import make_dataset
from sra_fast.data.facts import differences
from sra_fast.data.training_data import TrainingData
from sra_fast.diffusion.samplers import check_sampling
from sra_fast.evaluation.classifier import (
    Recipe,
    feature_network,
    least_images,
    read_images,
    sample_scores,
)
from sra_fast.evaluation.held_out import (
    LEAST_IMAGES,
    TIME_BINS,
    HeldOutImages,
    HeldOutLoss,
    has_held_out,
    held_out_loss,
    place_of,
)
from sra_fast.sampling.conditions import conditions_like, generate_for
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import plain, require, write_json

SCORES = "scores.json"
LOSSES = "held_out.npz"
# of scores.json; files of another one are made anew
VERSION = 2
# held-out images that samples are compared with, at most
REFERENCE = 10000
# samples, and images that they are compared with, at least
LEAST_SAMPLES = least_images(Recipe().features)
# the parts of the scores
PARTS = ("held_out_images", "samples", "probe_images", "distance_images")


@dataclass
class ScoreOptions:
    """What is scored, and on how much. A part with 0 images is not made."""

    weights: str = "ema"
    """which of a run's weights"""
    seed: int = 0
    """of the choice of images, of noise and times; not the run's"""
    held_out_images: int = 2000
    """of the held-out loss, at least 2"""
    time_bins: int = TIME_BINS
    """of the held-out loss"""
    samples: int = 2000
    """generated images, with the run's own sampler; more than the classifier has features (128)"""
    probe_images: int = 2000
    """of the linear probes, a fifth of them held out"""
    probe_times: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    """times of the probes, norms and distances, in [0, 1]; 0 is data"""
    probe_pool: Literal["auto", "mean", "patch", "all"] = "mean"
    """what a probe sees, as for probe.py"""
    distance_images: int = 500
    """held-out images of the feature norms and of the distance from student to teacher"""
    batch: int = 250
    """images per model call"""

    def check(self) -> None:
        """ValueError for options of another type or out of range: a study's file may have any."""
        for item in fields(self):
            value = getattr(self, item.name)
            kind = str if item.name in ("weights", "probe_pool") else int
            if item.name == "probe_times":
                numbers = isinstance(value, list) and all(
                    isinstance(time, int | float) and not isinstance(time, bool) for time in value
                )
                require_that(numbers, f"scores.probe_times must be numbers, got {value!r}")
            else:
                # a bool is an int to isinstance
                require_that(
                    type(value) is kind,
                    f"scores.{item.name} must be {kind.__name__}, got {value!r}",
                )
        least = {"time_bins": 1, "batch": 1, "distance_images": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            require_that(
                value >= smallest, f"scores.{name} must be at least {smallest}, got {value}"
            )
        # a mean needs two images, a covariance more than it has rows, a probe some for each side
        parts = {"held_out_images": LEAST_IMAGES, "samples": LEAST_SAMPLES, "probe_images": 10}
        for name, smallest in parts.items():
            value = getattr(self, name)
            require_that(
                value == 0 or value >= smallest,
                f"scores.{name} must be 0 or at least {smallest}, got {value}",
            )
        require_that(
            any(getattr(self, name) for name in PARTS),
            f"scores need some images, got 0 of {', '.join(PARTS)}",
        )
        check_times(self.probe_times)
        known = ("auto", "mean", "patch", "all")
        require_that(
            self.probe_pool in known,
            f"scores.probe_pool must be one of {', '.join(known)}, got {self.probe_pool}",
        )


def check_for(options: ScoreOptions, cfg: Config, data: TrainingData) -> None:
    """ValueError, one line, unless a run can be scored at its end: before hours of training.

    Args:
        options: what is scored.
        cfg: of the run, with what the data fill in.
        data: its training set.
    """
    options.check()
    check_weights("scores.weights", options.weights, cfg.train)
    model = cfg.model
    shape = (model.in_channels, model.input_size, model.input_size)
    _check_data(options, data, shape, model.num_classes, model.class_dropout_prob > 0)


def _check_data(
    options: ScoreOptions,
    data: TrainingData,
    shape: tuple[int, int, int],
    num_classes: int | None,
    has_null: bool,
) -> None:
    """ValueError unless data have what is scored, of a model of such inputs and so many classes, or
    None.
    """
    where = place_of(data)
    (train, rows), (held_out, held_out_rows) = data.held_out_split()
    require_that(
        has_held_out(data) and len(held_out_rows) > 0,
        f"scores need images that no run trains on (preprocess.py --holdout), {where} has none",
    )
    largest = int(held_out.labels[held_out_rows].max())
    require_that(
        num_classes is None or largest < num_classes,
        f"the model knows {num_classes} classes, the held-out images of {where} have the label "
        f"{largest}",
    )
    if options.held_out_images:
        images = HeldOutImages(data, options.held_out_images, options.time_bins, options.seed)
        images.check(shape, num_classes)
    if options.samples:
        require("scipy", "SciPy", "eval")
        for what, count in {"training": len(rows), "held-out": len(held_out_rows)}.items():
            require_that(
                count >= LEAST_SAMPLES,
                f"the Fréchet distance of samples needs at least {LEAST_SAMPLES} {what} images, {where} "
                f"has {count}: scores: {{samples: 0}} leaves it out",
            )
        seen = train.labels[rows]
        require_that(
            len(seen.unique()) > 1,
            "samples are scored by what tells classes apart: expected images of at least two, "
            f"{where} has only class {int(seen[0])}: scores: {{samples: 0}} leaves them out",
        )
    if options.probe_images:
        require("sklearn", "scikit-learn", "eval")
        require_that(
            has_null,
            "a probe needs a model with a null class, or one that knows the empty prompt "
            "(model.class_dropout_prob > 0): scores: {probe_images: 0} leaves it out",
        )
        part = _parts(data)[0]
        seen = train.labels[part.choose(train_count(options.probe_images), options.seed)]
        require_that(
            len(seen.unique()) > 1,
            f"a probe needs images of several classes, {where} has only class {int(seen[0])} among "
            f"{len(seen)}: scores: {{probe_images: 0}} leaves it out",
        )


def score_run(
    run: Path,
    options: ScoreOptions | None = None,
    cache: Path = Path("runs/feature_networks"),
    device: torch.device | str = "cpu",
) -> dict:
    """Score a run's weights.

    Args:
        run: a run folder (its newest weights) or a checkpoint folder in one.
        options: what is scored.
        cache: folder of feature networks.
        device: where models run.

    Returns:
        What ``scores.json`` has. Scalars: ``held_out``; ``frechet``, ``frechet_floor``,
        ``label_accuracy``, ``classifier_accuracy`` (see ``sample_scores``); ``probe``, the mean
        over the times of the layer for which it is largest; ``probe_early``, that of the layers in
        the first quarter of the depth; ``feature_norm``, the mean over layers and times;
        ``align_distance``, the mean over times. Lists: ``held_out_bins``, ``probe_rows`` (time,
        layer, accuracy; layer 0 is the noisy input), ``norm_rows`` (time, layer, norm),
        ``distance_rows`` (time, distance, cosine). And ``made_of``: the step and a digest of the
        weights, the options, the ``key`` of the held-out loss (``held_out_key``), the chance of the
        probes, and what the distance is between (``align``); None for what is not made.

    Raises:
        ValueError: an option, the run or its data cannot be used; the data have no held-out share;
            a loss or a sample is not finite.
        OSError: a file cannot be written.
    """
    options = options or ScoreOptions()
    options.check()
    device = torch.device(device)
    run = Path(run)
    require_that(run.is_dir(), f"expected a run folder or a checkpoint folder, got {run}")
    loaded = load_model(str(run), options.weights)
    folder = scores_folder(run, options.weights)
    digest = _digest(loaded)
    asked = plain(asdict(options))
    held = _held(folder, asked, digest)
    if held is not None:
        return held

    data = _data_of_run(loaded, run)
    model = loaded.model
    shape = (model.in_channels, model.input_size, model.input_size)
    _check_data(options, data, shape, model.num_classes, model.has_null)
    model.to(device)
    made_of = {"version": VERSION, "step": loaded.step, "digest": digest, "options": asked}
    made_of |= dict.fromkeys(("held_out_key", "chance", "align"))
    scores: dict = {"made_of": made_of}
    loss = None
    if options.held_out_images:
        loss = _held_out(loaded, data, options, device, run)
        made_of["held_out_key"] = loss.key
        scores |= {"held_out": loss.mean(), "held_out_bins": loss.bins().tolist()}
    if options.samples:
        scores |= _samples(loaded, data, options, cache, device)
    if options.probe_images:
        found, made_of["chance"] = _probes(loaded, data, options)
        scores |= found
    if options.distance_images:
        found, made_of["align"] = _distances(loaded, data, options, run, device)
        scores |= found
    folder.mkdir(parents=True, exist_ok=True)
    # losses that an earlier call has left would pass for those of these scores
    (folder / SCORES).unlink(missing_ok=True)
    (folder / LOSSES).unlink(missing_ok=True)
    if loss is not None:
        loss.save(folder / LOSSES)
    # last: with it the scores are complete
    write_json(folder / SCORES, scores)
    return scores


def scores_folder(run: Path, weights: str) -> Path:
    """Where the scores of a run folder, or of a checkpoint folder in one, lie."""
    if STEP_FOLDER.fullmatch(run.name) and run.parent.name == reading.CHECKPOINTS:
        # nothing is written into a checkpoint
        return reading.run_folder(run) / "scores" / weights / run.name
    return run / "scores" / weights


def _digest(loaded: LoadedModel) -> str:
    """SHA-256 of the weights and of how they sample: what scores depend on besides the options."""
    told = [loaded.path, _sample_settings(loaded)]
    if loaded.diffusion.time_shift != 1:
        # scores that were made before there was a shift stay those of their runs
        told.append(loaded.diffusion.time_shift)
    digest = hashlib.sha256(json.dumps(told).encode())
    for name, value in loaded.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().cpu().numpy())
    return digest.hexdigest()


def _sample_settings(loaded: LoadedModel) -> dict:
    return (loaded.config or {}).get("sample", {})


def _held(folder: Path, asked: dict, digest: str) -> dict | None:
    """The scores of an earlier call with these options and weights, if there are any."""
    try:
        held = json.loads((folder / SCORES).read_text())
        made_of = held["made_of"]
        found = (made_of["version"], made_of["options"], made_of["digest"])
        ours = found == (VERSION, asked, digest)
        if ours and asked["held_out_images"]:
            losses = HeldOutLoss.load(folder / LOSSES)
            # the key does not depend on the weights, the mean does
            beside = (losses.key, losses.mean())
            ours = beside == (made_of["held_out_key"], held["held_out"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return held if ours else None


def _data_of_run(loaded: LoadedModel, run: Path) -> TrainingData:
    """The data that a run was trained on, and no others."""
    require_that(loaded.facts is not None, f"{run} does not say what it was trained on")
    data = data_of(DataConfig(), loaded.facts)
    cfg = Config(model=sizes_of(loaded.model), data=data)
    # no batch is made of them
    cfg.train.global_batch = 1
    found = make_dataset(cfg)
    different = differences(found.facts(), loaded.facts)
    require_that(
        not different,
        f"{run} was trained on other data than there are now at {data.path or data.name}: "
        f"{'; '.join(different)}",
    )
    return found


def _held_out(
    loaded: LoadedModel, data: TrainingData, options: ScoreOptions, device: torch.device, run: Path
) -> HeldOutLoss:
    images = HeldOutImages(data, options.held_out_images, options.time_bins, options.seed)
    about = {"run": str(run.absolute()), "weights": options.weights, "step": loaded.step}
    loss = held_out_loss(
        loaded.model, loaded.path, images, batch=options.batch, device=device, about=about
    )
    loss.check_finite(str(run))
    return loss


@torch.no_grad()
def _samples(
    loaded: LoadedModel,
    data: TrainingData,
    options: ScoreOptions,
    cache: Path,
    device: torch.device,
) -> dict:
    """Scores of samples, made as the run's own settings say."""
    try:
        sample = SampleConfig(**_sample_settings(loaded))
    except TypeError as error:
        raise ValueError(
            f"the sample settings of the run are of another version: {error}"
        ) from None
    check_sampling(sample, loaded.model)
    network = feature_network(data, cache, device)
    (train, rows), (held_out, held_out_rows) = data.held_out_split()
    # what they are compared with has these classes or captions, and as often: a model that knows the
    # data well comes to the floor. Random labels would make the scores vary more
    conditions, labels = conditions_like(held_out, held_out_rows, options.samples)
    settings = (sample, loaded.diffusion, options.seed, options.batch, device)
    made = generate_for(loaded.model, conditions, range(options.samples), *settings)
    if data.facts().pixels:
        # an image has no values beyond these
        made = made.clamp(-1, 1)
    unseen, _ = read_images(held_out, held_out_rows, REFERENCE, options.seed)
    seen, _ = read_images(train, rows, options.samples, options.seed)
    return sample_scores(network, made, labels, unseen, seen)


def _parts(data: TrainingData) -> tuple[Part, Part]:
    (train, rows), (held_out, held_out_rows) = data.held_out_split()
    return Part(train, rows, 0), Part(held_out, held_out_rows, 1)


def _probes(loaded: LoadedModel, data: TrainingData, options: ScoreOptions) -> tuple[dict, float]:
    """The scores, and the accuracy of always naming the most frequent class."""
    model = loaded.model
    _, patches, width = model.pos_embed.shape
    probed = probe_layers(
        model,
        loaded.path,
        _parts(data),
        options.probe_times,
        choose_layers(None, model.depth),
        how=choose_pool(options.probe_pool, patches, width),
        count=options.probe_images,
        draws=1,
        seed=options.seed,
        batch=options.batch,
    )
    means = {
        layer: mean_of(row["accuracy"] for row in probed.rows if row["layer"] == layer)
        for layer in range(1, model.depth + 1)
    }
    early = range(1, max(1, math.ceil(model.depth / 4)) + 1)
    scores = {
        "probe": max(means.values()),
        "probe_early": max(means[layer] for layer in early),
        "probe_rows": probed.rows,
    }
    return scores, probed.chance


def _distances(
    loaded: LoadedModel,
    data: TrainingData,
    options: ScoreOptions,
    run: Path,
    device: torch.device,
) -> tuple[dict, dict]:
    """The scores, and what the distance is between."""
    images = _parts(data)[1].read(options.distance_images, options.seed)
    shared = (images, options.probe_times, options.batch)
    norms = norm_rows(loaded.model, loaded.path, *shared)
    student, teacher = (load_model(str(run), name) for name in ("model", "ema"))
    for other in (student, teacher):
        # a run that goes on has newer weights every now and then
        require_that(
            other.step == loaded.step,
            f"{run} went on while it was scored: expected step {loaded.step}, got {other.step}; "
            "score one of its checkpoints",
        )
        other.model.to(device)
    align, distances = distance_rows(student, teacher, *shared, seed=options.seed)
    scores = {
        "feature_norm": mean_of(row["norm"] for row in norms),
        "norm_rows": norms,
        "align_distance": mean_of(row["distance"] for row in distances),
        "distance_rows": distances,
    }
    return scores, align
