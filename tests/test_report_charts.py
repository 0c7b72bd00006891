"""What is drawn of layers: those that correspond, and what int8 costs in each."""

from __future__ import annotations

import dataclasses

import pytest
from page import Page
from sample_report import pair, realistic, sensitive

from edgekd.report import sensitivity, svg
from edgekd.report.layers import drawing
from edgekd.report.render import html, markdown
from edgekd.types import Interval, Report, Sensitivity


def test_axis_ticks_are_round_and_within() -> None:
    assert svg.Axis(0.1, 7.0, 0, 100, logarithmic=True).ticks(6) == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5])
    assert svg.Axis(0.964, 0.998, 0, 100).ticks(5) == pytest.approx([0.97, 0.98, 0.99])
    assert svg.Axis(1, 100, 0, 100, logarithmic=True).px(10) == 50


def test_labels_of_near_points_do_not_cover_each_other() -> None:
    frame = svg.Box(0, 0, 500, 300)
    taken: list[svg.Box] = []
    points = [(100.0 + 12 * i, 150.0) for i in range(5)]
    for x, y in points:
        box, _ = svg.place(x, y, "a label", taken, points, frame, 6)
        assert all(box.overlap(other) == 0 for other in taken)
        assert box.overlap(frame) == pytest.approx((box.right - box.left) * (box.bottom - box.top))
        taken.append(box)


def test_layers_that_correspond_are_drawn_and_listed() -> None:
    made = realistic()
    page = Page(html(made))
    lines = [a for tag, a in page.tags if tag == "line" and str(a.get("class")).startswith("pair ")]
    assert [a["class"] for a in lines] == 2 * (["pair unused"] * 2 + ["pair used"] * 2), "twice: wide and narrow"
    assert all(a["y1"] == a["y2"] for a in lines), "as many layers at the left as at the right, in the same order"
    for text in (page.text, markdown(made)):
        for words in ("layer3.8.relu", "head.fc:in", "64 × 8 × 8", "1 × srd", "no counterpart for maxpool"):
            assert words in text
    rows = [line for line in markdown(made).splitlines() if line.startswith("| l")]
    assert [row.split(" ")[1] for row in rows] == ["layer1", "layer2", "layer3", "linear:in"]
    assert rows[1] == "| layer2 | 32 × 16 × 16 | layer2 | 64 × 16 × 16 | review (not used) | −0.02 | none |"
    assert rows[2] == "| layer3 | 64 × 8 × 8 | layer3.8.relu | 128 × 8 × 8 | 1 × srd | 0.61 | 64 → 128 |"


def test_nothing_is_drawn_or_said_of_layers_where_none_are_compared() -> None:
    made = dataclasses.replace(realistic(), correspondence=())
    text = html(made)
    assert "ayers that" not in text
    assert 'class="layers"' not in text
    assert "ayers that" not in markdown(made)
    assert "The student learned from resnet56" in text
    silent = dataclasses.replace(made, training=None)
    assert "How the student was trained" not in html(silent) + markdown(silent)


def test_labels_of_lines_that_cross_do_not_cover_each_other() -> None:
    crossing = tuple(
        pair(mine, theirs, "cosine", 1.0, depth=depth)
        for (mine, theirs), depth in zip((("a", "y"), ("b", "x"), ("c", "x")), (0.1, 0.2, 0.9), strict=True)
    )
    layers = [dataclasses.replace(p, teacher=dataclasses.replace(p.teacher, depth=0.5)) for p in crossing]
    boxes = [
        svg.Box(x, y, x + float(a["width"] or 0), y + float(a["height"] or 0))
        for tag, a in Page(drawing(layers, 1108, 0.32)).tags
        if tag == "rect" and a["class"] == "behind"
        for x, y in [(float(a["x"] or 0), float(a["y"] or 0))]
    ]
    assert len(boxes) == 3
    assert all(one.overlap(other) == 0 for at, one in enumerate(boxes) for other in boxes[at + 1 :])


def test_two_losses_on_the_same_layers_are_one_line() -> None:
    same = [pair("a", "b", "srd", 1.0, depth=0.5), pair("a", "b", "cosine", 0.25, depth=0.5)]
    page = Page(drawing(same, 1108, 0.32))
    assert [a["class"] for tag, a in page.tags if tag == "line"] == ["pair used"]
    assert "1 × srd + 0.25 × cosine" in page.text


def bars(text: str) -> list[dict[str, str | None]]:
    """The bars of both widths, one width after the other."""
    return [a for tag, a in Page(text).tags if tag == "rect" and a.get("class") in {"harm", "floated", "between"}]


def report_of(*found: Sensitivity) -> Report:
    return dataclasses.replace(realistic(), sensitivity=found)


