"""What all model families share: embedders, a run of blocks, a prediction layer and SRA's
projection head.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sra_fast.models.conditioning import Conditioning
from sra_fast.models.layers import (
    FinalLayer,
    PatchEmbed,
    Pending,
    ProjectionHead,
    TimestepEmbedder,
    add_pending,
    images_of,
    patches_of,
    sincos_pos_embed,
    timestep_features,
)
from sra_fast.models.token_groups import TokenGroups
from sra_fast.utils.registry import CONDITIONINGS

# names of the heads that single alignment targets have begin with it: they are no part of the model
ALIGN_HEADS = "align_heads."
# of a block's code, at most
COMPILATIONS = 64


def init_linear(module: nn.Module) -> None:
    """DiT's initialisation of a linear layer; other modules are left alone."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Stream:
    """The image tokens of a batch on their way through the blocks.

    Args:
        tokens: ``[B, T, D]`` residual stream.
        conditioning: ``[B, D]`` after its SiLU, or with groups ``[B, G, D]``.
        groups: of the tokens, or None.
    """

    def __init__(self, tokens: Tensor, conditioning: Tensor, groups: TokenGroups | None):
        self.tokens = tokens
        self.conditioning = conditioning
        # what the last block has yet to add
        self.pending: Pending | None = None
        # how the blocks treat the tokens. Without groups nothing is said: a block of another kind
        # need not know of them
        self.how: dict[str, Any] = {}
        if groups is not None:
            self.how = {"group": groups.index, "segments": groups.segments}

    @property
    def group(self) -> Tensor | None:
        """``[B, T]``, whose conditioning each token has."""
        return self.how.get("group")

    def through(self, block: nn.Module, last: bool = False) -> None:
        """Run a block. ``last``: nothing but the image tokens will be asked for."""
        self.tokens, self.pending = block(self.tokens, self.conditioning, self.pending, **self.how)

    def features(self) -> Tensor:
        """``[B, T, D]``, the residual stream with what is pending."""
        if self.pending is None:
            # a block of another kind adds its outputs itself
            return self.tokens
        return add_pending(self.tokens, self.pending, self.group)

    def settle(self) -> Tensor:
        """``features``, which the next block then goes on from: it has nothing to add itself."""
        self.tokens = self.features()
        self.pending = None
        return self.tokens


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


