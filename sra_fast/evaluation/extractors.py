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
from torch import Tensor, nn

from sra_fast.evaluation.inception import load_inception

OFFICIAL = "6726825d"  # of the SHA-256 of torch-fidelity's (and pytorch-fid's) weights


class Features(NamedTuple):
    """Of a batch of N images."""

    pool: Tensor
    """``[N, D]``"""
    spatial: Tensor | None = None
    """``[N, S]``, for sFID"""
    logits: Tensor | None = None
    """``[N, K]``, for the Inception score"""


@dataclass(frozen=True)
class Extractor:
    """Features of uint8 images ``[N, C, H, W]`` on ``device``, with exact convolutions whatever the process has chosen."""

    name: str
    """what it is, with a hash of its weights: the identity in reports and in the names of cached statistics"""
    compute: Callable[[Tensor], tuple]
    device: torch.device
    inception: bool = False
    """one that statistics of the ADM suite belong to"""
    official: bool = False
    """the weights that published numbers are made with"""

    def __call__(self, images: Tensor) -> Features:
        """ValueError if what comes out is no ``[N, D]`` or ``([N, D], logits [N, K])``, or not finite."""
        # TF32 convolutions are PyTorch's default on a GPU; they move features in the third digit
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            out = self.compute(images.to(self.device))
        if self.inception:
            return self._checked(Features(*out), len(images))
        pool, logits = out if isinstance(out, (tuple, list)) and len(out) == 2 else (out, None)
        return self._checked(Features(pool, None, logits), len(images))

    def _checked(self, features: Features, count: int) -> Features:
        for x in features:
            if x is None:
                continue
            if not isinstance(x, Tensor) or x.ndim != 2 or len(x) != count:
                got = [*x.shape] if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"{self.name} must give [{count}, D] or ([{count}, D], logits [{count}, K]), it gave {got}"
                )
            if not x.isfinite().all():
                raise ValueError(f"{self.name} gave features that are not finite")
        return features


def _digest(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:8]


def inception_extractor(path: str, device: torch.device) -> Extractor:
    """Inception with the weights at ``path``; ValueError if there are none."""
    model = load_inception(path).to(device)
    digest = _digest(path)
    return Extractor(
        f"inception-{digest}", model, device, inception=True, official=digest == OFFICIAL
    )


def named_extractor(spec: str, shape: list[int], device: torch.device) -> Extractor:
    """A TorchScript file, or ``module:function`` of a module that can be imported or lies in the working directory.

    It is called with uint8 ``[N, C, H, W]`` on ``device`` and gives ``[N, D]``, or that and logits ``[N, K]``.

    Args:
        shape: ``(H, W, C)`` of the images; it is tried on one.

    Raises:
        ValueError: no such file, module or function, or it does not work on such images.
    """
    if Path(spec).is_file():
        try:
            extractor = Extractor(
                f"{Path(spec).stem}-{_digest(spec)}", torch.jit.load(spec, device).eval(), device
            )
        except RuntimeError as error:
            raise ValueError(
                f"{spec} is no TorchScript file: {str(error).splitlines()[0]}"
            ) from None
        probe(extractor, shape)
        return extractor
    compute = _imported(spec)
    if isinstance(compute, nn.Module):
        compute = compute.to(device).eval()
    extractor = Extractor(spec.replace(":", "."), compute, device)
    return replace(extractor, name=f"{extractor.name}-{probe(extractor, shape)}")


def _imported(spec: str) -> Callable:
    module, _, function = spec.partition(":")
    if not (module and function):
        raise ValueError(f"features must be a TorchScript file or module:function, got {spec}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {spec} cannot be imported: {error}") from None


def probe(extractor: Extractor, shape: list[int]) -> str:
    """Hash of the features of a fixed image of ``shape (H, W, C)``, 3 digits each: a function's weights can change when its
    file does not.  ValueError: it does not work on such images."""
    height, width, channels = shape
    image = (
        torch.arange(channels * height * width)
        .mul(37)
        .remainder(256)
        .to(torch.uint8)
        .view(1, channels, height, width)
    )
    try:
        with torch.inference_mode():
            pool = extractor(image).pool
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{extractor.name} failed on uint8 {[*image.shape]}: {str(error).strip().splitlines()[-1]}"
        ) from None
    return hashlib.sha256(
        " ".join(f"{x:.3g}" for x in pool.flatten().tolist()).encode()
    ).hexdigest()[:8]
