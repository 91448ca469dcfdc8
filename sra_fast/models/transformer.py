"""SiT and DiT: one backbone (embedders and adaLN-Zero blocks), a prediction layer and SRA's
projection head.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_fast.models.conditioning import Conditioning
from sra_fast.models.layers import (
    Block,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    ProjectionHead,
    TimestepEmbedder,
    add_pending,
    images_of,
    patches_of,
    sincos_pos_embed,
    timestep_features,
)
from sra_fast.models.token_groups import TokenGroups
from sra_fast.utils.registry import CONDITIONINGS, MODEL_FAMILIES

# names of the heads that single alignment targets have begin with it: they are no part of the model
ALIGN_HEADS = "align_heads."


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Backbone(nn.Module):
    """Embedders and ``depth`` blocks, without an output. SRA's teacher is a ``Backbone`` of depth
    n.

    Args:
        input_size: side of the square input, in pixels of the latent.
        patch_size: side of a patch; divides ``input_size``.
        in_channels: C of the input.
        hidden_size: width D; a multiple of 4 and of ``num_heads``.
        depth: number of blocks L.
        num_heads: attention heads.
        mlp_ratio: MLP width over D.
        class_dropout_prob: probability that a label is replaced by the null class in training mode;
            0 removes the null class and its embedding row.
        num_classes: number of classes; labels lie in ``[0, num_classes)``, the null class is
            ``num_classes``.
        qk_norm: LayerNorm on the queries and keys of each head.
        residual_dtype: dtype of the residual stream; None: that of the weights. In fp32 the
            additions of 28 blocks are not each rounded to bf16 (the published code's stream is
            fp32, under its autocast). Every pass over the stream then moves half as many bytes
            again.
        recompute, defer_bias: see ``Block``.

    Attributes:
        conditioning: name in ``CONDITIONINGS`` of what the network is conditioned on.
        process: name in ``PROCESSES`` of the diffusion process that the network is trained with.

    Raises:
        ValueError: sizes that do not divide, or a probability outside [0, 1].
    """

    conditioning = "labels"
    process = "flow_matching"
    pos_embed: Tensor

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
        residual_dtype: torch.dtype | None = None,
        recompute: str = "none",
        defer_bias: bool = False,
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
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_classes = num_classes
        self.residual_dtype = residual_dtype
        # the order is that of the published state dict, and that in which a seed's numbers are used
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # a buffer: the published state dict holds it, but nothing trains it
        self.register_buffer("pos_embed", self.make_pos_embed())
        make_block = lambda: Block(
            hidden_size, num_heads, mlp_ratio, qk_norm, recompute, defer_bias
        )
        self.blocks = nn.ModuleList(make_block() for _ in range(depth))
        self._init_backbone()

    def make_pos_embed(self) -> Tensor:
        """The fixed position embedding ``[1, T, D]`` in fp32."""
        return sincos_pos_embed(self.input_size // self.patch_size, self.hidden_size)

    def _init_backbone(self) -> None:
        # DiT's initialisation: what follows overwrites a part of it
        self.apply(_init_linear)
        # as a linear layer of a patch, not as a convolution
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for parameter in self.t_embedder.mlp.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        # adaLN-Zero: every block starts as the identity
        for block in self.blocks:
            assert isinstance(block, Block)
            for parameter in block.adaLN_modulation.parameters():
                nn.init.zeros_(parameter)

    def compile_blocks(self) -> None:
        """Compile each block with torch.compile. One compilation serves all of them, so start-up
        does not grow with depth.
        """
        import torch._inductor.config as inductor

        # torch 2.10 to 2.14 give wrong gradients of shared or broadcast modulations with it
        # (pytorch issue 193061)
        inductor.triton.mix_order_reduction = False
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    @property
    def has_null(self) -> bool:
        """Whether the network knows the null class, which guidance needs."""
        return self.y_embedder.dropout_prob > 0

    def as_condition(self, condition: Conditioning | Tensor) -> Conditioning:
        """The conditioning; a tensor is what the network's kind of conditioning is made from
        (labels ``[B]``).
        """
        if isinstance(condition, Tensor):
            return CONDITIONINGS[self.conditioning].from_tensors(condition)
        return condition

    @property
    def num_tokens(self) -> int:
        """T, the patches of an image."""
        return (self.input_size // self.patch_size) ** 2

    def embed(
        self,
        x: Tensor,
        t: Tensor,
        condition: Conditioning | Tensor,
        groups: TokenGroups | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T, D]`` and the conditioning after its SiLU, ``[B, D]`` or, with groups,
        ``[B, G, D]``. Arguments: see ``features``.
        """
        condition = self.as_condition(condition)
        self._check_inputs(x, t, condition, groups)
        pos_embed = self.pos_embed
        if groups is not None and groups.order is not None:
            # permuted once, where nothing wants a gradient: the blocks see each group as a run
            x = images_of(groups.arrange(patches_of(x, self.patch_size)))
            pos_embed = groups.arrange(pos_embed)
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        # mixed-precision wrappers may leave the buffer in fp32: the sum has the wider dtype of the
        # two
        tokens = tokens + pos_embed.to(self.residual_dtype or tokens.dtype)
        label = self.y_embedder(condition)
        if groups is not None:
            label = label[:, None]
            t = t if t.dim() == 3 else timestep_features(t, self.t_embedder.frequency_size)
        # the modulations of all blocks begin with this SiLU: computed once
        return tokens, F.silu(self.t_embedder(t) + label)

    def _check_inputs(
        self, x: Tensor, t: Tensor, condition: Conditioning, groups: TokenGroups | None
    ) -> None:
        image = (self.in_channels, self.input_size, self.input_size)
        frequencies = self.t_embedder.frequency_size
        batch = x.shape[:1]
        times = "[B]"
        fits = x.dim() == 4 and x.shape[1:] == image and len(condition) == len(x)
        if groups is not None:
            # one time for each group of an image
            batch = (*batch, t.shape[1] if t.dim() > 1 else 1)
            times = "[B, G]"
            fits = fits and groups.index.shape == (len(x), self.num_tokens)
        if not fits or t.shape not in (batch, (*batch, frequencies)):
            index = "" if groups is None else f", groups of [B, {self.num_tokens}] tokens"
            got = "" if groups is None else f", groups {[*groups.index.shape]}"
            raise ValueError(
                f"expected x [B, {', '.join(map(str, image))}], t {times} or "
                f"{times[:-1]}, {frequencies}]{index} and B conditionings, "
                f"got {[*x.shape]}, {[*t.shape]}{got} and {len(condition)}"
            )

    def features(
        self,
        x: Tensor,
        t: Tensor,
        condition: Conditioning | Tensor,
        depth: int | None = None,
        groups: TokenGroups | None = None,
    ) -> Tensor:
        """The residual stream after block ``depth``; later blocks are not computed.

        Args:
            x: ``[B, C, H, W]`` noisy input, any float dtype (cast to the weights').
            t: ``[B]`` times: SiT in [0, 1] (0 is data), DiT integers in [0, 1000). Or their
                sinusoid, ``timestep_features`` ``[B, 256]``. With groups ``[B, G]`` or ``[B, G,
                256]``.
            condition: B of them; or ``[B]`` int64 labels.
            depth: 1-based; default: all blocks.
            groups: of the tokens, each group with its time; None: one time per image.

        Returns:
            ``[B, T, D]``, in the order of the groups' sequence.
        """
        depth = self.depth if depth is None else depth
        if not 1 <= depth <= self.depth:
            raise ValueError(f"depth must lie in [1, {self.depth}], got {depth}")
        tokens, c = self.embed(x, t, condition, groups)
        how = _how(groups)
        pending = None
        for block in self.blocks[:depth]:
            tokens, pending = block(tokens, c, pending, **how)
        assert pending is not None, "depth is at least 1"
        return add_pending(tokens, pending, how.get("group"))

    def all_features(
        self, x: Tensor, t: Tensor, condition: Conditioning | Tensor
    ) -> Iterator[Tensor]:
        """``features`` of depth 1, 2, .. L from one pass, each ``[B, T, D]``. Arguments: see
        ``features``.
        """
        tokens, c = self.embed(x, t, condition)
        pending = None
        for block in self.blocks:
            tokens, pending = block(tokens, c, pending)
            yield add_pending(tokens, pending)


