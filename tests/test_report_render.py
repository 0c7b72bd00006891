"""The pages: what they say, that they need nothing from elsewhere, and that hostile names stay text."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from page import Page
from sample_report import (
    BUDGET,
    finished,
    latency,
    matched,
    of_values,
    pair,
    realistic,
    searched,
    sensitive,
    taught,
    variant,
)  # fmt: skip

from edgekd import report
from edgekd.bench.accuracy import wilson
from edgekd.outcome import Matched
from edgekd.report import figures, story
from edgekd.report.render import html, markdown
from edgekd.types import Budget, Interval, LossTerm, Part, Report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>|[a](javascript:x)`*_"
TEACHER = variant("teacher", "teacher", accuracy=wilson(440, 450))


def hostile() -> Report:
    """Every text that a user can choose is an attack."""
    made = realistic()
    rows = tuple(
        dataclasses.replace(
            v, id=v.id + HOSTILE, runtime=HOSTILE, missing=dict.fromkeys(v.missing, HOSTILE), path=HOSTILE,
            metrics={HOSTILE: 0.5},
        )
        for v in made.variants
    )  # fmt: skip
    changed = dataclasses.replace(
        made, name=HOSTILE, variants=rows, teacher=rows[0].id, notes=(HOSTILE,), environment={HOSTILE: HOSTILE},
        chosen={t: c and c + HOSTILE for t, c in made.chosen.items()}, recipe_sha256=HOSTILE, timings_s={HOSTILE: 1.0},
        comparisons=tuple(dataclasses.replace(c, candidate=HOSTILE) for c in made.comparisons), metric=HOSTILE,
        training=taught(teachers=(HOSTILE,), losses=(LossTerm(Part(HOSTILE), 1.0, ((HOSTILE, HOSTILE),)),)),
        correspondence=(Matched(HOSTILE, "same", (pair(HOSTILE, HOSTILE, HOSTILE, 1.0, depth=1.0),), (HOSTILE,)),),
        sensitivity=(dataclasses.replace(
            sensitive(5), target=HOSTILE, variant=HOSTILE, mixed=HOSTILE, float_layers=(HOSTILE,), notes=(HOSTILE,),
            layers=tuple(dataclasses.replace(row, layer=HOSTILE) for row in sensitive(5).layers),
        ),),
    )  # fmt: skip
    return report.concluded(changed)


EDGES: dict[str, Report] = {
    "realistic": realistic(),
    "many samples": realistic(n=10_000),
    "no budget": realistic(budget=Budget()),
    "nothing chosen": realistic(budget=Budget(max_accuracy_drop=0.0, max_latency_ms=0.001, max_size_bytes=10)),
    "one variant": finished([TEACHER], BUDGET),
    "nothing measured": finished([variant("teacher", "teacher"), variant("v", "onnx", target="host")], BUDGET),
    "all wrong": finished(
        [TEACHER, variant("v", "onnx", target="host", accuracy=wilson(0, 450), latency_ms=latency(1), size_bytes=0)],
        BUDGET,
    ),
    "no targets": finished([TEACHER, variant("v", "onnx", accuracy=wilson(450, 450))], BUDGET),
    "bare": finished([TEACHER], Budget(), environment={}, timings_s={}, notes=()),
    "regression": of_values(),
    "search": searched(),
    "search without latency": searched(timed=False),
    "search in vain": searched(budget=Budget(max_accuracy_drop=0.0, max_size_bytes=10, max_memory_bytes=10)),
    "several heads": dataclasses.replace(realistic(), correspondence=(matched("topic"), matched("mood"))),
    "hostile": hostile(),
    "five layers": dataclasses.replace(realistic(), sensitivity=(sensitive(5),)),
    "150 layers, two targets": dataclasses.replace(
        realistic(), sensitivity=(sensitive(150), sensitive(30, mixed=False))
    ),
    "int8 is easy": dataclasses.replace(realistic(), sensitivity=(sensitive(54, mixed=False, hurt=False),)),
    "no labels": dataclasses.replace(of_values(), sensitivity=(sensitive(20, labels=False),)),
    "one exact layer": dataclasses.replace(
        realistic(), sensitivity=(dataclasses.replace(sensitive(1, mixed=False, hurt=False), whole=None, layers=(
            dataclasses.replace(sensitive(1).layers[0], sqnr_db=None, expected_drop=0.0, drop=None, changed=None),
        )),)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_every_edge_renders(name: str, tmp_path: Path) -> None:
    report.render(EDGES[name], tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]
    for text in (html(EDGES[name]), markdown(EDGES[name])):
        assert not re.search(r"\b(nan|None|inf)\b", text), re.search(r".{60}\b(nan|None|inf)\b.{60}", text)
        assert "{{" not in text
    assert report.load(tmp_path) == EDGES[name]


@pytest.mark.parametrize("name", EDGES)
def test_the_page_is_self_contained(name: str) -> None:
    text = html(EDGES[name])
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "img", "form", "base"}
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href", "action"):
            target = attributes.get(key)
            assert target is None or target.startswith(("#", "data:,")), (tag, target)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_names_stay_text() -> None:
    page = Page(html(hostile()))
    assert page.text.count("<script>alert(1)</script>") > 20
    noted = markdown(hostile())
    assert "<script>" not in noted
    assert "\\[a\\](javascript" in noted
    for table in re.findall(r"(?:^\|.*\n)+", noted, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1, "a name breaks the table"


@pytest.mark.parametrize("name", EDGES)
def test_notes_and_their_numbers_belong_together(name: str) -> None:
    page = Page(html(EDGES[name]))
    asked = {a["href"] for tag, a in page.tags if tag == "a"}
    assert asked == {f"#{a['id']}" for tag, a in page.tags if tag == "li" and str(a.get("id", "")).startswith("gap-")}


def test_the_headline_says_what_a_person_wants_to_know() -> None:
    host, jetson = story.headlines(realistic())
    assert (host.kind, host.lead) == ("deploy", "Deploy host-int8 on host:")
    assert host.body == ("99.1 % accurate (teacher 99.3 %, −0.2 points), 37× smaller, 8.4× faster on this machine.")
    assert "the interval reaches beyond the limit" in host.because[0]
    assert (jetson.kind, jetson.lead) == ("try", "Try jetson-fp16 first on jetson:")
    assert jetson.because[0] == "Whether it keeps the budget cannot be told yet."
    assert "TensorRT is not installed here" in jetson.because[1]


def test_another_metric_is_called_by_its_name() -> None:
    made = of_values()
    (host,) = story.headlines(made)
    assert host.body == "R² 90.5 % (teacher 91.2 %, −0.7 points), 3.0× smaller, 1.00 ms on AMD EPYC."
    assert made.variants[2].verdict is not None
    assert made.variants[2].verdict.reasons[0].startswith("R² drop: 111.2 points [+80.0, +140.0] on 400 samples")
    noted, page = markdown(made), Page(html(made))
    for text in (noted, page.text):
        assert "accura" not in text.lower()
        assert "R² drop at most 1 point" in text
        assert "RMSE" in text
        assert "−20.0 %" in text
        assert "values are never the same" in text
    assert "| 0.308 | 0.220 |" in noted
    for words in ("R² against latency", "R², %", "Where R² was lost", "R² with its 95 % interval"):
        assert words in page.text, words


def test_the_headline_of_nothing_names_the_reasons() -> None:
    host, _ = story.headlines(EDGES["nothing chosen"])
    assert host.lead == "Deploy nothing on host yet."
    assert len(host.because) == 3
    assert host.because[0].startswith("host-fp32: accuracy drop: 0.2 points")


def test_the_headline_of_nothing_says_what_is_nearest() -> None:
    host, _ = story.headlines(EDGES["nothing chosen"])
    assert "Nearest: host-int8 " in host.body
    assert "it would fit with --max-drop 0.003 --max-latency 0.136ms --max-size 29.8kB." in host.body
    for text in (Page(html(EDGES["nothing chosen"])).text, markdown(EDGES["nothing chosen"])):
        assert "Nearest: host-int8 drops 0.2 points where 0 is allowed" in text


def test_the_front_is_drawn_and_listed() -> None:
    made = searched()
    page, noted = Page(html(made)), markdown(made)
    assert sum(tag == "path" and a.get("class") == "front" for tag, a in page.tags) == 2, "wide and narrow"
    on = [a for tag, a in page.tags if tag == "circle" and a.get("class") == "ring"]
    assert on, "the chosen one is marked"
    assert "The front: accuracy, latency and size (larger marks)" in page.text
    (front,) = made.pareto
    rows = [line for line in noted.splitlines() if line.startswith("| w")]
    assert [line.split(" ")[1] for line in rows if "/student-" in line.split("|")[1]] == [
        name.removeprefix("host/") for name in front.variants
    ]
    assert all(name.partition("/")[2].partition("/")[0] not in ("w2", "w4", "w6") for name in front.variants)
    for text in (page.text, noted):
        assert "10 of 11 candidates asked for were made by 2 processes; Optuna 5.0.0 (TPE) proposed them" in text
        assert "model resnet8: it cannot be built" in text
        assert text.count(", own rounds") == 6, "three candidates in two precisions are no finalists"
        assert "30 of 30 epochs" in text


def test_a_front_of_two_points_is_no_picture() -> None:
    given: dict[str, Any] = {"target": "host", "accuracy": wilson(430, 450), "drop": Interval(0.01, 0.0, 0.02, 450)}
    rows = [TEACHER, *(variant(f"v{i}", "onnx", **given, size_bytes=9 - i, latency_ms=latency(1 + i)) for i in (0, 1))]
    assert "The front" not in html(finished(rows, BUDGET)) + markdown(finished(rows, BUDGET))
    assert "The front" in html(realistic())


def test_each_limit_of_a_verdict_has_its_own_mark() -> None:
    text = html(EDGES["search in vain"])
    why = text[text.index("<h2>Verdicts</h2>") :]
    assert why.count("pill missed") > 20
    assert "pill cannot-tell" in why, "memory was not measured"


def test_int8_that_was_not_timed_has_still_to_earn_its_place() -> None:
    _, jetson = story.headlines(EDGES["many samples"])
    assert jetson.chosen is not None
    assert jetson.chosen.id == "jetson-int8"
    assert "int8 has still to earn its place" in jetson.because[-1]
    assert "jetson-fp32 and jetson-fp16" in jetson.because[-1]


def test_slower_larger_and_equal_are_called_so() -> None:
    rows = [
        variant("teacher", "teacher", accuracy=wilson(440, 450), size_bytes=1000, latency_ms=latency(1.0)),
        variant("v", "onnx", target="host", accuracy=wilson(440, 450), drop=Interval(0.0, -0.01, 0.01, 450),
                size_bytes=2000, latency_ms=latency(2.0)),
    ]  # fmt: skip
    (found,) = story.headlines(finished(rows, Budget()))
    assert found.body == "97.8 % accurate (teacher 97.8 %, no drop), 2.0× larger, 2.0× slower on this machine."
    rows[1] = dataclasses.replace(rows[1], size_bytes=1001, latency_ms=latency(1.0, device="board", origin="device"))
    (found,) = story.headlines(finished(rows, Budget()))
    assert found.body.endswith("as large as the teacher, 1.00 ms on board.")


def test_int8_that_brings_nothing_is_told(tmp_path: Path) -> None:
    made = realistic()
    slower = [dataclasses.replace(v, latency_ms=latency(0.4)) if v.id == "host-int8" else v for v in made.variants]
    found = finished(slower, BUDGET)
    assert found.chosen["host"] == "host-fp32"
    for text in (Page(html(found)).text, markdown(found)):
        assert "int8 must earn its place" in text
        assert "turned down" in text


def test_what_was_not_measured_is_a_dash_with_a_reason_never_zero() -> None:
    text = markdown(EDGES["nothing measured"])
    row = next(line for line in text.splitlines() if line.startswith("| v |"))
    assert not re.search(r"\b0\b", row)
    assert row.count("—") == 9
    assert "no reason was recorded" in text


def test_another_budget_gives_other_verdicts() -> None:
    made = realistic()
    changed = report.rejudged(made, Budget(max_size_bytes=10))
    assert changed.chosen == {"host": None, "jetson": None}
    assert {v.verdict.status for v in changed.variants if v.verdict} == {"missed"}
    assert report.rejudged(changed, made.budget) == made
    assert "Deploy nothing on host yet." in report.summary(changed, Path("runs/x"))
    assert report.summary(made, Path("runs/x")).endswith("Report: runs/x/report.html")


def test_on_the_console_each_target_has_its_own_lines_below_its_headline() -> None:
    made = realistic()
    for chosen in (made.chosen, dict(reversed(list(made.chosen.items())))):
        lines = report.summary(dataclasses.replace(made, chosen=chosen), Path("runs/x")).splitlines()
        heads = [line for line in lines if not line.startswith("  ")]
        assert [head.partition(":")[0] for head in heads[:-1]] == [
            {"host": "Deploy host-int8 on host", "jetson": "Try jetson-fp16 first on jetson"}[target]
            for target in chosen
        ]
        below = lines[lines.index(next(head for head in heads if "on jetson" in head)) :]
        assert below[1] == "  Whether it keeps the budget cannot be told yet."
        below = lines[lines.index(next(head for head in heads if "on host" in head)) :]
        assert below[1].startswith("  accuracy drop: 0.2 points")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (figures.titled("pixel accuracy"), "Pixel accuracy"),
        (figures.titled("mIoU"), "mIoU"),
        (figures.percent(0.99149, 450), "99.1 %"),
        (figures.percent(0.99149, 10_000), "99.15 %"),
        (figures.percent(0.9999, 450), "99.9 %"),
        (figures.percent(1.0, 450), "100.0 %"),
        (figures.points(0.002), "+0.2"),
        (figures.points(-0.002), "−0.2"),
        (figures.points(-0.0001), "0.0"),
        (figures.size(999), "999 B"),
        (figures.size(999_600), "1.00 MB"),
        (figures.size(12_345), "12.3 kB"),
        (figures.quantity(40_813_184), "40.8 M"),
        (figures.quantity(12), "12"),
        (figures.milliseconds(0.21844), "0.218 ms"),
        (figures.milliseconds(9.999), "10.0 ms"),
        (figures.milliseconds(1234.5), "1230 ms"),
        (figures.plain("5.00 ms"), "5 ms"),
        (figures.plain("500 kB"), "500 kB"),
        (figures.factor(9.96), "10×"),
        (figures.factor(1.02), "1.02×"),
        (figures.duration(59.7), "1 min 0 s"),
        (figures.duration(3725), "1 h 2 min"),
    ],
)
def test_figures(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "The student learned from resnet56 in 30 epochs, which took 12 min 4 s in bf16. "),
        ({}, "Its loss was 0.9 × kd + 0.1 × ce + 1 × srd on 2 pairs of layers; 50 % of what it was taught came from"),
        ({"recalled": 1.0}, "; all of what it was taught came from the cache"),
        ({"recalled": 0.99999}, "; 99.9 % of what it was taught"),
        ({"recalled": 0.0}, "; none of what it was taught"),
        ({"recalled": None}, "on 2 pairs of layers."),
        ({"epochs": 1}, "in 1 epoch, which"),
        ({"teachers": ("a", "b", "c")}, "learned from the weighted mean of a, b and c in"),
        ({"assistants": ("b",), "teachers": ("a",)}, "learned from b, which had learned from a, in 30"),
        ({"assistants": ("b", "c")}, "learned from c, which had learned from b, which had learned from resnet56, in"),
        ({"teachers": ()}, "learned from the labels alone in 30"),
    ],
)
def test_how_the_student_was_trained_is_told(changes: dict[str, Any], says: str) -> None:
    assert says in story.taught(taught(**changes))


def test_a_limit_far_below_every_point_tints_nothing() -> None:
    text = html(EDGES["nothing chosen"])
    assert 'class="allowed"' not in text
    assert "the limit lies far to the left of this chart" in text
    assert 'class="allowed"' in html(realistic())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["realistic", "nothing chosen", "one variant", "several heads", "hostile", "search", "150 layers, two targets"],
)
def test_a_browser_shows_it_on_a_phone_without_errors(name: str, tmp_path: Path) -> None:
    browser = next(
        (path for word in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(word))), None
    )
    if browser is None:
        pytest.skip("no chromium here")
    report.render(EDGES[name], tmp_path)
    script = "const d=f.contentDocument.documentElement;document.title=d.scrollWidth+' '+d.clientWidth"
    style = "border:0;width:390px;height:800px"
    (tmp_path / "phone.html").write_text(
        f'<title>none</title><iframe id="f" src="report.html" style="{style}" onload="{script}"></iframe>'
    )
    done = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         "--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=3000",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "phone.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    found = re.search(r"<title>(\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout[:300]
    assert int(found[1]) <= int(found[2]) == 390, "the page is wider than a phone"
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
