"""The small networks of the pruning papers, for MNIST and for scikit-learn's 8x8 digits."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet5(nn.Module):
    """Caffe's LeNet-5: 20 and 50 filters of 5x5 without padding, each max-pooled, then 500 - ReLU - classes.

    For 1x28x28 images it has 430,500 weights, biases apart: 500 + 25,000 in the convolutions, 400,000 + 5,000 behind
    them.

    Args:
        classes: outputs.
        in_channels: 1 for grey images.
        image_size: height and width of the images, 16 or more.
        conv_relu: put a ReLU behind both convolutions too, as many reimplementations do; the papers' network has none.
    """

    def __init__(
        self, classes: int = 10, in_channels: int = 1, *, image_size: int = 28, conv_relu: bool = False
    ) -> None:
        super().__init__()
        side = ((image_size - 4) // 2 - 4) // 2
        if side < 1:
            raise ValueError(f"image_size must be 16 or more, got {image_size}")
        self.conv1 = nn.Conv2d(in_channels, 20, 5)
        self.relu1 = nn.ReLU() if conv_relu else nn.Identity()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.relu2 = nn.ReLU() if conv_relu else nn.Identity()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(50 * side * side, 500)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        logits: Tensor = self.fc2(self.relu3(self.fc1(x.flatten(1))))
        return logits


class DigitsNet(nn.Module):
    """A LeNet for 8x8 images: 16 and 32 padded filters of 3x3, each with ReLU and max-pooling, then 64 - classes."""

    def __init__(self, classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = self.pool1(self.relu1(self.conv1(x)))
        x = self.pool2(self.relu2(self.conv2(x)))
        logits: Tensor = self.fc2(self.relu3(self.fc1(x.flatten(1))))
        return logits


class LeNet300(nn.Module):
    """LeNet-300-100: two hidden linear layers on the flattened image; 266,200 weights for 1x28x28, biases apart."""

    def __init__(self, classes: int = 10, in_channels: int = 1, *, image_size: int = 28) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels * image_size * image_size, 300)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(300, 100)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(100, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, C, H, W)."""
        x = self.relu1(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(self.relu2(self.fc2(x)))
        return logits
