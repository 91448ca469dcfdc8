"""Small diffusion transformers, one for each way in which the field writes norm, modulation and
gate. They are written from the papers, with the expressions that published codebases use.

Width 32, few tokens. Every model returns a tensor, or a tuple of tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 32
HEADS = 2
CHANNELS = 6
BATCH = 2


class TimeEmbedding(nn.Module):
    """Sines and cosines of the time, then two linear layers: ``[...] -> [..., D]``."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, D), nn.SiLU(), nn.Linear(D, D))
        self.register_buffer("frequencies", torch.logspace(0, 2, 8))

    def forward(self, t):
        angles = t[..., None] * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


def raised(x: Tensor) -> Tensor:
    """In fp32; in fp64 for the truth, in which nothing may be rounded to fp32."""
    return x if x.dtype == torch.float64 else x.float()


class RMSNorm(nn.Module):
    """Normalization by the root mean square as Llama's code writes it: in fp32, then weights."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def normalized(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self.normalized(raised(x)).type_as(x) * self.weight


def layer_norm(eps: float = 1e-6, affine: bool = False) -> nn.LayerNorm:
    return nn.LayerNorm(D, eps=eps, elementwise_affine=affine)


def gelu_mlp(width: int = 4 * D) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, width), nn.GELU("tanh"), nn.Linear(width, D))


class SwiGLU(nn.Module):
    def __init__(self, width: int = 2 * D):
        super().__init__()
        self.w12 = nn.Linear(D, 2 * width)
        self.w3 = nn.Linear(width, D)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of ``[B, heads, T, d]``."""
    length, width = x.shape[-2:]
    frequencies = 10.0 ** -torch.arange(0, 1, 2 / width, device=x.device)
    angles = torch.outer(torch.arange(length, device=x.device).float(), frequencies).to(x.dtype)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


class Attention(nn.Module):
    """Self-attention, or cross-attention to ``context``.

    Args:
        normed: queries and keys go through an RMSNorm.
        rotary: queries and keys are rotated by their positions.
    """

    def __init__(self, normed: bool = False, rotary: bool = False):
        super().__init__()
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * D)
        self.proj = nn.Linear(D, D)
        self.q_norm = RMSNorm(D // HEADS) if normed else nn.Identity()
        self.k_norm = RMSNorm(D // HEADS) if normed else nn.Identity()
        self.rotary = rotary

    def heads(self, x):
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x, context=None):
        context = x if context is None else context
        k, v = self.kv(context).chunk(2, dim=-1)
        q = self.q_norm(self.heads(self.q(x)))
        k = self.k_norm(self.heads(k))
        if self.rotary:
            q, k = rotate(q), rotate(k)
        out = F.scaled_dot_product_attention(q, k, self.heads(v))
        return self.proj(out.transpose(1, 2).flatten(2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """With vectors ``[B, D]``, as DiT writes it."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class FinalLayer(nn.Module):
    """DiT's: a modulated norm and a linear layer."""

    def __init__(self):
        super().__init__()
        self.norm = layer_norm()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.linear = nn.Linear(D, CHANNELS)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiTBlock(nn.Module):
    """adaLN-Zero: Peebles and Xie, Scalable Diffusion Models with Transformers, figure 3."""

    def __init__(self):
        super().__init__()
        self.norm1 = layer_norm()
        self.attn = Attention()
        self.norm2 = layer_norm()
        self.mlp = gelu_mlp()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(
            c
        ).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x


class DiT(nn.Module):
    """Tokens ``[B, T, C]``, times and labels to tokens.

    Args:
        block: makes a block.
        tap: after this many blocks the features also go to a projector, whose result is returned
            too, as in representation alignment (REPA, SRA).
    """

    def __init__(self, block: Callable[[], nn.Module] = DiTBlock, depth: int = 3, tap: int = 0):
        super().__init__()
        self.x_embedder = nn.Linear(CHANNELS, D)
        self.t_embedder = TimeEmbedding()
        self.y_embedder = nn.Embedding(4, D)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.final_layer = FinalLayer()
        self.tap = tap
        if tap:
            self.projector = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, 8))

    def forward(self, x, t, y):
        x = self.x_embedder(x)
        c = self.t_embedder(t) + self.y_embedder(y)
        features = None
        for number, block in enumerate(self.blocks, 1):
            x = block(x, c)
            if number == self.tap:
                features = self.projector(x)
        out = self.final_layer(x, c)
        return out if features is None else (out, features)


class LightningBlock(nn.Module):
    """LightningDiT: RMSNorm, SwiGLU, rotary positions, normed queries and keys.

    Args:
        shifted: without it there are scales and gates only.
    """

    def __init__(self, shifted: bool = True):
        super().__init__()
        self.norm1 = RMSNorm(D)
        self.attn = Attention(normed=True, rotary=True)
        self.norm2 = RMSNorm(D)
        self.mlp = SwiGLU()
        self.shifted = shifted
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, (6 if shifted else 4) * D))

    def modulate(self, x, shift, scale):
        if shift is None:
            return x * (1 + scale.unsqueeze(1))
        return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def forward(self, x, c):
        vectors = self.adaLN_modulation(c)
        if self.shifted:
            shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=1)
        else:
            scale1, gate1, scale2, gate2 = vectors.chunk(4, dim=1)
            shift1 = shift2 = None
        x = x + gate1.unsqueeze(1) * self.attn(self.modulate(self.norm1(x), shift1, scale1))
        x = x + gate2.unsqueeze(1) * self.mlp(self.modulate(self.norm2(x), shift2, scale2))
        return x


