"""What turns images into features for the scores: the ADM suite's Inception, or anything the user names."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_fast.evaluation.inception import POOL, SHA256, load_inception
from sra_fast.utils.files import sha256

# of torch-fidelity's weights; pytorch-fid has the same file
OFFICIAL = SHA256[:8]
# the built-in features, and the largest side that they average images to
PIXELS = "pixels"
COARSE = 8


class Features(NamedTuple):
    """Features of a batch of N images."""

    pool: Tensor
    """``[N, D]``"""
    spatial: Tensor | None = None
    """``[N, S]``, for sFID"""
    logits: Tensor | None = None
    """``[N, K]``, for the Inception score"""


@dataclass(frozen=True)
class Extractor:
    """Computes features of uint8 images ``[N, C, H, W]`` on ``device``. Its convolutions never use TF32."""

    name: str
    """what it is and a hash of its weights; appears in reports and in the names of cached statistics"""
    compute: Callable[[Tensor], tuple]
    device: torch.device
    inception: bool = False
    """an Inception, so that statistics of the ADM suite belong to it"""
    official: bool = False
    """the weights that published numbers are made with"""
    spec: str | None = None
    """what the user has named, for messages; None: nothing of theirs"""

    def __call__(self, images: Tensor) -> Features:
        """Features of a batch.

        Raises:
            ValueError: ``compute`` returns neither ``[N, D]`` nor ``([N, D], logits [N, K])``, or
                values that are not finite; or it is the user's own and fails.
        """
        # PyTorch convolves in TF32 by default on a GPU, which changes the third digit of a feature
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            try:
                out = self.compute(images.to(self.device))
            except Exception as error:
                if self.spec is None:
                    raise
                # theirs may raise anything; the last line of TorchScript's text is the message
                reason = (str(error).strip().splitlines() or [""])[-1]
                raise ValueError(
                    f"features {self.spec} failed on uint8 {[*images.shape]}: "
                    f"{type(error).__name__}: {reason}"
                ) from None
        if self.inception:
            return self._checked(Features(*out), len(images))
        with_logits = isinstance(out, (tuple, list)) and len(out) == 2
        pool, logits = out if with_logits else (out, None)
        return self._checked(Features(pool, None, logits), len(images))

    def _checked(self, features: Features, count: int) -> Features:
        for x in features:
            if x is None:
                continue
            # named now: later the sums would fail with an obscure error
            if not isinstance(x, Tensor) or x.ndim != 2 or len(x) != count:
                got = [*x.shape] if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"{self.name} must give [{count}, D] or ([{count}, D], logits [{count}, K]), it gave {got}"
                )
            if not x.isfinite().all():
                raise ValueError(f"{self.name} gave features that are not finite")
        return features


def _digest(path: str) -> str:
    """The first eight digits of a file's SHA-256."""
    return sha256(path)[:8]


def inception_extractor(path: str, device: torch.device) -> Extractor:
    """Inception with the weights at ``path``; ValueError if the file does not hold them."""
    model = load_inception(path).to(device)
    digest = _digest(path)
    official = digest == OFFICIAL
    return Extractor(f"inception-{digest}", model, device, inception=True, official=official)


def pixels_extractor(device: torch.device) -> Extractor:
    """Features without weights: the pixels, averaged to at most 8 x 8.

    A Fréchet distance of them sees colours and coarse shapes. It is a sanity check of samples of
    one data set, and no FID.
    """
    return Extractor(PIXELS, coarse_pixels, device)


def coarse_pixels(images: Tensor) -> Tensor:
    """uint8 ``[N, C, H, W]`` -> fp32 ``[N, C min(H, 8) min(W, 8)]`` in [-1, 1]."""
    side = [min(length, COARSE) for length in images.shape[2:]]
    return (F.adaptive_avg_pool2d(images.float(), side) / 127.5 - 1).flatten(1)


def named_extractor(spec: str, shape: list[int], device: torch.device) -> Extractor:
    """An extractor that the user names.

    It is called with uint8 ``[N, C, H, W]`` on ``device`` and returns ``[N, D]``, or that and
    logits ``[N, K]``.

    Args:
        spec: ``pixels``, a TorchScript file, or ``module:function`` of a module that can be
            imported. Modules in the working directory can.
        shape: [H, W, C] of the images. The extractor is tried on one such image.
        device: where it runs.

    Raises:
        ValueError: there is no such file, module or function, or it does not work on such images.
    """
    if spec == PIXELS:
        return pixels_extractor(device)
    if Path(spec).is_file():
        try:
            network = torch.jit.load(spec, device).eval()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{spec} is no TorchScript file: {reason}") from None
        extractor = Extractor(f"{Path(spec).stem}-{_digest(spec)}", network, device, spec=spec)
        try_on_image(extractor, shape)
        return extractor
    compute = _imported(spec)
    if isinstance(compute, nn.Module):
        compute = compute.to(device).eval()
    # its weights are not in a file that we know, so its name gets a hash of its output
    extractor = Extractor(spec.replace(":", "."), compute, device, spec=spec)
    digits = " ".join(f"{x:.3g}" for x in try_on_image(extractor, shape).tolist())
    digest = hashlib.sha256(digits.encode()).hexdigest()[:8]
    return replace(extractor, name=f"{extractor.name}-{digest}")


def _imported(spec: str) -> Callable:
    """The function or module that ``module:function`` names."""
    module, _, function = spec.partition(":")
    if not (module and function):
        raise ValueError(
            f"features must be pixels, a TorchScript file or module:function, got {spec}"
        )
    # a script that is launched by path does not look there by itself
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except Exception as error:
        # a module may raise anything, a syntax error for example
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"features {spec} cannot be imported: {reason}") from None


def file_of(spec: str) -> Path | None:
    """The file that an extractor of the user's is in, if it is one of the working directory."""
    module, _, function = spec.partition(":")
    file = Path(module.replace(".", "/") + ".py") if function else Path(spec)
    return file if file.is_file() else None


def try_on_image(extractor: Extractor, shape: list[int]) -> Tensor:
    """Features ``[D]`` of a fixed image. They tell two sets of weights of one function apart.

    Args:
        extractor: what to try.
        shape: [H, W, C] of the image.

    Raises:
        ValueError: the extractor does not work on such images.
    """
    height, width, channels = shape
    # 37 has no factor in common with 256: every value appears
    values = torch.arange(channels * height * width) * 37 % 256
    image = values.to(torch.uint8).view(1, channels, height, width)
    with torch.inference_mode():
        return extractor(image).pool.flatten()


def feature_width(extractor: Extractor, shape: list[int]) -> int:
    """Number of features of an image of shape [H, W, C]; ValueError: see ``try_on_image``."""
    # known, and one image through Inception takes half a second on a CPU
    return POOL if extractor.inception else len(try_on_image(extractor, shape))
