"""How good generated digits are: an SVM's agreement with their labels, and the Fréchet distance to held-out digits."""

import torch
from torch import Tensor

from sra_fast.data.dataset import Digits
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance

COMPONENTS = 16


def evaluate_digits(images: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores of generated images ``[N, 1, 8, 8]`` in [-1, 1] and the labels ``[N]`` they were generated for.

    Returns:
        ``label_accuracy``: share that an SVM trained on the real training digits assigns to their label;
        ``svm_accuracy``: the SVM's own on held-out digits, a ceiling; ``frechet``: distance to the held-out digits in
        the space of the first 16 principal components of the training pixels (in pixel units of [-1, 1]);
        ``frechet_train``: that of the training digits, a floor.
    """
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    train, held_out = Digits(), Digits(held_out=True)
    flat = [
        x.reshape(len(x), -1).double().numpy()
        for x in (train.images, held_out.images, images.clamp(-1, 1).cpu())
    ]
    svm = SVC(gamma="scale", C=10).fit(flat[0], train.labels.numpy())
    pca = PCA(COMPONENTS, svd_solver="full").fit(flat[0])
    train_fit, held_out_fit, fit = (fit_gaussian(pca.transform(x)) for x in flat)
    return {
        "label_accuracy": float((svm.predict(flat[2]) == labels.cpu().numpy()).mean()),
        "svm_accuracy": float(svm.score(flat[1], held_out.labels.numpy())),
        "frechet": frechet_distance(fit, held_out_fit),
        "frechet_train": frechet_distance(train_fit, held_out_fit),
    }


def real_rows(columns: int) -> Tensor:
    """``[10, columns, 1, 8, 8]``: the first held-out digits of every class, for a picture beside generated ones."""
    data = Digits(held_out=True)
    return torch.stack([data.images[data.labels == c][:columns] for c in range(10)])
