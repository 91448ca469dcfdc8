"""MMDiT: tokens of an image and of its caption in two streams with weights of their own, which meet
in joint attention (SD3, arXiv 2403.03206, Sec. 4), under SD3's parameter names.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_fast import ops
from sra_fast.models.backbone import Backbone, DiffusionTransformer, Stream
from sra_fast.models.conditioning import Conditioning, TextFeatures
from sra_fast.models.layers import (
    Pending,
    Projections,
    StreamBlock,
    recomputed,
    sincos_pos_embed,
)
from sra_fast.models.token_groups import TokenGroups
from sra_fast.utils.registry import MODEL_FAMILIES


class StreamAttention(Projections):
    """What joint attention has of one stream: its projections and its norms of queries and keys.

    Args:
        hidden_size: width D.
        num_heads: attention heads.
        qk_norm: RMSNorm with a weight on the queries and keys of each head.
        has_output: whether the stream reads the result of attention; if not, it has no queries. (The
            published parameters ``qkv`` have rows for them all the same, ``ln_q`` is left out.)
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, has_output: bool):
        super().__init__(hidden_size, num_heads)
        self.qk_norm = qk_norm
        if has_output:
            self.proj = nn.Linear(hidden_size, hidden_size)
        make_norm = lambda: nn.RMSNorm(hidden_size // num_heads, eps=1e-6)
        if qk_norm and has_output:
            self.ln_q = make_norm()
        if qk_norm:
            self.ln_k = make_norm()

    def forward(self, heads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[B, T, D]``, or keys and values -> ``[B, T, H, d]``,
        normed.
        """
        *queries, k, v = (self.by_head(x) for x in heads)
        if not self.qk_norm:
            return (*queries, k, v)
        if queries:
            weights = self.ln_q.weight, self.ln_k.weight
            q, k = ops.qk_norm_rope(queries[0], k, q_weight=weights[0], k_weight=weights[1])
            return q, k, v
        # the operator norms a pair: without queries, one of the keys stands in for them
        k, _ = ops.qk_norm_rope(k, k.narrow(1, 0, 1), q_weight=self.ln_k.weight)
        return k, v


def group_mask(group: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
    """What the tokens of separated groups attend to, ``[B, 1, L + T, L + T]`` bool.

    All attend to the text, and an image token to those of its own group. The text attends to the
    image too if all of it is one group, which has nobody to be separated from.

    Args:
        group: ``[B, T]``, that of each image token.
        length: L, tokens of the text.
        mask: ``[B, L]`` bool, those of the text that are there; None: all.
    """
    same = group[:, :, None] == group[:, None, :]
    batch, count = group.shape
    whole = same[:, 0].all(1)
    to_image = torch.cat([whole[:, None, None].expand(-1, length, count), same], dim=1)
    text = group.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
    to_text = text[:, None].expand(-1, length + count, -1)
    return torch.cat([to_text, to_image], dim=2)[:, None]


class JointAttention(nn.Module):
    """Attention over the tokens of both streams. It has no parameters: the streams have them."""

    def forward(
        self, image: tuple[Tensor, ...], text: tuple[Tensor, ...], mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run it.

        Args:
            image: queries, keys and values ``[B, T, H, d]``.
            text: the same ``[B, L, H, d]``, or keys and values only.
            mask: ``[B, L + T]`` bool, tokens of both that may be attended to; or what each token
                may attend to, ``[B, 1, L + T, L + T]`` (see ``group_mask``); None: to all.

        Returns:
            ``[B, T, D]`` and ``[B, L, D]``, the latter None without queries of the text.
        """
        q, k, v = image
        *text_q, text_k, text_v = text
        length = text_k.shape[1]
        # the text comes first, as in SD3
        keys = torch.cat([text_k, k], dim=1)
        values = torch.cat([text_v, v], dim=1)
        if not text_q:
            if mask is not None and mask.dim() == 4:
                mask = mask.narrow(2, length, q.shape[1])
            return ops.attention(q, keys, values, mask=mask).flatten(2), None
        queries = torch.cat([text_q[0], q], dim=1)
        out = ops.attention(queries, keys, values, mask=mask).flatten(2)
        text_out, image_out = out.split([length, q.shape[1]], dim=1)
        return image_out, text_out


class JointBlock(nn.Module):
    """A block of both streams: adaLN-Zero in each, and one attention over the tokens of both.

    Args:
        hidden_size: width D of both streams.
        num_heads: attention heads.
        mlp_ratio: MLP width over D.
        qk_norm: see ``StreamAttention``.
        recompute, defer_bias: see ``StreamBlock``.
        context_output: whether the caption's tokens go on after this block.
        context_modulations: see ``StreamBlock``; 2 in the last block of a model.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        recompute: str = "none",
        defer_bias: bool = False,
        context_output: bool = True,
        context_modulations: int = 6,
    ):
        super().__init__()
        self.recompute = recompute

        def make_stream(has_output: bool, modulations: int) -> StreamBlock:
            attn = StreamAttention(hidden_size, num_heads, qk_norm, has_output)
            return StreamBlock(
                attn, hidden_size, mlp_ratio, recompute, defer_bias, has_output, modulations
            )

        self.context_output = context_output
        self.context_block = make_stream(context_output, context_modulations)
        self.x_block = make_stream(True, 6)
        self.joint = JointAttention()

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        pending: Pending | None,
        context: Tensor,
        context_c: Tensor,
        context_pending: Pending | None = None,
        mask: Tensor | None = None,
        last: bool = False,
        group: Tensor | None = None,
    ) -> tuple[Tensor, Pending, Tensor | None, Pending | None]:
        """Run the block.

        Args:
            x: ``[B, T, D]`` residual stream of the image tokens.
            c: ``[B, D]`` conditioning, after the SiLU that all blocks share; with groups ``[B, G,
                D]``.
            pending: what the block before has yet to add to ``x``.
            context: ``[B, L, D]`` residual stream of the caption's tokens.
            context_c: ``[B, D]``, their conditioning.
            context_pending: what the block before has yet to add to ``context``.
            mask: see ``JointAttention``.
            last: nothing reads the caption's tokens after this block: neither their queries nor
                their output half is computed.
            group: ``[B, T]``, whose conditioning each image token has; see ``Block``.

        Returns:
            The stream of the image and what is pending there, then those of the caption, which are
            None after the last block.
        """
        inputs = (x, c, pending, context, context_c, context_pending, mask, last, group)
        return recomputed(self.recompute, self._forward, *inputs)

    def _forward(
        self,
        x: Tensor,
        c: Tensor,
        pending: Pending | None,
        context: Tensor,
        context_c: Tensor,
        context_pending: Pending | None,
        mask: Tensor | None,
        last: bool,
        group: Tensor | None,
    ) -> tuple[Tensor, Pending, Tensor | None, Pending | None]:
        goes_on = self.context_output and not last
        text, image = self.context_block, self.x_block
        text_modulation = text.modulation(context_c)
        image_modulation = image.modulation(c)
        shift, scale = text_modulation[:2]
        context, text_heads = text.heads(context, shift, scale, context_pending, queries=goes_on)
        shift, scale = image_modulation[:2]
        x, image_heads = image.heads(x, shift, scale, pending, group)
        attended, text_attended = self.joint(image.attn(image_heads), text.attn(text_heads), mask)
        x, pending = image.outputs(x, attended, image_modulation, group)
        if text_attended is None:
            return x, pending, None, None
        context, context_pending = text.outputs(context, text_attended, text_modulation)
        return x, pending, context, context_pending


class JointStream(Stream):
    """The tokens of images and captions on their way through the blocks.

    Args:
        tokens, conditioning, groups: of the images, see ``Stream``.
        context: ``[B, L, D]`` residual stream of the captions.
        mask: ``[B, L]`` bool, tokens of the captions that are there; None: all.
    """

    def __init__(
        self,
        tokens: Tensor,
        conditioning: Tensor,
        groups: TokenGroups | None,
        context: Tensor,
        mask: Tensor | None,
    ):
        super().__init__(tokens, conditioning, groups)
        # by group, and not by segments: those are for attention of one stream
        segments = self.how.pop("segments", None)
        self.context: Tensor | None = context
        self.context_pending: Pending | None = None
        # once for all blocks
        self.mask = None
        if segments is not None:
            self.mask = group_mask(self.how["group"], context.shape[1], mask)
        elif mask is not None:
            self.mask = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
        # a caption belongs to all groups of its image
        self.context_c = conditioning if groups is None else groups.mean(conditioning)

    def through(self, block: nn.Module, last: bool = False) -> None:
        self.tokens, self.pending, self.context, self.context_pending = block(
            self.tokens,
            self.conditioning,
            self.pending,
            self.context,
            self.context_c,
            self.context_pending,
            self.mask,
            last,
            **self.how,
        )


class VectorEmbedder(nn.Module):
    """An MLP of two layers on a pooled text feature: ``[B, P]`` -> ``[B, D]``."""

    def __init__(self, pooled_size: int, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(pooled_size, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, pooled: Tensor) -> Tensor:
        return self.mlp(pooled.to(next(self.mlp.parameters()).dtype))


class TextBackbone(Backbone):
    """Embedders and the first ``depth`` blocks of an MMDiT.

    Args:
        mlp_ratio: MLP width over D.
        class_dropout_prob: probability that a caption is replaced by the empty prompt in training;
            0: the network does not know the empty prompt.
        context_size: width E of the features of the text's tokens.
        context_tokens: L, how many of them there are; None: any number.
        pooled_size: width P of the pooled text feature, which is added to the time; 0: there is
            none.
        qk_norm: RMSNorm on the queries and keys of each head, in both streams.
        time_scale: what a time in [0, 1] is multiplied by before its sinusoid: 1 as SiT and REPA,
            1000 as SD3.
        position_start, position_step: place of the first patch along an axis in the position
            embedding, and from one patch to the next. SD3's table is that of a larger image than
            those it was first trained on, of which each size takes the middle.
        model_depth: depth of the whole model. In its last block the captions have keys and values
            only. Default: ``depth``.
        recompute, defer_bias: see ``StreamBlock``.
        input_size, patch_size, in_channels, hidden_size, depth, num_heads, residual_dtype: see
            ``Backbone``.

    Raises:
        ValueError: see ``Backbone``; a size, scale or position that cannot be.
    """

    conditioning = "text"
    takes_groups = True
    block_list = "joint_blocks"

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 24,
        num_heads: int = 24,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        context_size: int = 768,
        context_tokens: int | None = None,
        pooled_size: int = 0,
        qk_norm: bool = False,
        time_scale: float = 1.0,
        position_start: float = 0.0,
        position_step: float = 1.0,
        model_depth: int | None = None,
        residual_dtype: torch.dtype | None = None,
        recompute: str = "none",
        defer_bias: bool = False,
    ):
        sizes = (input_size, patch_size, in_channels, hidden_size, depth, num_heads)
        super().__init__(*sizes, class_dropout_prob, residual_dtype)
        if context_size < 1 or pooled_size < 0 or context_tokens is not None and context_tokens < 1:
            raise ValueError(
                "expected context_size and context_tokens of at least 1 and pooled_size of at "
                f"least 0, got {context_size}, {context_tokens} and {pooled_size}"
            )
        # with 0 all times, or all patches, would be the same
        if not 0 < time_scale < math.inf:
            raise ValueError(f"time_scale must be a positive number, got {time_scale}")
        if (
            not math.isfinite(position_start)
            or not math.isfinite(position_step)
            or not position_step
        ):
            raise ValueError(
                "expected a finite position_start and a finite position_step other than 0, got "
                f"{position_start} and {position_step}"
            )
        self.class_dropout_prob = class_dropout_prob
        self.context_size = context_size
        self.context_tokens = context_tokens
        self.pooled_size = pooled_size
        self.qk_norm = qk_norm
        self.mlp_ratio = mlp_ratio
        self.time_scale = time_scale
        self.position_start = position_start
        self.position_step = position_step
        self._make_embedders()
        if pooled_size:
            self.y_embedder = VectorEmbedder(pooled_size, hidden_size)
        self.context_embedder = nn.Linear(context_size, hidden_size)
        self._make_pos_embed()
        whole = depth if model_depth is None else model_depth

        def make_block(number: int) -> JointBlock:
            # after the last block that is there, nothing reads the captions
            goes_on = number < depth
            modulations = 6 if number < whole else 2
            how = (recompute, defer_bias, goes_on, modulations)
            return JointBlock(hidden_size, num_heads, mlp_ratio, qk_norm, *how)

        self.joint_blocks = nn.ModuleList(make_block(i + 1) for i in range(depth))
        self._init_backbone()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.joint_blocks

    def _init_condition(self) -> None:
        if self.pooled_size:
            for parameter in self.y_embedder.mlp.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.02)

    def make_pos_embed(self) -> Tensor:
        grid = self.input_size // self.patch_size
        return sincos_pos_embed(grid, self.hidden_size, self.position_start, self.position_step)

    def own_arguments(self) -> dict:
        return dict(
            mlp_ratio=self.mlp_ratio,
            class_dropout_prob=self.class_dropout_prob,
            context_size=self.context_size,
            context_tokens=self.context_tokens,
            pooled_size=self.pooled_size,
            qk_norm=self.qk_norm,
            time_scale=self.time_scale,
            position_start=self.position_start,
            position_step=self.position_step,
        )

    @property
    def has_null(self) -> bool:
        return self.class_dropout_prob > 0

    def _check_text(self, text: TextFeatures) -> None:
        """ValueError unless captions have the sizes that the network takes."""
        tokens, width = text.tokens.shape[1:]
        pooled = 0 if text.pooled is None else text.pooled.shape[1]
        length = tokens if self.context_tokens is None else self.context_tokens
        # a network that takes no pooled feature leaves it alone
        fits = (tokens, width) == (length, self.context_size)
        if not fits or self.pooled_size not in (0, pooled):
            raise ValueError(
                f"expected captions of {length} tokens of {self.context_size} and a pooled feature "
                f"of {self.pooled_size}, got {tokens} tokens of {width} and {pooled}"
            )

    def begin(
        self,
        x: Tensor,
        t: Tensor,
        condition: Conditioning | Tensor,
        groups: TokenGroups | None = None,
    ) -> JointStream:
        condition = self.as_condition(condition)
        self._check_inputs(x, t, condition, groups)
        assert isinstance(condition, TextFeatures), "checked"
        self._check_text(condition)
        text = condition.seen()
        tokens = self._image_tokens(x, groups)
        context = self.context_embedder(text.tokens.to(self.context_embedder.weight.dtype))
        context = context.to(self.residual_dtype or context.dtype)
        c = self.t_embedder(self._time(t, groups))
        if self.pooled_size:
            pooled = self.y_embedder(text.pooled)
            c = c + (pooled if groups is None else pooled[:, None])
        # the modulations of all blocks begin with this SiLU: computed once
        return JointStream(tokens, F.silu(c), groups, context, text.mask)


@MODEL_FAMILIES.register("MMDiT")
class MMDiT(DiffusionTransformer, TextBackbone):
    """Velocity prediction ``[B, C, H, W]`` -> ``[B, C, H, W]`` from images and captions. Arguments:
    see ``TextBackbone``.
    """

    family = "MMDiT"
    backbone = TextBackbone

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._make_output()
