"""How much of the class a linear classifier reads off a frozen model's features: per layer and time."""

import torch.nn.functional as F
from torch import Tensor

from sra_fast.analysis.features import Part, noisy_features
from sra_fast.models import SiT

POOLS = ("mean", "patch", "all")
# prior variance of a logit.  the penalty is scaled by the number of features: no representation is favoured for its width
LOGIT_VARIANCE = 30.0


def pool(tokens: Tensor, how: str) -> Tensor:
    """``[B, T, D]`` -> samples for a classifier: ``mean`` of the patches ``[B, D]``, each ``patch`` by itself
    ``[B T, D]``, ``all`` patches side by side ``[B, T D]``."""
    if how == "mean":
        return tokens.mean(1)
    return tokens.flatten(0, 1) if how == "patch" else tokens.flatten(1)


def pixels(x: Tensor, patch_size: int, how: str) -> Tensor:
    """Noisy input ``[B, C, H, W]`` -> the same samples without a model: one patch ``[B T, C p p]``, else the whole image."""
    return (
        F.unfold(x, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1)
        if how == "patch"
        else x.flatten(1)
    )


def accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """Share of ``test [M, D]`` that a multinomial logistic regression on ``train [N, D]``, standardised, labels right."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = LogisticRegression(C=LOGIT_VARIANCE / train.shape[1], max_iter=1000)
    probe = make_pipeline(StandardScaler(), regression).fit(train.numpy(), train_labels.numpy())
    return float(probe.score(test.numpy(), test_labels.numpy()))


def probe_layers(
    model: SiT,
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
    progress=None,
) -> list[dict]:
    """Accuracies of linear probes, and of the same probe on the noisy input.

    The model gets no class: the null class, without which its features would hold the answer.

    Args:
        model, path: see ``noisy_features``.
        parts: training and held-out images.
        times: in [0, 1]; layers: 1-based.
        how: see ``pool``.
        count: most images, held-out ones included; a fifth of them is held out.
        draws: noises per image.
        seed: of the choice of images and of the noise, the same at all times.
        progress: called after each time with its rows.

    Returns:
        Rows ``{"time", "layer", "accuracy"}`` in the order of times and layers; layer 0 is the noisy input.

    Raises:
        ValueError: no null class, or images of a single class.
    """
    if model.y_embedder.dropout_prob == 0:
        raise ValueError(
            "a probe needs a model with a null class (model.class_dropout_prob > 0): a label would be the answer"
        )
    images = [
        part.read(most, seed, draws)
        for part, most in zip(parts, (count - count // 5, count // 5), strict=True)
    ]
    if len(images[0].labels.unique()) < 2:
        raise ValueError(
            f"a probe needs images of several classes, got class {images[0].labels[0]} alone"
        )
    rows = []
    for time in times:
        samples = [_samples(model, path, part, time, layers, how, batch) for part in images]
        labels = [
            part.labels.repeat_interleave(len(s[0]) // len(part.labels))
            for part, s in zip(images, samples, strict=True)
        ]
        scores = [
            accuracy(train, labels[0], test, labels[1])
            for train, test in zip(*samples, strict=True)
        ]
        rows += [
            {"time": time, "layer": layer, "accuracy": score}
            for layer, score in zip([0, *layers], scores, strict=True)
        ]
        if progress:
            progress(rows[-len(scores) :])
    return rows


def _samples(
    model: SiT, path: str, images, time: float, layers: list[int], how: str, batch: int
) -> list[Tensor]:
    null = images.labels.new_full(images.labels.shape, model.null_class)
    x, features = noisy_features(
        model, path, images, null, time, layers, lambda h: pool(h, how), batch
    )
    return [pixels(x, model.patch_size, how), *features]


def best(rows: list[dict]) -> dict:
    """The row of the most accurate layer; of the shallowest, where several are."""
    return max((row for row in rows if row["layer"]), key=lambda row: row["accuracy"])
