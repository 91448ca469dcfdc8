"""Samples against an FID reference: the ADM suite's five scores, and which of them may be compared."""

import glob
import hashlib
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sra_fast.evaluation.extractors import Extractor
from sra_fast.evaluation.folder import FolderImages, open_images
from sra_fast.evaluation.inception import POOL, SPATIAL
from sra_fast.evaluation.npz import (
    NpzImages,
    Statistics,
    members,
    read_statistics,
    save_arrays,
    statistics_arrays,
)
from sra_fast.evaluation.packed import PackedImages
from sra_fast.evaluation.scores import (
    Gaussian,
    InceptionScore,
    RunningGaussian,
    frechet_distance,
    precision_recall,
)

log = logging.getLogger(__name__)

# how many samples published numbers are computed from
SAMPLES = 50_000
CACHED = ".stats.npz"
COMPARABLE = "comparable with published ADM-suite numbers for the same reference file"
# why a score could not be computed
LACKING = {
    "sfid": "the extractor or the reference file has no spatial features",
    "inception_score": "the extractor gives no logits",
    "precision": "the reference file holds no images",
    "recall": "the reference file holds no images",
}


@dataclass
class Summary:
    """What the scores need of one side. A field is None if the side does not have it."""

    count: int = 0
    """images"""
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    inception_score: float | None = None
    features: Tensor | None = None
    """``[<= count, D]`` fp32 on the CPU, of the first images, for precision and recall"""
    precomputed: bool = False
    """the Gaussians come from the file, not from its images"""
    written_here: bool = False
    """by ``evaluate.py``, not by the ADM suite"""
    shape: list[int] | None = None
    """[H, W, C] of the images"""


def summarize(
    images: NpzImages | FolderImages | PackedImages,
    extractor: Extractor,
    batch: int,
    keep: int | None = None,
) -> Summary:
    """One pass over the images, with a progress bar.

    Args:
        images: all of them are used for the Gaussians and the Inception score.
        extractor: what computes the features.
        batch: images per call of the extractor.
        keep: features of this many first images are kept for precision and recall; None: of all.

    Raises:
        ValueError: the file is damaged, or the extractor's output is not usable.
    """
    pool = RunningGaussian()
    spatial = RunningGaussian()
    score = InceptionScore()
    kept = []
    keep = images.count if keep is None else keep
    bar = tqdm(total=images.count, unit="image", desc=Path(images.path).name)
    with torch.inference_mode(), bar:
        for part in images.batches(batch):
            # [N, H, W, C] -> [N, C, H, W]
            features = extractor(torch.from_numpy(part).permute(0, 3, 1, 2).contiguous())
            still_wanted = max(0, keep - pool.count)
            kept.append(features.pool[:still_wanted].float().cpu())
            pool.update(features.pool)
            if features.spatial is not None:
                spatial.update(features.spatial)
            if features.logits is not None:
                score.update(features.logits)
            bar.update(len(part))
    return Summary(
        count=images.count,
        pool=pool.gaussian(),
        spatial=spatial.gaussian() if spatial.count else None,
        inception_score=score.compute() if features.logits is not None else None,
        features=torch.cat(kept),
        shape=images.shape,
    )


def _cache_path(
    images: NpzImages | FolderImages | PackedImages, extractor: Extractor, keep: int | None
) -> Path:
    """Where a reference's summary is cached, beside it. The name changes when the images do."""
    stamp = hashlib.sha256(f"{images.state()} {keep}".encode()).hexdigest()[:8]
    # abspath: the folder may be given as `.`
    path = Path(os.path.abspath(images.path))
    return path.with_name(f"{path.name}.{extractor.name}.{stamp}{CACHED}")


def _load_cached(path: Path) -> Summary | None:
    """A summary that ``_save_cached`` wrote; None if there is none, or if it cannot be read (a warning)."""
    if not path.exists():
        return None
    try:
        held = read_statistics(str(path))
        with np.load(path) as arrays:
            features = torch.from_numpy(arrays["features"])
        return Summary(held.count, held.pool, held.spatial, features=features)
    except Exception as error:
        # numpy and zipfile raise many types, also of files that decompress and are damaged
        log.warning("%s is ignored: %s", path, " ".join(str(error).split()))
        return None


def _save_cached(path: Path, summary: Summary) -> None:
    """Cache a summary and remove those of earlier states of the file. A folder that is read-only gives a warning."""
    statistics = Statistics(summary.pool, summary.spatial, count=summary.count)
    features = summary.features.numpy()
    try:
        save_arrays(path, {**statistics_arrays(statistics), "features": features})
        # the same name up to the eight digits of the stamp
        stem = path.name.removesuffix(CACHED)[:-8]
        for old in path.parent.glob(glob.escape(stem) + "*" + CACHED):
            if old != path:
                old.unlink()
    except OSError as error:
        log.warning("the reference's statistics are not kept: %s", error)


def has_images(reference: str) -> bool:
    """Whether an FID reference is a folder, or a file with images; ValueError if it is unreadable."""
    return Path(reference).is_dir() or "arr_0" in members(reference)


