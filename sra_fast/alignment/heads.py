"""Heads that single alignment targets have: from the student's features to what is compared.

Each takes features ``[b, T, D]`` in the order of the image, their conditioning ``[b, D]`` (``[b, G,
D]``) and, with groups, the group ``[b, T]`` of each token. Most read the features only.
"""

from typing import cast

from torch import Tensor, nn

from sra_fast import ops
from sra_fast.models.backbone import init_linear
from sra_fast.models.layers import as_weights


def _mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers with SiLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


class Head(nn.Module):
    """What the trainer makes for a target: a module that draws its own first values."""

    def initialise(self) -> None:
        """Draw the first values."""
        raise NotImplementedError


class LatentHead(Head):
    """SRA 2's head (arXiv 2601.17830): features -> the clean latent of their patch.

    Four layers of width 2D with SiLU, then a last layer as SiT's: a modulated norm and a linear
    layer. Without ``modulated`` the last layer is linear only, and the head has the size that the
    paper gives (8.3 M parameters for B, 18.6 M for XL).

    Args:
        hidden_size: D.
        out_size: elements of a patch.
        modulated: whether the last layer has SiT's modulated norm.
    """

    def __init__(self, hidden_size: int, out_size: int, modulated: bool = True):
        super().__init__()
        width = 2 * hidden_size
        self.mlp = _mlp([hidden_size, width, width, width, width])
        self.act = nn.SiLU()
        self.linear = nn.Linear(width, out_size)
        self.modulation = nn.Linear(hidden_size, 2 * width) if modulated else None

    def initialise(self) -> None:
        """SiT's initialisation: the first prediction is zero."""
        self.mlp.apply(init_linear)
        last = [self.linear] if self.modulation is None else [self.linear, self.modulation]
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, c: Tensor, group: Tensor | None = None) -> Tensor:
        weight, bias = self.linear.weight, self.linear.bias
        hidden = self.act(self.mlp(as_weights(x, weight)))
        if self.modulation is None:
            return self.linear(hidden)
        shift, scale = self.modulation(c).chunk(2, dim=-1)
        _, patches = ops.adaln_linear(hidden, shift, scale, weight, bias, group=group)
        return cast(Tensor, patches)


class FeatureHead(Head):
    """REPA's head (arXiv 2410.06940): three layers with SiLU, ``[b, T, D] -> [b, T, out_size]``."""

    def __init__(self, hidden_size: int, width: int, out_size: int):
        super().__init__()
        self.mlp = _mlp([hidden_size, width, width, out_size])

    def initialise(self) -> None:
        self.mlp.apply(init_linear)

    def forward(self, x: Tensor, c: Tensor, group: Tensor | None = None) -> Tensor:
        return self.mlp(as_weights(x, self.mlp.get_parameter("0.weight")))


class ConvHead(Head):
    """iREPA's head: a 3 x 3 convolution over the tokens of the square image."""

    def __init__(self, hidden_size: int, out_size: int):
        super().__init__()
        self.conv = nn.Conv2d(hidden_size, out_size, 3, padding=1)

    def initialise(self) -> None:
        """PyTorch's initialisation, as published."""

    def forward(self, x: Tensor, c: Tensor, group: Tensor | None = None) -> Tensor:
        b, T, D = x.shape
        side = round(T**0.5)
        images = as_weights(x, self.conv.weight).transpose(1, 2).reshape(b, D, side, side)
        return self.conv(images).flatten(2).transpose(1, 2)


def output_order(tokens: Tensor) -> Tensor:
    """Patches ``[b, T, C, p, p]`` -> ``[b, T, p p C]``, in the order of SiT's last layer."""
    return tokens.permute(0, 1, 3, 4, 2).flatten(2)
