"""How good generated digits are: an SVM's agreement with their labels, and the Fréchet distance to held-out digits."""

import torch
from torch import Tensor

from sra_fast.data.dataset import Digits
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance

COMPONENTS = 16


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
    """
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    train = Digits()
    held_out = Digits(held_out=True)
    sets = (train.images, held_out.images, images.clamp(-1, 1).cpu())
    real, unseen, generated = (x.reshape(len(x), -1).double().numpy() for x in sets)

    svm = SVC(gamma="scale", C=10).fit(real, train.labels.numpy())
    predicted = svm.predict(generated)
    # border pixels are almost always black: the covariance of all 64 pixels is close to singular
    pca = PCA(COMPONENTS, svd_solver="full").fit(real)
    real_fit, unseen_fit, generated_fit = (
        fit_gaussian(pca.transform(x)) for x in (real, unseen, generated)
    )
    return {
        "label_accuracy": float((predicted == labels.cpu().numpy()).mean()),
        "svm_accuracy": float(svm.score(unseen, held_out.labels.numpy())),
        "frechet": frechet_distance(generated_fit, unseen_fit),
        "frechet_train": frechet_distance(real_fit, unseen_fit),
    }


def real_rows(columns: int) -> Tensor:
    """The first ``columns`` held-out digits of every class: ``[10, columns, 1, 8, 8]``, to show with generated ones."""
    data = Digits(held_out=True)
    return torch.stack([data.images[data.labels == c][:columns] for c in range(10)])