class DoubleBlock(nn.Module):
    """Two streams that attend to each other: Esser et al., Scaling Rectified Flow Transformers
    for High-Resolution Image Synthesis, figure 2. Vectors are ``[B, 1, D]``, as Flux writes them.
    """

    def __init__(self):
        super().__init__()
        self.modulations = nn.ModuleList(nn.Linear(D, 6 * D) for _ in range(2))
        self.norms1 = nn.ModuleList(layer_norm() for _ in range(2))
        self.norms2 = nn.ModuleList(layer_norm() for _ in range(2))
        self.attn = Attention(normed=True)
        self.mlps = nn.ModuleList(gelu_mlp() for _ in range(2))

    def forward(self, image, text, c):
        streams = [image, text]
        vectors = [
            modulation(F.silu(c))[:, None, :].chunk(6, dim=-1) for modulation in self.modulations
        ]
        normed = [
            (1 + scale) * norm(x) + shift
            for x, norm, (shift, scale, *_) in zip(streams, self.norms1, vectors, strict=True)
        ]
        attended = self.attn(torch.cat(normed, dim=1))
        parts = attended.split([image.shape[1], text.shape[1]], dim=1)
        results = []
        for i, (x, y) in enumerate(zip(streams, parts, strict=True)):
            _, _, gate1, shift2, scale2, gate2 = vectors[i]
            x = x + gate1 * y
            x = x + gate2 * self.mlps[i]((1 + scale2) * self.norms2[i](x) + shift2)
            results.append(x)
        return results


class SingleBlock(nn.Module):
    """Flux's: attention and MLP side by side, one norm and one gate for both."""

    def __init__(self):
        super().__init__()
        self.modulation = nn.Linear(D, 3 * D)
        self.norm = layer_norm()
        self.attn = Attention(normed=True)
        self.inner = nn.Linear(D, 2 * D)
        self.outer = nn.Linear(3 * D, D)

    def forward(self, x, c):
        shift, scale, gate = self.modulation(F.silu(c))[:, None, :].chunk(3, dim=-1)
        h = (1 + scale) * self.norm(x) + shift
        y = self.outer(torch.cat([self.attn(h), F.gelu(self.inner(h), approximate="tanh")], 2))
        return x + gate * y


class JointModel(nn.Module):
    """Flux: blocks of two streams, then of one."""

    def __init__(self, doubles: int = 2, singles: int = 2):
        super().__init__()
        self.img_in = nn.Linear(CHANNELS, D)
        self.txt_in = nn.Linear(5, D)
        self.time_in = TimeEmbedding()
        self.double_blocks = nn.ModuleList(DoubleBlock() for _ in range(doubles))
        self.single_blocks = nn.ModuleList(SingleBlock() for _ in range(singles))
        self.final_layer = FinalLayer()

    def forward(self, x, text, t):
        c = self.time_in(t)
        image, text = self.img_in(x), self.txt_in(text)
        for block in self.double_blocks:
            image, text = block(image, text, c)
        both = torch.cat((text, image), dim=1)
        for block in self.single_blocks:
            both = block(both, c)
        return self.final_layer(both[:, text.shape[1] :], c)


class TableBlock(nn.Module):
    """PixArt-alpha's: a table of six vectors per block plus six that all blocks share;
    cross-attention with neither norm nor gate.
    """

    def __init__(self):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.zeros(6, D))
        self.norm1 = layer_norm()
        self.attn = Attention()
        self.cross_attn = Attention()
        self.norm2 = layer_norm()
        self.mlp = gelu_mlp()

    def forward(self, x, text, t6):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (
            self.scale_shift_table[None] + t6.reshape(x.shape[0], 6, -1)
        ).chunk(6, dim=1)
        x = x + gate_msa * self.attn(self.norm1(x) * (1 + scale_msa) + shift_msa)
        x = x + self.cross_attn(x, text)
        x = x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)
        return x


