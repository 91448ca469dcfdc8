"""Inception-v3 as FID uses it: TensorFlow's graph of 2015-12-05, under the parameter names of torch-fidelity's file.

It differs from the usual Inception-v3 in four points. Average pools do not count the padding. The
last block pools with a maximum. There are 1008 classes. Images are resized as TensorFlow 1 does it.
"""

import os
import pickle
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# side of the images that the network sees
SIZE = 299
# numbers of features: pool_3, and seven channels of a 17 x 17 map
POOL = 2048
SPATIAL = 17 * 17 * 7
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# for whoever does not have them: nothing is downloaded
SOURCE = (
    f"{WEIGHTS} (95 628 359 bytes, SHA-256 {SHA256}) of the releases of toshas/torch-fidelity, "
    "or the same file of mseitzer/pytorch-fid, pt_inception-2015-12-05-6726825d.pth"
)
MEAN_POOL = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
MAX_POOL = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
HALVE = partial(F.max_pool2d, kernel_size=3, stride=2)


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """Bilinear, as TensorFlow 1: pixel i is read at i H / size, without half-pixel centres.

    Args:
        images: ``[N, C, H, W]`` fp32.
        size: side of the result.

    Returns:
        ``[N, C, size, size]`` fp32.
    """
    # columns, then rows
    for dim in (3, 2):
        length = images.shape[dim]
        # positions in fp32, as in TensorFlow
        scale = torch.tensor(length / size, dtype=torch.float32)
        position = torch.arange(size, device=images.device) * scale
        low = position.long()
        high = (low + 1).clamp(max=length - 1)
        first = images.index_select(dim, low)
        second = images.index_select(dim, high)
        weight = position - low
        if dim == 2:
            weight = weight.view(-1, 1)
        images = first + (second - first) * weight
    return images


class Convolution(nn.Module):
    """Convolution without bias, then batch norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel, stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Several branches on one input, concatenated over channels.

    Args:
        in_channels: of the input.
        branches: each is a chain of steps. A step is a pool (a callable), a convolution ``(name,
            channels, kernel[, stride])``, or a fork: a list of convolutions of one input whose
            outputs are concatenated. Convolutions are padded to keep the size, except at stride 2.
    """

    def __init__(self, in_channels: int, *branches: tuple):
        super().__init__()
        # every step as a fork, of one part if it is none
        self.branches = [
            [step if isinstance(step, list) else [step] for step in branch] for branch in branches
        ]
        for branch in self.branches:
            channels = in_channels
            for step in branch:
                channels = sum(self._add(channels, part) for part in step)

    def _add(self, in_channels: int, part) -> int:
        """Register a convolution under its name; the number of its output channels."""
        # a pool keeps the channels and has no weights
        if callable(part):
            return in_channels
        # the stride may be left out
        name, channels, kernel, stride = (*part, 1)[:4]
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if stride == 1 else 0
        self.add_module(name, Convolution(in_channels, channels, kernel, stride, padding))
        return channels

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                parts = [part(y) if callable(part) else getattr(self, part[0])(y) for part in step]
                y = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
            outputs.append(y)
        return torch.cat(outputs, 1)


# the blocks are named after the side of their feature map; branch names are those of the file
def block_35(in_channels: int, pooled: int) -> Mixed:
    return Mixed(
        in_channels,
        (("branch1x1", 64, 1),),
        (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        (MEAN_POOL, ("branch_pool", pooled, 1)),
    )


def block_35_to_17(in_channels: int) -> Mixed:
    return Mixed(
        in_channels,
        (("branch3x3", 384, 3, 2),),
        (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)),
        (HALVE,),
    )


def block_17(c: int) -> Mixed:
    row = (1, 7)
    column = (7, 1)
    return Mixed(
        768,
        (("branch1x1", 192, 1),),
        (("branch7x7_1", c, 1), ("branch7x7_2", c, row), ("branch7x7_3", 192, column)),
        (
            ("branch7x7dbl_1", c, 1),
            ("branch7x7dbl_2", c, column),
            ("branch7x7dbl_3", c, row),
            ("branch7x7dbl_4", c, column),
            ("branch7x7dbl_5", 192, row),
        ),
        (MEAN_POOL, ("branch_pool", 192, 1)),
    )


def block_17_to_8() -> Mixed:
    return Mixed(
        768,
        (("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)),
        (
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ),
        (HALVE,),
    )


def block_8(in_channels: int, pool) -> Mixed:
    row = (1, 3)
    column = (3, 1)
    return Mixed(
        in_channels,
        (("branch1x1", 320, 1),),
        (("branch3x3_1", 384, 1), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]),
        (
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)],
        ),
        (pool, ("branch_pool", 192, 1)),
    )


class Inception(nn.Module):
    """The network whose features the ADM suite uses."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = block_35(192, 32)
        self.Mixed_5c = block_35(256, 64)
        self.Mixed_5d = block_35(288, 64)
        self.Mixed_6a = block_35_to_17(288)
        self.Mixed_6b = block_17(128)
        self.Mixed_6c = block_17(160)
        self.Mixed_6d = block_17(160)
        self.Mixed_6e = block_17(192)
        self.Mixed_7a = block_17_to_8()
        self.Mixed_7b = block_8(1280, MEAN_POOL)
        self.Mixed_7c = block_8(2048, MAX_POOL)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of a batch.

        Args:
            images: uint8 ``[N, 3, H, W]``, or ``[N, 1, H, W]``, whose channel is repeated.

        Returns:
            In fp32: ``pool_3`` ``[N, 2048]``; the first 7 channels of ``mixed_6/conv`` in NHWC
            order, ``[N, 2023]``; the logits without their bias, ``[N, 1008]``.
        """
        # [0, 255] to [-1, 1], as the graph scales it
        x = (resize_tf1(images.float(), SIZE) - 128) / 128
        x = x.expand(-1, 3, -1, -1)
        x = HALVE(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = HALVE(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        # 35 x 35, then 17 x 17
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # mixed_6/conv is branch1x1, which comes first
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        # 8 x 8, averaged
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x)))).mean((2, 3))
        return pool, spatial, F.linear(pool, self.fc.weight)


def load_inception(path: str) -> Inception:
    """The network in eval mode on the CPU, with the weights at ``path``; ValueError if they are not there."""
    if not os.path.exists(path):
        raise ValueError(f"there is no {path}, expected {SOURCE}")
    # without memory until the weights are there: random initialisation would take seconds
    with torch.device("meta"):
        model = Inception()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.to_empty(device="cpu").load_state_dict(state, strict=True)
    except (
        OSError,
        RuntimeError,
        TypeError,
        AttributeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        # torch's text on pickles advises to load unsafely
        pickled_code = isinstance(error, pickle.UnpicklingError)
        reason = "no file of tensors" if pickled_code else " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not hold the weights of {WEIGHTS}: {reason}") from None
    return model.eval().requires_grad_(False)
