"""The denoising loss of a model on images that no run trains on.

Every image is seen at one time of each of K bins of [0, 1], with noise, a posterior sample and
times that are functions of a seed and the image's number. Two models of one data set are thereby
measured on the same inputs, and their difference is a mean of paired differences, whose error is
much smaller than that of either loss.

The bins divide [0, 1] evenly, whatever times a run has trained at, so that runs with different
distributions of times are measured alike.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sra_fast.config.schema import DiffusionConfig
from sra_fast.data.training_data import TrainingData
from sra_fast.data.vae import repeatable
from sra_fast.diffusion.draws import block_seed, draw_stratified
from sra_fast.diffusion.process import Process
from sra_fast.models import Conditioning, DiffusionTransformer
from sra_fast.utils.checks import require_that
from sra_fast.utils.collectives import gather_rows, share_of
from sra_fast.utils.files import write_atomic
from sra_fast.utils.registry import PROCESSES

# K, unless another number is asked for
TIME_BINS = 10
# a mean of one has no error that could be told
LEAST_IMAGES = 2
# images per model call
BLOCK = 64
# what the numbers of a file mean; another value makes older files incomparable
VERSION = 1
ATTENTION = "SRA_FAST_ATTENTION"


@dataclass(frozen=True)
class HeldOutLoss:
    """Denoising losses of N images, each at a time in every one of K bins.

    Attributes:
        losses: ``[N, K]`` float32, means over an image's elements: of the velocity's squared error
            (SiT), or of the noise's (DiT).
        times: ``[N, K]`` float32 in [0, 1]; 0 is data.
        images: ``[N]`` int64, row numbers in the held-out share.
        settings: what was measured: data, rows, seed, bins, process.
        about: which weights these are of, as far as the caller has said it.
    """

    losses: np.ndarray
    times: np.ndarray
    images: np.ndarray
    settings: dict
    about: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        """SHA-256 of the settings: two losses can be compared in pairs only with equal keys."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    def per_image(self) -> np.ndarray:
        """``[N]`` float64, the mean over the bins."""
        return self.losses.astype(np.float64).mean(1)

    def mean(self) -> float:
        """The mean over images and bins."""
        return float(self.losses.astype(np.float64).mean())

    def bins(self) -> np.ndarray:
        """``[K]`` float64, the mean over the images in every bin."""
        return self.losses.astype(np.float64).mean(0)

    def check_finite(self, source: str) -> None:
        """ValueError unless every loss is finite; ``source``: what was measured."""
        bad = int((~np.isfinite(self.losses).all(1)).sum())
        require_that(
            bad == 0,
            f"the held-out loss of {source} is not finite for {bad} of {len(self.losses)} images",
        )

    def paired(self, other: "HeldOutLoss") -> np.ndarray:
        """``[N]`` float64, what this loss is above the other one, of each image.

        Raises:
            ValueError: the two were not measured on the same images, times and noise.
        """
        different = [
            f"{name} {self.settings.get(name)} and {other.settings.get(name)}"
            for name in sorted({*self.settings, *other.settings})
            if self.settings.get(name) != other.settings.get(name)
        ]
        require_that(
            not different,
            "held-out losses are paired on the same images, times and noise, got "
            f"{'; '.join(different)}",
        )
        return self.per_image() - other.per_image()

    def save(self, path: str | Path) -> None:
        """Write an ``.npz``; OSError if that cannot be."""
        arrays = {"losses": self.losses, "times": self.times, "images": self.images}
        texts = {"settings": json.dumps(self.settings), "about": json.dumps(self.about)}

        def write(temporary: Path) -> None:
            # through an open file: given a path, numpy would add a suffix
            with open(temporary, "wb") as f:
                np.savez(f, **arrays, **texts, key=self.key)

        write_atomic(Path(path), write)

    @classmethod
    def load(cls, path: str | Path) -> "HeldOutLoss":
        """The inverse of ``save``; ValueError if the file holds no such losses."""
        came = "a file of another kind"
        try:
            with np.load(path, allow_pickle=False) as held:
                written = {"losses", "times", "images", "settings", "about", "key"}
                whole = written.issubset(held.files)
                came = "a damaged one" if whole else f"one that holds {', '.join(held.files)}"
                arrays = [held[name] for name in ("losses", "times", "images")]
                settings, about = (json.loads(str(held[name])) for name in ("settings", "about"))
                found = cls(*arrays, settings, about)
                key = str(held["key"])
        except Exception as error:
            # numpy, zipfile and json raise many types, and numpy advises to load what is unsafe
            if isinstance(error, OSError) and error.strerror:
                came = f"none ({error.strerror})"
            raise ValueError(
                f"{path} holds no held-out losses: expected an .npz that held_out.py --out wrote, "
                f"got {came}"
            ) from None
        losses, times, images = arrays
        fits = losses.ndim == 2 and times.shape == losses.shape and len(images) == len(losses)
        require_that(
            fits and found.key == key,
            f"{path} holds no held-out losses: its arrays or its key were changed",
        )
        return found


