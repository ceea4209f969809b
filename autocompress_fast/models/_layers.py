"""What several networks share."""

from __future__ import annotations

from torch import nn


def conv3x3(in_channels: int, filters: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution with padding, without bias: a normalisation follows."""
    return nn.Conv2d(in_channels, filters, 3, stride, padding=1, bias=False)


def conv1x1(in_channels: int, filters: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias: a normalisation follows."""
    return nn.Conv2d(in_channels, filters, 1, stride, bias=False)


def initialise(model: nn.Module) -> None:
    """He initialisation of the convolutions (fan out), N(0, 0.01^2) for the linear layers, biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
