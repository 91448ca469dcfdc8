"""Sample images:  python sra_fast/sample.py --checkpoint runs/digits/000 --count 100 --out samples

Under a launcher (`deepspeed sra_fast/sample.py ...`) every process makes its share.  Interrupted, the same command goes on.
"""

import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

sys.path[0] = str(
    Path(__file__).resolve().parents[1]
)  # launched by path: import the checkout, not this folder

from sra_fast.config.schema import SampleConfig  # noqa: E402


@dataclass
class Options:
    """What to sample."""

    checkpoint: str
    """run folder, checkpoint folder, .safetensors export or reference .pt"""
    out: str = "samples"
    """folder for samples.png and samples.npz (arr_0: uint8 [N, H, W, C], arr_1: labels)"""
    count: int = 100
    """number of images"""
    classes: list[int] | None = None
    """labels to sample, in turn; default: all of the model's classes"""
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
    """path or hub id of a diffusers AutoencoderKL, for models of 4-channel latents"""
    latent_scale: float = 0.18215
    """what the latents were multiplied with for training"""
    num_heads: int | None = None
    """for a reference .pt whose width is no paper size"""
    sample: SampleConfig = field(default_factory=SampleConfig)


def prepare(options: Options):
    """``(model, interpolant, labels, VAE or None)``, everything checked and the folder made; ValueError says what is wrong."""
    import torch

    from sra_fast.checkpoint.load_model import load_model
    from sra_fast.data.vae import load_vae
    from sra_fast.sampling.generate import choose_labels
    from sra_fast.training.checks import check_sampling

    if min(options.count, options.batch, options.columns, options.grid, options.scale) < 1:
        raise ValueError("count, batch, columns, grid and scale must be at least 1")
    model, path = load_model(options.checkpoint, options.sample.weights, options.num_heads)
    check_sampling(options.sample, model)
    if options.vae is None and model.in_channels not in (1, 3):
        raise ValueError(
            f"the model makes latents of {model.in_channels} channels: give --vae to decode them"
        )
    classes = torch.tensor(options.classes if options.classes else list(range(model.num_classes)))
    if int(classes.min()) < 0 or int(classes.max()) >= model.num_classes:
        raise ValueError(f"classes must lie in [0, {model.num_classes}), got {options.classes}")
    if options.sample.guidance != 1 and model.y_embedder.dropout_prob == 0:
        raise ValueError(
            f"sample.guidance {options.sample.guidance} needs a model with a null class"
        )
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {options.out} cannot be made: {error.strerror}") from None
    labels = classes[
        choose_labels(options.count, len(classes), options.sample.labels, options.seed)
    ]
    return model, path, labels, load_vae(options.vae, model.in_channels) if options.vae else None


def identity(options: Options, model) -> dict:
    """What the images depend on, and whether they are also written as PNGs."""
    free = {
        "checkpoint",
        "out",
        "batch",
        "columns",
        "grid",
        "scale",
        "compile",
        "graph",
        "num_heads",
    }
    digest = hashlib.sha256()  # no sum: its last digit depends on the number of threads
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy())
    return {
        "weights": digest.hexdigest()[:16],
        **{key: value for key, value in asdict(options).items() if key not in free},
    }


def make_images(options: Options, model, path: str, labels, vae, device, progress):
    """``(first, end)`` image numbers -> uint8 images, on this process's device."""
    import torch

    from sra_fast.data.vae import decode
    from sra_fast.plots.report import to_uint8
    from sra_fast.sampling.generate import generate
    from sra_fast.utils.cuda_graph import Graphed

    model.to(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    vae = vae.to(device) if vae else None
    if options.compile:
        model.compile_blocks()
    call = Graphed(model) if options.graph else None

    def make(first: int, end: int):
        latents = generate(
            model,
            labels[first:end],
            options.sample,
            path,
            options.seed,
            options.batch,
            device,
            progress,
            first=first,
            call=call,
        )
        images = decode(latents, vae, options.latent_scale, options.batch, device)
        if not images.isfinite().all():
            raise ValueError(
                f"images {first} .. {end - 1} are not finite: the weights, or precision {options.precision}"
            )
        return to_uint8(images, options.sample.rounding)

    return make


def run(options: Options) -> dict | None:
    """Sample and write; the first process's summary, None on the others."""
    import torch
    from tqdm import tqdm

    from sra_fast.plots.report import save_grid
    from sra_fast.sampling.parts import join_parts, make_parts, num_parts, open_parts, open_pngs

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif options.graph:
        raise ValueError("graph needs a CUDA device")
    model, path, labels, vae = prepare(options)
    out, parts, png = (
        Path(options.out),
        Path(options.out) / "parts",
        Path(options.out) / "png" if options.png else None,
    )
    if rank >= num_parts(options.count):
        return None
    open_parts(parts, identity(options, model))
    if png:
        open_pngs(png, options.count)
    start = time.perf_counter()
    with (
        tqdm(total=-(-options.count // world), unit="image", disable=rank > 0) as bar,
        torch.no_grad(),
    ):
        make = make_images(options, model, path, labels, vae, device, bar.update)
        made = make_parts(make, options.count, parts, rank, world, png)
    rate = made / (time.perf_counter() - start)
    if rank:
        return None
    shown = join_parts(parts, options.count, labels.numpy(), out / "samples.npz", options.grid)
    save_grid(out / "samples.png", shown, min(options.columns, len(shown)), options.scale)
    return {"out": str(out), "count": options.count, "images_per_s_per_process": round(rate, 2)}


def main() -> None:
    from sra_fast.config.cli import make_parser, parse

    parser = make_parser(Options, "Sample images from a SiT or DiT.")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options, _ = parse(Options, parser)
    try:
        summary = run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        sys.exit(
            f"error: cannot write {options.out}: {error}; finished parts are kept, the same command goes on"
        )
    if summary:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