@dataclass(frozen=True)
class Block:
    """Images as a model sees them in K calls.

    Attributes:
        x0: ``[B, C, H, W]`` clean latents.
        condition: B of them.
        noise: ``[B, K, C, H, W]``.
        times: ``[B, K]`` in [0, 1].
    """

    x0: Tensor
    condition: Conditioning
    noise: Tensor
    times: Tensor


class HeldOutImages:
    """Held-out images in a fixed random order, with their times and noise.

    The noise differs between the bins of an image: with one for all bins their errors would be
    correlated. For a SiT of 4 blocks of width 64 on 8 x 8 digits (CPU, 24 draws), the loss of an
    image, its difference between EMA and student, and that between two checkpoints then vary with
    5 times the variance. One uniform for all bins instead of one for each gives 1.25, 1.0 and 1.1
    times. The sample of a VAE's posterior is one per image: the model is trained on samples, and
    their mean is smoother than any of them.

    Args:
        data: training set of the run; its held-out share is taken.
        count: the most images, the first ones of the order; None: all of them.
        bins: K.
        seed: of the order, the times and the noise; independent of any run's.
        trained: allow data that have no held-out share, of which a run trains on all images.

    Raises:
        ValueError: ``data`` have no held-out share or one of less than 2 images, ``count`` is below
            2, or ``bins`` below 1.
    """

    def __init__(
        self,
        data: TrainingData,
        count: int | None = None,
        bins: int = TIME_BINS,
        seed: int = 0,
        trained: bool = False,
    ):
        check_counts(count, bins)
        require_that(trained or has_held_out(data), _without_share(data))
        self.data, rows = data.held_out_split()[1]
        require_that(
            len(rows) >= LEAST_IMAGES,
            f"a held-out loss needs at least {LEAST_IMAGES} images, {place_of(data)} holds out {len(rows)}",
        )
        self.bins = bins
        self.seed = seed
        # a data set may be sorted by class: -4 keeps the order apart from other draws
        order = np.random.default_rng(block_seed(int(seed), -4)).permutation(len(rows))
        self.rows = np.asarray(rows, np.int64)[order[:count]]

    def __len__(self) -> int:
        """N."""
        return len(self.rows)

    def check(self, shape: tuple[int, int, int], num_classes: int | None) -> None:
        """ValueError unless the images fit a model of (C, H, W) inputs and so many classes; None: it
        knows no classes.
        """
        require_that(
            self.data.shape == shape,
            f"the model takes latents {shape}, the held-out images have {self.data.shape}",
        )
        largest = int(self.data.labels[self.rows].max())
        require_that(
            num_classes is None or largest < num_classes,
            f"the model knows {num_classes} classes, the held-out images have the label {largest}",
        )

    def settings(self, process: str, path: str) -> dict:
        """What the losses of a model depend on besides its weights.

        Args:
            process: name of the model's diffusion process.
            path: its interpolant (SiT).
        """
        facts = self.data.facts()
        # of the captions; files of labels have no such entry
        text = {"text": facts.text["fingerprint"]} if facts.text else {}
        return {
            "version": VERSION,
            "data": self.data.fingerprint or self._digest(),
            "shape": [*self.data.shape],
            "scale": facts.scale,
            "shift": facts.shift,
            "images": len(self.rows),
            "rows": hashlib.sha256(self.rows.tobytes()).hexdigest()[:16],
            "seed": self.seed,
            "bins": self.bins,
            "process": process,
            "path": path,
            **text,
        }

    def _digest(self) -> str:
        """SHA-256 of the images and labels, for data that do not tell their own."""
        digest = hashlib.sha256()
        for start in range(0, len(self.rows), BLOCK):
            batch = self.data.__getitems__(self.rows[start : start + BLOCK].tolist())
            images, told, _ = self.data.split(batch)
            for tensor in (images, *told):
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def block(self, number: int, size: int) -> Block:
        """Images ``number * size`` to ``(number + 1) * size`` of the order.

        The last block is filled up with its first image: every call of a model has the same shape.
        """
        rows = self.rows[number * size : (number + 1) * size]
        rows = np.concatenate([rows, np.repeat(rows[:1], size - len(rows))])
        raw, told, _ = self.data.split(self.data.__getitems__(rows.tolist()))
        drawn = draw_stratified(
            self.seed, rows.tolist(), self.data.shape, self.bins, self.data.posterior
        )
        x0 = self.data.to_latent(raw, drawn.posterior).float()
        return Block(x0, self.data.condition(told), drawn.noise, drawn.uniform)


