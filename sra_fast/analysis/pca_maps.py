"""The first principal components of patch features as colours (SRA, Fig. 2): how a layer tells patches apart."""

import numpy as np
import torch
from torch import Tensor

from sra_fast.analysis.features import Images, noisy_features
from sra_fast.models import DiffusionTransformer


def components(features: Tensor, signs_of: np.ndarray | None = None) -> np.ndarray:
    """The first three principal components over the patches of all images together.

    Args:
        features: ``[N, T, D]``.
        signs_of: ``[N T, 3]`` components of another layer. The sign of a component is arbitrary;
            each of ours gets the sign that correlates with its counterpart.

    Returns:
        ``[N T, 3]`` float64.

    Raises:
        ValueError: fewer than three patches.
    """
    from sklearn.decomposition import PCA

    patches = features.flatten(0, 1).double().numpy()
    if len(patches) < 3:
        raise ValueError(
            f"three components need at least 3 patches, got {len(patches)}: show more images"
        )
    scores = PCA(3, svd_solver="full").fit_transform(patches)
    if signs_of is not None:
        scores *= np.where((scores * signs_of).sum(0) < 0, -1, 1)
    return scores


def colours(scores: np.ndarray, grid: int) -> np.ndarray:
    """Components ``[N T, 3]`` -> uint8 ``[N, grid, grid, 3]``.

    The 1st to the 99th percentile of each component over all images becomes 0 to 255.
    """
    # outliers do not set the range
    low, high = np.percentile(scores, [1, 99], axis=0)
    unit = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    return np.round(255 * unit).astype(np.uint8).reshape(-1, grid, grid, 3)


def as_colours(x: Tensor) -> np.ndarray:
    """Noisy inputs ``[N, C, H, W]`` -> uint8 ``[N, H, W, 3]``: the first three channels, or the first as grey."""
    x = x[:, :3] if x.shape[1] >= 3 else x[:, :1].expand(-1, 3, -1, -1)
    bytes_ = ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return bytes_.permute(0, 2, 3, 1).numpy()


def draw_maps(
    model: DiffusionTransformer, path: str, images: Images, times: list[float], layers: list[int]
) -> np.ndarray:
    """Maps of every image, time and layer, each enlarged to the size of the input.

    Args:
        model, path, layers: see ``noisy_features``.
        images: a few; the model gets their labels or captions.
        times: in [0, 1].

    Returns:
        uint8 ``[N, len(times), 1 + len(layers), H, W, 3]``; the noisy input comes before the
        layers.
    """
    patch_size = model.patch_size
    grid = model.input_size // patch_size
    everything = lambda tokens: tokens
    previous = None
    maps = []
    for time in times:
        x, features = noisy_features(
            model, path, images, images.condition, time, layers, everything, len(images.labels)
        )
        cells = [as_colours(x)]
        for tokens in features:
            # signs follow the layer before; those of the first layer, the last layer of the time before
            previous = components(tokens, previous)
            # every patch becomes a square of one colour
            cells.append(colours(previous, grid).repeat(patch_size, 1).repeat(patch_size, 2))
        maps.append(np.stack(cells, axis=1))
    return np.stack(maps, axis=1)
