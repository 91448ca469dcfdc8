"""The body of evaluate.py: open both sides, extract features, score, report what may be compared."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from sra_fast.evaluation.adm_suite import comparability, score, summarize, summarize_reference
from sra_fast.evaluation.extractors import (
    Extractor,
    inception_extractor,
    named_extractor,
    try_on_image,
)
from sra_fast.evaluation.npz import NpzImages, members
from sra_fast.evaluation.scores import NEIGHBOURS
from sra_fast.utils.files import write_json


@dataclass
class Options:
    """What to score, and with which features."""

    samples: str
    """.npz with arr_0: uint8 [N, H, W, C]"""
    reference: str
    """.npz with arr_0, the statistics mu, sigma, mu_s, sigma_s (an ADM reference batch), or both"""
    inception: str | None = None
    """path of weights-inception-2015-12-05-6726825d.pth: the features of published numbers"""
    features: str | None = None
    """instead: a TorchScript file or module:function, uint8 [N, C, H, W] -> [N, D], or that and logits [N, K]"""
    out: str = "scores.json"
    """JSON with the scores, the counts, the extractor and what may be compared"""
    batch: int = 64
    """images per call of the extractor"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    manifold_images: int | None = None
    """precision and recall of the first images of each side only; default: all, as the ADM suite"""
    cache: bool = True
    """keep the reference's statistics in a file next to it for the next time"""


def _check_options(options: Options) -> None:
    if (options.inception is None) == (options.features is None):
        raise ValueError(
            "give either inception (a path of weights) or features (a TorchScript file or module:function)"
        )
    if options.batch < 1:
        raise ValueError(f"batch must be at least 1, got {options.batch}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is no GPU")
    # scoring takes minutes: an unusable file name is said before
    out = Path(options.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"out must be a file in a folder that exists, got {options.out}")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"out {options.out} cannot be written")


def open_inputs(options: Options) -> tuple[NpzImages, NpzImages | None, Extractor]:
    """Check everything before the first feature is computed.

    Returns:
        The samples; the images of the FID reference, or None if it only has statistics; the
        extractor.

    Raises:
        ValueError: an option, a file or the extractor cannot be used.
    """
    _check_options(options)
    samples = NpzImages(options.samples)
    has_images = "arr_0" in members(options.reference)
    reference = NpzImages(options.reference) if has_images else None
    # the balls of precision and recall need this many neighbours
    counts = {
        "samples": samples.count,
        "reference": reference.count if reference else None,
        "manifold_images": options.manifold_images,
    }
    for name, count in counts.items():
        if count is not None and count <= NEIGHBOURS:
            raise ValueError(f"{name} must be more than {NEIGHBOURS} images, got {count}")

    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if options.inception:
        return samples, reference, inception_extractor(options.inception, device)
    extractor = named_extractor(options.features, samples.shape, device)
    # it was tried on an image of the samples' size
    if reference and reference.shape != samples.shape:
        try_on_image(extractor, reference.shape)
    return samples, reference, extractor


def run(options: Options) -> dict:
    """Score and write ``options.out``.

    Returns:
        What was written.

    Raises:
        ValueError: see ``open_inputs``, or a file turns out to be damaged.
        OSError: ``options.out`` cannot be written.
    """
    images, reference_images, extractor = open_inputs(options)
    reference = summarize_reference(
        options.reference, extractor, options.batch, options.manifold_images, options.cache
    )
    samples = summarize(images, extractor, options.batch, options.manifold_images)
    scores = score(samples, reference, extractor.device)

    reference_shape = reference_images.shape if reference_images else None
    same_size = reference_shape in (None, images.shape)
    report = {
        **scores,
        "comparable": comparability(scores, extractor, samples, reference, same_size),
        "samples": {"path": options.samples, "images": samples.count, "shape": images.shape},
        "reference": {
            "path": options.reference,
            "images": reference.count,
            "shape": reference_shape,
            "statistics": "of the file" if reference.precomputed else "of its images",
        },
        "extractor": {"name": extractor.name, "dimensions": len(samples.pool.mean)},
    }
    write_json(Path(options.out), report)
    return report


def table(report: dict) -> str:
    """One line per score: name, value and what it may be compared with."""
    lines = []
    for name, verdict in report["comparable"].items():
        value = "-" if report[name] is None else f"{report[name]:.4f}"
        lines.append(f"{name:16}{value:>12}  {verdict}")
    return "\n".join(lines)
