"""The body of evaluate.py: open both sides, extract features, score, report what may be compared; and
how well samples fit their prompts.
"""

import json
import logging
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from sra_fast.data.prompts import digest_of
from sra_fast.evaluation.adm_suite import (
    Summary,
    comparability,
    few_images,
    has_images,
    reference_statistics,
    score,
    summarize,
    summarize_reference,
    write_reference,
)
from sra_fast.evaluation.extractors import (
    Extractor,
    feature_width,
    file_of,
    inception_extractor,
    named_extractor,
)
from sra_fast.evaluation.folder import FolderImages, open_images
from sra_fast.evaluation.inception import SOURCE
from sra_fast.evaluation.npz import NpzImages, members, save_arrays
from sra_fast.evaluation.packed import (
    ORIGIN,
    PROMPTS,
    PackedImages,
    folder_of,
    made_of,
    prompts_of,
    reference_of,
)
from sra_fast.evaluation.scores import NEIGHBOURS
from sra_fast.evaluation.text_scores import (
    TextScorer,
    check_order,
    cosines_of,
    load_text_scorer,
    text_scores,
)
from sra_fast.utils.files import write_json
from sra_fast.utils.outputs import check_output

log = logging.getLogger(__name__)


@dataclass
class Options:
    """What to score, and with which features."""

    reference: str | None = None
    """.npz with arr_0, the statistics mu, sigma, mu_s, sigma_s (an ADM reference batch), or both; or
    a folder of packed pixels, or of PNG or JPEG images; default: the held-out images of the pixels
    that the samples' model was trained on"""
    samples: str | None = None
    """.npz with arr_0: uint8 [N, H, W, C]; a folder that holds samples.npz, or PNG or JPEG images"""
    inception: str | None = None
    """path of weights-inception-2015-12-05-6726825d.pth: the features of published numbers"""
    features: str | None = None
    """instead: pixels (averaged to 8 x 8: a check without weights, no FID), a TorchScript file, or
    module:function, uint8 [N, C, H, W] -> [N, D], or that and logits [N, K]"""
    clip_score: str | None = None
    """folder of a CLIPModel: how well the samples fit their prompts (CLIP score)"""
    pick_score: str | None = None
    """folder of PickScore_v1, a CLIPModel of what people prefer: the samples' PickScore"""
    prompts: str | None = None
    """file with a prompt for each sample (.txt, .json, .jsonl); default: prompts.jsonl beside the
    samples, which sample.py has written"""
    per_image: str | None = None
    """write the cosines of all images with their prompts to this .npz: clip_score [N], pick_score
    [N]"""
    write_reference: str | None = None
    """write the statistics of the reference's images to this .npz, an FID reference for later"""
    out: str = "scores.json"
    """JSON with the scores, the counts, the extractor and what may be compared; a file of before is
    replaced"""
    batch: int = 64
    """images per call of the extractor"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one"""
    manifold_images: int | None = None
    """precision and recall of the first images of each side only; default: all, as the ADM suite"""
    cache: bool = True
    """keep the reference's statistics in a file next to it for the next time"""


@dataclass
class Inputs:
    """Both sides, opened and checked.

    Attributes:
        samples: None: only a reference is written.
        reference: None: the FID reference only has statistics.
        extractor: fits both.
    """

    samples: NpzImages | FolderImages | PackedImages | None
    reference: NpzImages | FolderImages | PackedImages | None
    extractor: Extractor


@dataclass
class TextInputs:
    """Samples, their prompts and the models that compare them.

    Attributes:
        samples: in the order of the prompts.
        prompts: one for each.
        scorers: by the names of their scores.
    """

    samples: NpzImages | FolderImages | PackedImages
    prompts: list[str]
    scorers: dict[str, TextScorer]


def _text_models(options: Options) -> dict[str, str]:
    """The folders of the models that compare samples with prompts, by their scores."""
    given = {"clip_score": options.clip_score, "pick_score": options.pick_score}
    return {name: path for name, path in given.items() if path is not None}


def _has_extractor(options: Options) -> bool:
    return options.inception is not None or options.features is not None


def _check_options(options: Options) -> None:
    text = _text_models(options)
    both = options.inception is not None and options.features is not None
    if both or not _has_extractor(options) and not text:
        raise ValueError(
            "give either features (pixels, a TorchScript file or module:function) or inception, the "
            f"path of {SOURCE}; or clip_score or pick_score, the folder of a CLIPModel"
        )
    for name in ("reference", "write_reference"):
        if getattr(options, name) is not None and not _has_extractor(options):
            raise ValueError(f"{name} is compared by features or inception, neither is given")
    if options.samples is None and (text or options.write_reference is None):
        raise ValueError("expected samples to score, or write_reference")
    for name in ("prompts", "per_image"):
        if getattr(options, name) is not None and not text:
            raise ValueError(f"{name} is for clip_score or pick_score, neither is given")
    for name in ("per_image", "write_reference"):
        file = getattr(options, name)
        if file is not None and Path(file).suffix != ".npz":
            raise ValueError(f"{name} must end in .npz, got {file}")
    if options.batch < 1:
        raise ValueError(f"batch must be at least 1, got {options.batch}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: there is no GPU")


