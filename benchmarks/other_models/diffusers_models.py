"""Models of diffusers, by the name of their class: arguments for a tiny one, and inputs for any.

Nothing of diffusers is changed. ``tests/integrations`` compares every tiny model with itself after
``integrations.compile``; ``benchmarks/integrations.py`` times them at either size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.timing import make_randn


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs.

    Attributes:
        batch: samples.
        frames: of a video's latents, after its autoencoder.
        height: of the latents, before patches are made.
        width: likewise.
        text: tokens of the prompt.
    """

    batch: int
    frames: int
    height: int
    width: int
    text: int

    @property
    def tokens(self) -> int:
        """Tokens of an image whose patches of 2 x 2 the pipeline has already made."""
        return self.height // 2 * (self.width // 2)


TINY = Sizes(batch=2, frames=2, height=4, width=4, text=3)
# an image of 512 x 512 pixels, or a short video
DEFAULT = Sizes(batch=1, frames=3, height=64, width=64, text=128)


class Draw:
    """Random inputs with a generator of their own.

    Args:
        sizes: of the inputs.
        device: "cpu" or "cuda".
        dtype: of the floating-point inputs.
    """

    def __init__(self, sizes: Sizes, device: str, dtype: torch.dtype):
        self.sizes = sizes
        self.device = device
        self.dtype = dtype
        self._randn = make_randn(0, device)

    def randn(self, *shape: int) -> Tensor:
        return self._randn(*shape, dtype=self.dtype)

    def latents(self, channels: int) -> Tensor:
        """An image ``[B, C, H, W]``."""
        return self.randn(self.sizes.batch, channels, self.sizes.height, self.sizes.width)

    def video(self, channels: int) -> Tensor:
        """``[B, C, F, H, W]``"""
        sizes = self.sizes
        return self.randn(sizes.batch, channels, sizes.frames, sizes.height, sizes.width)

    def packed(self, channels: int) -> Tensor:
        """Tokens of an image ``[B, T, C]``."""
        return self.randn(self.sizes.batch, self.sizes.tokens, channels)

    def text(self, width: int) -> Tensor:
        """Tokens of a prompt ``[B, S, C]``."""
        return self.randn(self.sizes.batch, self.sizes.text, width)

    def vector(self, width: int) -> Tensor:
        """A vector per sample ``[B, C]``."""
        return self.randn(self.sizes.batch, width)

    def steps(self) -> Tensor:
        """Time in 0 .. 999, int64 ``[B]``."""
        return torch.arange(100, 100 + self.sizes.batch, device=self.device)

    def times(self) -> Tensor:
        """Time in (0, 1) ``[B]``."""
        times = torch.linspace(0.2, 0.7, self.sizes.batch, device=self.device)
        return times.to(self.dtype)

    def mask(self, length: int | None = None) -> Tensor:
        """All tokens of the prompt count: int64 ones ``[B, S]``."""
        shape = (self.sizes.batch, length or self.sizes.text)
        return torch.ones(shape, dtype=torch.int64, device=self.device)

    def grid(self, axes: int, first: int = 1) -> Tensor:
        """Positions of an image's tokens ``[T, axes]``: rows and columns from axis ``first``."""
        ids = torch.zeros(self.sizes.tokens, axes, device=self.device)
        columns = self.sizes.width // 2
        index = torch.arange(self.sizes.tokens, device=self.device)
        ids[:, first] = index // columns
        ids[:, first + 1] = index % columns
        return ids

    def no_positions(self, axes: int) -> Tensor:
        """Positions of the tokens of a prompt: zeros ``[S, axes]``."""
        return torch.zeros(self.sizes.text, axes, device=self.device)


Inputs = Callable[[Draw, object], dict]


@dataclass(frozen=True)
class Recipe:
    """A model of diffusers.

    Attributes:
        class_name: in diffusers.
        inputs: makes the arguments of ``forward`` from ``Draw`` and the model's configuration.
        tiny: arguments that make a tiny model; the others keep their defaults.
        default: arguments without which the class makes no model of the published size.
    """

    class_name: str
    inputs: Inputs
    tiny: dict
    default: dict = field(default_factory=dict)