@pytest.mark.parametrize(
    ("found", "count"), [((sensitive(5),), 5), ((sensitive(150), sensitive(30, mixed=False)), 150)], ids=["few", "many"]
)
def test_what_int8_costs_is_drawn_layer_by_layer(found: tuple[Sensitivity, ...], count: int) -> None:
    text = html(report_of(*found))
    drawn = bars(text)[:count]
    left = [float(bar["x"] or 0) for bar in drawn]
    assert left == sorted(left), "from the input to the output"
    tall = [float(bar["height"] or 0) for bar in drawn]
    assert tall.index(max(tall)) == count // 2
    assert all(height > 0 for height in tall)
    ends = [float(bar["x"] or 0) + float(bar["width"] or 0) for bar in drawn]
    assert all(end <= start + 0.11 for end, start in zip(ends, left[1:], strict=False)), "no bar covers its neighbour"
    assert max(ends) <= 1108
    floats = [i for i, bar in enumerate(drawn) if bar["class"] == "floated"]
    assert floats == [count // 2 - min(3, count // 2), count // 2]
    for words in ("accuracy lost, points", "input", "output", "computes in int8", "left in float", "6.1", "the taller"):
        assert words in Page(text).text, words


def test_the_worst_layers_are_said_in_plain_words() -> None:
    found = sensitive(20)
    assert sensitivity.sentence(found) == (
        "The worst is blocks.2.se: in int8 it alone costs 6.1 points. With 2 layers in float "
        "(blocks.2.se, blocks.1.conv_pwl) int8 costs 0.3 points instead of 6.8 points."
    )
    rows = sensitivity.table(found)
    assert len(rows) == 10
    assert rows[0] == (
        "blocks.2.se alone costs 6.1 points", "+6.1 [+5.1, +7.3]", "12.2 %", "8.5 dB", "5.0 %, 1.30 k",
        "costs 0.7 points", "float",
    )  # fmt: skip
    assert [row[-1] for row in rows] == ["float", "float", *["int8"] * 8]
    costs = [sensitivity.damage(row, found) for row in found.layers]
    assert max(costs) == pytest.approx(6.1)
    easy = sensitive(54, mixed=False, hurt=False)
    assert sensitivity.sentence(easy).endswith("no layer alone costs anything to speak of.")
    left = {"gru": "a recurrent layer", "attention": "a product of two activations", "mid.rnn": "a recurrent layer"}
    named = "gru, mid.rnn (a recurrent layer), attention (a product of two activations)"
    said = sensitivity.sentence(dataclasses.replace(easy, left=left))
    assert said.startswith(f"All layers but {named} compute in int8, together they cost less than 0.1 points: no layer")
    assert sensitivity.sentence(dataclasses.replace(found, left=left)).endswith(
        f"instead of 6.8 points. In float anyway: {named}."
    )
    # 30 dB are a thirtieth of the outputs' size
    assert sensitivity.damage(easy.layers[0], easy) == pytest.approx(3.162, abs=1e-3)
    missed = dataclasses.replace(sensitive(20, mixed=False), notes=("why",))
    assert sensitivity.sentence(missed).endswith("no set of layers to leave in float was found.")


def test_a_drop_on_labels_counts_where_it_is_certain() -> None:
    row = sensitive(5).layers[2]
    assert sensitivity.lost(dataclasses.replace(row, drop=Interval(0.2, 0.1, 0.3, 256))) == 0.2
    assert sensitivity.lost(dataclasses.replace(row, drop=Interval(0.2, -0.1, 0.5, 256))) == row.expected_drop
    assert sensitivity.lost(dataclasses.replace(row, drop=None)) == row.expected_drop


def test_markdown_draws_bars_of_text_and_bounds_their_number() -> None:
    noted = markdown(report_of(sensitive(150), sensitive(30, mixed=False)))
    first = noted.split("## What int8 costs")[1]
    lines = [line for line in first.splitlines() if line.startswith("| blocks.") and "alone costs" not in line]
    assert len(lines) <= 40
    (longest,) = [line for line in lines if "█" * 24 in line]
    assert "blocks.18.conv\\_pwl" in longest
    assert "6.1 points" in longest
    assert "in float" in longest


def test_a_block_is_marked_where_a_layer_of_it_is_in_float() -> None:
    found = sensitive(5)
    block = dataclasses.replace(found.layers[0], layer="blocks.0", kind="block")
    other = dataclasses.replace(found.layers[0], layer="blocks.01", kind="block")
    made = dataclasses.replace(found, layers=(block, other), float_layers=("blocks.0.conv",))
    drawn = bars(sensitivity.drawing(made, "accuracy", 1108, 300))
    assert [bar["class"] for bar in drawn] == ["floated", "harm"]
    assert sensitivity.table(made)[0][0].startswith("the block blocks.0")


def test_nothing_is_said_of_layers_that_were_not_looked_into() -> None:
    for made in (realistic(), dataclasses.replace(realistic(), sensitivity=())):
        assert "What int8 costs" not in html(made) + markdown(made)
