"""Self-attention: its heads are cut whole, since channels of a head mean nothing without the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from edgekd.pruning.cut import Count, Group, Slot

# What implementations call the number of heads, and the channels of all heads together.
_HEADS = ("num_heads", "heads", "num_attention_heads", "n_heads", "n_head", "nhead")
_INNER = ("attn_dim", "all_head_size", "inner_dim", "attention_dim")


@dataclass(frozen=True, slots=True)
class Attention:
    """A module with heads, the linear layers that make queries, keys and values, and the one behind them."""

    path: str
    made_by: tuple[str, ...]  # paths: one layer for all three, or one each
    group: Group


def attentions(module: nn.Module) -> Iterator[Attention]:
    """Every self-attention that can be read off its layers; whether that reading is right is for a trial to say."""
    taken: set[str] = set()
    for path, inside in reversed(list(module.named_modules())):  # a block may say the heads of what is inside it, too
        name = next((each for each in _HEADS if isinstance(vars(inside).get(each), int)), None)
        if name is None:
            continue
        heads = vars(inside)[name]
        prefix = f"{path}." if path else ""
        layers = {f"{prefix}{child}": layer for child, layer in inside.named_modules() if isinstance(layer, nn.Linear)}
        found = _layers(layers, heads)
        if found is None or heads < 2 or not taken.isdisjoint(found[0]):
            continue
        made_by, behind, inner = found
        taken.update(made_by)
        each = inner // heads
        counts = [Count(path, name, 1)]
        counts += [Count(path, extra, each) for extra in _INNER if vars(inside).get(extra) == inner]
        slots = [_made(at, layers[at].out_features // inner, inner, heads) for at in made_by]
        slots.append(Slot(behind, "in", _ranges(heads, each)))
        group = Group(path or made_by[0], heads, each, tuple(slots), tuple(counts))
        yield Attention(path, made_by, group)


def _layers(layers: dict[str, nn.Linear], heads: int) -> tuple[tuple[str, ...], str, int] | None:
    """(queries, keys and values; the layer behind; channels of all heads): one layer of three parts, or three."""
    order = list(layers)
    for at, path in enumerate(order):
        of_three = layers[path].out_features
        behind = [other for other in order[at + 1 :] if 3 * layers[other].in_features == of_three]
        if behind and of_three % (3 * heads) == 0:
            return (path,), behind[0], of_three // 3
    for at in range(len(order) - 3):
        first, last = order[at : at + 3], order[at + 3]
        widths = {layers[path].out_features for path in first} | {layers[last].in_features}
        if len(widths) == 1 and (inner := widths.pop()) % heads == 0:
            return tuple(first), last, inner
    return None


def _ranges(heads: int, each: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(range(head * each, (head + 1) * each)) for head in range(heads))


def _made(path: str, parts: int, inner: int, heads: int) -> Slot:
    of_head = _ranges(heads, inner // heads)
    return Slot(path, "out", tuple(tuple(part * inner + at for part in range(parts) for at in own) for own in of_head))
