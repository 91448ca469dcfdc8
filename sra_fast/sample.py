"""Sample images:  python sra_fast/sample.py --checkpoint runs/digits/000 --count 100 --out samples"""
import sys
from dataclasses import dataclass, field
from pathlib import Path

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
    scale: int = 1
    """enlargement of a pixel in the grid"""
    seed: int = 0
    """image i has the same noise for any batch size"""
    precision: str = "fp32"
    """fp32, or bf16 (weights and activations; the sampler's state stays float64)"""
    vae: str | None = None
    """path or hub id of a diffusers AutoencoderKL, for models of 4-channel latents"""
    latent_scale: float = 0.18215
    """what the latents were multiplied with for training"""
    num_heads: int | None = None
    """for a reference .pt whose width is no paper size"""
    sample: SampleConfig = field(default_factory=SampleConfig)


def decode(latents, vae: str | None, scale: float, batch: int, device):
    """``[N, C, h, w]`` latents -> images in [-1, 1]; without a VAE latents of 1 or 3 channels are the images."""
    import torch

    if vae is None:
        return latents
    from diffusers import AutoencoderKL  # the `vae` extra

    model = AutoencoderKL.from_pretrained(vae).to(device).eval()
    with torch.no_grad():
        return torch.cat([model.decode(part.to(device) / scale).sample.float().cpu() for part in latents.split(batch)])


def run(options: Options) -> Path:
    """Sample and write; returns the folder."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from sra_fast.engine.files import write_atomic
    from sra_fast.engine.generate import choose_labels, generate
    from sra_fast.engine.load_model import load_model
    from sra_fast.engine.report import save_grid, to_uint8

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, path = load_model(options.checkpoint, options.sample.weights, options.num_heads)
    if options.count < 1 or options.batch < 1 or options.columns < 1 or options.precision not in ("fp32", "bf16"):
        raise ValueError("count, batch and columns must be at least 1, precision fp32 or bf16")
    if options.vae is None and model.in_channels not in (1, 3):
        raise ValueError(f"the model makes latents of {model.in_channels} channels: give --vae to decode them")
    model.to(device, torch.bfloat16 if options.precision == "bf16" else torch.float32)
    classes = torch.tensor(options.classes if options.classes else list(range(model.num_classes)))
    if int(classes.min()) < 0 or int(classes.max()) >= model.num_classes:
        raise ValueError(f"classes must lie in [0, {model.num_classes}), got {options.classes}")
    labels = classes[choose_labels(options.count, len(classes), options.sample.labels, options.seed)]
    with tqdm(total=options.count, unit="image") as bar:
        latents = generate(model, labels, options.sample, path, options.seed, options.batch, device, bar.update)
    images = to_uint8(decode(latents, options.vae, options.latent_scale, options.batch, device), options.sample.rounding)

    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "samples.npz", lambda p: _savez(p, images, labels.numpy(), np))
    save_grid(out / "samples.png", images, min(options.columns, options.count), options.scale)
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
