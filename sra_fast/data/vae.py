"""The image autoencoder: diffusers' AutoencoderKL, loaded from a local folder."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def load_vae(path: str, channels: int | None = None):
    """diffusers' AutoencoderKL in fp32, from a folder or from the hub's cache; nothing is downloaded.

    Args:
        channels: that its latents must have.

    Raises:
        ValueError: no diffusers, no AutoencoderKL there, or one of other latents.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError:
        raise ValueError("--vae needs diffusers: pip install 'sra-fast[vae]'") from None
    try:
        # without accelerate, which diffusers' default asks for
        vae = AutoencoderKL.from_pretrained(path, local_files_only=True, low_cpu_mem_usage=False)
    except Exception as error:  # of diffusers, huggingface_hub, safetensors and torch
        raise ValueError(
            f"--vae {path} holds no AutoencoderKL: {str(error).strip().splitlines()[0]}"
        ) from None
    if channels not in (None, vae.config.latent_channels):
        raise ValueError(
            f"--vae {path} is for latents of {vae.config.latent_channels} channels, the model has {channels}"
        )
    return vae.float().eval().requires_grad_(False)


def vae_identity(vae) -> dict:
    """``sha256`` of what makes the latents, the encoder (decoders are fine-tuned and swapped), and the ``scaling_factor``."""
    digest = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {[*weight.shape]} ".encode())
            digest.update(weight.detach().cpu().float().contiguous().numpy())
    return {"sha256": digest.hexdigest(), "scaling_factor": vae.config.scaling_factor}


def make_encoder(vae, precision: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """A function from uint8 images ``[B, 3, R, R]`` to fp32 moments ``[B, 2C, h, w]`` (mean, standard deviation) on the CPU.

    ``precision``: fp32; tf32: products of fp32 numbers rounded to TF32 on a GPU; bf16: autocast.  The same batch gives the
    same bits again.
    """
    vae.to(device)

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        images = pixels.to(device).float() / 127.5 - 1
        with (
            _repeatable(tf32=precision == "tf32"),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            posterior = vae.encode(images).latent_dist
        return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1).cpu()

    return encode


@contextmanager
def _repeatable(tf32: bool) -> Iterator[None]:
    """The same bits from the same batch, and TF32 as said; the process's own choices come back afterwards."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32
        ):
            yield
    finally:
        matmul.allow_tf32 = before


def moments_shape(vae, encode: Callable[[Tensor], Tensor], size: int) -> tuple[int, int, int]:
    """[2C, h, w] of an image of ``size`` pixels; ValueError if it is none that the VAE takes."""
    if vae.config.in_channels != 3:
        raise ValueError(
            f"--vae must take images of 3 channels, this one takes {vae.config.in_channels}"
        )
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size < factor or size % factor:
        raise ValueError(f"resolution must be a multiple of {factor} (the VAE's), got {size}")
    return tuple(encode(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[1:])


@torch.no_grad()
def decode(latents: Tensor, vae, scale: float, batch: int, device: torch.device) -> Tensor:
    """``[N, C, h, w]`` latents -> images in [-1, 1] on the CPU; without a VAE latents of 1 or 3 channels are the images.

    ``scale``: what the latents were multiplied with for training.
    """
    if vae is None:
        return latents
    return torch.cat(
        [vae.decode(part.to(device) / scale).sample.float().cpu() for part in latents.split(batch)]
    )
