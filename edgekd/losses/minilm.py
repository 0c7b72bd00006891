"""MiniLMv2: how the tokens of a sentence relate in one attention layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from edgekd.errors import PartError
from edgekd.losses._inputs import both_features, full_precision, positions_kept

# what a padded key scores: a softmax makes 0 of it, and unlike −∞ it stays finite when a score is subtracted
_NEVER = torch.finfo(torch.float32).min / 2


def minilm(student_feature: Tensor, teacher_feature: Tensor, mask: Tensor | None = None, *, heads: int = 12) -> Tensor:
    """Kullback-Leibler divergence between the relations of tokens in one attention layer of student and teacher.

    loss = Σ_{X ∈ Q, K, V} 1/(A·n) · Σ_a Σ_i KL(R^t_ai ‖ R^s_ai), with R_a = softmax(X_a · X_aᵀ / √d), X_a the a-th of A
    equal slices of the channels of queries, keys or values, d the width of a slice, and i the n tokens that count, each
    related to those of its own sentence that count. Widths and attention heads of the two networks may differ: the
    slices are cut anew. It is 0 where all relations are equal. Usually of the last layer, or of one in the upper half
    of a large teacher, alone.

    Reference: Wang, Bao, Huang, Dong, Wei: MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing
    Pretrained Transformers, Findings of ACL 2021.

    Args:
        student_feature, teacher_feature: batch × tokens × 3·width each: queries, keys and values, concatenated.
        mask: batch × tokens, False where a token is padding and does not count.
        heads: A, relation heads; it divides both widths, and need not be the number of attention heads.

    Returns:
        A scalar in nats. No gradient reaches the teacher.

    Raises:
        PartError: batch or tokens differ, the channels cannot be cut into 3 · heads slices, no token counts, or there
            is but one token.
    """
    student, teacher = both_features(student_feature, teacher_feature, "minilm", alike=2)
    _check(student, teacher, heads)
    kept = None if mask is None else positions_kept(mask, student, "minilm")
    with full_precision(student):
        guess, target = _relations(student, heads, kept), _relations(teacher, heads, kept)
    divergence = kl_div(guess, target, reduction="none", log_target=True).sum(-1)  # batch × 3 × heads × tokens
    of_tokens = divergence.mean(2).sum(1)
    if kept is not None:
        of_tokens = of_tokens[kept]
        if not of_tokens.numel():
            raise PartError("minilm is given no token that counts, and the mean of nothing is undefined")
    return of_tokens.mean()


def _relations(feature: Tensor, heads: int, kept: Tensor | None) -> Tensor:
    """Logarithms, batch × 3 × heads × tokens × tokens."""
    if kept is not None:
        feature = feature.masked_fill(~kept[..., None], 0)  # whatever padding holds, it must not reach a product
    batch, tokens, channels = feature.shape
    slices = feature.reshape(batch, tokens, 3, heads, -1).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(slices, slices.transpose(-1, -2)) / math.sqrt(channels // (3 * heads))
    if kept is not None:
        scores = scores.masked_fill(~kept[:, None, None, None], _NEVER)
    return scores.log_softmax(-1)


def _check(student: Tensor, teacher: Tensor, heads: int) -> None:
    if student.shape[1] < 2:
        raise PartError("minilm relates tokens to each other, and there is one", fix="use hidden or cosine")
    channels = student.shape[2], teacher.shape[2]
    if heads < 1 or any(width % (3 * heads) for width in channels):
        shared = math.gcd(*channels)
        possible = [count for count in range(1, shared // 3 + 1) if shared % (3 * count) == 0]
        raise PartError(
            f"minilm has heads = {heads} for features of {channels[0]} and {channels[1]} channels",
            expected="queries, keys and values, concatenated, each of a width that heads divides",
            fix=f"heads may be {', '.join(map(str, possible))}" if possible else "",
        )