class TableModel(nn.Module):
    def __init__(self, depth: int = 2):
        super().__init__()
        self.x_embedder = nn.Linear(CHANNELS, D)
        self.text_embedder = nn.Linear(5, D)
        self.t_embedder = TimeEmbedding()
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(TableBlock() for _ in range(depth))
        self.scale_shift_table = nn.Parameter(torch.zeros(2, D))
        self.norm = layer_norm()
        self.linear = nn.Linear(D, CHANNELS)

    def forward(self, x, text, t):
        t = self.t_embedder(t)
        t6 = self.t_block(t)
        x, text = self.x_embedder(x), self.text_embedder(text)
        for block in self.blocks:
            x = block(x, text, t6)
        shift, scale = (self.scale_shift_table[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class VideoBlock(nn.Module):
    """Wan's: the stream is raised to fp32 for norm and gate, vectors are ``[B, 1 or T, 6, D]``;
    cross-attention has an affine norm and no gate.
    """

    def __init__(self):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 6, D))
        self.norm1 = layer_norm()
        self.attn = Attention(normed=True, rotary=True)
        self.norm2 = layer_norm(affine=True)
        self.cross_attn = Attention(normed=True)
        self.norm3 = layer_norm()
        self.ffn = gelu_mlp()

    def vectors(self, t6):
        if t6.ndim == 4:
            # a time per token
            return [v.squeeze(2) for v in (self.modulation[None] + t6).chunk(6, dim=2)]
        return (self.modulation + t6).chunk(6, dim=1)

    def forward(self, x, text, t6):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.vectors(raised(t6))
        h = (self.norm1(raised(x)) * (1 + scale1) + shift1).type_as(x)
        x = (raised(x) + self.attn(h) * gate1).type_as(x)
        x = x + self.cross_attn(self.norm2(raised(x)).type_as(x), text)
        h = (self.norm3(raised(x)) * (1 + scale2) + shift2).type_as(x)
        x = (raised(x) + raised(self.ffn(h)) * gate2).type_as(x)
        return x


class VideoModel(nn.Module):
    """Wan: one time per video ``[B]``, or per token ``[B, T]`` as in Wan2.2's 5B model."""

    def __init__(self, depth: int = 2):
        super().__init__()
        self.patch_embedding = nn.Linear(CHANNELS, D)
        self.text_embedding = nn.Linear(5, D)
        self.time_embedding = TimeEmbedding()
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(VideoBlock() for _ in range(depth))
        self.modulation = nn.Parameter(torch.zeros(1, 2, D))
        self.norm = layer_norm()
        self.head = nn.Linear(D, CHANNELS)

    def forward(self, x, text, t):
        e = self.time_embedding(t)
        t6 = self.time_projection(e).unflatten(-1, (6, D))
        x, text = self.patch_embedding(x), self.text_embedding(text)
        for block in self.blocks:
            x = block(x, text, t6)
        if e.ndim == 3:
            two = self.modulation[None] + e.unsqueeze(2)
            shift, scale = (v.squeeze(2) for v in two.chunk(2, dim=2))
        else:
            shift, scale = (self.modulation + e.unsqueeze(1)).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class FrameBlock(nn.Module):
    """A time per frame of a video: vectors are ``[B, F, 6, D]`` and every token of a frame shares
    them, as in causal video models.
    """

    def __init__(self):
        super().__init__()
        self.modulation = nn.Parameter(torch.zeros(1, 1, 6, D))
        self.norm1 = layer_norm()
        self.attn = Attention(rotary=True)
        self.norm2 = layer_norm()
        self.ffn = gelu_mlp()

    def forward(self, x, t6):
        frames = t6.shape[1]
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + t6).chunk(6, dim=2)
        by_frame = (frames, x.shape[1] // frames)
        h = (self.norm1(x).unflatten(1, by_frame) * (1 + scale1) + shift1).flatten(1, 2)
        y = self.attn(h)
        x = x + (y.unflatten(1, by_frame) * gate1).flatten(1, 2)
        h = (self.norm2(x).unflatten(1, by_frame) * (1 + scale2) + shift2).flatten(1, 2)
        y = self.ffn(h)
        return x + (y.unflatten(1, by_frame) * gate2).flatten(1, 2)


class FrameModel(nn.Module):
    def __init__(self, depth: int = 2):
        super().__init__()
        self.patch_embedding = nn.Linear(CHANNELS, D)
        self.time_embedding = TimeEmbedding()
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(FrameBlock() for _ in range(depth))
        self.head = nn.Linear(D, CHANNELS)

    def forward(self, x, t):
        t6 = self.time_projection(self.time_embedding(t)).unflatten(-1, (6, D))
        x = self.patch_embedding(x)
        for block in self.blocks:
            x = block(x, t6)
        return self.head(x)


class SandwichBlock(nn.Module):
    """Lumina-Image 2.0's: a norm before and after every branch, gates through tanh, no shifts."""

    def __init__(self):
        super().__init__()
        self.norm1 = RMSNorm(D)
        self.attn = Attention(normed=True, rotary=True)
        self.norm2 = RMSNorm(D)
        self.ffn_norm1 = RMSNorm(D)
        self.mlp = SwiGLU()
        self.ffn_norm2 = RMSNorm(D)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 4 * D))

    def forward(self, x, c):
        scale1, gate1, scale2, gate2 = self.adaLN_modulation(c).chunk(4, dim=1)
        y = self.attn(self.norm1(x) * (1 + scale1.unsqueeze(1)))
        x = x + gate1.unsqueeze(1).tanh() * self.norm2(y)
        y = self.mlp(self.ffn_norm1(x) * (1 + scale2.unsqueeze(1)))
        x = x + gate2.unsqueeze(1).tanh() * self.ffn_norm2(y)
        return x