def _dit(draw: Draw, config) -> dict:
    labels = torch.arange(draw.sizes.batch, device=draw.device) % 3
    return {
        "hidden_states": draw.latents(config.in_channels),
        "timestep": draw.steps(),
        "class_labels": labels,
    }


def _pixart(draw: Draw, config) -> dict:
    sizes = {"resolution": None, "aspect_ratio": None}
    return {
        "hidden_states": draw.latents(config.in_channels),
        "encoder_hidden_states": draw.text(config.caption_channels),
        "timestep": draw.steps(),
        "added_cond_kwargs": sizes,
    }


def _latents_and_text(draw: Draw, channels: int, text: int) -> dict:
    """The inputs that most models of images share."""
    return {
        "hidden_states": draw.latents(channels),
        "encoder_hidden_states": draw.text(text),
        "timestep": draw.steps(),
    }


def _video_and_text(draw: Draw, channels: int, text: int) -> dict:
    """The inputs that most models of videos share."""
    return {
        "hidden_states": draw.video(channels),
        "encoder_hidden_states": draw.text(text),
        "timestep": draw.steps(),
    }


def _packed_and_text(draw: Draw, channels: int, text: int) -> dict:
    """The inputs of models that take patches."""
    return {
        "hidden_states": draw.packed(channels),
        "encoder_hidden_states": draw.text(text),
        "timestep": draw.times(),
    }


def _sd3(draw: Draw, config) -> dict:
    return {
        **_latents_and_text(draw, config.in_channels, config.joint_attention_dim),
        "pooled_projections": draw.vector(config.pooled_projection_dim),
    }


def _flux(draw: Draw, config) -> dict:
    axes = len(config.axes_dims_rope)
    inputs = {
        **_packed_and_text(draw, config.in_channels, config.joint_attention_dim),
        "img_ids": draw.grid(axes),
        "txt_ids": draw.no_positions(axes),
    }
    if getattr(config, "pooled_projection_dim", None):
        inputs["pooled_projections"] = draw.vector(config.pooled_projection_dim)
    if getattr(config, "guidance_embeds", False):
        inputs["guidance"] = torch.full_like(inputs["timestep"], 4.0)
    return inputs


def _longcat(draw: Draw, config) -> dict:
    inputs = _flux(draw, config)
    # in its configuration, and unused
    del inputs["pooled_projections"]
    return inputs