def _check_outputs(options: Options) -> None:
    """Scoring takes minutes: an unusable file name, or one of an input, is said before."""
    inputs = {
        "samples": options.samples,
        "reference": options.reference,
        "inception": options.inception,
        "features": options.features and file_of(options.features),
        "prompts": options.prompts,
        **_text_models(options),
    }
    if options.samples is not None:
        folder = folder_of(options.samples)
        if folder is not None:
            # they tell of the samples.npz beside them
            inputs |= {f"the samples' {name}": folder / name for name in (ORIGIN, PROMPTS)}
        check_output("out", options.out, inputs, _is_report)
    if options.per_image is not None:
        check_output("per_image", options.per_image, inputs, _is_cosines)
    if options.write_reference is not None:
        # it may be someone's only copy
        if Path(options.write_reference).exists():
            raise ValueError(f"write_reference {options.write_reference} exists already")
        check_output("write_reference", options.write_reference, inputs)
    outputs = {
        name: Path(file).resolve()
        for name in ("out", "per_image", "write_reference")
        if (file := getattr(options, name)) is not None
    }
    if len({*outputs.values()}) < len(outputs):
        found = ", ".join(f"{name} {getattr(options, name)}" for name in outputs)
        raise ValueError(f"every output must have its own name, got {found}")


def _is_report(path: Path) -> bool:
    """Whether a file is what an earlier call has written to ``out``."""
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and "comparable" in held


def _is_cosines(path: Path) -> bool:
    """Whether a file is what an earlier call has written to ``per_image``."""
    try:
        found = members(str(path))
    except ValueError:
        return False
    return bool(found) and found <= {"clip_score", "pick_score"}


def _check_counts(options: Options, inputs: Inputs) -> None:
    """The balls of precision and recall need their neighbours."""
    counts = {
        "samples": inputs.samples.count if inputs.samples else None,
        "reference": inputs.reference.count if inputs.reference else None,
        "manifold_images": options.manifold_images,
    }
    for name, count in counts.items():
        if count is not None and count <= NEIGHBOURS:
            raise ValueError(f"{name} must be more than {NEIGHBOURS} images, got {count}")


def _check_widths(options: Options, inputs: Inputs) -> None:
    """Both sides must have the same number of features; nothing has been computed yet."""
    extractor = inputs.extractor
    statistics = reference_statistics(options.reference, extractor)
    widths = {}
    if inputs.samples:
        widths[options.samples] = feature_width(extractor, inputs.samples.shape)
    if statistics:
        widths[options.reference] = len(statistics.pool.mean)
    elif inputs.reference:
        widths[options.reference] = feature_width(extractor, inputs.reference.shape)
    if len(set(widths.values())) > 1:
        found = " and ".join(f"{width} for {path}" for path, width in widths.items())
        raise ValueError(f"{extractor.name} must have equally many features, got {found}")
    if statistics and options.write_reference:
        raise ValueError(
            f"write_reference needs images, but {options.reference} brings statistics already"
        )


def _device(options: Options) -> torch.device:
    on_gpu = options.device != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def open_text_inputs(options: Options) -> TextInputs | None:
    """What is scored against prompts; None: nothing.

    Raises:
        ValueError: a model or the prompts cannot be used, or they are not those of the images.
    """
    models = _text_models(options)
    if not models:
        return None
    assert options.samples is not None, "checked"
    samples = open_images(options.samples)
    check_order(samples)
    prompts = prompts_of(options.samples, options.prompts, samples.count)
    device = _device(options)
    scorers = {name: load_text_scorer(path, device) for name, path in models.items()}
    for name, scorer in scorers.items():
        cut = scorer.too_long(prompts)
        if cut:
            log.warning(
                "%d of %d prompts are longer than the %d tokens of %s, their ends are not seen; the "
                "first is %r",
                *(len(cut), len(prompts), scorer.tokens, name, prompts[cut[0]]),
            )
    return TextInputs(samples, prompts, scorers)


def open_inputs(options: Options) -> Inputs:
    """Check everything before the first feature is computed.

    Raises:
        ValueError: an option, a file or the extractor cannot be used, or the two sides do not
            belong together.
    """
    samples = open_images(options.samples) if options.samples is not None else None
    reference = open_images(options.reference) if has_images(options.reference) else None
    device = _device(options)
    # statistics alone have no shape: the extractor is tried on an image of either side
    tried = samples or reference
    if options.inception:
        extractor = inception_extractor(options.inception, device)
    elif tried is None:
        raise ValueError(f"write_reference needs images, {options.reference} has none")
    else:
        extractor = named_extractor(options.features, tried.shape, device)
    inputs = Inputs(samples, reference, extractor)
    _check_counts(options, inputs)
    _check_widths(options, inputs)
    return inputs


