"""How good generated digits are."""

import torch
from torch import Tensor

from sra_fast.data.digits import Digits
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance
from sra_fast.utils.registry import EVALUATIONS

# principal components in which the Fréchet distance is measured
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