class Backbone(nn.Module):
    """Embedders and blocks, without an output. SRA's teacher is a ``Backbone`` of depth n.

    A family makes its own embedder of the conditioning and its blocks, and says how a batch enters
    them (``begin``).

    Args:
        input_size: side of the square input, in pixels of the latent.
        patch_size: side of a patch; divides ``input_size``.
        in_channels: C of the input.
        hidden_size: width D; a multiple of 4 and of ``num_heads``.
        depth: number of blocks L.
        num_heads: attention heads.
        class_dropout_prob: probability that a conditioning is replaced by nothing in training.
        residual_dtype: dtype of the residual stream; None: that of the weights. In fp32 the
            additions of 28 blocks are not each rounded to bf16 (the published code's stream is
            fp32, under its autocast). Every pass over the stream then moves half as many bytes
            again.

    Attributes:
        conditioning: name in ``CONDITIONINGS`` of what the network is conditioned on.
        num_classes: labels lie in [0, num_classes); None: it knows no classes.
        process: name in ``PROCESSES`` of the diffusion process that the network is trained with.
        time_scale: what a time is multiplied by before its sinusoid.
        takes_groups: whether ``begin`` and the blocks know groups of tokens.
        blocks: the blocks, which the state dict has under the name ``block_list``.

    Raises:
        ValueError: sizes that do not divide, or a probability outside [0, 1].
    """

    conditioning = "labels"
    num_classes: int | None = None
    process = "flow_matching"
    time_scale = 1.0
    takes_groups = False
    block_list = "blocks"
    blocks: nn.ModuleList
    pos_embed: Tensor

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        class_dropout_prob: float,
        residual_dtype: torch.dtype | None,
    ):
        super().__init__()
        if min(input_size, patch_size, in_channels, hidden_size, depth, num_heads) < 1:
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
        self.num_heads = num_heads
        self.residual_dtype = residual_dtype

    def _make_embedders(self) -> None:
        """The embedders of images and times. The order in which a family makes its modules is that
        in which a seed's numbers are used.
        """
        self.x_embedder = PatchEmbed(self.patch_size, self.in_channels, self.hidden_size)
        self.t_embedder = TimestepEmbedder(self.hidden_size)

    def _make_pos_embed(self) -> None:
        # a buffer: the published state dict holds it, but nothing trains it
        self.register_buffer("pos_embed", self.make_pos_embed())

    def make_pos_embed(self) -> Tensor:
        """The fixed position embedding ``[1, T, D]`` in fp32."""
        return sincos_pos_embed(self.input_size // self.patch_size, self.hidden_size)

    def _init_backbone(self) -> None:
        # DiT's initialisation: what follows overwrites a part of it
        self.apply(init_linear)
        # as a linear layer of a patch, not as a convolution
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        self._init_condition()
        for parameter in self.t_embedder.mlp.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        # adaLN-Zero: every block starts as the identity
        for name, parameter in self.named_parameters():
            if ".adaLN_modulation." in name:
                nn.init.zeros_(parameter)

    def compile_blocks(self) -> None:
        """Compile each block with torch.compile. One compilation serves all of a kind, so start-up
        does not grow with depth.
        """
        import torch._dynamo.config as dynamo
        import torch._inductor.config as inductor

        # torch 2.10 to 2.14 give wrong gradients of shared or broadcast modulations with it
        # (pytorch issue 193061)
        inductor.triton.mix_order_reduction = False
        # all blocks share their code: with and without gradients, guided or not, with a last batch
        # that is smaller. Past its limit of 8, PyTorch would stop a run that asks for whole graphs
        dynamo.recompile_limit = max(dynamo.recompile_limit, COMPILATIONS)
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False)

    def _init_condition(self) -> None:
        """Initialise the embedder of the conditioning, as far as ``init_linear`` does not."""

    def own_arguments(self) -> dict:
        """Constructor arguments that decide what the network computes and that not every family
        has.
        """
        raise NotImplementedError

    @property
    def has_null(self) -> bool:
        """Whether the network knows nothing, which guidance needs."""
        raise NotImplementedError

    def as_condition(self, condition: Conditioning | Tensor) -> Conditioning:
        """The conditioning; a tensor is what the network's kind of conditioning is made from
        (labels ``[B]``, features of tokens ``[B, L, E]``).
        """
        if isinstance(condition, Tensor):
            return CONDITIONINGS[self.conditioning].from_tensor(condition)
        return condition

    @property
    def num_tokens(self) -> int:
        """T, the patches of an image."""
        return (self.input_size // self.patch_size) ** 2

    def begin(
        self,
        x: Tensor,
        t: Tensor,
        condition: Conditioning | Tensor,
        groups: TokenGroups | None = None,
    ) -> Stream:
        """A batch before the first block. Arguments: see ``features``."""
        raise NotImplementedError

    def _image_tokens(self, x: Tensor, groups: TokenGroups | None) -> Tensor:
        """Tokens ``[B, T, D]`` of the images, in the order of the groups' sequence."""
        pos_embed = self.pos_embed
        if groups is not None and groups.order is not None:
            # permuted once, where nothing wants a gradient: the blocks see each group as a run
            x = images_of(groups.arrange(patches_of(x, self.patch_size)))
            pos_embed = groups.arrange(pos_embed)
        tokens = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype))
        # mixed-precision wrappers may leave the buffer in fp32: the sum has the wider dtype of the
        # two
        return tokens + pos_embed.to(self.residual_dtype or tokens.dtype)

    def _time(self, t: Tensor, groups: TokenGroups | None) -> Tensor:
        """What the embedder of the times takes: times ``[B]``, or sinusoids."""
        sinusoid = (2,) if groups is None else (3,)
        if t.dim() in sinusoid:
            return t
        t = t * self.time_scale if self.time_scale != 1 else t
        return t if groups is None else timestep_features(t, self.t_embedder.frequency_size)

    def sinusoid(self, t: Tensor) -> Tensor:
        """``timestep_features`` of times in the units of the process, for several forwards."""
        return timestep_features(t * self.time_scale, self.t_embedder.frequency_size)

    def _check_inputs(
        self, x: Tensor, t: Tensor, condition: Conditioning, groups: TokenGroups | None
    ) -> None:
        kind = CONDITIONINGS[self.conditioning]
        if not isinstance(condition, kind):
            raise ValueError(
                f"expected a conditioning of {kind.__name__}, got {type(condition).__name__}"
            )
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
            t: ``[B]`` times: of flow matching in [0, 1] (0 is data), DiT's integers in [0, 1000).
                Or their ``sinusoid`` ``[B, 256]``. With groups ``[B, G]`` or ``[B, G, 256]``.
            condition: B of them; or the tensor that they are made from, ``[B]`` int64 labels.
            depth: 1-based; default: all blocks.
            groups: of the tokens, each group with its time; None: one time per image.

        Returns:
            ``[B, T, D]``, in the order of the groups' sequence.
        """
        depth = self.depth if depth is None else depth
        if not 1 <= depth <= self.depth:
            raise ValueError(f"depth must lie in [1, {self.depth}], got {depth}")
        stream = self.begin(x, t, condition, groups)
        for i, block in enumerate(self.blocks[:depth], start=1):
            stream.through(block, last=i == depth)
        return stream.features()

    def all_features(
        self, x: Tensor, t: Tensor, condition: Conditioning | Tensor
    ) -> Iterator[Tensor]:
        """``features`` of depth 1, 2, .. L from one pass, each ``[B, T, D]``. Arguments: see
        ``features``.
        """
        stream = self.begin(x, t, condition)
        for block in self.blocks:
            stream.through(block)
            yield stream.features()


class DiffusionTransformer(Backbone):
    """A backbone with its prediction layer and SRA's projection head: a network that is trained.

    Arguments: those of the family's backbone.
    """

    family: str
    # what a teacher is built from
    backbone: type[Backbone]

    def _make_output(self) -> None:
        """Called by a family when its backbone is complete."""
        self.out_channels = self._out_channels()
        self.ap_head = ProjectionHead(self.hidden_size)
        # heads of other alignment targets than SRA's, by target: the trainer adds them
        self.align_heads = nn.ModuleDict()
        self.final_layer = FinalLayer(self.hidden_size, self.patch_size**2 * self.out_channels)
        self.ap_head.apply(init_linear)
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
        stream = self.begin(x, t, condition, groups)
        found = {}
        for i, block in enumerate(self.blocks, start=1):
            stream.through(block, last=i == self.depth)
            if i in depths:
                # the features contain what is pending, so it is added here and not by the next
                # block
                found[i] = stream.settle()
        c = stream.conditioning
        patches = self.final_layer(stream.tokens, c, stream.pending, stream.group)
        if groups is not None:
            patches = groups.restore(patches)
        prediction = self.unpatchify(patches)
        return (prediction, Features(found, c, groups)) if depths else prediction


def layers_of(block: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """``{path: layer}`` of those that a block has."""
    own = dict(block.named_modules())
    return {path: own[path] for path in paths if path in own}
