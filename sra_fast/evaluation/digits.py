"""How good generated digits are."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from sra_fast.data.digits import Digits
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance
from sra_fast.utils.checks import require_that
from sra_fast.utils.registry import EVALUATIONS

# principal components in which the Fréchet distance is measured
COMPONENTS = 16


def as_vectors(images: Tensor) -> np.ndarray:
    """Digits ``[N, 1, 8, 8]`` -> float64 ``[N, 64]``, clamped to [-1, 1]."""
    return images.clamp(-1, 1).cpu().flatten(1).double().numpy()


@cache
def digit_reader():
    """An SVM that has learned to read from the real training digits."""
    from sklearn.svm import SVC

    train = Digits()
    return SVC(gamma="scale", C=10).fit(as_vectors(train.images), train.labels.numpy())


def read_digits(images: Tensor) -> Tensor:
    """Which digit the SVM sees in each image.

    Args:
        images: ``[N, 1, 8, 8]`` in [-1, 1].

    Returns:
        int64 ``[N]``.
    """
    return torch.from_numpy(digit_reader().predict(as_vectors(images)))


def evaluate_digits(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Score generated digits.

    Args:
        images: ``[N, 1, 8, 8]`` in [-1, 1].
        labels: ``[N]``, what they were generated for.

    Returns:
        ``label_accuracy``: share of the images to which an SVM, trained on the real training
        digits, assigns their label.
        ``svm_accuracy``: the SVM's accuracy on held-out digits, a ceiling.
        ``frechet``: Fréchet distance to the held-out digits in the first 16 principal components of
        the training pixels, in units of pixels in [-1, 1].
        ``frechet_train``: the distance of the training digits, a floor.

    Raises:
        ValueError: an image is not finite.
    """
    from sklearn.decomposition import PCA

    bad = int((~images.isfinite().flatten(1).all(1)).sum())
    require_that(
        bad == 0,
        f"generated digits must be finite, {bad} of {len(images)} are not: the weights, or the "
        "sampler",
    )
    held_out = Digits(held_out=True)
    sets = (Digits().images, held_out.images, images)
    real, unseen, generated = (as_vectors(x) for x in sets)
    # border pixels are almost always black: the covariance of all 64 pixels is close to singular
    pca = PCA(COMPONENTS, svd_solver="full").fit(real)
    real_fit, unseen_fit, generated_fit = (
        fit_gaussian(pca.transform(x)) for x in (real, unseen, generated)
    )
    return {
        "label_accuracy": float((read_digits(images) == labels.cpu()).double().mean()),
        "svm_accuracy": float((read_digits(held_out.images) == held_out.labels).double().mean()),
        "frechet": frechet_distance(generated_fit, unseen_fit),
        "frechet_train": frechet_distance(real_fit, unseen_fit),
    }


@EVALUATIONS.register("digits")
class DigitsEvaluation:
    """What a run on the digits ends with.

    Attributes:
        num_images: to be generated.
        columns: images per row of the picture.
        gap_after: the picture has a gap after this column.
        scale: enlargement of a pixel in the picture.
    """

    num_images = 400
    columns = 20
    gap_after = 10
    scale = 6

    def scores(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        return evaluate_digits(images, labels)

    def picture(self, images: Tensor, labels: Tensor) -> Tensor:
        """A row per class: ten generated digits, then ten real ones; ``[200, 1, 8, 8]``."""
        held_out = Digits(held_out=True)
        rows = []
        for label in range(Digits.num_classes):
            generated = images[labels == label][:10]
            real = held_out.images[held_out.labels == label][:10]
            # random labels may leave a class with fewer
            if len(generated) == 10:
                rows += [generated, real]
        return torch.cat(rows)
