"""What a data set has to be for a run to train on it."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.data import Dataset

from sra_fast.config.schema import DataConfig


class TrainingData(Dataset):
    """Clean latents and their conditioning, in whole batches.

    In ``DATASETS`` stands a function ``DataConfig -> TrainingData`` for each of them.

    Attributes:
        shape: (C, H, W) of a latent.
        posterior: whether items are VAE moments, from which the latents are drawn.
        num_classes: one more than the largest label.
        labels: ``[N]`` int64.
        in_memory: a batch costs nothing to fetch: no loader processes.
        evaluation: name in ``EVALUATIONS`` of how samples are scored at the end of a run, or None.
    """

    shape: tuple[int, int, int]
    posterior: bool = False
    num_classes: int
    labels: Tensor
    in_memory: bool = False
    evaluation: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """One batch: the images, then the tensors that the conditioning is made from (labels)."""
        raise NotImplementedError

    def to_latent(self, images: Tensor, noise: Tensor | None) -> Tensor:
        """A batch on the device -> clean latents ``[B, C, H, W]``.

        ``noise``: standard normals like the latents, if the set has a ``posterior``.
        """
        return images

    def held_out(self) -> "TrainingData | None":
        """The images that no run trains on, as a set of their own; None if there are none."""
        return None


DataFactory = Callable[[DataConfig], TrainingData]
