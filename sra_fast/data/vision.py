"""A vision model of transformers as an extractor of patch features, loaded from a local folder."""

import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_fast.data.reasons import why
from sra_fast.data.vae import repeatable, weights_digest
from sra_fast.utils.checks import require_that

CONFIG = "config.json"
# how a folder says what its model is to be given
PREPROCESSOR = "preprocessor_config.json"
# entries of config.json that say nothing of the features
UNSAID = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


@dataclass(frozen=True)
class VisionModel:
    """A vision model and what it is to be given.

    Attributes:
        model: from ``pixel_values`` to ``last_hidden_state``, fp32, in eval mode.
        path: its folder.
        patch: side of a patch, in pixels.
        scale: a value of 0 .. 255 is multiplied with it before anything else.
        mean, std: of the three channels: an input is (pixel * scale - mean) / std.
        identity: ``class``, and ``sha256`` of configuration and weights.
    """

    model: nn.Module
    path: str
    patch: int
    scale: float
    mean: list[float]
    std: list[float]
    identity: dict


def load_vision_model(path: str) -> VisionModel:
    """The vision model in a folder that ``save_pretrained`` wrote.

    Nothing is downloaded, and no code of the folder runs.

    Of a model of images and texts (CLIP, SigLIP) it is the part that sees images.

    Raises:
        ValueError: transformers is not installed, or the folder holds no vision model of square
            patches, a part of one, or no ``preprocessor_config.json``.
    """
    folder = Path(path)
    require_that(
        (folder / CONFIG).is_file(),
        f"--features must name the folder of a vision model, there is no {CONFIG} in {path}",
    )
    scale, mean, std = read_preprocessor(folder / PREPROCESSOR)
    whole, missing = _load(path)
    model = getattr(whole, "vision_model", whole)
    patch = _patch_of(model, path)
    channels = getattr(model.config, "num_channels", 3)
    require_that(
        channels == 3, f"--features {path} must take images of 3 channels, it takes {channels}"
    )
    prefix = "" if model is whole else "vision_model."
    # the pooler comes after the features; without weights it is drawn anew at every start
    lacking = [name for name in missing if name.startswith(prefix) and "pooler." not in name]
    if lacking:
        raise ValueError(
            f"--features {path} lacks {len(lacking)} weights of its {type(model).__name__}, the "
            f"first is {lacking[0]}"
        )
    identity = {"class": type(model).__name__, "sha256": _sha256(model, folder / CONFIG)}
    return VisionModel(model, path, patch, scale, mean, std, identity)