def has_held_out(data: TrainingData) -> bool:
    """Whether there are images of a data set that no run trains on."""
    (train, _), (held_out, _) = data.held_out_split()
    return held_out is not train


def check_counts(images: int | None, bins: int) -> None:
    """ValueError unless a held-out loss can be measured on so many images (None: all) and bins."""
    require_that(
        bins >= 1 and (images is None or images >= LEAST_IMAGES),
        f"a held-out loss needs at least {LEAST_IMAGES} images and 1 bin, got {images} and {bins}",
    )


def place_of(data: TrainingData) -> str:
    """Where data lie, or what they are, for messages."""
    return getattr(data, "path", None) or data.name or type(data).__name__


def _without_share(data: TrainingData) -> str:
    return (
        "a held-out loss needs images that no run trains on (preprocess.py --holdout), "
        f"{place_of(data)} has none"
    )


def held_out_loss(
    model: DiffusionTransformer,
    path: str,
    images: HeldOutImages,
    *,
    batch: int = BLOCK,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    about: dict | None = None,
) -> HeldOutLoss:
    """The loss of a model; collective if ``world`` is more than 1.

    The images go through the model in blocks of ``batch``, which do not depend on the number of
    processes: each takes whole blocks. With the same ``batch``, device and number of threads per
    process, the losses are the same bit for bit. The real labels, or the first captions, are given,
    none is dropped.

    Args:
        model: in eval mode, on ``device``, in fp32.
        path: the interpolant it was trained with (SiT).
        images: what it is measured on.
        batch: images per model call.
        device: where it runs.
        rank: of this process.
        world: number of processes.
        about: kept with the losses.

    Raises:
        ValueError: the images do not fit the model, it is in training mode, or ``batch`` is below
            1.
    """
    require_that(not model.training, "a held-out loss needs a model in eval mode")
    require_that(batch >= 1, f"batch must be at least 1, got {batch}")
    images.check((model.in_channels, model.input_size, model.input_size), model.num_classes)
    process = PROCESSES[model.process].from_config(DiffusionConfig(path=path), t_max=0.0)
    num_blocks = -(-len(images) // batch)
    shares = [share_of(num_blocks, r, world) for r in range(world)]
    # losses and times
    found = torch.zeros(len(shares[rank]) * batch, 2, images.bins)
    with torch.no_grad(), repeatable(tf32=False), _fixed_attention():
        for i, number in enumerate(shares[rank]):
            block = images.block(number, batch)
            part = found[i * batch : (i + 1) * batch]
            part[:, 0] = _losses(model, process, block, device)
            part[:, 1] = block.times
    if world > 1 and dist.get_backend() == "nccl":
        found = found.to(device)
    everyone = gather_rows(found, [len(share) * batch for share in shares]).cpu()
    # without the images that fill up the last block
    losses, times = everyone[: len(images)].unbind(1)
    settings = images.settings(model.process, path)
    arrays = (losses.contiguous().numpy(), times.contiguous().numpy(), images.rows)
    return HeldOutLoss(*arrays, settings, about or {})


def _losses(
    model: DiffusionTransformer, process: Process, block: Block, device: torch.device | str
) -> Tensor:
    """``[B, K]`` fp32 on the CPU."""
    x0 = block.x0.to(device)
    kept = torch.zeros(len(x0), dtype=torch.bool)
    condition = block.condition.dropped(kept).to(device)
    # a call has one time of every image
    no_gap = torch.zeros(len(x0), device=device)
    losses = []
    for noise, uniform in zip(block.noise.unbind(1), block.times.unbind(1), strict=True):
        t, _ = process.times(uniform.to(device), no_gap)
        noised = process.corrupt(x0, noise.to(device), t, t)
        prediction = model(noised.x, t, condition)
        losses.append(process.losses(prediction, noised)["denoise"].cpu())
    return torch.stack(losses, 1)


@contextmanager
def _fixed_attention() -> Iterator[None]:
    """PyTorch's attention, unless another is asked for: on a GPU the fastest is measured, and two
    processes may find different ones, which round differently.
    """
    before = os.environ.get(ATTENTION)
    os.environ[ATTENTION] = before or "sdpa"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ATTENTION]
        else:
            os.environ[ATTENTION] = before
