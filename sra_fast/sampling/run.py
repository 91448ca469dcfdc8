"""The body of sample.py: check, load, sample this process's parts, join them."""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sra_fast.checkpoint.load_model import load_model
from sra_fast.config.schema import DiffusionConfig, SampleConfig
from sra_fast.data.facts import DataFacts
from sra_fast.data.prompts import as_lines
from sra_fast.data.vae import decode
from sra_fast.diffusion.samplers import Call, check_sampling
from sra_fast.evaluation.packed import ORIGIN, PROMPTS
from sra_fast.models import Conditioning, DiffusionTransformer, arguments_of
from sra_fast.plots.report import save_grid, to_uint8
from sra_fast.sampling.conditions import SampleConditions, SampledLabels
from sra_fast.sampling.decoder import Decoder, choose_decoder
from sra_fast.sampling.folder import IDENTITY, SampleFolder
from sra_fast.sampling.generate import choose_labels, generate, time_shift
from sra_fast.sampling.parts import delete_parts, first_images, join_parts, make_parts, num_parts
from sra_fast.sampling.prompts import choose_text
from sra_fast.utils.checks import require_that
from sra_fast.utils.cuda_graph import Graphed
from sra_fast.utils.files import make_folder, write_atomic, write_json
from sra_fast.utils.launcher import cuda_index

log = logging.getLogger("sra_fast")


@dataclass
class Options:
    """What to sample."""

    checkpoint: str
    """run folder, checkpoint folder, .safetensors (sharded too), Hugging Face folder, or a .pt of the
    published code or others"""
    out: str = "samples"
    """folder for samples.png, samples.npz (arr_0: uint8 [N, H, W, C], arr_1: labels, or numbers of
    the prompts), samples.json (of which model they are), and prompts.jsonl for models of text; one
    with other samples is refused"""
    count: int | None = None
    """number of images; default: one for each prompt, otherwise 100"""
    classes: list[int | str] | None = None
    """classes to sample, in turn, by number or by name; default: all of the model's"""
    prompts: list[str] | None = None
    """for models of text: a file (.txt: a prompt in each line; .json: a list of strings; .jsonl), or
    the prompts themselves; they take turns"""
    text_encoders: list[str] | None = None
    """folders of the text encoders that see the prompts; default: those of the training data, if they
    are still there"""
    text: str | None = None
    """instead of prompts, FOLDER or FOLDER:NAME: the stored features of the first captions of a data
    set's images"""
    batch: int = 64
    """images per model call (twice that with guidance)"""
    columns: int = 10
    """images per row of the grid"""
    grid: int = 100
    """images in the grid, the first ones"""
    scale: int = 1
    """enlargement of a pixel in the grid"""
    seed: int = 0
    """image i has the same noise for any batch size"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or bf16 (weights and activations; the sampler's state stays float64)"""
    compile: bool = False
    """torch.compile each block"""
    graph: bool = False
    """replay the model as a CUDA graph"""
    png: bool = False
    """also write every image to out/png/000000.png, ..."""
    vae: str | None = None
    """path or hub id of a diffusers AutoencoderKL that decodes latents; default: the one that made
    the training data, if it is still there"""
    latent_scale: float | list[float] | None = None
    """for weights of other projects (a run knows it): a latent is (z - latent_shift) *
    latent_scale, z being the VAE's; one number, or one for each channel; default: the
    scaling_factor of the VAE, divided by its latents_std if it has that"""
    latent_shift: float | list[float] | None = None
    """see latent_scale; default: the latents_mean or the shift_factor of the VAE"""
    num_heads: int | None = None
    """for weights that do not say it and whose width is no paper size"""
    sample: SampleConfig = field(default_factory=SampleConfig)


# options that change how images are made or shown, but not which images they are; and those of which
# the model, the decoder and the conditions know more
FREE_OPTIONS = {
    "checkpoint",
    "out",
    "batch",
    "columns",
    "grid",
    "scale",
    "compile",
    "graph",
    "num_heads",
    "vae",
    "prompts",
    "text_encoders",
    "text",
}


# images of classes, unless another number is asked for
DEFAULT_COUNT = 100


@dataclass
class SamplingJob:
    """A checked job.

    Attributes:
        options: as given; ``count`` is known.
        model: in eval mode, fp32, on the CPU.
        diffusion: interpolant and shift of times that it was trained with.
        conditions: of every image.
        facts: about the data that the model was trained on, if they are known.
        decoder: what turns latents into images.
        device: where this process samples.
        made_of: ``step`` and ``weights`` of the model, see ``LoadedModel``.
    """

    options: Options
    model: DiffusionTransformer
    diffusion: DiffusionConfig
    conditions: SampleConditions
    facts: DataFacts | None
    decoder: Decoder
    device: torch.device
    made_of: dict