def _qwen(draw: Draw, config) -> dict:
    sizes = draw.sizes
    shape = [(1, sizes.height // 2, sizes.width // 2)]
    return {
        **_packed_and_text(draw, config.in_channels, config.joint_attention_dim),
        "img_shapes": [shape] * sizes.batch,
        "encoder_hidden_states_mask": draw.mask(),
    }


def _auraflow(draw: Draw, config) -> dict:
    inputs = _latents_and_text(draw, config.in_channels, config.joint_attention_dim)
    return {**inputs, "timestep": draw.times()}


def _sana(draw: Draw, config) -> dict:
    return _latents_and_text(draw, config.in_channels, config.caption_channels)


def _sana_video(draw: Draw, config) -> dict:
    return _video_and_text(draw, config.in_channels, config.caption_channels)


def _wan(draw: Draw, config) -> dict:
    return _video_and_text(draw, config.in_channels, config.text_dim)


def _wan_per_token(draw: Draw, config) -> dict:
    inputs = _wan(draw, config)
    tokens = draw.sizes.frames * draw.sizes.tokens
    steps = torch.arange(100, 100 + tokens, device=draw.device)
    return {**inputs, "timestep": steps.expand(draw.sizes.batch, tokens).contiguous()}


def _ltx(draw: Draw, config) -> dict:
    sizes = draw.sizes
    tokens = sizes.frames * sizes.tokens
    return {
        "hidden_states": draw.randn(sizes.batch, tokens, config.in_channels),
        "encoder_hidden_states": draw.text(config.caption_channels),
        "timestep": draw.steps(),
        "encoder_attention_mask": draw.mask(),
        "num_frames": sizes.frames,
        "height": sizes.height // 2,
        "width": sizes.width // 2,
    }


def _lumina2(draw: Draw, config) -> dict:
    return {
        "hidden_states": draw.latents(config.in_channels),
        "encoder_hidden_states": draw.text(config.cap_feat_dim),
        "timestep": draw.times(),
        "encoder_attention_mask": draw.mask().bool(),
    }


def _hunyuan_video(draw: Draw, config) -> dict:
    inputs = {
        **_video_and_text(draw, config.in_channels, config.text_embed_dim),
        "encoder_attention_mask": draw.mask(),
        "pooled_projections": draw.vector(config.pooled_projection_dim),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full_like(draw.times(), 4000.0)
    return inputs


def _hunyuan_image(draw: Draw, config) -> dict:
    inputs = _latents_and_text(draw, config.in_channels, config.text_embed_dim)
    return {
        **inputs,
        "timestep": inputs["timestep"].to(draw.dtype),
        "encoder_attention_mask": draw.mask(),
    }


def _hunyuan_video15(draw: Draw, config) -> dict:
    inputs = _video_and_text(draw, config.in_channels, config.text_embed_dim)
    return {
        **inputs,
        "timestep": inputs["timestep"].to(draw.dtype),
        "encoder_attention_mask": draw.mask(),
        "encoder_hidden_states_2": draw.text(config.text_embed_2_dim),
        "encoder_attention_mask_2": draw.mask(),
        "image_embeds": draw.randn(draw.sizes.batch, 3, config.image_embed_dim),
    }


def _mochi(draw: Draw, config) -> dict:
    return {
        **_video_and_text(draw, config.in_channels, config.text_embed_dim),
        "encoder_attention_mask": draw.mask().bool(),
    }


def _cogvideox(draw: Draw, config) -> dict:
    sizes = draw.sizes
    shape = (sizes.batch, sizes.frames, config.in_channels, sizes.height, sizes.width)
    return {
        "hidden_states": draw.randn(*shape),
        "encoder_hidden_states": draw.text(config.text_embed_dim),
        "timestep": draw.steps(),
    }


def _cogview(draw: Draw, config) -> dict:
    size = torch.tensor([[8 * draw.sizes.height, 8 * draw.sizes.width]], device=draw.device)
    sizes = size.expand(draw.sizes.batch, 2).to(draw.dtype)
    return {
        **_latents_and_text(draw, config.in_channels, config.text_embed_dim),
        "original_size": sizes,
        "target_size": sizes,
        "crop_coords": torch.zeros_like(sizes),
    }


def _glm_image(draw: Draw, config) -> dict:
    inputs = _cogview(draw, config)
    del inputs["original_size"]
    tokens = torch.arange(draw.sizes.tokens, device=draw.device)
    tokens = tokens.expand(draw.sizes.batch, -1) % config.prior_vq_quantizer_codebook_size
    return {
        **inputs,
        "prior_token_id": tokens,
        "prior_token_drop": torch.zeros_like(tokens, dtype=torch.bool),
    }


def _hidream(draw: Draw, config) -> dict:
    sizes = draw.sizes
    layers = len(config.llama_layers)
    width = config.caption_channels[1]
    return {
        "hidden_states": draw.latents(config.in_channels),
        "timesteps": draw.steps(),
        "encoder_hidden_states_t5": draw.text(config.caption_channels[0]),
        "encoder_hidden_states_llama3": draw.randn(layers, sizes.batch, sizes.text, width),
        "pooled_embeds": draw.vector(config.text_emb_dim),
    }


def _omnigen(draw: Draw, config) -> dict:
    sizes = draw.sizes
    text = torch.arange(sizes.text, device=draw.device).expand(sizes.batch, -1)
    # the prompt, the time and the image
    length = sizes.text + 1 + sizes.tokens
    positions = torch.arange(length, device=draw.device).expand(sizes.batch, -1)
    return {
        "hidden_states": draw.latents(config.in_channels),
        "timestep": draw.times(),
        "input_ids": text,
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(sizes.batch, length, length, device=draw.device).to(
            draw.dtype
        ),
        "position_ids": positions,
    }


def _z_image(draw: Draw, config) -> dict:
    sizes = draw.sizes
    shape = (config.in_channels, 1, sizes.height, sizes.width)
    return {
        "x": [draw.randn(*shape) for _ in range(sizes.batch)],
        "t": draw.times(),
        "cap_feats": [draw.randn(sizes.text, config.cap_feat_dim) for _ in range(sizes.batch)],
    }


def _latte(draw: Draw, config) -> dict:
    return _video_and_text(draw, config.in_channels, config.caption_channels)


def _hunyuan_dit(draw: Draw, config) -> dict:
    sizes = draw.sizes
    head = config.hidden_size // config.num_attention_heads
    rotary = draw.randn(sizes.tokens, head), draw.randn(sizes.tokens, head)
    first = draw.randn(sizes.batch, config.text_len, config.cross_attention_dim)
    second = draw.randn(sizes.batch, config.text_len_t5, config.cross_attention_dim_t5)
    return {
        "hidden_states": draw.latents(config.in_channels),
        "timestep": draw.steps().to(draw.dtype),
        "encoder_hidden_states": first,
        "text_embedding_mask": draw.mask(config.text_len),
        "encoder_hidden_states_t5": second,
        "text_embedding_mask_t5": draw.mask(config.text_len_t5),
        "image_meta_size": torch.full((sizes.batch, 6), 32, device=draw.device).to(draw.dtype),
        "style": torch.zeros(sizes.batch, dtype=torch.int64, device=draw.device),
        "image_rotary_emb": rotary,
    }


def _stable_audio(draw: Draw, config) -> dict:
    sizes = draw.sizes
    # with the token of the global state
    length = sizes.tokens + 1
    half = config.attention_head_dim // 2
    return {
        "hidden_states": draw.randn(sizes.batch, config.in_channels, sizes.tokens),
        "timestep": draw.times(),
        "encoder_hidden_states": draw.text(config.cross_attention_input_dim),
        "global_hidden_states": draw.randn(sizes.batch, 1, config.global_states_input_dim),
        "rotary_embedding": (draw.randn(length, half), draw.randn(length, half)),
    }


def _kandinsky5(draw: Draw, config) -> dict:
    sizes = draw.sizes
    shape = (sizes.batch, sizes.frames, sizes.height, sizes.width, config.in_visual_dim)
    sides = (sizes.frames, sizes.height // 2, sizes.width // 2)
    return {
        "hidden_states": draw.randn(*shape),
        "encoder_hidden_states": draw.text(config.in_text_dim),
        "timestep": draw.times(),
        "pooled_projections": draw.vector(config.in_text_dim2),
        "visual_rope_pos": [torch.arange(side, device=draw.device) for side in sides],
        "text_rope_pos": torch.arange(sizes.text, device=draw.device),
    }


def _prx(draw: Draw, config) -> dict:
    inputs = _latents_and_text(draw, config.in_channels, config.context_in_dim)
    return {**inputs, "timestep": draw.times()}


def _ernie(draw: Draw, config) -> dict:
    sizes = draw.sizes
    lengths = torch.full((sizes.batch,), sizes.text, device=draw.device)
    return {
        "hidden_states": draw.latents(config.in_channels),
        "timestep": draw.steps(),
        "text_bth": draw.text(config.text_in_dim),
        "text_lens": lengths,
    }


def _krea2(draw: Draw, config) -> dict:
    sizes = draw.sizes
    ids = torch.cat([draw.no_positions(3), draw.grid(3)])
    shape = (sizes.batch, sizes.text, config.num_text_layers, config.text_hidden_dim)
    return {
        "hidden_states": draw.packed(config.in_channels),
        "encoder_hidden_states": draw.randn(*shape),
        "timestep": draw.times(),
        "position_ids": ids,
    }


def _bria_fibo(draw: Draw, config) -> dict:
    sizes = draw.sizes
    layers = config.num_layers + config.num_single_layers
    width = config.text_encoder_dim
    return {
        **_flux(draw, config),
        "text_encoder_layers": [draw.randn(sizes.batch, sizes.text, width) for _ in range(layers)],
    }


def _any_flow(draw: Draw, config) -> dict:
    # frames come before channels, and every frame has a time
    steps = draw.steps()[:, None].expand(-1, draw.sizes.frames)
    return {
        "hidden_states": draw.video(config.in_channels).transpose(1, 2),
        "encoder_hidden_states": draw.text(config.text_dim),
        "timestep": steps,
        "r_timestep": steps // 2,
    }


def _wan_vace(draw: Draw, config) -> dict:
    return {**_wan(draw, config), "control_hidden_states": draw.video(config.vace_in_channels)}


def _sky_reels_per_frame(draw: Draw, config) -> dict:
    inputs = _wan(draw, config)
    steps = draw.steps()[:, None] + 10 * torch.arange(draw.sizes.frames, device=draw.device)
    return {**inputs, "timestep": steps, "enable_diffusion_forcing": True}


def _joy_image(draw: Draw, config) -> dict:
    return _video_and_text(draw, config.in_channels, config.text_dim)


_ROPE = {"axes_dims_rope": (4, 6, 6)}
_TWO_AND_TWO = {"num_layers": 2, "num_single_layers": 2}
_FLUX = {
    "in_channels": 4,
    **_TWO_AND_TWO,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    **_ROPE,
}
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
_SD3 = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 4,
}
_COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "condition_dim": 8,
}
_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
}
_SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
}

