"""Residual networks: ResNet-20 to -110 for CIFAR, ResNet-18 and ResNet-50 for CIFAR or ImageNet shapes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from autocompress_fast.models._layers import conv1x1, conv3x3, initialise


class ZeroPadShortcut(nn.Module):
    """The parameter-free shortcut ("option A"): every `stride`-th pixel, with channels of zeros before and after."""

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = before
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, before + C + after, H / stride, W / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))

    def extra_repr(self) -> str:
        """What print(module) shows."""
        return f"stride={self.stride}, before={self.before}, after={self.after}"


class CifarBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, with the layer names of the widespread CIFAR checkpoints."""

    def __init__(self, in_channels: int, filters: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, filters, stride)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = conv3x3(filters, filters)
        self.bn2 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_channels != filters:
            if shortcut == "A":
                before = (filters - in_channels) // 2
                self.shortcut = ZeroPadShortcut(stride, before, filters - in_channels - before)
            else:
                self.shortcut = nn.Sequential(conv1x1(in_channels, filters, stride), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, filters, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """The CIFAR ResNets of He et al. (2015), section 4.2: a 3x3 convolution and three stages of (depth - 2) / 6 blocks.

    Args:
        classes: outputs.
        in_channels: 3 for colour images.
        depth: 20, 32, 44, 56, 110 in the paper; any 6 n + 2.
        shortcut: "A", zero padding, as in the paper, or "B", a 1x1 convolution where the shape changes.
        width: filters of the first stage; the others have two and four times as many.
    """

    def __init__(
        self, classes: int = 10, in_channels: int = 3, *, depth: int = 20, shortcut: str = "A", width: int = 16
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6 n + 2 (8, 14, 20, ...), got {depth}")
        if shortcut not in ("A", "B"):
            raise ValueError(f"shortcut must be 'A' or 'B', got {shortcut!r}")
        self.conv1 = conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(width, width, 1, blocks, shortcut)
        self.layer2 = self._stage(width, 2 * width, 2, blocks, shortcut)
        self.layer3 = self._stage(2 * width, 4 * width, 2, blocks, shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(4 * width, classes)
        initialise(self)

    @staticmethod
    def _stage(in_channels: int, filters: int, stride: int, blocks: int, shortcut: str) -> nn.Sequential:
        first = CifarBlock(in_channels, filters, stride, shortcut)
        return nn.Sequential(first, *(CifarBlock(filters, filters, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, with torchvision's layer names."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _projection(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, width, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions around a shortcut, with torchvision's layer names."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        filters = width * self.expansion
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, filters)
        self.bn3 = nn.BatchNorm2d(filters)
        self.relu = nn.ReLU()
        self.downsample = _projection(in_channels, filters, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class ResNet(nn.Module):
    """ResNet of four stages, with torchvision's layer names.

    Args:
        classes: outputs.
        in_channels: 3 for colour images.
        depth: 18 (basic blocks) or 50 (bottlenecks).
        stem: "cifar", one 3x3 convolution, or "imagenet", 7x7 with stride 2 and a pool with stride 2.
        width: filters of the first stage; the last has eight times as many.
    """

    def __init__(
        self, classes: int = 10, in_channels: int = 3, *, depth: int = 18, stem: str = "cifar", width: int = 64
    ) -> None:
        super().__init__()
        if depth not in (18, 50):
            raise ValueError(f"depth must be 18 or 50, got {depth}")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        block: type[BasicBlock] | type[Bottleneck] = BasicBlock if depth == 18 else Bottleneck
        blocks = (2, 2, 2, 2) if depth == 18 else (3, 4, 6, 3)
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False) if large else conv3x3(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        out = block.expansion
        self.layer1 = _stage(block, width, width, blocks[0], 1)
        self.layer2 = _stage(block, width * out, 2 * width, blocks[1], 2)
        self.layer3 = _stage(block, 2 * width * out, 4 * width, blocks[2], 2)
        self.layer4 = _stage(block, 4 * width * out, 8 * width, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width * out, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(
    block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(in_channels, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(blocks - 1)))


def _projection(in_channels: int, filters: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == filters:
        return None
    return nn.Sequential(conv1x1(in_channels, filters, stride), nn.BatchNorm2d(filters))
