"""Small data sets on disk, and the photographs that come with scikit-learn and matplotlib."""

import gzip
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


# mean and deviation of DINOv2's inputs
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def write_vision_model(folder: Path, name: str = "Dinov2", seed: int = 0, **config) -> Path:
    """A small vision model with random weights and patches of 4 pixels, and its preprocessor's
    configuration.

    Args:
        folder: to make.
        name: of its class in transformers, without ``Model``.
        seed: of the weights.
        config: other sizes, or other options.
    """
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    width = {"mlp_ratio": 2} if name.startswith("Dinov2") else {"intermediate_size": 64}
    sizes = {**sizes, **width, "patch_size": 4, "image_size": 16, **config}
    if name in ("CLIP", "Siglip"):
        text = {**sizes, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
        sizes = {"vision_config": sizes, "text_config": text}
    settings = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")(settings)
    for parameter in model.parameters():
        # tokens differ by their place as well: some models begin with zeros there
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    held = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(held))
    return folder


def tree(root: Path) -> dict[str, bytes]:
    """Name -> content of every file below ``root``."""
    return {f.relative_to(root).as_posix(): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def idx(array):
    """The bytes of an IDX file, written independently of the reader."""
    header = b"\x00\x00\x08" + bytes([array.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx(folder, part, count, seed=0, packed=True, side=6, classes=3):
    """Random images and labels as MNIST's files; returns both."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
    labels = (np.arange(count) % classes).astype(np.uint8)
    folder.mkdir(exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx(array)
        name = f"{part}-{kind}-ubyte"
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    return images, labels


def write_text_encoder(folder: Path, name: str = "CLIPTextModel", seed: int = 0, **config) -> Path:
    """A small text encoder with random weights, and a tokenizer that has a token for each letter.

    Args:
        folder: to make.
        name: of its class in transformers.
        seed: of the weights.
        config: other sizes, or other options.
    """
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    if name.startswith("CLIP"):
        vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
        vocabulary += ["<|startoftext|>", "<|endoftext|>"]
        numbers = {token: number for number, token in enumerate(vocabulary)}
        tokenizer = transformers.CLIPTokenizer(vocab=numbers, merges=[], model_max_length=20)
        sizes = {
            "vocab_size": len(vocabulary),
            "bos_token_id": len(vocabulary) - 2,
            "eos_token_id": len(vocabulary) - 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 20,
            "projection_dim": 8,
        }
        settings = transformers.CLIPTextConfig(**{**sizes, **config})
    else:
        words = ["<pad>", "</s>", "<unk>", "\u2581", *letters]
        scores = [(word, 0.0 if word.startswith("<") else -2.0) for word in words]
        tokenizer = transformers.T5Tokenizer(vocab=scores, extra_ids=0)
        sizes = {
            "vocab_size": 48,
            "d_model": 24,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
        }
        settings = transformers.T5Config(**{**sizes, **config})
    model = getattr(transformers, name)(settings)
    for parameter in model.parameters():
        # tokens differ by their place as well
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
