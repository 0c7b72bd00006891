"""Which layers int8 costs, as a figure that a person reads at first sight, as rows of a table, and in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from edgekd.report import figures, svg
from edgekd.report.svg import Axis, Box, element
from edgekd.types import LayerSensitivity, Sensitivity

COLUMNS = ("Layer", "Measured on labels", "Decisions changed", "Signal to noise", "MACs, parameters",
           "The rest without it", "Computes in")  # fmt: skip
WORST = 10  # rows of the table
LINES = 40  # at most, of the bars in text
_SIZES = ((1108, 300), (344, 280))  # width and height in pixels: on a page, and on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 10.0, 34.0, 46.0
_VISIBLE = 5e-4  # of the metric: below a twentieth of a point the bars show the error of the outputs instead
_NAMED = 58.0  # pixels that a layer must have for its name to stand under its bar
_CELLS = 24  # of a bar in text


@dataclass(frozen=True, slots=True)
class Told:
    """All that is said and drawn of one int8 variant."""

    title: str
    sentence: str
    explained: str
    wide: Markup
    narrow: Markup
    values: bool  # there are bars of values between layers
    floats: bool  # there are layers in float
    rows: tuple[tuple[str, ...], ...]  # the worst, in the order of COLUMNS
    bars: tuple[tuple[str, str, str], ...]  # layer, a bar of text, what it costs; from the input to the output
    notes: tuple[str, ...]


def told(found: Sensitivity, metric: str) -> Told:
    """Everything about one variant."""
    wide, narrow = (drawing(found, metric, width, height) for width, height in _SIZES)
    return Told(
        title=f"What int8 costs, layer by layer: {found.variant}",
        sentence=sentence(found),
        explained=_explained(found, metric),
        wide=wide,
        narrow=narrow,
        values=any(row.kind == "value" for row in found.layers),
        floats=any(_in_float(row, found) for row in found.layers),
        rows=table(found),
        bars=_bars_of_text(found),
        notes=found.notes,
    )


def sentence(found: Sensitivity) -> str:
    """What the figure shows, in words: the worst layer, what was done about it, and what is in float anyway."""
    worst = _worst(found)[0]
    alone = f"The worst is {_named(worst)}: in int8 it alone costs {_cost(lost(worst))}"
    whole = "" if found.whole is None else _cost(found.whole)
    left = _left(found)
    also = f" In float anyway: {left}." if left else ""
    if found.mixed is not None and found.remaining is not None:
        count = len(found.float_layers)
        layers = f"{count} layer{'s' if count > 1 else ''} in float ({_listed(found.float_layers)})"
        return f"{alone}. With {layers} int8 costs {_cost(found.remaining)} instead of {whole}.{also}"
    if found.notes:
        return f"{alone}, and int8 as a whole {whole}; no set of layers to leave in float was found.{also}"
    if lost(worst) < _VISIBLE:
        every = f"All layers but {left} compute in int8" if left else "Every layer computes in int8"
        every += f", together they cost {whole}" if whole else ""
        return f"{every}: no layer alone costs anything to speak of."
    return f"{alone}, and int8 as a whole {whole}.{also}" if whole else f"{alone}.{also}"


def lost(row: LayerSensitivity) -> float:
    """What it costs alone: the drop counted on labels where that is above zero for certain, else the expected one."""
    return row.drop.value if row.drop is not None and row.drop.low > 0 else row.expected_drop


def damage(row: LayerSensitivity, found: Sensitivity) -> float:
    """The height of its bar: lost points of the metric, or the error of the outputs in percent of their size."""
    if _in_points(found):
        return lost(row) * 100
    return 0.0 if row.sqnr_db is None else 100 * 10 ** (-row.sqnr_db / 20)


def drawing(found: Sensitivity, metric: str, width: int, height: int) -> Markup:
    """A bar for each layer, from the input at the left to the output at the right."""
    frame = Box(_LEFT, _TOP, width - _RIGHT, height - _BOTTOM)
    heights = [damage(row, found) for row in found.layers]
    y = Axis(0.0, max(max(heights) * 1.2, 1e-3), frame.bottom, frame.top)
    slot = (frame.right - frame.left) / len(heights)
    parts = _grid(frame, y, found, metric)
    boxes = []
    for index, (row, value) in enumerate(zip(found.layers, heights, strict=True)):
        middle, wide = frame.left + (index + 0.5) * slot, min(max(slot * 0.7, 1.2), 44.0)
        box = Box(middle - wide / 2, min(y.px(value), frame.bottom - 0.8), middle + wide / 2, frame.bottom)
        boxes.append(box)
        parts.append(_bar(row, found, box))
        if slot >= _NAMED:
            name = svg.shortened(row.layer, int(slot / 7.2))
            parts.append(element("text", name, cls="tick", x=middle, y=frame.bottom + 20, text_anchor="middle"))
    parts += _labels(found, heights, boxes, frame, slot)
    ends = (("input", frame.left, "start"), ("output", frame.right, "end"))
    parts += [element("text", word, cls="axis", x=x, y=height - 8.0, text_anchor=at) for word, x, at in ends]
    middle = (frame.left + frame.right) / 2
    along = "layers, in the order in which they compute" if width > 400 else "layers"
    parts.append(element("text", f"← {along} →", cls="axis", x=middle, y=height - 8.0, text_anchor="middle"))
    title = f"What int8 costs, layer by layer: {found.variant}"
    worst = "; ".join(f"{row.layer}: {_said(row, found)}" for row in _worst(found)[:3])
    inner = element("title", title) + element("desc", f"The worst: {worst}") + svg.joined(parts)
    view = f"0 0 {width} {height}"
    return element("svg", inner, cls="chart", viewBox=view, role="img", aria_label=f"{title}. The worst: {worst}")


def table(found: Sensitivity) -> tuple[tuple[str, ...], ...]:
    """A row for each of the ten worst, the worst first, in the order of COLUMNS."""
    rows = []
    for row in _worst(found)[:WORST]:
        drop = figures.DASH
        if row.drop is not None:
            drop = f"{figures.points(row.drop.value, row.drop.n)} {figures.points_interval(row.drop)}"
        changed = figures.DASH if row.changed is None else figures.percent(row.changed)
        noise = "no error" if row.sqnr_db is None else f"{row.sqnr_db:.1f} dB".replace("-", figures.MINUS)
        share = figures.DASH
        if row.kind != "value":
            share = f"{figures.percent(row.macs)}, {figures.quantity(row.parameters)}"
        rest = figures.DASH if row.rest is None else f"costs {_cost(row.rest)}"
        rows.append((f"{_named(row)} alone costs {_said(row, found)}", drop, changed, noise, share, rest,
                     "float" if _in_float(row, found) else "int8"))  # fmt: skip
    return tuple(rows)


def _explained(found: Sensitivity, metric: str) -> str:
    """How to read the figure."""
    what = f"the {metric} lost" if _in_points(found) else "the error of the outputs"
    text = f"A bar is {what} where that layer alone computes in int8 and all others in float, on {found.samples} "
    text += "calibration samples held out: the taller, the worse."
    if _in_points(found):
        labels = any(row.drop is not None for row in found.layers)
        text += " Points are counted on labels where that tells them from none, and else " if labels else " Points are "
        text += "those expected by the float network's own probabilities."
    else:
        text += " A network bears several percent, since what it decides hardly changes."
    return text


def _grid(frame: Box, y: Axis, found: Sensitivity, metric: str) -> list[Markup]:
    parts = []
    for tick in y.ticks(4):
        at = y.px(tick)
        parts.append(element("line", cls="grid", x1=frame.left, x2=frame.right, y1=at, y2=at))
        text = figures.plain(figures.digits(tick))
        parts.append(element("text", text, cls="tick", x=frame.left - 7, y=at + 4, text_anchor="end"))
    name = f"{metric} lost, points" if _in_points(found) else "error of the outputs, %"
    parts.append(element("text", name, cls="axis", x=8.0, y=14.0, text_anchor="start"))
    return parts


def _bar(row: LayerSensitivity, found: Sensitivity, box: Box) -> Markup:
    kind = "floated" if _in_float(row, found) else "between" if row.kind == "value" else "harm"
    wide, tall = box.right - box.left, box.bottom - box.top
    tip = element("title", f"{_named(row)}: {_said(row, found)}" + (", left in float" if kind == "floated" else ""))
    drawn = element("rect", tip, cls=kind, x=box.left, y=box.top, width=wide, height=tall, rx=min(2.0, wide / 3))
    if kind != "floated":
        return drawn
    middle = (box.left + box.right) / 2
    half = max(3.0, min(5.0, wide / 2))
    mark = f"M{middle:.1f} {box.bottom + 3:.1f}l{half:.1f} {half * 1.4:.1f}h{-2 * half:.1f}Z"
    return drawn + element("path", cls="float-mark", d=mark)


def _labels(
    found: Sensitivity, heights: Sequence[float], boxes: Sequence[Box], frame: Box, slot: float
) -> list[Markup]:
    """The worst bars carry their names, where those do not stand below, and what they cost."""
    tall = max(heights)
    order = sorted(range(len(heights)), key=lambda i: -heights[i])
    few = frame.right - frame.left < 400
    most = 1 if sum(height > tall / 2 for height in heights) > 4 else 2 if few else 4  # of many alike one will do
    chosen = [i for i in order[:most] if heights[i] > 0.1 * tall and heights[i] > 0]
    tops = [((boxes[i].left + boxes[i].right) / 2, boxes[i].top) for i in chosen]
    taken = list(boxes)
    parts = []
    for i, (x, top) in zip(chosen, tops, strict=True):
        row = found.layers[i]
        value = f"{_figure(heights[i])}{'' if _in_points(found) else ' %'}"
        text = value if slot >= _NAMED else f"{svg.shortened(row.layer, 22 if few else 36)} {value}"
        box, _ = svg.place(x, top, text, taken, tops, frame, 4.0)
        taken.append(box)
        kind = "chosen" if _in_float(row, found) else "other"
        parts.append(element("text", text, cls=f"label {kind}", x=box.left, y=box.bottom - 4))
    return parts


def _bars_of_text(found: Sensitivity) -> tuple[tuple[str, str, str], ...]:
    """The figure for Markdown; of very many layers neighbours share a line, which shows the worst of them."""
    step = math.ceil(len(found.layers) / LINES)
    most = max((damage(row, found) for row in found.layers), default=0.0) or 1.0
    lines = []
    for start in range(0, len(found.layers), step):
        part = found.layers[start : start + step]
        worst = max(part, key=lambda row: damage(row, found))
        name = part[0].layer if len(part) == 1 else f"{part[0].layer} … {part[-1].layer}"
        cells = round(damage(worst, found) / most * _CELLS)
        cost = _said(worst, found) + ("" if len(part) == 1 else f" ({worst.layer})")
        floats = [row for row in part if _in_float(row, found)]
        lines.append((name + (" (in float)" if floats else ""), "█" * cells, cost))
    return tuple(lines)


def _worst(found: Sensitivity) -> list[LayerSensitivity]:
    return sorted(found.layers, key=lambda row: (-damage(row, found), -row.divergence))


def _in_points(found: Sensitivity) -> bool:
    return max(map(lost, found.layers), default=0.0) >= _VISIBLE


def _in_float(row: LayerSensitivity, found: Sensitivity) -> bool:
    """Is the layer, or one of the block, left in float?"""
    if row.kind == "value":
        return False
    return any(name == row.layer or name.startswith(f"{row.layer}.") for name in found.float_layers)


def _said(row: LayerSensitivity, found: Sensitivity) -> str:
    if _in_points(found):
        return _cost(lost(row))
    return "no error" if row.sqnr_db is None else f"{_figure(damage(row, found))} % of error"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.05 else figures.digits(value, 1)


def _cost(drop: float) -> str:
    """A drop in words: "1.8 points", "less than 0.1 points", "nothing"."""
    if drop <= 0:
        return "nothing"
    if drop < _VISIBLE:
        return "less than 0.1 points"
    shown = figures.points(drop, signed=False)
    return f"{shown} point" if shown == "1.0" else f"{shown} points"


def _named(row: LayerSensitivity) -> str:
    return {"layer": row.layer, "block": f"the block {row.layer}", "value": f"the values of {row.layer}"}[row.kind]


def _left(found: Sensitivity) -> str:
    """What no int8 form has in integers, and why: "lstm (a recurrent layer)"; empty where there is none."""
    reasons = dict.fromkeys(found.left.values())
    names = ([name for name, its in found.left.items() if its == why] for why in reasons)
    return ", ".join(f"{_listed(each)} ({why})" for each, why in zip(names, reasons, strict=True))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
