"""SiT and DiT: one backbone (embedders and adaLN-Zero blocks), a prediction layer and SRA's projection head."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_fast.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    ProjectionHead,
    TimestepEmbedder,
    settle,
    sincos_pos_embed,
)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Backbone(nn.Module):
    """Embedders and ``depth`` blocks, without an output.  SRA's teacher is a ``Backbone`` of depth n.

    Args:
        input_size: side of the square input, in pixels of the latent.
        patch_size: side of a patch; divides ``input_size``.
        in_channels: C of the input.
        hidden_size: width D; a multiple of 4 and of ``num_heads``.
        depth: number of blocks L.
        num_heads: attention heads.
        mlp_ratio: MLP width over D.
        class_dropout_prob: probability that a label is replaced by the null class in training mode; 0 removes the
            null class and its embedding row.
        num_classes: number of classes; labels lie in ``[0, num_classes)``, the null class is ``num_classes``.
        qk_norm: LayerNorm on the queries and keys of each head.

    Attributes:
        residual_dtype: of the residual stream; None: the weights'.  In fp32, additions of 28 blocks are not rounded to bf16 one by
            one (the published code's stream is fp32 under its autocast), and every pass over the stream moves half as much more.

    Raises:
        ValueError: sizes that do not divide, or a probability outside [0, 1].
    """

    residual_dtype: torch.dtype | None = None

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        qk_norm: bool = False,
    ):
        super().__init__()
        if min(input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes) < 1:
            raise ValueError("every size of the model must be at least 1")
        if input_size % patch_size:
            raise ValueError(
                f"input_size must be a multiple of patch_size {patch_size}, got {input_size}"
            )
        if hidden_size % 4 or hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of 4 and of num_heads {num_heads}, got {hidden_size}"
            )
        if not 0 <= class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1], got {class_dropout_prob}")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.depth, self.num_classes = hidden_size, depth, num_classes
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # a buffer: the reference stores it in its state dict, but nothing trains it
        self.register_buffer("pos_embed", self.make_pos_embed())
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth)
        )
        self._init_backbone()

    def make_pos_embed(self) -> Tensor:
        """The fixed position embedding ``[1, T, D]`` in fp32."""
        return sincos_pos_embed(self.input_size // self.patch_size, self.hidden_size)

    def _init_backbone(self) -> None:
        self.apply(_init_linear)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=0.02)
        for block in self.blocks:  # adaLN-Zero: every block starts as the identity
            nn.init.zeros_(block.adaLN_modulation[1].weight)

    def compile_blocks(self) -> None:
        """torch.compile of each block by itself: one compilation serves all blocks, and start-up does not grow with depth."""
        import torch._inductor.config as inductor

        # torch 2.10 to 2.14 give wrong gradients of shared or broadcast modulations with it (pytorch issue 193061)
        inductor.triton.mix_order_reduction = False
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    @property
    def null_class(self) -> int:
        """The label of "no class" (guidance); only embedded if ``class_dropout_prob > 0``."""
        return self.num_classes

    def embed(
        self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T, D]`` and the conditioning ``[B, D]`` behind its SiLU; see ``features`` for the arguments."""
        expected = (self.in_channels, self.input_size, self.input_size)
        times = (x.shape[:1], (*x.shape[:1], self.t_embedder.frequency_size))
        if (
            x.dim() != 4
            or x.shape[1:] != expected
            or t.shape not in times
            or y.shape != x.shape[:1]
        ):
            raise ValueError(
                f"expected x [B, {', '.join(map(str, expected))}], t [B] or [B, {times[1][1]}] and y [B], "
                f"got {[*x.shape]}, {[*t.shape]}, {[*y.shape]}"
            )
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        # a buffer: mixed-precision wrappers may leave it in fp32.  The sum has the wider dtype of the two
        tokens = tokens + self.pos_embed.to(self.residual_dtype or tokens.dtype)
        return tokens, F.silu(self.t_embedder(t) + self.y_embedder(y, drop))

    def features(
        self, x: Tensor, t: Tensor, y: Tensor, depth: int | None = None, drop: Tensor | None = None
    ) -> Tensor:
        """The residual stream after block ``depth`` (1-based; default: the last), computing nothing beyond it.

        Args:
            x: ``[B, C, H, W]`` noisy input, any float dtype (cast to the weights').
            t: ``[B]`` times: SiT in [0, 1] (0 is data), DiT integers in [0, 1000); or their ``timestep_features`` ``[B, 256]``.
            y: ``[B]`` int64 labels; ``num_classes`` is the null class.
            depth: number of blocks to run.
            drop: ``[B]`` bool, labels to replace by the null class; None: drawn in training mode, none in eval mode.

        Returns:
            ``[B, T, D]``.
        """
        depth = self.depth if depth is None else depth
        if not 1 <= depth <= self.depth:
            raise ValueError(f"depth must lie in [1, {self.depth}], got {depth}")
        (tokens, c), pending = self.embed(x, t, y, drop), None
        for block in self.blocks[:depth]:
            tokens, pending = block(tokens, c, pending)
        return settle(tokens, pending)

    def all_features(self, x: Tensor, t: Tensor, y: Tensor) -> Iterator[Tensor]:
        """``features`` of depth 1, 2, .. L in one pass, one after the other ``[B, T, D]``.  Arguments: see ``features``."""
        (tokens, c), pending = self.embed(x, t, y), None
        for block in self.blocks:
            tokens, pending = block(tokens, c, pending)
            yield settle(tokens, pending)


class SiT(Backbone):
    """Velocity prediction ``[B, C, H, W]`` -> ``[B, C, H, W]`` (arXiv 2401.08740).  Arguments: see ``Backbone``."""

    family = "SiT"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.out_channels = self._out_channels()
        self.ap_head = ProjectionHead(self.hidden_size)
        self.final_layer = FinalLayer(self.hidden_size, self.patch_size**2 * self.out_channels)
        self.ap_head.apply(_init_linear)
        for parameter in self.final_layer.parameters():
            nn.init.zeros_(parameter)

    def _out_channels(self) -> int:
        return self.in_channels

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """``[B, T, p*p*C_out]`` -> ``[B, C_out, H, W]``."""
        grid, p = self.input_size // self.patch_size, self.patch_size
        x = tokens.view(-1, grid, grid, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(
            -1, self.out_channels, self.input_size, self.input_size
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        drop: Tensor | None = None,
        align_depth: int | None = None,
        align_images: Tensor | None = None,
        project: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The prediction; with ``align_depth=m`` also ``ap_head(h_m)`` (``project=False``: ``h_m``) ``[B, T, D]``, or that of
        the images ``align_images [b]`` alone ``[b, T, D]``.  Other arguments: see ``features``."""
        if align_depth is not None and not 1 <= align_depth <= self.depth:
            raise ValueError(f"align_depth must lie in [1, {self.depth}], got {align_depth}")
        (tokens, c), pending, projected = self.embed(x, t, y, drop), None, None
        for i, block in enumerate(self.blocks, start=1):
            tokens, pending = block(tokens, c, pending)
            if i == align_depth:
                tokens, pending = settle(tokens, pending), None
                projected = tokens if align_images is None else tokens[align_images]
                projected = self.ap_head(projected) if project else projected
        prediction = self.unpatchify(self.final_layer(tokens, c, pending))
        return prediction if projected is None else (prediction, projected)


class DiT(SiT):
    """Noise prediction and, with ``learn_sigma``, the variance interpolation in C further channels (arXiv 2212.09748).

    Arguments: see ``Backbone``, and ``learn_sigma``.
    """

    family = "DiT"

    def __init__(self, *args, learn_sigma: bool = True, **kwargs):
        self.learn_sigma = learn_sigma
        super().__init__(*args, **kwargs)

    def _out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)
