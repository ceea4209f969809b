"""MobileNetV2 (Sandler et al. 2018): inverted residuals around depthwise convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from autocompress_fast.models._layers import conv1x1, initialise

# expansion, filters, blocks, stride of the first block; the paper's table 2
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation; added to its input where the shape allows."""

    def __init__(self, in_channels: int, filters: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        layers: list[nn.Module] = [_conv_bn_relu6(in_channels, inner, 1)] if expansion > 1 else []
        layers += [
            _conv_bn_relu6(inner, inner, 3, stride, groups=inner),
            conv1x1(inner, filters),
            nn.BatchNorm2d(filters),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds = stride == 1 and in_channels == filters

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, filters, H / stride, W / stride)."""
        y: Tensor = self.conv(x)
        return x + y if self.adds else y


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1, with torchvision's layer names.

    Args:
        classes: outputs.
        in_channels: 3 for colour images.
        stem: "imagenet", which halves the image five times, or "cifar", which leaves out the first two halvings.
    """

    def __init__(self, classes: int = 10, in_channels: int = 3, *, stem: str = "cifar") -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem must be 'cifar' or 'imagenet', got {stem!r}")
        large = stem == "imagenet"
        channels = 32
        layers: list[nn.Module] = [_conv_bn_relu6(in_channels, channels, 3, 2 if large else 1)]
        for stage, (expansion, filters, blocks, first_stride) in enumerate(_STAGES):
            for index in range(blocks):
                stride = first_stride if index == 0 and (large or stage != 1) else 1
                layers.append(InvertedResidual(channels, filters, stride, expansion))
                channels = filters
        layers.append(_conv_bn_relu6(channels, 1280, 1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def _conv_bn_relu6(in_channels: int, filters: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, filters, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters), nn.ReLU6())
