"""Small data sets on disk, and the photographs that come with scikit-learn and matplotlib."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def photographs() -> list[Image.Image]:
    """China (640 x 427), a flower (640 x 427), Grace Hopper (512 x 600)."""
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn's photographs")
    cbook = pytest.importorskip("matplotlib.cbook", reason="needs matplotlib's photograph")
    hopper = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    return [*map(Image.fromarray, datasets.load_sample_images().images), hopper.convert("RGB")]


def write_images(root: Path, per_class: int = 4) -> list[str]:
    """A class folder for each photograph with crops of it, as .jpg and .png; returns the names,
    sorted.
    """
    names = []
    for photo, label in zip(photographs(), ("a", "b", "c"), strict=True):
        (root / label).mkdir(parents=True)
        for i in range(per_class):
            names.append(f"{label}/{i}.{('jpg', 'png')[i % 2]}")
            left = 40 * i
            top = 20 * i
            # heights differ, so that some images have an odd margin
            photo.crop((left, top, left + 200, top + 150 + i)).save(root / names[-1])
    return names


def write_latents(
    root: Path, count: int = 10, shape=(8, 4, 4), leading=(), classes: int = 3
) -> Path:
    """Moments in the published layout; returns ``root/vae-sd``.

    Args:
        root: folder to make.
        count: images.
        shape: (2C, H, W).
        leading: dimensions before these in the files.
        classes: how many classes the images take turns in.
    """
    folder = root / "vae-sd"
    rng = np.random.default_rng(0)
    labels = []
    for i in range(count):
        name = f"{i % 2:05d}/img-mean-std-{i:08d}.npy"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, rng.random((*leading, *shape), dtype=np.float32))
        labels.append([name, i % classes])
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    return folder


def write_vae(folder: Path, seed: int = 0, **config) -> Path:
    """A small AutoencoderKL with random weights. Its latents have 4 channels and an eighth of the
    side.
    """
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    torch.manual_seed(seed)
    sizes = {"block_out_channels": (8,) * 4, "norm_num_groups": 4, "layers_per_block": 1, **config}
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        **sizes,
    )
    vae.save_pretrained(folder)
    return folder


def tree(root: Path) -> dict[str, bytes]:
    """Name -> content of every file below ``root``."""
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()}