def _how(groups: TokenGroups | None) -> dict[str, Any]:
    """How the blocks treat the tokens. Without groups nothing is said: a block of another kind
    need not know of them.
    """
    return {} if groups is None else {"group": groups.index, "segments": groups.segments}


@dataclass(frozen=True)
class Features:
    """What a forward pass has computed besides its prediction.

    Attributes:
        after: ``{depth: [B, T, D]}``, the residual stream after blocks, in the order of the groups'
            sequence.
        conditioning: ``[B, D]`` after its SiLU, or ``[B, G, D]``.
        groups: of the tokens, or None.
    """

    after: dict[int, Tensor]
    conditioning: Tensor
    groups: TokenGroups | None = None


@MODEL_FAMILIES.register("SiT")
class SiT(Backbone):
    """Velocity prediction ``[B, C, H, W]`` -> ``[B, C, H, W]`` (arXiv 2401.08740). Arguments: see
    ``Backbone``.
    """

    family = "SiT"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.out_channels = self._out_channels()
        self.ap_head = ProjectionHead(self.hidden_size)
        # heads of other alignment targets than SRA's, by target: the trainer adds them
        self.align_heads = nn.ModuleDict()
        self.final_layer = FinalLayer(self.hidden_size, self.patch_size**2 * self.out_channels)
        self.ap_head.apply(_init_linear)
        # the first prediction is zero
        for parameter in self.final_layer.parameters():
            nn.init.zeros_(parameter)

    def _out_channels(self) -> int:
        return self.in_channels

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """``[B, T, p*p*C_out]`` -> ``[B, C_out, H, W]``."""
        p = self.patch_size
        grid = self.input_size // p
        size = (-1, self.out_channels, self.input_size, self.input_size)
        # [B, rows, columns, p, p, C] -> [B, C, rows, p, columns, p]
        patches = tokens.view(-1, grid, grid, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(size)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Conditioning | Tensor,
        *,
        depths: Collection[int] = (),
        groups: TokenGroups | None = None,
    ) -> Tensor | tuple[Tensor, Features]:
        """The prediction, and with ``depths`` the features after these blocks.

        Args:
            x, t, condition, groups: see ``features``.
            depths: 1-based numbers of the blocks whose features are returned too.

        Returns:
            ``[B, C_out, H, W]``, or that and ``Features``.

        Raises:
            ValueError: a depth outside [1, L], or inputs of other shapes.
        """
        if not all(1 <= depth <= self.depth for depth in depths):
            raise ValueError(f"depths must lie in [1, {self.depth}], got {sorted(depths)}")
        tokens, c = self.embed(x, t, condition, groups)
        how = _how(groups)
        pending = None
        found = {}
        for i, block in enumerate(self.blocks, start=1):
            tokens, pending = block(tokens, c, pending, **how)
            if i in depths:
                # the features contain what is pending, so it is added here and not by the next
                # block
                tokens = add_pending(tokens, pending, how.get("group"))
                pending = None
                found[i] = tokens
        patches = self.final_layer(tokens, c, pending, how.get("group"))
        if groups is not None:
            patches = groups.restore(patches)
        prediction = self.unpatchify(patches)
        return (prediction, Features(found, c, groups)) if depths else prediction


@MODEL_FAMILIES.register("DiT")
class DiT(SiT):
    """Noise prediction and, with ``learn_sigma``, C channels of variance interpolation (arXiv
    2212.09748).

    Arguments: see ``Backbone``, and ``learn_sigma``.
    """

    family = "DiT"
    process = "gaussian_diffusion"

    def __init__(self, *args, learn_sigma: bool = True, **kwargs):
        self.learn_sigma = learn_sigma
        super().__init__(*args, **kwargs)

    def _out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)
