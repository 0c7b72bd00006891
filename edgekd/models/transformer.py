"""A small transformer encoder: a classifier of texts and sensor windows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from edgekd.errors import ModelError
from edgekd.models.sequences import head, pooled, sequence_of
from edgekd.types import TensorSpec

_STD = 0.02  # of initial weights, as in BERT
# Added to the scores of padding. It is finite, so that a sample that is all padding gives no NaN, and within float16.
_HIDDEN = -1e4


class Block(nn.Module):
    """Self-attention and two linear layers, each behind a layer normalisation and with a way around it.

    `qkv` is one linear layer: queries, keys and values side by side, each `width` channels.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(batch × time × width) → the same; `bias` (batch × 1 × 1 × time) is added to the scores of keys.

        Heads may be fewer than share the width: pruning cuts them whole.
        """
        batch, steps, _ = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, 2)
        query, key, value = (part.reshape(batch, steps, self.heads, -1).transpose(1, 2) for part in parts)
        seen = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + self.dropout(self.proj(seen.transpose(1, 2).reshape(batch, steps, self.proj.in_features)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class Transformer(nn.Module):
    """Embedding and learned positions, blocks, the mean over the steps that are no padding, and a linear layer."""

    def __init__(
        self,
        classes: int | Mapping[str, int],
        inputs: tuple[TensorSpec, ...],
        *,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        embedding: int,
        dropout: float,
        vocabulary: int | None,
    ) -> None:
        super().__init__()
        given = sequence_of(inputs, "transformer", vocabulary)
        if isinstance(given.length, str):
            raise ModelError(
                f"sequences differ in length ('{given.length}')",
                where="transformer",
                expected="one length, for its positions",
                fix="cut and pad them, with a mask",
            )
        self.embedding = None if given.vocabulary is None else nn.Embedding(given.vocabulary, embedding)
        features = given.channels or embedding
        self.widen = nn.Identity() if given.vocabulary and features == width else nn.Linear(features, width)
        self.position = nn.Parameter(torch.empty(given.length, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.linear = head(width, classes)
        nn.init.normal_(self.position, std=_STD)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """Ids (batch × time) or vectors (batch × time × channels) → logits (batch × classes), by head where several."""
        if self.embedding is not None:
            x = self.embedding(x)
        x = self.dropout(self.widen(x) + self.position)
        bias = None if mask is None else (mask == 0).to(x.dtype)[:, None, None, :] * _HIDDEN
        for block in self.blocks:
            x = block(x, bias)
        logits: Tensor | dict[str, Tensor] = self.linear(self.dropout(pooled(self.norm(x), mask)))
        return logits


def transformer(
    classes: int | Mapping[str, int],
    inputs: tuple[TensorSpec, ...],
    *,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    hidden: int | None = None,
    embedding: int | None = None,
    dropout: float = 0.1,
    vocabulary: int | None = None,
) -> Transformer:
    """A transformer encoder with the normalisation in front (Vaswani et al., NeurIPS 2017; Xiong et al., ICML 2020).

    With a mask the logits do not depend on what the padding holds. Linear layers become int8, attention stays in float.

    Args:
        classes: number of logits; or by name of a head, for several tasks.
        inputs: ids (batch × time) or vectors (batch × time × channels), and a mask (batch × time) where padded; time is
            fixed.
        width: features of a step.
        depth: blocks.
        heads: of the attention, which share the width.
        hidden: features between the two linear layers of a block; left out: four times the width.
        embedding: features of an id, widened by a linear layer where they are fewer (Lan et al., "ALBERT", ICLR 2020);
            left out: the width.
        dropout: probability.
        vocabulary: number of ids; left out: the data's.

    Raises:
        ModelError: the data is no sequence of a fixed length, or a number is impossible.
    """
    hidden, embedding = 4 * width if hidden is None else hidden, width if embedding is None else embedding
    for name, value in (
        ("width", width),
        ("depth", depth),
        ("heads", heads),
        ("hidden", hidden),
        ("embedding", embedding),
    ):
        if value < 1:
            raise ModelError(f"{name} is {value}", where="transformer", expected="at least 1")
    if width % heads:
        raise ModelError(f"{heads} heads cannot share a width of {width}", where="transformer", expected="a divisor")
    return Transformer(
        classes,
        inputs,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        embedding=embedding,
        dropout=dropout,
        vocabulary=vocabulary,
    )
