"""SiT and DiT: class labels, and blocks in which an image's tokens attend to each other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sra_fast.models.backbone import Backbone, DiffusionTransformer, Stream
from sra_fast.models.conditioning import Conditioning
from sra_fast.models.layers import Block, LabelEmbedder
from sra_fast.models.token_groups import TokenGroups
from sra_fast.utils.registry import MODEL_FAMILIES


class ClassBackbone(Backbone):
    """Embedders and ``depth`` blocks of a SiT or DiT.

    Args:
        mlp_ratio: MLP width over D.
        class_dropout_prob: probability that a label is replaced by the null class in training mode;
            0 removes the null class and its embedding row.
        num_classes: number of classes; labels lie in ``[0, num_classes)``, the null class is
            ``num_classes``.
        qk_norm: LayerNorm on the queries and keys of each head.
        recompute, defer_bias: see ``Block``.
        input_size, patch_size, in_channels, hidden_size, depth, num_heads, residual_dtype: see
            ``Backbone``.

    Raises:
        ValueError: see ``Backbone``.
    """

    takes_groups = True

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
        sizes = (input_size, patch_size, in_channels, hidden_size, depth, num_heads)
        super().__init__(*sizes, class_dropout_prob, residual_dtype)
        if num_classes < 1:
            raise ValueError("every size of the model must be at least 1")
        self.num_classes = num_classes
        # the order is that of the published state dict, and that in which a seed's numbers are used
        self._make_embedders()
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self._make_pos_embed()
        make_block = lambda: Block(
            hidden_size, num_heads, mlp_ratio, qk_norm, recompute, defer_bias
        )
        self.blocks = nn.ModuleList(make_block() for _ in range(depth))
        self._init_backbone()

    def _init_condition(self) -> None:
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)

    def own_arguments(self) -> dict:
        block = self.blocks[0]
        assert isinstance(block, Block)
        return dict(
            mlp_ratio=block.mlp.fc1.out_features / self.hidden_size,
            num_classes=self.num_classes,
            class_dropout_prob=self.y_embedder.dropout_prob,
            qk_norm=isinstance(block.attn.q_norm, nn.LayerNorm),
        )

    @property
    def has_null(self) -> bool:
        return self.y_embedder.dropout_prob > 0

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
        tokens = self._image_tokens(x, groups)
        label = self.y_embedder(condition)
        if groups is not None:
            label = label[:, None]
        # the modulations of all blocks begin with this SiLU: computed once
        return tokens, F.silu(self.t_embedder(self._time(t, groups)) + label)

    def begin(
        self,
        x: Tensor,
        t: Tensor,
        condition: Conditioning | Tensor,
        groups: TokenGroups | None = None,
    ) -> Stream:
        return Stream(*self.embed(x, t, condition, groups), groups)


@MODEL_FAMILIES.register("SiT")
class SiT(DiffusionTransformer, ClassBackbone):
    """Velocity prediction ``[B, C, H, W]`` -> ``[B, C, H, W]`` (arXiv 2401.08740). Arguments: see
    ``ClassBackbone``.
    """

    family = "SiT"
    backbone = ClassBackbone

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._make_output()


@MODEL_FAMILIES.register("DiT")
class DiT(SiT):
    """Noise prediction and, with ``learn_sigma``, C channels of variance interpolation (arXiv
    2212.09748).

    Arguments: see ``ClassBackbone``, and ``learn_sigma``.
    """

    family = "DiT"
    process = "gaussian_diffusion"

    def __init__(self, *args, learn_sigma: bool = True, **kwargs):
        self.learn_sigma = learn_sigma
        super().__init__(*args, **kwargs)

    def own_arguments(self) -> dict:
        return {**super().own_arguments(), "learn_sigma": self.learn_sigma}

    def _out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)
