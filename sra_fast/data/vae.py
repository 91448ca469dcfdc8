"""The image autoencoder: diffusers' AutoencoderKL, loaded from a local folder."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sra_fast.data.normalization import OF_LATENTS, Normalization, check_statistics


def load_vae(path: str, channels: int | None = None):
    """diffusers' AutoencoderKL in fp32 and eval mode, from a folder or the hub's cache. Nothing is downloaded.

    Args:
        path: folder, or id of a model in the hub's cache.
        channels: how many channels its latents must have; None: any.

    Raises:
        ValueError: diffusers is not installed, ``path`` is no AutoencoderKL, or its latents have
            other channels.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError("--vae needs diffusers: pip install 'sra-fast[vae]'") from None
    try:
        # the default low_cpu_mem_usage=True would need accelerate
        vae = AutoencoderKL.from_pretrained(path, local_files_only=True, low_cpu_mem_usage=False)
    except Exception as error:
        # diffusers, huggingface_hub, safetensors and torch each raise their own types
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--vae {path} holds no AutoencoderKL: {reason}") from None
    found = vae.config.latent_channels
    if channels not in (None, found):
        raise ValueError(
            f"--vae {path} is for latents of {found} channels, the model has {channels}"
        )
    return vae.float().eval().requires_grad_(False)


def vae_is_there(path: str) -> bool:
    """Whether the VAE of a data set may still be loaded: a folder that is there, or an id of the hub,
    which only ``load_vae`` can find. Folders are kept as absolute paths.
    """
    return not Path(path).is_absolute() or Path(path).exists()


def vae_identity(vae) -> dict:
    """What decides the latents: ``sha256`` of the encoder's weights, ``scaling_factor`` and
    ``shift_factor``; if the VAE has them, ``latents_mean`` and ``latents_std``, a number for each
    channel. ``Normalization.of_vae`` reads it.

    The decoder is left out: decoders are fine-tuned and swapped without a change of the latents.

    Raises:
        ValueError: its statistics are not those of its channels.
    """
    weights = vae.state_dict().items()
    decisive = {
        name: weight for name, weight in weights if name.startswith(("encoder.", "quant_conv."))
    }
    return {
        "sha256": weights_digest(decisive).hexdigest(),
        "scaling_factor": vae.config.scaling_factor,
        # None in a VAE that has no shift
        "shift_factor": getattr(vae.config, "shift_factor", None) or 0.0,
        **_own_statistics(vae),
    }


def _own_statistics(vae) -> dict:
    """``latents_mean`` and ``latents_std`` of a VAE's configuration; nothing unless it has both."""
    found = {name: getattr(vae.config, name, None) for name in OF_LATENTS}
    if None in found.values():
        return {}
    # diffusers makes tuples of some lists
    lists = {name: [*value] if isinstance(value, tuple) else value for name, value in found.items()}
    check_statistics(*lists.values(), vae.config.latent_channels, "the VAE's config.json")
    return lists


def weights_digest(weights: dict[str, Tensor]):
    """SHA-256 (hashlib's) of weights in fp32, whatever their order."""
    # names and shapes as well: the same numbers under other names are another encoder
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {[*weight.shape]} ".encode())
        digest.update(weight.detach().cpu().float().contiguous().numpy())
    return digest


def make_encoder(vae, precision: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from images to moments. The same batch always gives the same bits.

    Args:
        vae: is moved to ``device``.
        precision: ``fp32``; ``tf32``: fp32 tensors, products rounded to TF32 on a GPU; ``bf16``:
            autocast.

    Returns:
        uint8 images ``[B, 3, R, R]`` -> fp32 moments ``[B, 2C, h, w]`` (mean, standard deviation)
        on the CPU.
    """
    vae.to(device)

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        # uint8 to [-1, 1]
        images = pixels.to(device).float() / 127.5 - 1
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        with repeatable(tf32=precision == "tf32"), autocast:
            posterior = vae.encode(images).latent_dist
        return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1).cpu()

    return encode


@contextmanager
def repeatable(tf32: bool) -> Iterator[None]:
    """Deterministic convolutions, and TF32 as asked for. The process's own settings are restored afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32
        ):
            yield
    finally:
        matmul.allow_tf32 = before


def moments_shape(vae, encode: Callable[[Tensor], Tensor], size: int) -> tuple[int, int, int]:
    """(2C, h, w) of the moments of an image of ``size`` pixels.

    Raises:
        ValueError: the VAE does not take RGB images, or none of this size.
    """
    if vae.config.in_channels != 3:
        raise ValueError(
            f"--vae must take images of 3 channels, this one takes {vae.config.in_channels}"
        )
    # every block but the last halves the side
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size < factor or size % factor:
        raise ValueError(f"resolution must be a multiple of {factor} (the VAE's), got {size}")
    # one image through the encoder is the surest way to know the shape
    black = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    return tuple(encode(black).shape[1:])


@torch.no_grad()
def decode(
    latents: Tensor, vae, normalization: Normalization, batch: int, device: torch.device
) -> Tensor:
    """Latents -> images in [-1, 1].

    Args:
        latents: ``[N, C, h, w]``.
        vae: on ``device``; None: the latents are the images and are returned as they are.
        normalization: of the latents.
        batch: latents per call of the decoder.

    Returns:
        ``[N, 3, H, W]`` (without a VAE ``[N, C, H, W]``) fp32 on the CPU.
    """
    if vae is None:
        return latents
    images = []
    for part in latents.split(batch):
        z = normalization.denormalize(part.to(device))
        images.append(vae.decode(z).sample.float().cpu())
    return torch.cat(images)
