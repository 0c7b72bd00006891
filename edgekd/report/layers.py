"""The layers of student and teacher that losses compare, as a figure of two columns and as rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgekd.outcome import Layer, LayerPair
from edgekd.report import figures, svg
from edgekd.report.svg import Box, element

COLUMNS = ("Student", "Its output", "Teacher", "Its output", "Loss", "CKA", "Projector")
_TOP, _ROW, _NODE = 26.0, 54.0, 42.0  # heights in pixels: of the titles, a row, and a layer in it
_ALONG = (0.5, 0.36, 0.64, 0.24, 0.76)  # where on its line a label may stand


@dataclass(frozen=True, slots=True)
class Place:
    """One layer in the figure: the middle of its row, and whether a loss that counts looks at it."""

    layer: Layer
    y: float
    used: bool


def drawing(pairs: Sequence[LayerPair], width: int, share: float) -> Markup:
    """Student at the left, teacher at the right, each from its input down to its output, and a line for each pair.

    Args:
        pairs: those of weight 0 are drawn faint.
        width: of the figure in pixels.
        share: of it that a column takes.
    """
    wide = width * share
    rows = max(len(_layers(pairs, 0)), len(_layers(pairs, 1)))
    height = _TOP + rows * _ROW
    columns = [_column(pairs, side, height) for side in (0, 1)]
    parts = [
        element("text", "Student", cls="axis", x=0.5, y=12.0),
        element("text", "Teacher", cls="axis", x=width - wide - 0.5, y=12.0),
    ]
    parts += _lines(pairs, columns, wide, width - wide)
    for column, left in zip(columns, (0.5, width - wide - 0.5), strict=True):
        parts += [_node(place, left, wide) for place in column.values()]
    inner = element("title", "Layers that correspond") + element("desc", told(pairs)) + svg.joined(parts)
    box = f"0 0 {width} {height:.0f}"
    return element("svg", inner, cls="chart", viewBox=box, role="img", aria_label=f"Layers: {told(pairs)}")


def table(pairs: Sequence[LayerPair]) -> tuple[tuple[str, ...], ...]:
    """A row for each pair, shallow to deep, in the order of `COLUMNS`."""
    return tuple(
        (
            pair.student.path, shape(pair.student), pair.teacher.path, shape(pair.teacher), _loss(pair),
            figures.DASH if pair.cka is None else f"{pair.cka:.2f}".replace("-", figures.MINUS),
            pair.projector.replace(">", " → "),
        )
        for pair in _in_order(pairs)
    )  # fmt: skip


def told(pairs: Sequence[LayerPair]) -> str:
    """The pairs in words, for those who do not see the figure."""
    return "; ".join(f"{p.student.path} with {p.teacher.path}: {_loss(p)}" for p in _in_order(pairs))


def shape(layer: Layer) -> str:
    """What it gives for one sample: channels, and positions where there are any."""
    return f" {figures.TIMES} ".join(map(str, (layer.channels, *layer.grid)))


def _in_order(pairs: Sequence[LayerPair]) -> list[LayerPair]:
    return sorted(pairs, key=lambda pair: (pair.student.depth, pair.teacher.depth))


def _loss(pair: LayerPair) -> str:
    return f"{pair.weight:g} {figures.TIMES} {pair.loss}" if pair.weight else f"{pair.loss} (not used)"


def _layers(pairs: Iterable[LayerPair], side: int) -> list[Layer]:
    """Each once, from the input to the output."""
    found = {layer.path: layer for pair in pairs for layer in [(pair.student, pair.teacher)[side]]}
    return sorted(found.values(), key=lambda layer: layer.depth)


def _column(pairs: Sequence[LayerPair], side: int, height: float) -> dict[str, Place]:
    """The layers of one network by path, spread over the height of the figure."""
    layers = _layers(pairs, side)
    used = {(pair.student, pair.teacher)[side].path for pair in pairs if pair.weight}
    row = (height - _TOP) / len(layers)
    return {
        layer.path: Place(layer, _TOP + (index + 0.5) * row, layer.path in used) for index, layer in enumerate(layers)
    }


def _lines(pairs: Sequence[LayerPair], columns: Sequence[dict[str, Place]], left: float, right: float) -> list[Markup]:
    """A line for each two layers, those that count on top, with all losses between the two as its label."""
    lines: dict[tuple[str, str], list[LayerPair]] = {}
    for pair in sorted(pairs, key=lambda pair: not pair.weight):
        lines.setdefault((pair.student.path, pair.teacher.path), []).append(pair)
    drawn: list[Markup] = []
    labels: list[Markup] = []
    taken: list[Box] = []
    for (mine, theirs), same in lines.items():
        start, end = columns[0][mine].y, columns[1][theirs].y
        used = [pair for pair in same if pair.weight]
        kind = "used" if used else "unused"
        drawn.append(element("line", cls=f"pair {kind}", x1=left, x2=right, y1=start, y2=end))
        text = svg.shortened(_label(used or same), max(6, int((right - left) / 8.2)))
        box = _free(text, (left, start), (right, end), taken)
        taken.append(box)
        x, y, across = (box.left + box.right) / 2, box.bottom - 4, box.right - box.left
        labels.append(element("rect", cls="behind", x=box.left, y=box.top, width=across, height=box.bottom - box.top))
        labels.append(element("text", text, cls=f"label pair-{kind}", x=x, y=y, text_anchor="middle"))
    return [*reversed(drawn), *labels]


def _label(same: Sequence[LayerPair]) -> str:
    return " + ".join(f"{pair.weight:g} {figures.TIMES} {pair.loss}" if pair.weight else pair.loss for pair in same)


def _free(text: str, start: tuple[float, float], end: tuple[float, float], taken: Sequence[Box]) -> Box:
    """The first place along a line at which its label covers no other, or the one where it covers least."""
    wide = svg.text_width(text)
    boxes = []
    for part in _ALONG:
        x, y = (a + part * (b - a) for a, b in zip(start, end, strict=True))
        x = min(max(x, start[0] + wide / 2), end[0] - wide / 2)  # between the columns
        boxes.append(Box(x - wide / 2, y - 11, x + wide / 2, y + 8))
    return min(boxes, key=lambda box: sum(box.overlap(other) for other in taken))


def _node(place: Place, left: float, wide: float) -> Markup:
    layer, top = place.layer, place.y - _NODE / 2
    kind = "used" if place.used else "unused"
    most = int((wide - 20) / 7.2)
    parts = [
        element("rect", cls=f"node {kind}", x=left, y=top, width=wide, height=_NODE, rx=6.0),
        element("text", svg.shortened(layer.path, most), cls=f"layer {kind}", x=left + 10, y=top + 17),
        element("text", svg.shortened(shape(layer), most), cls=f"shape {kind}", x=left + 10, y=top + 33),
    ]
    return element("g", element("title", layer.path) + svg.joined(parts))
