"""A vision model of the digits, and what it says of them:  python examples/digits_features.py data/digits

A small ViT learns the labels of the training digits; the held-out ones only score it. Then FOLDER
holds the model (vit/), and the digits with its features of every patch (packed/), for a run with

    --data.name digits --data.path FOLDER/packed --data.features vit --align cached_features
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sra_fast.data.digits import Digits
from sra_fast.data.preprocess import Options, make_jobs
from sra_fast.data.summary import summary
from sra_fast.data.writer import run_jobs

BATCH = 64
LR = 2e-3


def make_vit(width: int, depth: int):
    """A classifier with patches of 2: its 4 x 4 patches are the tokens of a SiT-S/2 on digits."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        intermediate_size=4 * width,
        num_labels=Digits.num_classes,
    )
    return ViTForImageClassification(config)


def logits(model, images: torch.Tensor) -> torch.Tensor:
    """``[B, 10]`` of digits ``[B, 1, 8, 8]``."""
    # preprocess.py gives every model three channels
    return model(pixel_values=images.expand(-1, 3, -1, -1)).logits


def fit(model, steps: int, seed: int) -> None:
    """Teach the model the labels of the training digits."""
    train = Digits()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(train), (BATCH,), generator=generator)
        loss = F.cross_entropy(logits(model, train.images[rows]), train.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def held_out_accuracy(model) -> float:
    """Share of the held-out digits whose label the model says."""
    held_out = Digits(held_out=True)
    said = logits(model, held_out.images).argmax(1)
    return (said == held_out.labels).float().mean().item()


def save_model(model, folder: Path) -> None:
    """A folder as preprocess.py reads it."""
    model.save_pretrained(folder)
    # pixels in [0, 255] become those in [-1, 1] that the model has learned from
    seen = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(seen))


def save_digits(file: Path) -> None:
    """The training digits in their order, as the array that preprocess.py reads."""
    train = Digits()
    images = ((train.images + 1) * 127.5).round().to(torch.uint8)
    # channels last
    np.savez(file, arr_0=images.permute(0, 2, 3, 1).numpy(), arr_1=train.labels.numpy())


def store_features(source: Path, model: Path, out: Path) -> None:
    """Pack the digits with the features of a model, as this command does:

    python sra_fast/preprocess.py --source SOURCE --out OUT --pixels true --features MODEL
    """
    options = Options(source=str(source), out=str(out), pixels=True, features=str(model))
    for job, finished in run_jobs(make_jobs(options)):
        print(*summary(job, finished), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":  ")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    parser.add_argument("--width", type=int, default=64, help="of the model")
    parser.add_argument("--depth", type=int, default=4, help="of the model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # rounding depends on the number of threads, and so would the features
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    try:
        model = make_vit(args.width, args.depth)
    except ImportError:
        sys.exit(f"error: {parser.prog} needs transformers: pip install 'sra-fast[features]'")
    fit(model, args.steps, args.seed)
    print(f"the ViT knows {held_out_accuracy(model):.1%} of the held-out digits")
    save_model(model, args.out / "vit")
    save_digits(args.out / "digits.npz")
    try:
        store_features(args.out / "digits.npz", args.out / "vit", args.out / "packed")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
