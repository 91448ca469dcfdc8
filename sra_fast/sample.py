"""Sample images:  python sra_fast/sample.py --checkpoint runs/digits/000 --count 100 --out samples"""
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path: import the checkout, not this folder

from sra_fast.engine.config import SampleConfig  # noqa: E402


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
    vae: str | None = None
    """path or hub id of a diffusers AutoencoderKL, for models of 4-channel latents"""
    latent_scale: float = 0.18215
    """what the latents were multiplied with for training"""
    num_heads: int | None = None
    """for a reference .pt whose width is no paper size"""
    sample: SampleConfig = field(default_factory=SampleConfig)


def load_vae(path: str):
    """diffusers' AutoencoderKL; ValueError without diffusers or without weights there."""
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError("--vae needs diffusers: pip install 'sra-fast[vae]'") from None
    try:
        return AutoencoderKL.from_pretrained(path).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"--vae {path} holds no AutoencoderKL: {str(error).splitlines()[0]}") from None


def decode(latents, vae, scale: float, batch: int, device):
    """``[N, C, h, w]`` latents -> images in [-1, 1]; without a VAE latents of 1 or 3 channels are the images."""
    import torch

    if vae is None:
        return latents
    with torch.no_grad():
        return torch.cat([vae.decode(part.to(device) / scale).sample.float().cpu() for part in latents.split(batch)])


def prepare(options: Options):
    """``(model, interpolant, labels, VAE or None)``, everything checked and the folder made; ValueError says what is wrong."""
    import torch

    from sra_fast.engine.generate import choose_labels
    from sra_fast.engine.load_model import load_model
    from sra_fast.engine.validate import check_sampling

    if min(options.count, options.batch, options.columns, options.grid, options.scale) < 1:
        raise ValueError("count, batch, columns, grid and scale must be at least 1")
    model, path = load_model(options.checkpoint, options.sample.weights, options.num_heads)
    check_sampling(options.sample, model.family)
    if options.vae is None and model.in_channels not in (1, 3):
        raise ValueError(f"the model makes latents of {model.in_channels} channels: give --vae to decode them")
    classes = torch.tensor(options.classes if options.classes else list(range(model.num_classes)))
    if int(classes.min()) < 0 or int(classes.max()) >= model.num_classes:
        raise ValueError(f"classes must lie in [0, {model.num_classes}), got {options.classes}")
    if options.sample.guidance != 1 and model.y_embedder.dropout_prob == 0:
        raise ValueError(f"sample.guidance {options.sample.guidance} needs a model with a null class")
    try:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out {options.out} cannot be made: {error.strerror}") from None
    labels = classes[choose_labels(options.count, len(classes), options.sample.labels, options.seed)]
    return model, path, labels, load_vae(options.vae) if options.vae else None


def run(options: Options) -> Path:
    """Sample and write; returns the folder."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from sra_fast.engine.files import write_atomic
    from sra_fast.engine.generate import generate
    from sra_fast.engine.report import save_grid, to_uint8

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, path, labels, vae = prepare(options)
    model.to(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    with tqdm(total=options.count, unit="image") as bar:
        latents = generate(model, labels, options.sample, path, options.seed, options.batch, device, bar.update)
    images = decode(latents, vae.to(device) if vae else None, options.latent_scale, options.batch, device)
    images, out = to_uint8(images, options.sample.rounding), Path(options.out)
    write_atomic(out / "samples.npz", lambda p: _savez(p, images, labels.numpy(), np))
    shown = images[: options.grid]
    save_grid(out / "samples.png", shown, min(options.columns, len(shown)), options.scale)
    return out


def _savez(path: Path, images, labels, np) -> None:
    with open(path, "wb") as f:  # an open file: savez would add a suffix to the name
        np.savez(f, arr_0=images, arr_1=labels)


def main() -> None:
    from sra_fast.engine.cli import make_parser, parse

    options, _ = parse(Options, make_parser(Options, "Sample images from a SiT or DiT."))
    try:
        print(run(options))
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