@dataclass(frozen=True)
class OwnModel:
    """A model and its inputs.

    Attributes:
        make: the model, with the weights of its constructors.
        inputs: the arguments of ``forward``.
        counts: how often each operator must be put into it at least: adaln, gated_residual,
            gated_residual_adaln, gated_residual_norm.
    """

    make: Callable[..., nn.Module]
    inputs: Callable[[], dict]
    counts: tuple[int, int, int, int]


def tokens(length: int = 6) -> Tensor:
    return torch.randn(BATCH, length, CHANNELS)


def prompt() -> Tensor:
    return torch.randn(BATCH, 3, 5)


def times(*shape: int) -> Tensor:
    """Times in (0, 1), all different."""
    count = torch.Size(shape).numel()
    return torch.linspace(0.1, 0.9, count).reshape(shape)


def labelled() -> dict:
    return {"x": tokens(), "t": times(BATCH), "y": torch.tensor([1, 3])}


def prompted() -> dict:
    return {"x": tokens(), "text": prompt(), "t": times(BATCH)}


def prompted_per_token() -> dict:
    return {"x": tokens(), "text": prompt(), "t": times(BATCH, 6)}


def framed() -> dict:
    return {"x": tokens(), "t": times(BATCH, 3)}


OWN_MODELS = {
    "DiT": OwnModel(DiT, labelled, (1, 0, 6, 0)),
    # the tap reads the stream before the next norm does
    "DiT with a tap": OwnModel(lambda: DiT(tap=1), labelled, (1, 0, 6, 0)),
    "LightningDiT": OwnModel(lambda: DiT(LightningBlock), labelled, (1, 0, 6, 0)),
    "LightningDiT without shifts": OwnModel(
        lambda: DiT(lambda: LightningBlock(shifted=False)), labelled, (1, 0, 6, 0)
    ),
    # no norm follows a stream's last gate where the streams are joined or cut
    "two streams, then one": OwnModel(JointModel, prompted, (4, 3, 7, 0)),
    "a table and shared vectors": OwnModel(TableModel, prompted, (1, 2, 4, 0)),
    "video": OwnModel(VideoModel, prompted, (1, 0, 6, 0)),
    "video, a time per token": OwnModel(VideoModel, prompted_per_token, (1, 0, 6, 0)),
    "video, a time per frame": OwnModel(FrameModel, framed, (1, 1, 3, 0)),
    "norms before and after": OwnModel(lambda: DiT(SandwichBlock), labelled, (7, 0, 0, 6)),
}


def build(name: str, **options) -> tuple[nn.Module, dict]:
    """A model whose parameters are random and not zero, and the arguments of its ``forward``.

    ``options`` go to the model's constructor.

    adaLN-Zero begins with gates of zero, which would hide whatever they multiply.
    """
    own = OWN_MODELS[name]
    torch.manual_seed(0)
    model = own.make(**options)
    inputs = own.inputs()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            else:
                p.add_(torch.randn_like(p), alpha=0.2)
    return model, inputs