def _load(path: str) -> tuple[nn.Module, list[str]]:
    """The model in a folder, and the names of the weights that the folder does not have."""
    try:
        from transformers import AutoModel
        from transformers.utils import logging
    except ImportError:
        raise ValueError(
            "--features needs transformers: pip install 'sra-fast[features]'"
        ) from None
    try:
        with quiet(logging):
            model, info = AutoModel.from_pretrained(
                path, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:
        # transformers, safetensors and torch each raise their own types
        raise ValueError(
            f"--features {path} holds no readable model: {first_line(error)}"
        ) from None
    return model.float().eval().requires_grad_(False), sorted(info["missing_keys"])


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextmanager
def quiet(logging) -> Iterator[None]:
    """No bar and no table: what matters of them is checked, and said in one line."""
    verbosity = logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def read_preprocessor(file: Path) -> tuple[float, list[float], list[float]]:
    """Scale, mean and deviation. The file is read as it is: the classes that it names need packages
    that the model does not.
    """
    try:
        held = json.loads(file.read_bytes())
        scale = float(held.get("rescale_factor", 1 / 255)) if held.get("do_rescale", True) else 1.0
        mean = [0.0, 0.0, 0.0]
        std = [1.0, 1.0, 1.0]
        if held.get("do_normalize", True):
            mean = [float(value) for value in held["image_mean"]]
            std = [float(value) for value in held["image_std"]]
        finite = all(map(math.isfinite, (scale, *mean, *std)))
        if len(mean) != 3 or len(std) != 3 or not finite or min(std) <= 0:
            raise ValueError(f"got {mean} and {std}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} must hold image_mean and image_std of three channels: {why(error)}"
        ) from None
    return scale, mean, std


def _patch_of(model: nn.Module, path: str) -> int:
    """Side of a model's patches."""
    patch = getattr(model.config, "patch_size", None)
    sides = {*patch} if isinstance(patch, list | tuple) else {patch}
    side = sides.pop()
    require_that(
        isinstance(side, int) and not sides,
        f"--features {path} must hold a vision model of square patches, {type(model).__name__} has "
        f"patch_size {patch}",
    )
    return side


def _sha256(model: nn.Module, config: Path) -> str:
    """Of what decides the features: the weights but for the pooler's, and the configuration."""
    weights = model.state_dict().items()
    digest = weights_digest({name: value for name, value in weights if "pooler." not in name})
    settings = json.loads(config.read_bytes())
    kept = {name: value for name, value in settings.items() if name not in UNSAID}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def make_extractor(
    vision: VisionModel, grid: int, precision: str, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function from images to patch features. The same batch always gives the same bits.

    Images are resized to ``grid`` patches a side (bicubic, antialiased). The features are the last
    ``grid * grid`` tokens of ``last_hidden_state``: class and register tokens come before them.

    Args:
        vision: its model is moved to ``device``.
        grid: patches per side.
        precision: see ``make_encoder``.

    Returns:
        uint8 images ``[B, C, R, R]`` of 1 or 3 channels -> fp32 features ``[B, grid * grid, D]`` on
        the CPU. ValueError: the model's tokens are not these patches.
    """
    model = vision.model.to(device)
    side = grid * vision.patch
    mean = torch.tensor(vision.mean, device=device)[:, None, None]
    std = torch.tensor(vision.std, device=device)[:, None, None]
    parameters = inspect.signature(model.forward).parameters
    # others do it unasked (DINOv2), have no table of positions (DINOv3), or refuse other sizes
    options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}

    @torch.no_grad()
    def extract(pixels: Tensor) -> Tensor:
        # in one order in memory: files have channels last, and rounding would differ
        images = pixels.to(device).contiguous().float() * vision.scale
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        # a single channel becomes three here
        images = (images - mean) / std
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with repeatable(tf32=precision == "tf32"), autocast:
            tokens = model(pixel_values=images, **options).last_hidden_state
        _check_tokens(tokens, vision, grid)
        return tokens[:, -grid * grid :].float().cpu()

    return extract


def _check_tokens(tokens: Tensor, vision: VisionModel, grid: int) -> None:
    """ValueError unless tokens are ``grid * grid`` patches after a few others."""
    registers = getattr(vision.model.config, "num_register_tokens", None) or 0
    # none, a class token, or that and a distillation token
    others = (0, registers + 1, registers + 2)
    if tokens.ndim != 3 or tokens.shape[1] - grid * grid not in others:
        raise ValueError(
            f"a token for each of {grid} x {grid} patches was expected, got {[*tokens.shape[1:]]}"
        )


def features_shape(
    vision: VisionModel, extract: Callable[[Tensor], Tensor], grid: int, channels: int, size: int
) -> tuple[int, int]:
    """[T, D] of the features of an image of ``channels`` channels and ``size`` pixels.

    Raises:
        ValueError: images of other than 1 or 3 channels, or the model cannot take them in the size
            that ``grid`` asks for.
    """
    require_that(channels in (1, 3), f"--features needs images of 1 or 3 channels, got {channels}")
    # one image through the model is the surest way to know
    black = torch.zeros(1, channels, size, size, dtype=torch.uint8)
    side = grid * vision.patch
    try:
        tokens = extract(black)
    except Exception as error:
        # every model raises its own types
        raise ValueError(
            f"--features {vision.path} has no use for images of {side} x {side} pixels: "
            f"{first_line(error)}"
        ) from None
    return tuple(tokens.shape[1:])
