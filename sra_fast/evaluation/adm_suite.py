"""Samples against a reference batch, both ``.npz``: the ADM suite's five scores, and which of them may be compared."""

import glob
import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sra_fast.evaluation.extractors import Extractor
from sra_fast.evaluation.inception import POOL, SPATIAL
from sra_fast.evaluation.npz import NpzImages, members, read_statistics
from sra_fast.evaluation.scores import (
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    precision_recall,
)
from sra_fast.utils.files import write_atomic

log = logging.getLogger(__name__)

SAMPLES = 50_000  # of published numbers
CACHED = ".stats.npz"
COMPARABLE = "comparable with published ADM-suite numbers for the same reference file"
LACKING = {
    "sfid": "the extractor or the reference file has no spatial features",
    "inception_score": "the extractor gives no logits",
    "precision": "the reference file holds no images",
    "recall": "the reference file holds no images",
}


@dataclass
class Summary:
    """What the scores need of one side; None where it has none."""

    count: int = 0
    """images"""
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    inception_score: float | None = None
    features: Tensor | None = None
    """``[<= count, D]`` fp32 on the CPU, of the first images, for precision and recall"""
    precomputed: bool = False
    """the Gaussians come from the file, not from its images"""


def summarize(
    images: NpzImages, extractor: Extractor, batch: int, keep: int | None = None
) -> Summary:
    """One pass over ``images``, ``batch`` at a time, with a progress bar; features of the first ``keep`` are kept (None: all)."""
    pool, spatial, score, kept = Moments(), Moments(), InceptionScore(), []
    keep = images.count if keep is None else keep
    with (
        torch.inference_mode(),
        tqdm(total=images.count, unit="image", desc=Path(images.path).name) as bar,
    ):
        for part in images.batches(batch):
            features = extractor(torch.from_numpy(part).permute(0, 3, 1, 2).contiguous())
            kept.append(features.pool[: max(0, keep - pool.count)].float().cpu())
            pool.update(features.pool)
            if features.spatial is not None:
                spatial.update(features.spatial)
            if features.logits is not None:
                score.update(features.logits)
            bar.update(len(part))
    return Summary(
        images.count,
        pool.gaussian(),
        spatial.gaussian() if spatial.count else None,
        score.compute() if features.logits is not None else None,
        torch.cat(kept),
    )


def _cache_path(reference: str, extractor: Extractor, keep: int | None) -> Path:
    """Where the reference's summary is kept; another name once the file has changed."""
    path, stat = Path(reference), Path(reference).stat()
    stamp = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} {keep}".encode()).hexdigest()[:8]
    return path.with_name(f"{path.name}.{extractor.name}.{stamp}{CACHED}")


def _load(path: Path) -> Summary | None:
    """A summary written by ``_save``; None, and one warning, if it cannot be read."""
    if not path.exists():
        return None
    try:
        pool, spatial = read_statistics(str(path))
        with np.load(path) as held:
            return Summary(
                int(held["count"]), pool, spatial, features=torch.from_numpy(held["features"])
            )
    except (ValueError, KeyError, OSError) as error:
        log.warning("%s is ignored: %s", path, error)
        return None


def _save(path: Path, summary: Summary) -> None:
    """Write, and remove what was kept for an earlier state of the file; a warning where the folder cannot be written."""
    arrays = {"count": summary.count, "features": summary.features.numpy()}
    for suffix, gaussian in (("", summary.pool), ("_s", summary.spatial)):
        if gaussian is not None:
            arrays |= {"mu" + suffix: gaussian.mean, "sigma" + suffix: gaussian.cov}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as f:  # an open file: savez would add a suffix to the name
            np.savez(f, **arrays)

    try:
        write_atomic(path, write)
        others = glob.escape(path.name.removesuffix(CACHED)[:-8]) + "*" + CACHED
        for old in set(path.parent.glob(others)) - {path}:
            old.unlink()
    except OSError as error:
        log.warning("the reference's statistics are not kept: %s", error)


def summarize_reference(
    path: str, extractor: Extractor, batch: int, keep: int | None = None, cache: bool = True
) -> Summary:
    """A reference batch: its own statistics where it brings any and they are Inception's, the rest from its images.

    What comes from images is kept beside the file, under the extractor's name, for the next time.

    Raises:
        ValueError: neither images nor statistics that fit the extractor.
    """
    pool, spatial = read_statistics(path) if extractor.inception else (None, None)
    for gaussian, size in ((pool, POOL), (spatial, SPATIAL)):
        if gaussian is not None and len(gaussian.mean) != size:
            raise ValueError(
                f"{path}: statistics of {size} Inception features expected, got {len(gaussian.mean)}"
            )
    summary = Summary()
    if "arr_0" in members(path) or pool is None:
        images = NpzImages(path)
        kept = _cache_path(path, extractor, keep)
        summary = _load(kept) if cache else None
        if summary is None:
            summary = summarize(images, extractor, batch, keep)
            if cache:
                _save(kept, summary)
    if pool is not None:
        summary = replace(summary, pool=pool, spatial=spatial, precomputed=True)
    return summary


def _distance(a: Gaussian | None, b: Gaussian | None) -> float | None:
    return None if a is None or b is None else frechet_distance(a, b)


def score(samples: Summary, reference: Summary, device: torch.device) -> dict[str, float | None]:
    """The five scores; None for one that lacks an input."""
    precision, recall = None, None
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
    """For every score whether it may stand beside published ones, or why not."""
    common, against = [], []
    if not extractor.official:
        common.append("other Inception weights" if extractor.inception else "other extractor")
    if samples.count != SAMPLES:
        common.append(f"{samples.count} samples instead of {SAMPLES}")
    if not reference.precomputed:
        against.append("the reference file brings no statistics of its whole data set")
    if not same_size:
        against.append("samples and reference images differ in size")
    partial = reference.features is not None and (
        len(reference.features) < reference.count or len(samples.features) < samples.count
    )
    verdicts = {}
    for name, value in scores.items():
        reasons = common + (against if name != "inception_score" else [])
        if partial and name in ("precision", "recall"):
            reasons.append("not all images")
        if value is None:
            verdicts[name] = f"not computed: {LACKING[name]}"
        else:
            verdicts[name] = f"not comparable: {'; '.join(reasons)}" if reasons else COMPARABLE
    return verdicts