def run(options: Options) -> dict:
    """Score and write ``options.out``, and the FID reference if one is asked for.

    Returns:
        What was written to ``options.out``; without samples, what is known of the reference.

    Raises:
        ValueError: see ``open_inputs``, or a file turns out to be damaged.
        OSError: an output cannot be written.
    """
    _check_options(options)
    if _has_extractor(options) and options.reference is None:
        options = replace(options, reference=reference_of(options.samples))
    _check_outputs(options)
    text = open_text_inputs(options)
    report = _compare_sides(options) if _has_extractor(options) else _without_reference(options)
    if text is not None:
        _compare_with_prompts(options, text, report)
    for warning in report["warnings"]:
        log.warning("%s", warning)
    if options.samples is not None:
        with _writing(options.out):
            write_json(Path(options.out), report)
    return report


def _compare_sides(options: Options) -> dict:
    """The report on samples and reference, as far as they are there."""
    inputs = open_inputs(options)
    extractor = inputs.extractor
    reference = summarize_reference(
        options.reference, extractor, options.batch, options.manifold_images, options.cache
    )
    report = {
        "reference": {
            "path": options.reference,
            "images": reference.count,
            "shape": reference.shape,
            "statistics": "of the file" if reference.precomputed else "of its images",
        },
        "extractor": {"name": extractor.name, "dimensions": len(reference.pool.mean)},
    }
    warnings = [few_images(options.reference, reference.count, len(reference.pool.mean))]
    if options.write_reference is not None:
        with _writing(options.write_reference):
            write_reference(Path(options.write_reference), reference, extractor)
        report["written"] = options.write_reference
    if inputs.samples is not None:
        samples = summarize(inputs.samples, extractor, options.batch, options.manifold_images)
        warnings.append(few_images(options.samples, samples.count, len(samples.pool.mean)))
        report = {**_scores(inputs, samples, reference), **report, **made_of(options.samples)}
        report["samples"] = _about(options, inputs.samples)
    report["warnings"] = [warning for warning in warnings if warning]
    return report


def _about(options: Options, samples: NpzImages | FolderImages | PackedImages) -> dict:
    return {"path": options.samples, "images": samples.count, "shape": samples.shape}


def _without_reference(options: Options) -> dict:
    """The report on samples that are compared with their prompts only."""
    return {"comparable": {}, "warnings": [], **made_of(options.samples)}


def _compare_with_prompts(options: Options, text: TextInputs, report: dict) -> None:
    """Add the scores against prompts to a report."""
    cosines = cosines_of(text.scorers, text.samples, text.prompts, options.batch)
    scores = text_scores(cosines, text.scorers)
    report |= scores
    report["samples"] = _about(options, text.samples)
    report["text_models"] = {name: scorer.identity for name, scorer in text.scorers.items()}
    report["prompts_sha256"] = digest_of(text.prompts)
    for name in scores:
        scorer = text.scorers.get(name, text.scorers.get("clip_score"))
        report["comparable"][name] = (
            f"comparable for the same prompts and the same model ({scorer.identity['sha256'][:8]})"
        )
    if options.per_image is not None:
        with _writing(options.per_image):
            save_arrays(Path(options.per_image), cosines)


@contextmanager
def _writing(file: str):
    """An OSError that names the file, not the temporary one beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {file}: {error}") from None


def _scores(inputs: Inputs, samples: Summary, reference: Summary) -> dict:
    """The scores, and under ``comparable`` what each may be compared with."""
    scores = score(samples, reference, inputs.extractor.device)
    same_size = reference.shape is None or reference.shape == samples.shape
    verdicts = comparability(scores, inputs.extractor, samples, reference, same_size)
    return {**scores, "comparable": verdicts}


def table(report: dict) -> str:
    """The extractor and the models of text, then one line per score: name, value and what it may be
    compared with.
    """
    lines = []
    if "extractor" in report:
        extractor = report["extractor"]
        lines.append(f"extractor: {extractor['name']} ({extractor['dimensions']} features)")
    for name, model in report.get("text_models", {}).items():
        lines.append(f"{name} by {model['path']}")
    for name, verdict in report.get("comparable", {}).items():
        value = "-" if report[name] is None else f"{report[name]:.4f}"
        lines.append(f"{name:16}{value:>12}  {verdict}")
    if "written" in report:
        images = report["reference"]["images"]
        lines.append(f"written: {report['written']}, the statistics of {images} images")
    return "\n".join(lines)
