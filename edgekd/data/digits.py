"""Handwritten digits that come with scikit-learn: real data with nothing to download."""

from __future__ import annotations

import numpy as np

from edgekd.data.splits import array_pool, assemble
from edgekd.types import Dataset, TensorSpec

_WHITE = 16  # grey levels are 0 to 16 in the source


def digits(seed: int, *, test_fraction: float = 0.2, calibration: int | None = None) -> Dataset:
    """1,797 handwritten digits, 8 × 8 grey pixels, ten classes (Alpaydin and Kaynak, UCI, 1998).

    Args:
        seed: of the division into train, calibration and test.
        test_fraction: fraction of the images to test on.
        calibration: images held out of training; left out: a tenth of the training images.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    image = np.rint(source.images * (255 / _WHITE)).astype(np.uint8)[:, :, :, None]
    return assemble(
        "digits",
        (TensorSpec("image", "uint8", ("batch", *image.shape[1:])),),
        [str(digit) for digit in range(10)],
        array_pool({"image": image}, source.target.astype(np.int64)),
        None,
        images=True,
        seed=seed,
        test_fraction=test_fraction,
        calibration=calibration,
        where="digits",
    )
