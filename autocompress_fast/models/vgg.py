"""VGG-16 for CIFAR and ImageNet, and AlexNet: plain chains of convolutions."""

from __future__ import annotations

from torch import Tensor, nn

from autocompress_fast.models._layers import initialise

_VGG16 = (
    (1, 1),
    (2, 2),
    (4, 4, 4),
    (8, 8, 8),
    (8, 8, 8),
)  # filters of every stage, in widths; each stage ends in a pool


class VGG16(nn.Module):
    """VGG-16 with batch normalisation for 32x32 images and one linear layer; 14.71 M CONV weights, 313.2 M MACs.

    Args:
        classes: outputs.
        in_channels: 3 for colour images.
        width: filters of the first stage; the last has eight times as many.
    """

    def __init__(self, classes: int = 10, in_channels: int = 3, *, width: int = 64) -> None:
        super().__init__()
        self.features = _features(in_channels, width, bias=False, batch_norm=True)
        self.classifier = nn.Linear(8 * width, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class VGG16ImageNet(nn.Module):
    """VGG-16 for 224x224 images, with three linear layers; names and shapes of torchvision's vgg16 (vgg16_bn).

    Args:
        classes: outputs.
        in_channels: 3 for colour images.
        batch_norm: normalise behind every convolution.
    """

    def __init__(self, classes: int = 1000, in_channels: int = 3, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.features = _features(in_channels, 64, bias=True, batch_norm=batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


class AlexNet(nn.Module):
    """AlexNet for 224x224 images; names and shapes of torchvision's alexnet, which has no groups and 61.1 M parameters.

    Args:
        classes: outputs.
        in_channels: 3 for colour images.
    """

    def __init__(self, classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def _features(in_channels: int, width: int, *, bias: bool, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for stage in _VGG16:
        for multiple in stage:
            filters = multiple * width
            layers.append(nn.Conv2d(in_channels, filters, 3, padding=1, bias=bias))
            layers += [nn.BatchNorm2d(filters)] * batch_norm
            layers.append(nn.ReLU())
            in_channels = filters
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)
