"""Data sets in numpy arrays and batches of them in torch: MNIST, CIFAR, image folders, arrays, the user's own loaders.

Reading needs numpy alone (image folders Pillow, `digits` scikit-learn); only batches need torch.
"""

from autocompress_fast.data._augmentation import Augmentation
from autocompress_fast.data._batches import Batches, BatchLoader, UserBatches, batches
from autocompress_fast.data._cifar import load_cifar10, load_cifar100
from autocompress_fast.data._dataset import DataError, Dataset, Splits, from_arrays, split
from autocompress_fast.data._digits import digits
from autocompress_fast.data._folder import load_folder, read_image
from autocompress_fast.data._load import load
from autocompress_fast.data._mnist import load_fashion_mnist, load_mnist

__all__ = [
    "Augmentation",
    "BatchLoader",
    "Batches",
    "DataError",
    "Dataset",
    "Splits",
    "UserBatches",
    "batches",
    "digits",
    "from_arrays",
    "load",
    "load_cifar10",
    "load_cifar100",
    "load_fashion_mnist",
    "load_folder",
    "load_mnist",
    "read_image",
    "split",
]
