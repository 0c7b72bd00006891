"""SRD: a linear projector, normalised features and a soft maximum of their differences."""

from __future__ import annotations

from torch import Tensor

from edgekd.errors import PartError
from edgekd.losses._inputs import both_rows

_EPS = 1e-4  # of the mean variance; below the logarithm it keeps loss and gradient finite at equality
_LEAST = 1e-12  # variance: where all features are one constant, no gradient explodes


def srd(projected_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logarithm of the summed fourth powers of the differences between features standardised over the batch.

    loss = log(ε + Σ_i Σ_c |ŝ_ic − t̂_ic|⁴), with x̂_ic = (x_ic − mean_i x_ic) / √(var_i x_ic + ε · mean_c var_i x_ic) and
    ε = 1e-4, over all positions i of the batch that count and the channels c. The fourth power looks at the largest
    differences, the logarithm keeps the gradient's size as they shrink. It does not depend on the scale of all features
    and but for ε not on that of a channel. Its minimum is log ε ≈ −9.2, where both agree; elsewhere it grows with
    log(positions · channels), which no gradient sees.

    Reference: Miles, Mikolajczyk: Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024 (on the
    features before the classifier, pooled to a vector; of weight 2 beside cross-entropy and kd at T = 1). There ε alone
    stands under the root. It rewards a student whose features are small for shrinking them to nothing, ŝ = 0 being
    nearer to t̂ than what is not yet correlated with it, and its ReLUs die.

    Args:
        projected_feature, teacher_feature: batch × positions × channels each, or maps, or vectors.
        mask: batch × positions, False where a position is padding and does not count.

    Returns:
        A scalar, negative where the two nearly agree. No gradient reaches the teacher.

    Raises:
        PartError: the shapes differ, or there is but one position in the whole batch.
    """
    rows = both_rows(projected_feature, teacher_feature, mask, "srd")
    if rows[0].shape[0] < 2:
        raise PartError(
            "srd standardises over the batch, and this one has one vector", fix="use a batch of two samples or more"
        )
    student, teacher = map(_standardised, rows)
    # squared twice, and the variance from what is centred anyway: a fifth of the time of `** 4` and `var`
    return (student - teacher).square().square().sum().add(_EPS).log()


def _standardised(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(0)
    variance = centred.square().mean(0)
    return centred * (variance + _EPS * variance.mean() + _LEAST).rsqrt()
