"""Features without a published network: those of a small classifier of the data's own images.

Inception's features are made for photographs of 299 pixels. For digits, clothes, latents or
anything else that is small, a convolutional network that tells the data's classes apart says more,
and takes a minute to train on one CPU core. It sees what the model sees: latents or pixels ``[C, H,
W]``. Its numbers compare models of one data set with each other, and with nothing else.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from sra_fast.data.training_data import TrainingData
from sra_fast.data.vae import repeatable, weights_digest
from sra_fast.diffusion.draws import block_seed
from sra_fast.evaluation.scores import fit_gaussian, frechet_distance
from sra_fast.utils.checks import require_that
from sra_fast.utils.files import plain
from sra_fast.utils.outputs import save_tensors

# images that are read, or pass the network, at once
AT_ONCE = 256
# side of the feature map that the linear layer sees, at most
LAST_SIDE = 5
# from this side on the first convolution has a kernel of 5, below one of 3
LARGE = 16


@dataclass(frozen=True)
class Recipe:
    """How a feature network is made; another recipe is another network."""

    width: int = 32
    """channels after the first convolution; twice as many after each further one"""
    widest: int = 128
    """the most channels"""
    features: int = 128
    """D, width of the penultimate layer"""
    most_images: int = 60000
    """training images, drawn at random if there are more"""
    seen: int = 180000
    """images that pass the network in training, about"""
    epochs: tuple[int, int] = (3, 25)
    """the fewest and the most"""
    batch: int = 128
    lr: float = 4e-3
    """largest learning rate of one cycle"""
    weight_decay: float = 1e-2
    seed: int = 0

    def num_epochs(self, images: int) -> int:
        """Passes over so many images."""
        low, high = self.epochs
        return min(max(round(self.seen / images), low), high)


class ConvNet(nn.Module):
    """Convolutions that halve the side to 5 or less, a layer of D features, and the classes."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int, recipe: Recipe):
        super().__init__()
        channels, *sides = shape
        width = recipe.width
        layers: list[nn.Module] = []
        while not layers or max(sides) > LAST_SIDE:
            # an image that is small already is not made smaller
            stride = 2 if max(sides) > LAST_SIDE else 1
            kernel = 5 if max(sides) > LARGE else 3
            conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            sides = [-(-side // stride) for side in sides]
            channels = width
            width = min(2 * width, recipe.widest)
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Linear(channels * sides[0] * sides[1], recipe.features, bias=False)
        self.norm = nn.BatchNorm1d(recipe.features)
        self.classes = nn.Linear(recipe.features, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C, H, W]`` -> features ``[B, D]``, at least 0, and logits ``[B, K]``."""
        features = F.relu(self.norm(self.hidden(self.convolutions(x).flatten(1))))
        return features, self.classes(features)


@dataclass(frozen=True)
class FeatureNetwork:
    """A trained classifier.

    Attributes:
        network: in eval mode.
        accuracy: share of the held-out images that it names right.
        device: where it runs.
    """

    network: ConvNet
    accuracy: float
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[N, D]`` and logits ``[N, K]`` of ``[N, C, H, W]``, fp32 on the CPU."""
        with repeatable(tf32=False):
            parts = [self.network(part.to(self.device)) for part in images.split(AT_ONCE)]
        features, logits = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
        return features.cpu(), logits.cpu()

    def accuracy_of(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images whose label it names."""
        _, logits = self(images)
        return float((logits.argmax(1) == labels).double().mean())


def read_images(
    data: TrainingData, rows: np.ndarray, count: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """Clean latents ``[N, C, H, W]`` fp32 and labels ``[N]`` of some rows, in a random order.

    Args:
        data: whose rows.
        rows: which of them.
        count: how many at most; None: all.
        seed: of the order, and of the sample of a VAE's posterior.
    """
    chosen = np.random.default_rng(block_seed(int(seed), -5)).permutation(rows)[:count]
    generator = torch.Generator().manual_seed(block_seed(int(seed), -6))
    latents = []
    for start in range(0, len(chosen), AT_ONCE):
        raw, *_ = data.split(data.__getitems__(chosen[start : start + AT_ONCE].tolist()))
        noise = None
        if data.posterior:
            noise = torch.randn(len(raw), *data.shape, generator=generator)
        latents.append(data.to_latent(raw, noise).float())
    return torch.cat(latents), data.labels[torch.from_numpy(chosen)]


def feature_network(
    data: TrainingData,
    cache: Path | None = None,
    device: torch.device | str = "cpu",
    recipe: Recipe | None = None,
) -> FeatureNetwork:
    """The classifier of a data set: from ``cache``, or trained on its training images and kept
    there.

    Args:
        data: training set; its held-out share gives the accuracy.
        cache: folder of feature networks; None: it is not kept.
        device: where it runs.
        recipe: how it is made.

    Raises:
        ValueError: the images are of one class, or the file in ``cache`` is damaged or of other
            data.
        OSError: ``cache`` cannot be written.
    """
    recipe = recipe or Recipe()
    device = torch.device(device)
    identity = _identity(data, recipe)
    file = None
    if cache is not None:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        name = f"{identity['data'][:16]}-conv{recipe.features}-{digest[:8]}.safetensors"
        file = Path(cache) / name
        if file.exists():
            return _read(file, identity, data, recipe, device)
    found = _train(data, recipe, device)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, identity, found)
    return found


def _identity(data: TrainingData, recipe: Recipe) -> dict:
    """What the network depends on, as JSON has it."""
    facts = data.facts()
    held = {
        "data": data.fingerprint or _digest(data),
        "shape": data.shape,
        "num_classes": data.num_classes,
        "scale": facts.scale,
        "shift": facts.shift,
        "recipe": asdict(recipe),
    }
    return plain(held)


def _digest(data: TrainingData) -> str:
    """SHA-256 of images and labels, for data that do not tell their own."""
    digest = hashlib.sha256(data.labels.numpy().tobytes())
    for start in range(0, len(data), AT_ONCE):
        rows = list(range(start, min(start + AT_ONCE, len(data))))
        digest.update(data.split(data.__getitems__(rows))[0].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _train(data: TrainingData, recipe: Recipe, device: torch.device) -> FeatureNetwork:
    (train, rows), (held_out, held_out_rows) = data.held_out_split()
    images, labels = read_images(train, rows, recipe.most_images, recipe.seed)
    if len(labels.unique()) < 2:
        raise ValueError(
            "a feature network is trained to tell classes apart: expected images of at least two, "
            f"got only class {int(labels[0])}"
        )
    # batch normalization takes two images at least
    require_that(len(images) >= 2, f"expected at least 2 training images, got {len(images)}")
    epochs = recipe.num_epochs(len(images))
    batches = list(_batches(len(images), epochs, recipe))
    # the caller's random numbers go on as if nothing had been trained
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        network = ConvNet(data.shape, data.num_classes, recipe).to(device)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=len(batches) + 1
    )
    with torch.enable_grad(), repeatable(tf32=False):
        for chosen in batches:
            _, logits = network(images[chosen].to(device))
            loss = F.cross_entropy(logits, labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    found = FeatureNetwork(network.eval().requires_grad_(False), 0.0, device)
    unseen = read_images(held_out, held_out_rows, None, recipe.seed)
    return FeatureNetwork(found.network, found.accuracy_of(*unseen), device)


def _batches(images: int, epochs: int, recipe: Recipe) -> Iterator[Tensor]:
    """Numbers of the images of every step."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(epochs):
        for part in torch.randperm(images, generator=generator).split(recipe.batch):
            # a single image has no batch statistics
            if len(part) > 1:
                yield part


def _write(file: Path, identity: dict, found: FeatureNetwork) -> None:
    state = {name: value.cpu().contiguous() for name, value in found.network.state_dict().items()}
    held = {
        **identity,
        "accuracy": found.accuracy,
        "sha256": weights_digest(state).hexdigest(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    metadata = {name: json.dumps(value) for name, value in held.items()}
    save_tensors(file, state, metadata)


def _read(
    file: Path, identity: dict, data: TrainingData, recipe: Recipe, device: torch.device
) -> FeatureNetwork:
    try:
        with safe_open(file, "pt") as held:
            metadata = {name: json.loads(text) for name, text in held.metadata().items()}
            state = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
        accuracy = float(metadata["accuracy"])
        intact = metadata["sha256"] == weights_digest(state).hexdigest()
    except Exception as error:
        # safetensors and json raise their own types
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is no feature network: {reason}; remove it") from None
    require_that(intact, f"{file} is damaged: its weights were changed; remove it")
    for name, value in identity.items():
        require_that(
            metadata.get(name) == value,
            f"{file} is the feature network of other data: expected {name} {value}, "
            f"got {metadata.get(name)}; remove it",
        )
    network = ConvNet(data.shape, data.num_classes, recipe)
    network.load_state_dict(state)
    return FeatureNetwork(network.to(device).eval().requires_grad_(False), accuracy, device)


def least_images(features: int) -> int:
    """Of how many images a Fréchet distance in so many features can tell anything."""
    return features + 1


def sample_scores(
    network: FeatureNetwork, samples: Tensor, labels: Tensor, held_out: Tensor, real: Tensor
) -> dict[str, float]:
    """Scores of generated images in the features of a network.

    Args:
        network: of the data.
        samples: ``[N, C, H, W]``, made for ``labels [N]``.
        held_out: real images that no run trains on.
        real: training images; as many as there are samples, for a floor of the same bias.

    Returns:
        ``frechet``: Fréchet distance of the samples to the held-out images.
        ``frechet_floor``: that of the training images, which no model should be expected to beat.
        ``label_accuracy``: share of the samples that the network takes for their label.
        ``classifier_accuracy``: that of the held-out images.

    Raises:
        ValueError: a sample is not finite, or a set has no more images than there are features: its
            covariance has no inverse then, and the distance says how few there are.
    """
    bad = int((~samples.isfinite().flatten(1).all(1)).sum())
    require_that(bad == 0, f"samples must be finite, {bad} of {len(samples)} are not")
    generated, logits = network(samples)
    unseen, seen = (network(images)[0] for images in (held_out, real))
    least = least_images(generated.shape[1])
    sets = {"samples": generated, "held-out images": unseen, "training images": seen}
    for what, features in sets.items():
        require_that(
            len(features) >= least,
            f"a Fréchet distance in {generated.shape[1]} features needs at least {least} {what}, got "
            f"{len(features)}",
        )
    reference = fit_gaussian(unseen.numpy())
    return {
        "frechet": frechet_distance(fit_gaussian(generated.numpy()), reference),
        "frechet_floor": frechet_distance(fit_gaussian(seen.numpy()), reference),
        "label_accuracy": float((logits.argmax(1) == labels).double().mean()),
        "classifier_accuracy": network.accuracy,
    }
