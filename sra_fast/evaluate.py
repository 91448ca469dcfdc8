"""Score samples:  python sra_fast/evaluate.py --samples samples.npz --reference ref.npz --inception weights.pth"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # launched by path: import the checkout, not this folder


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
    """keep the reference's statistics beside its file for the next time"""


def prepare(options: Options):
    """``(sample images, reference images or None, extractor)``, everything checked; ValueError says what is wrong."""
    import torch

    from sra_fast.evaluation.extractors import inception_extractor, named_extractor, probe
    from sra_fast.evaluation.npz import NpzImages, members
    from sra_fast.evaluation.scores import NEIGHBOURS

    if (options.inception is None) == (options.features is None):
        raise ValueError(
            "give either inception (a path of weights) or features (a TorchScript file or module:function)"
        )
    if options.batch < 1:
        raise ValueError(f"batch must be at least 1, got {options.batch}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is no GPU")
    if Path(options.out).is_dir() or not Path(options.out).parent.is_dir():
        raise ValueError(f"out must be a file in a folder that exists, got {options.out}")
    if not os.access(Path(options.out).parent, os.W_OK):
        raise ValueError(f"out {options.out} cannot be written")
    samples = NpzImages(options.samples)
    reference = NpzImages(options.reference) if "arr_0" in members(options.reference) else None
    used = {
        "samples": samples.count,
        "reference": reference and reference.count,
        "manifold_images": options.manifold_images,
    }
    for name, count in used.items():
        if count is not None and count <= NEIGHBOURS:
            raise ValueError(f"{name} must be more than {NEIGHBOURS} images, got {count}")
    device = torch.device(
        "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    )
    if options.inception:
        return samples, reference, inception_extractor(options.inception, device)
    extractor = named_extractor(options.features, samples.shape, device)
    if reference and reference.shape != samples.shape:
        probe(extractor, reference.shape)
    return samples, reference, extractor


def run(options: Options) -> dict:
    """Score and write; returns what was written."""
    from sra_fast.evaluation.adm_suite import comparability, score, summarize, summarize_reference
    from sra_fast.utils.files import write_json

    images, other, extractor = prepare(options)
    shape = other.shape if other else None
    reference = summarize_reference(
        options.reference, extractor, options.batch, options.manifold_images, options.cache
    )
    samples = summarize(images, extractor, options.batch, options.manifold_images)
    scores = score(samples, reference, extractor.device)
    report = {
        **scores,
        "comparable": comparability(
            scores, extractor, samples, reference, shape in (None, images.shape)
        ),
        "samples": {"path": options.samples, "images": samples.count, "shape": images.shape},
        "reference": {
            "path": options.reference,
            "images": reference.count,
            "shape": shape,
            "statistics": "of the file" if reference.precomputed else "of its images",
        },
        "extractor": {"name": extractor.name, "dimensions": len(samples.pool.mean)},
    }
    write_json(Path(options.out), report)
    return report


def main() -> None:
    from sra_fast.config.cli import make_parser, parse

    options, _ = parse(
        Options,
        make_parser(Options, "FID, sFID, Inception score, precision and recall of samples."),
    )
    try:
        report = run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(f"error: cannot write {options.out}: {error}")
    for name, verdict in report["comparable"].items():
        value = report[name]
        print(f"{name:16}{'-' if value is None else f'{value:.4f}':>12}  {verdict}")


if __name__ == "__main__":
    main()