def reference_statistics(path: str, extractor: Extractor) -> Statistics | None:
    """The statistics that an FID reference brings for this extractor; None: its images are needed.

    Statistics without the name of an extractor are those of the ADM suite's Inception.

    Raises:
        ValueError: they belong to another extractor, and there are no images to compute from, or
            their width is not Inception's.
    """
    held = None if Path(path).is_dir() else read_statistics(path)
    if held is None:
        return None
    width = len(held.pool.mean)
    if held.extractor is not None:
        if held.extractor != extractor.name:
            raise ValueError(
                f"{path} has statistics of the extractor {held.extractor}, "
                f"expected those of {extractor.name}"
            )
        return held
    if extractor.inception:
        for gaussian, size in ((held.pool, POOL), (held.spatial, SPATIAL)):
            if gaussian is not None and len(gaussian.mean) != size:
                raise ValueError(
                    f"{path}: statistics of {size} Inception features expected, "
                    f"got {len(gaussian.mean)}"
                )
        return held
    if not has_images(path):
        raise ValueError(
            f"{path} has no images, only statistics of {width} features of the ADM suite's "
            f"Inception; expected images or statistics for the extractor {extractor.name}"
        )
    return None


def summarize_reference(
    path: str, extractor: Extractor, batch: int, keep: int | None = None, cache: bool = True
) -> Summary:
    """The summary of an FID reference.

    The file's own statistics are used if they belong to the extractor. The rest comes from its
    images. What was computed from images is cached in a file next to the reference, under the
    extractor's name.

    Args:
        path: ``.npz`` with images, statistics, or both; or a folder of images.
        extractor, batch, keep: see ``summarize``.
        cache: read and write the cache.

    Raises:
        ValueError: there are neither images nor statistics that fit the extractor.
    """
    statistics = reference_statistics(path, extractor)
    summary = Summary()
    if statistics is None or has_images(path):
        images = open_images(path)
        cached = _cache_path(images, extractor, keep)
        summary = _load_cached(cached) if cache else None
        if summary is None:
            summary = summarize(images, extractor, batch, keep)
            if cache:
                _save_cached(cached, summary)
        # a cached one does not say it
        summary = replace(summary, shape=images.shape)
    if statistics is None:
        return summary
    # the file's own statistics are of the whole data set, its images often of a part
    return replace(
        summary,
        count=summary.count or statistics.count,
        shape=summary.shape or statistics.shape,
        pool=statistics.pool,
        spatial=statistics.spatial,
        precomputed=True,
        written_here=statistics.extractor is not None,
    )


def write_reference(path: Path, summary: Summary, extractor: Extractor) -> None:
    """Write the statistics of a summary as an FID reference that names its extractor.

    The file has ``mu``, ``sigma``, with Inception also ``mu_s``, ``sigma_s``, and ``extractor``,
    ``count`` and ``shape``. OSError: the disk is full.
    """
    statistics = Statistics(
        summary.pool, summary.spatial, extractor.name, summary.count, summary.shape
    )
    save_arrays(path, statistics_arrays(statistics))


def _distance(a: Gaussian | None, b: Gaussian | None) -> float | None:
    return None if a is None or b is None else frechet_distance(a, b)


def score(samples: Summary, reference: Summary, device: torch.device) -> dict[str, float | None]:
    """The five scores, None for one whose input is missing; ``device`` computes the distances between features."""
    # a file that only has statistics gives no manifold
    precision = None
    recall = None
    if reference.features is not None:
        precision, recall = precision_recall(
            reference.features.to(device), samples.features.to(device)
        )
    return {
        "fid": _distance(samples.pool, reference.pool),
        "sfid": _distance(samples.spatial, reference.spatial),
        "inception_score": samples.inception_score,
        "precision": precision,
        "recall": recall,
    }


def comparability(
    scores: dict, extractor: Extractor, samples: Summary, reference: Summary, same_size: bool
) -> dict[str, str]:
    """Whether each score may be compared with published ones, or why not.

    Args:
        scores: of ``score``.
        extractor, samples, reference: what they were computed from.
        same_size: samples and reference images have the same height, width and channels.
    """
    # reasons that hold for every score
    common = []
    if not extractor.official:
        common.append("other Inception weights" if extractor.inception else "other extractor")
    if samples.count != SAMPLES:
        common.append(f"{samples.count} samples instead of {SAMPLES}")

    # reasons that hold for scores against the reference: all but the Inception score
    against_reference = []
    if reference.written_here:
        against_reference.append("the reference file was not written by the ADM suite")
    elif not reference.precomputed:
        against_reference.append("the reference file brings no statistics of its whole data set")
    if reference.shape is None:
        # the ADM suite's files have images, those of other tools statistics alone
        against_reference.append(
            "the reference file does not say which images its statistics are of"
        )
    elif not same_size:
        against_reference.append("samples and reference images differ in size")

    # precision and recall may use fewer images than the file has
    partial = reference.features is not None and (
        len(reference.features) < reference.count or len(samples.features) < samples.count
    )
    verdicts = {}
    for name, value in scores.items():
        if value is None:
            verdicts[name] = f"not computed: {LACKING[name]}"
            continue
        reasons = [*common]
        if name != "inception_score":
            reasons += against_reference
        if partial and name in ("precision", "recall"):
            reasons.append("not all images")
        verdicts[name] = f"not comparable: {'; '.join(reasons)}" if reasons else COMPARABLE
    return verdicts


def few_images(name: str, count: int, width: int) -> str | None:
    """A warning if there are too few images for a covariance of full rank, else None."""
    if not 0 < count <= width:
        return None
    return (
        f"{name}: {count} images for {width} features, so that the covariance is singular and the "
        "Fréchet distance depends on the number of images"
    )
