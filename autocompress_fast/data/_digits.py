"""scikit-learn's handwritten digits: real data that needs no download."""

from __future__ import annotations

import numpy as np

from autocompress_fast.data._dataset import DataError, Size, Splits, from_arrays


def digits(*, validation: Size = 0.15, test: Size = 0.25, seed: int = 0) -> Splits:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn, as shares of full ink (float32, 0 to 1).

    Args:
        validation, test: counts or shares, cut by seed: the test set from all, then the validation set from the rest.
        seed: which ones.

    Raises:
        DataError: scikit-learn is not installed.

    Example:
        >>> splits = digits()
        >>> splits.input_shape, len(splits.train), len(splits.validation), len(splits.test)
        ((1, 8, 8), 1146, 202, 449)
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError("the digits come with scikit-learn; install it: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8).astype(np.float32) / 16
    return from_arrays(images, labels, test=test, validation=validation, seed=seed, name="digits")