def _choose_device(graph: bool) -> torch.device:
    """This process's GPU, or the CPU; ValueError: a CUDA graph was asked for without a GPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", cuda_index())
        torch.cuda.set_device(device)
        return device
    if graph:
        raise ValueError("graph needs a CUDA device")
    return torch.device("cpu")


def load_job(options: Options) -> SamplingJob:
    """Check the options and load the model and the VAE; nothing is written yet.

    Raises:
        ValueError: an option is out of range or does not fit the model, or the weights cannot be
            read.
    """
    device = _choose_device(options.graph)
    numbers = [options.batch, options.columns, options.grid, options.scale]
    if min(numbers) < 1 or options.count is not None and options.count < 1:
        raise ValueError("count, batch, columns, grid and scale must be at least 1")
    # the model's sizes decide what else must be given
    loaded = load_model(options.checkpoint, options.sample.weights, options.num_heads)
    model, facts = loaded.model, loaded.facts
    check_sampling(options.sample, model)
    if options.sample.guidance != 1 and not model.has_null:
        what = {"labels": "a null class", "text": "the empty prompt (model.class_dropout_prob > 0)"}
        raise ValueError(
            f"sample.guidance {options.sample.guidance} needs a model with "
            f"{what[model.conditioning]}"
        )
    if options.png and (facts is None or facts.pixels) and model.in_channels not in (1, 3, 4):
        raise ValueError(
            f"png needs images of 1, 3 or 4 channels, the model's have {model.in_channels}"
        )
    conditions = CHOICES[model.conditioning](options, model, facts, device)
    decoder = choose_decoder(
        options.vae, options.latent_scale, options.latent_shift, model.in_channels, facts
    )
    options = replace(options, count=len(conditions))
    made_of = {"step": loaded.step, "weights": loaded.weights}
    diffusion = loaded.diffusion
    return SamplingJob(options, model, diffusion, conditions, facts, decoder, device, made_of)


def _dtype(options: Options) -> torch.dtype:
    return torch.bfloat16 if options.precision == "bf16" else torch.float32


def _choose_labels(
    options: Options, model: DiffusionTransformer, facts: DataFacts | None, device: torch.device
) -> SampleConditions:
    """Labels of the asked classes, which take turns or are drawn."""
    for name in ("prompts", "text_encoders", "text"):
        value = getattr(options, name)
        require_that(
            value is None,
            f"{name} is for models of text, this one takes class labels (classes); got {value}",
        )
    names = facts.class_names if facts else None
    classes = torch.tensor(class_numbers(options.classes, model.num_classes, names))
    count = DEFAULT_COUNT if options.count is None else options.count
    turns = choose_labels(count, len(classes), options.sample.labels, options.seed)
    return SampledLabels(classes[turns], facts)


def _choose_text(
    options: Options, model: DiffusionTransformer, facts: DataFacts | None, device: torch.device
) -> SampleConditions:
    """Prompts, or captions of a data set."""
    require_that(
        options.classes is None,
        f"classes are for models of class labels, this one takes prompts; got {options.classes}",
    )
    require_that(
        options.sample.labels == "balanced",
        f"sample.labels {options.sample.labels} is for models of class labels, this one takes "
        "prompts",
    )
    return choose_text(
        options.prompts,
        options.text_encoders,
        options.text,
        options.count,
        model,
        facts,
        device,
        _dtype(options),
    )


# what a model is conditioned on -> how its conditions are chosen
CHOICES = {"labels": _choose_labels, "text": _choose_text}


def class_numbers(
    asked: list[int | str] | None, num_classes: int, names: list[str] | None
) -> list[int]:
    """Labels of the asked classes; all of them if none were asked for.

    Raises:
        ValueError: a number outside the range, or a name that the model's data do not have.
    """
    numbers = []
    for item in range(num_classes) if asked is None else asked:
        if isinstance(item, str) and item in (names or ()):
            item = names.index(item)
        if not isinstance(item, int) or not 0 <= item < num_classes:
            known = f", or names such as {', '.join(names[:3])}" if names else ""
            raise ValueError(f"classes must lie in [0, {num_classes}){known}, got {item!r}")
        if names and item < len(names) and names[item].isdecimal() and int(names[item]) != item:
            # folders 1, 2, .. are the classes 0, 1, ..
            log.warning("class %d is the one that is named %s", item, names[item])
        numbers.append(item)
    if not numbers:
        raise ValueError("classes must name at least one class, got []")
    return numbers


def identity(job: SamplingJob) -> dict:
    """What the images depend on, and whether they are also written as PNGs.

    Parts of samples with another identity are not reused.
    """
    options = job.options
    model = job.model
    # a hash and no sum: the last digit of a sum depends on the number of threads
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy())
    decisive = {key: value for key, value in asdict(options).items() if key not in FREE_OPTIONS}
    # the one that holds, given or not
    del decisive["sample"]["time_shift"]
    shift = time_shift(options.sample, job.diffusion)
    return {
        "weights": digest.hexdigest()[:16],
        # what weights do not show: the number of heads, what times are multiplied by
        "model": {"family": model.family, **arguments_of(model)},
        "path": job.diffusion.path,
        # samples of before there was one have none
        "time_shift": None if shift == 1 else shift,
        **decisive,
        # what decodes, also where it was not given
        **job.decoder.identity(),
        # names of classes may stand for other numbers
        "numbers": hashlib.sha256(job.conditions.numbers.numpy().tobytes()).hexdigest()[:16],
        **job.conditions.facts,
    }


def graphed_call(model: DiffusionTransformer) -> Call:
    """The model as a CUDA graph, whose inputs are tensors only."""
    told: Conditioning | None = None
    graphed = Graphed(lambda x, t, *tensors: model(x, t, told.with_tensors(*tensors)))

    def call(x: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        nonlocal told
        # what kind of conditioning the tensors are
        told = condition
        return graphed(x, t, *condition.tensors())

    return call


def image_maker(
    job: SamplingJob, progress: Callable[[int], object]
) -> Callable[[int, int], np.ndarray]:
    """A function from image numbers ``(first, end)`` to images, uint8 ``[end - first, H, W, C]``.

    Args:
        job: its model and VAE are moved to its device.
        progress: called with the number of images of every finished batch.
    """
    options = job.options
    device = job.device
    model = job.model.to(device, _dtype(options))
    decoder = job.decoder
    vae = decoder.vae.to(device) if decoder.vae else None
    if options.compile:
        model.compile_blocks()
    # a graph per batch size: the last batch may be smaller
    call = graphed_call(model) if options.graph else None

    def make(first: int, end: int) -> np.ndarray:
        latents = generate(
            model,
            job.conditions.read(first, end),
            options.sample,
            job.diffusion,
            options.seed,
            options.batch,
            device,
            progress,
            first=first,
            call=call,
        )
        images = decode(latents, vae, decoder.normalization, options.batch, device)
        if not images.isfinite().all():
            raise ValueError(
                f"images {first} .. {end - 1} are not finite: the weights, or precision {options.precision}"
            )
        return to_uint8(images, options.sample.rounding)

    return make


def run(job: SamplingJob) -> dict | None:
    """Sample and write.

    Returns:
        The first process's summary; None on the others.

    Raises:
        ValueError: the folder cannot be made or holds other samples, or an image is not finite.
        OSError: the disk is full. Finished parts are kept.
    """
    options = job.options
    count = len(job.conditions)
    rank = int(os.environ.get("RANK", 0))
    # more processes than parts
    if rank >= num_parts(count):
        return None

    folder = SampleFolder(make_folder(options.out), identity(job), count, options.png)
    rate = 0.0
    if folder.open():
        rate = _sample(job, folder, rank)
    elif rank == 0:
        log.warning("%s holds these samples already, none is made again", folder.npz)
        if folder.left_over():
            delete_parts(folder.parts)
    if rank:
        return None
    # from the file: parts may be gone
    shown = first_images(folder.npz, options.grid)
    columns = min(options.columns, len(shown))
    captions = job.conditions.captions(len(shown))
    save_grid(folder.path / "samples.png", shown, columns, options.scale, captions=captions)
    return {"out": str(folder.path), "count": count, "images_per_s_per_process": round(rate, 2)}


def _sample(job: SamplingJob, folder: SampleFolder, rank: int) -> float:
    """Make this process's parts; the first process writes what is made of all parts.

    Returns:
        Images per second.
    """
    options = job.options
    conditions = job.conditions
    count = len(conditions)
    world = int(os.environ.get("WORLD_SIZE", 1))
    start = time.perf_counter()
    # the bar shows process 0's share
    bar = tqdm(total=-(-count // world), unit="image", disable=rank > 0)
    with bar, torch.no_grad():
        make = image_maker(job, bar.update)
        made = make_parts(make, count, folder.parts, rank, world, folder.png, folder.finished)
    # parts of an earlier, interrupted run are not counted
    rate = made / (time.perf_counter() - start)
    if rank == 0:
        origin = {
            "checkpoint": str(Path(options.checkpoint).absolute()),
            "data": job.facts.as_json() if job.facts else None,
            "sample": asdict(options.sample),
            "seed": options.seed,
            **conditions.facts,
            **job.made_of,
            IDENTITY: folder.identity,
        }
        # before the images: they are known by it
        write_json(folder.path / ORIGIN, origin)
        _write_prompts(folder.path / PROMPTS, conditions.prompts)
        # the first process joins the parts of all
        numbers = conditions.numbers.numpy()
        join_parts(folder.parts, count, numbers, folder.npz, folder.finished)
    return rate


def _write_prompts(file: Path, prompts: list[str] | None) -> None:
    """A prompt for each image, where they are known; those of earlier samples go."""
    if prompts is None:
        file.unlink(missing_ok=True)
        return
    write_atomic(file, lambda path: path.write_text(as_lines(prompts), encoding="utf-8"))
