"""Colour photographs to try everything on, without a download:  python examples/photos.py FOLDER

Five photographs come with scikit-image and scikit-learn. Square pieces of each make a class. The
pieces of the right two fifths of a photograph lie in val/, so that no piece of train/ shares a pixel
with one of val/.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

# pieces per class, and their side in the photograph, which is drawn from this range
TRAIN, VAL = 320, 80
SIDES = (96, 161)


def photographs() -> dict[str, np.ndarray]:
    """Class -> photograph, uint8 ``[H, W, 3]``."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images
    return {
        "astronaut": data.astronaut(),
        "cat": data.cat(),
        "coffee": data.coffee(),
        "flower": flower,
        "temple": temple,
    }


def write_pieces(photo: np.ndarray, folder: Path, count: int, rng: np.random.Generator) -> None:
    """Write ``count`` pieces as JPEGs, each at a random place and of a random size."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width, _ = photo.shape
    for number in range(count):
        side = int(rng.integers(*SIDES))
        top = int(rng.integers(0, height - side + 1))
        left = int(rng.integers(0, width - side + 1))
        piece = Image.fromarray(photo[top : top + side, left : left + side])
        piece.save(folder / f"{number:03d}.jpg", quality=95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":  ")[0])
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    for name, photo in photographs().items():
        border = photo.shape[1] * 3 // 5
        write_pieces(photo[:, :border], args.out / "train" / name, TRAIN, rng)
        write_pieces(photo[:, border:], args.out / "val" / name, VAL, rng)
    print(f"{args.out}: {TRAIN} and {VAL} images of each of {len(photographs())} classes")


if __name__ == "__main__":
    main()