# several recipes may use one class: after the name of the class comes what differs
RECIPES = {
    "DiTTransformer2DModel": Recipe(
        "DiTTransformer2DModel",
        _dit,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "sample_size": 4,
            "num_embeds_ada_norm": 10,
        },
    ),
    "PixArtTransformer2DModel": Recipe(
        "PixArtTransformer2DModel",
        _pixart,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "sample_size": 4,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "use_additional_conditions": False,
        },
        {"caption_channels": 4096, "use_additional_conditions": False},
    ),
    "SD3Transformer2DModel": Recipe("SD3Transformer2DModel", _sd3, {**_SD3, "num_layers": 3}),
    "SD3Transformer2DModel, dual attention": Recipe(
        "SD3Transformer2DModel",
        _sd3,
        {**_SD3, "num_layers": 2, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
    ),
    "FluxTransformer2DModel": Recipe(
        "FluxTransformer2DModel",
        _flux,
        {**_FLUX, "pooled_projection_dim": 16, "guidance_embeds": True},
    ),
    "QwenImageTransformer2DModel": Recipe(
        "QwenImageTransformer2DModel",
        _qwen,
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            **_ROPE,
        },
    ),
    "AuraFlowTransformer2DModel": Recipe(
        "AuraFlowTransformer2DModel",
        _auraflow,
        {
            "sample_size": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
    ),
    "SanaTransformer2DModel": Recipe("SanaTransformer2DModel", _sana, {**_SANA, "sample_size": 4}),
    "WanTransformer3DModel": Recipe("WanTransformer3DModel", _wan, _WAN),
    "WanTransformer3DModel, a time per token": Recipe(
        "WanTransformer3DModel", _wan_per_token, _WAN
    ),
    "LTXVideoTransformer3DModel": Recipe(
        "LTXVideoTransformer3DModel",
        _ltx,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 24,
        },
    ),
    "Lumina2Transformer2DModel": Recipe(
        "Lumina2Transformer2DModel",
        _lumina2,
        {
            "sample_size": 4,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 24,
        },
    ),
    "HunyuanVideoTransformer3DModel": Recipe(
        "HunyuanVideoTransformer3DModel",
        _hunyuan_video,
        {**_HUNYUAN, **_TWO_AND_TWO, "pooled_projection_dim": 16, "rope_axes_dim": (4, 6, 6)},
    ),
    "HunyuanImageTransformer2DModel": Recipe(
        "HunyuanImageTransformer2DModel",
        _hunyuan_image,
        {**_HUNYUAN, **_TWO_AND_TWO, "rope_axes_dim": (8, 8)},
    ),
    "HunyuanVideo15Transformer3DModel": Recipe(
        "HunyuanVideo15Transformer3DModel",
        _hunyuan_video15,
        {
            **_HUNYUAN,
            "num_layers": 2,
            "text_embed_2_dim": 20,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    "MochiTransformer3DModel": Recipe(
        "MochiTransformer3DModel",
        _mochi,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
        },
    ),
    "CogVideoXTransformer3DModel": Recipe(
        "CogVideoXTransformer3DModel",
        _cogvideox,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 24,
            "num_layers": 2,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 5,
            "max_text_seq_length": 3,
        },
    ),
    "CogView3PlusTransformer2DModel": Recipe(
        "CogView3PlusTransformer2DModel",
        _cogview,
        {**_COGVIEW, "pos_embed_max_size": 8, "sample_size": 8},
    ),
    "CogView4Transformer2DModel": Recipe(
        "CogView4Transformer2DModel", _cogview, {**_COGVIEW, "rope_axes_dim": (32, 32)}
    ),
    "GlmImageTransformer2DModel": Recipe(
        "GlmImageTransformer2DModel",
        _glm_image,
        {**_COGVIEW, "prior_vq_quantizer_codebook_size": 16},
    ),
    "HiDreamImageTransformer2DModel": Recipe(
        "HiDreamImageTransformer2DModel",
        _hidream,
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            **_TWO_AND_TWO,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "caption_channels": [24, 20],
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (16, 16),
            "llama_layers": (0, 1, 2, 3),
        },
        {
            "patch_size": 2,
            "in_channels": 16,
            "caption_channels": [4096, 4096],
            "axes_dims_rope": (64, 32, 32),
            "llama_layers": tuple(range(48)),
        },
    ),
    "ChromaTransformer2DModel": Recipe(
        "ChromaTransformer2DModel",
        _flux,
        {
            **_FLUX,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
    ),
    "OmniGenTransformer2DModel": Recipe(
        "OmniGenTransformer2DModel",
        _omnigen,
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 16,
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 64,
            "pos_embed_max_size": 8,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        {"rope_scaling": {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}},
    ),
    "BriaTransformer2DModel": Recipe("BriaTransformer2DModel", _flux, _FLUX),
    "BriaFiboTransformer2DModel": Recipe(
        "BriaFiboTransformer2DModel", _bria_fibo, {**_FLUX, "text_encoder_dim": 16}
    ),
    "Flux2Transformer2DModel": Recipe(
        "Flux2Transformer2DModel",
        _flux,
        {**_FLUX, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "ZImageTransformer2DModel": Recipe(
        "ZImageTransformer2DModel",
        _z_image,
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [64, 16, 16],
        },
    ),
    "SanaVideoTransformer3DModel": Recipe(
        "SanaVideoTransformer3DModel",
        _sana_video,
        {**_SANA, "sample_size": 4, "rope_max_seq_len": 32},
    ),
    "LatteTransformer3DModel": Recipe(
        "LatteTransformer3DModel",
        _latte,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "sample_size": 4,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 10,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 24,
            "video_length": 2,
        },
        {
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 4096,
        },
    ),
    "AllegroTransformer3DModel": Recipe(
        "AllegroTransformer3DModel",
        _latte,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "sample_height": 4,
            "sample_width": 4,
            "sample_frames": 2,
            "caption_channels": 24,
        },
    ),
    "HunyuanDiT2DModel": Recipe(
        "HunyuanDiT2DModel",
        _hunyuan_dit,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 4,
            "hidden_size": 32,
            "num_layers": 4,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 16,
            "text_len": 3,
            "text_len_t5": 3,
        },
        {"in_channels": 4, "patch_size": 2},
    ),
    "StableAudioDiTModel": Recipe(
        "StableAudioDiTModel",
        _stable_audio,
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 16,
            "time_proj_dim": 16,
            "global_states_input_dim": 24,
            "cross_attention_input_dim": 16,
        },
    ),
    "SkyReelsV2Transformer3DModel": Recipe("SkyReelsV2Transformer3DModel", _wan, _WAN),
    "SkyReelsV2Transformer3DModel, a time per frame": Recipe(
        "SkyReelsV2Transformer3DModel", _sky_reels_per_frame, _WAN
    ),
    "AnyFlowTransformer3DModel": Recipe("AnyFlowTransformer3DModel", _any_flow, _WAN),
    "ChronoEditTransformer3DModel": Recipe("ChronoEditTransformer3DModel", _wan, _WAN),
    "WanVACETransformer3DModel": Recipe(
        "WanVACETransformer3DModel",
        _wan_vace,
        {**_WAN, "vace_layers": [0], "vace_in_channels": 6},
    ),
    "Kandinsky5Transformer3DModel": Recipe(
        "Kandinsky5Transformer3DModel",
        _kandinsky5,
        {
            "in_text_dim": 24,
            "in_text_dim2": 16,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
    ),
    "PRXTransformer2DModel": Recipe(
        "PRXTransformer2DModel",
        _prx,
        {
            "in_channels": 4,
            "context_in_dim": 24,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [8, 8],
        },
        {"axes_dim": [32, 32]},
    ),
    "ErnieImageTransformer2DModel": Recipe(
        "ErnieImageTransformer2DModel",
        _ernie,
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    "Krea2Transformer2DModel": Recipe(
        "Krea2Transformer2DModel",
        _krea2,
        {
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 24,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            **_ROPE,
        },
    ),
    "OvisImageTransformer2DModel": Recipe(
        "OvisImageTransformer2DModel", _flux, {**_FLUX, "out_channels": 4}
    ),
    "LongCatImageTransformer2DModel": Recipe("LongCatImageTransformer2DModel", _longcat, _FLUX),
    "JoyImageEditTransformer3DModel": Recipe(
        "JoyImageEditTransformer3DModel",
        _joy_image,
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 24,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
    ),
}


# arguments of constructors that count blocks
DEPTHS = (
    "num_layers",
    "num_single_layers",
    "num_mmdit_layers",
    "num_single_dit_layers",
    "num_visual_blocks",
    "n_layers",
    "depth",
)


def build(
    name: str,
    tiny: bool,
    sizes: Sizes,
    device: str,
    dtype: torch.dtype,
    layers: int | None = None,
) -> tuple[nn.Module, dict]:
    """A model with random weights, none of which is zero, and its inputs.

    Args:
        name: of ``RECIPES``.
        tiny: with the arguments of ``Recipe.tiny``; otherwise the defaults of the class.
        sizes: of the inputs.
        device: "cpu" or "cuda".
        dtype: of weights and inputs.
        layers: blocks of each kind; None for as many as the other arguments say.

    Returns:
        The model in ``eval`` mode, in which it drops no labels at random, and the arguments of
        its ``forward``.

    Raises:
        ValueError: an unknown name, or this version of diffusers has no such class.
    """
    import diffusers

    if name not in RECIPES:
        raise ValueError(f"--model: expected one of {'; '.join(RECIPES)}; got {name!r}")
    recipe = RECIPES[name]
    if not hasattr(diffusers, recipe.class_name):
        raise ValueError(
            f"--model: expected a diffusers with {recipe.class_name}; got {diffusers.__version__}"
        )
    arguments = dict(recipe.tiny if tiny else recipe.default)
    if layers is not None:
        arguments.update({key: layers for key in DEPTHS if key in recipe.tiny})
    with torch.device(device):
        model = getattr(diffusers, recipe.class_name)(**arguments)
    randomize(model)
    # as from_pretrained does it: some parts stay in fp32
    in_fp32 = model._keep_in_fp32_modules or ()
    nn.Module.to(model, dtype=dtype).eval()
    for part, p in model.named_parameters():
        if dtype != torch.float64 and not set(in_fp32).isdisjoint(part.split(".")):
            p.data = p.data.float()
    inputs = recipe.inputs(Draw(sizes, device, dtype), model.config)
    return model, {**inputs, "return_dict": False}


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Draw every parameter, in place: gates that start at zero would hide what they multiply.

    Matrices keep the variance of what they multiply; vectors move away from where they start.
    """
    with torch.no_grad():
        for number, p in enumerate(model.parameters()):
            randn = make_randn(seed + number, str(p.device))
            if p.ndim > 1:
                p.copy_(randn(*p.shape) / p[0].numel() ** 0.5)
            else:
                p.add_(0.2 * randn(*p.shape))
