"""How much of the class a linear classifier reads off the features of a frozen model, for every layer and time."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from sra_fast.analysis.features import Images, Part, noisy_features
from sra_fast.models import DiffusionTransformer

# the most features of an image that `auto` puts side by side: a probe has one weight for each and class
SIDE_BY_SIDE = 4096
# prior variance of a logit. the penalty is scaled by the number of features, so that width is no advantage
LOGIT_VARIANCE = 30.0


def choose_pool(how: str, patches: int, width: int) -> str:
    """What ``auto`` stands for: ``all`` if it gives at most 4096 features an image, else ``mean``.

    The mean over the patches loses their positions, which the pixels that it is compared with keep:
    on 8 x 8 digits every layer then lies below the pixels.

    Args:
        how: ``auto``, or a pooling that is returned as it is.
        patches: T, of an image.
        width: D, of a feature.
    """
    if how != "auto":
        return how
    return "all" if patches * width <= SIDE_BY_SIDE else "mean"


def chance(labels: Tensor) -> float:
    """Accuracy of always naming the most frequent class of ``labels`` ``[N]``."""
    return float(labels.bincount().max() / len(labels))


def pool(tokens: Tensor, how: str) -> Tensor:
    """Features ``[B, T, D]`` -> samples for a classifier.

    Args:
        tokens: of one layer.
        how: ``mean`` averages the patches: ``[B, D]``. ``patch`` takes each by itself:
            ``[B T, D]``. ``all`` puts them side by side: ``[B, T D]``.
    """
    if how == "mean":
        return tokens.mean(1)
    return tokens.flatten(0, 1) if how == "patch" else tokens.flatten(1)


def pixels(x: Tensor, patch_size: int, how: str) -> Tensor:
    """Noisy inputs ``[B, C, H, W]`` -> the same samples without a model.

    Returns:
        With ``how`` ``patch`` the pixels of each patch, ``[B T, C p p]``; else those of the image,
        ``[B, C H W]``.
    """
    if how != "patch":
        return x.flatten(1)
    # [B, C p p, T]: unfold puts the pixels of a patch before the patches
    patches = F.unfold(x, patch_size, stride=patch_size)
    return patches.transpose(1, 2).flatten(0, 1)


def accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Accuracy of a multinomial logistic regression on standardised features.

    Args:
        train: ``[N, D]`` features it is fitted to, with labels ``[N]``.
        test: ``[M, D]`` features it is scored on, with labels ``[M]``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=LOGIT_VARIANCE / train.shape[1], max_iter=1000)
    # the held-out features are standardised with the mean and deviation of the training features
    probe = make_pipeline(StandardScaler(), regression).fit(train.numpy(), train_labels.numpy())
    return float(probe.score(test.numpy(), test_labels.numpy()))


@dataclass(frozen=True)
class Probed:
    """Accuracies of probes on held-out images.

    Attributes:
        rows: ``{"time", "layer", "accuracy"}``; layer 0 is the noisy input.
        chance: see ``chance``.
    """

    rows: list[dict]
    chance: float


def train_count(count: int) -> int:
    """How many of the images of a probe it is fitted to; a fifth is held out."""
    return count - count // 5


def probe_layers(
    model: DiffusionTransformer,
    path: str,
    parts: tuple[Part, Part],
    times: list[float],
    layers: list[int],
    *,
    how: str = "mean",
    count: int = 20000,
    draws: int = 2,
    seed: int = 0,
    batch: int = 256,
    progress: Callable[[list[dict]], object] | None = None,
) -> Probed:
    """Accuracies of linear probes, and of the same probe on the noisy input.

    The model gets the null class, or the empty prompt: with a label, or a caption that names it, its
    features would contain the answer.

    Args:
        model, path: see ``noisy_features``.
        parts: training and held-out images.
        times: in [0, 1].
        layers: 1-based.
        how: see ``pool``.
        count: the most images, held-out ones included; a fifth of them is held out.
        draws: noises per image.
        seed: of the choice of images and of the noise, which is the same at all times.
        batch: images per model call.
        progress: called after each time with its rows.

    Returns:
        Accuracies in the order of times and layers.

    Raises:
        ValueError: the model knows no null class or empty prompt, or the images are all of one
            class.
    """
    if not model.has_null:
        raise ValueError(
            "a probe needs a model with a null class, or one that knows the empty prompt "
            "(model.class_dropout_prob > 0): a label would be the answer"
        )
    fitted = train_count(count)
    train = parts[0].read(fitted, seed, draws)
    test = parts[1].read(count - fitted, seed, draws)
    if len(train.labels.unique()) < 2:
        raise ValueError(
            f"a probe needs images of several classes, got only class {train.labels[0]}"
        )
    rows = []
    for time in times:
        # the noisy input and every layer, for the images that are learned and those that are scored
        train_samples, train_labels = _samples(model, path, train, time, layers, how, batch)
        test_samples, test_labels = _samples(model, path, test, time, layers, how, batch)
        at_this_time = []
        for layer, x, x_test in zip([0, *layers], train_samples, test_samples, strict=True):
            score = accuracy(x, train_labels, x_test, test_labels)
            at_this_time.append({"time": time, "layer": layer, "accuracy": score})
        rows += at_this_time
        if progress:
            progress(at_this_time)
    return Probed(rows, chance(test.labels))


def _samples(
    model: DiffusionTransformer,
    path: str,
    images: Images,
    time: float,
    layers: list[int],
    how: str,
    batch: int,
) -> tuple[list[Tensor], Tensor]:
    """Samples of the noisy input and of every layer, each ``[N, ...]``, and their labels ``[N]``."""
    # nothing: a label, or a caption that names it, would give the answer away
    null = images.condition.null()
    pooled = lambda tokens: pool(tokens, how)
    x, features = noisy_features(model, path, images, null, time, layers, pooled, batch)
    samples = [pixels(x, model.patch_size, how), *features]
    # with one sample per patch, every patch has the label of its image
    repeats = len(samples[0]) // len(images.labels)
    return samples, images.labels.repeat_interleave(repeats)


def best(rows: list[dict]) -> dict:
    """The row of the most accurate layer, and of the shallowest if several are equal."""
    return max((row for row in rows if row["layer"]), key=lambda row: row["accuracy"])
