"""What preprocess.py prints at the end."""

from sra_fast.data.batch import Report
from sra_fast.data.latents import PLAUSIBLE_DEVIATION
from sra_fast.data.normalization import OF_LATENTS, Normalization
from sra_fast.data.packed import read_index
from sra_fast.data.writer import Finished, PackingJob


def summary(job: PackingJob, finished: Finished) -> list[str]:
    """What was made, and what a user should know of it."""
    recipe = job.recipe
    if recipe["kind"] == "text":
        return _text_lines(job, finished)
    classes = recipe["num_classes"]
    kind = recipe["kind"]
    shape = " x ".join(map(str, recipe["shape"]))
    lines = [
        f"{job.out}: {finished.images} images of {classes} class{'es' if classes > 1 else ''}, "
        f"{kind} {shape}"
    ]
    # what was done to the images was said of the data set
    if kind != "features":
        lines += getattr(job.source, "notes", [])
        report: Report = finished.report
        lines += report.lines()
    lines += _statistics_lines(recipe, finished.statistics)
    return lines


def _text_lines(job: PackingJob, finished: Finished) -> list[str]:
    index = read_index(job.out)
    pooled = f", pooled {index['pooled']}" if index["pooled"] else ""
    masked = ", masked" if index["masked"] else ""
    classes = [encoder["class"] for encoder in index["encoders"] or []]
    low, high = min(finished.statistics["std"]), max(finished.statistics["std"])
    return [
        f"{job.out}: {finished.images} captions of {index['num_classes'] * index['copies']} images, "
        f"text {index['tokens']} x {index['width']}{pooled}{masked}",
        *getattr(job.source, "notes", []),
        *finished.report.lines(),
        f"text features of {', '.join(classes) or 'an encoder that is not known'}: deviations "
        f"{low:.4g} to {high:.4g}",
    ]


def _statistics_lines(recipe: dict, statistics: dict) -> list[str]:
    numbers = lambda values: ", ".join(f"{value:.4g}" for value in values)
    mean = numbers(statistics["mean"])
    std = numbers(statistics["std"])
    if recipe["kind"] == "features":
        # of hundreds of channels: from the least to the most
        low, high = min(statistics["std"]), max(statistics["std"])
        return [f"features of {recipe['model']['class']}: deviations {low:.4g} to {high:.4g}"]
    if recipe["kind"] == "pixels":
        return [f"pixels 0 to 255: mean {mean}; standard deviation {std}"]
    lines = [f"latents: mean {mean}; standard deviation {std}"]
    vae = recipe["vae"] or {}
    if "scaling_factor" not in vae:
        return lines
    if all(vae.get(name) for name in OF_LATENTS):
        return [*lines, *_normalized_lines(vae, statistics)]
    scale = vae["scaling_factor"]
    # as a whole: the root of the mean variance
    deviation = (sum(value**2 for value in statistics["std"]) / len(statistics["std"])) ** 0.5
    if deviation == 0:
        return [*lines, "warning: all latents are equal"]
    lines.append(
        f"times the VAE's scaling_factor {scale:g}: standard deviation {scale * deviation:.3g}"
    )
    low, high = PLAUSIBLE_DEVIATION
    if not low <= scale * deviation <= high:
        lines.append(
            "warning: a model expects about 1; train with "
            f"--data.latent_scale {1 / deviation:.4g}, or with --data.latent_statistics true"
        )
    return lines


def _normalized_lines(vae: dict, statistics: dict) -> list[str]:
    """About latents of a VAE that has statistics of its channels."""
    std = statistics["std"]
    scaled = Normalization.of_vae(vae, len(std), "the VAE's config.json").deviations(std)
    lines = [
        f"divided by the VAE's latents_std, times its scaling_factor {vae['scaling_factor']:g}: "
        f"standard deviations {min(scaled):.3g} to {max(scaled):.3g}"
    ]
    low, high = PLAUSIBLE_DEVIATION
    if not low <= min(scaled) <= max(scaled) <= high:
        lines.append("warning: a model expects about 1; train with --data.latent_statistics true")
    return lines
