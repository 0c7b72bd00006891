"""Distillation losses, one file each: pure functions of tensors, for edgekd's loop and for anybody's own.

What a loss is given follows from the names of its positional parameters; keyword-only ones come from the recipe:

======================================  ==============================================================================
student_logits, teacher_logits          rows × classes: a row a sample, or a pixel or a frame of a dense task
labels                                  of those rows: int64 class indices, or rows × classes probabilities (mixup);
                                        for a task of values, rows × values
student_values, teacher_values          rows × values, of a task of values (regression)
student_feature, teacher_feature        one matched pair, batch × positions × channels each, on one grid
projected_feature                       the student's feature brought to the teacher's channels by a trainable projector
mask                                    batch × positions, bool, of the pair: False is padding; or None
exit_logits                             rows × classes from a trainable exit on the student's feature
fused_features, teacher_features        tuples, shallow to deep, batch × channels × height × width each: the student's
                                        through trainable fusion, and the teacher's
student, teacher                        Outputs: everything that is tapped
======================================  ==============================================================================

A feature loss is taken for every pair of its term and summed; in one's own loop any of them may be given maps
(batch × channels × height × width) and vectors (batch × channels) too. No loss lets a gradient reach the teacher.
"""

from __future__ import annotations

from edgekd.losses.attention import attention
from edgekd.losses.ce import ce
from edgekd.losses.cosine import cosine
from edgekd.losses.dist import dist
from edgekd.losses.dkd import dkd
from edgekd.losses.function_matching import function_matching
from edgekd.losses.hidden import hidden
from edgekd.losses.hint import hint
from edgekd.losses.kd import kd
from edgekd.losses.minilm import minilm
from edgekd.losses.mse import mse
from edgekd.losses.nkd import nkd
from edgekd.losses.ofa import ofa
from edgekd.losses.review import review
from edgekd.losses.similarity import similarity
from edgekd.losses.srd import srd

__all__ = [
    "attention",
    "ce",
    "cosine",
    "dist",
    "dkd",
    "function_matching",
    "hidden",
    "hint",
    "kd",
    "minilm",
    "mse",
    "nkd",
    "ofa",
    "review",
    "similarity",
    "srd",
]
