"""report.json: the schema holds for what is written, and what is read is checked."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from sample_report import realistic, searched, sensitive

from edgekd import report
from edgekd.errors import DataError, StoreError


def test_the_schema_is_valid_and_holds_for_a_report(tmp_path: Path) -> None:
    schema = report.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    report.dump(realistic(), tmp_path / "report.json")
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, schema)
    document["variants"][0]["precision"] = "int3"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    written = realistic()
    report.dump(written, tmp_path / "report.json")
    assert report.load(tmp_path / "report.json") == written
    assert report.load(tmp_path) == written
    before = (tmp_path / "report.json").read_bytes()
    report.dump(report.load(tmp_path), tmp_path / "report.json")
    assert (tmp_path / "report.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_report_of_before_layers_were_told_is_read(tmp_path: Path) -> None:
    document = json.loads(json.dumps(dataclasses.asdict(realistic())))
    assert document["correspondence"][0]["pairs"][0]["student"]["path"] == "layer3"
    assert document["training"]["losses"][0]["part"]["name"] == "kd"
    del document["correspondence"], document["training"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    read = report.load(tmp_path)
    assert (read.training, read.correspondence) == (None, ())
    jsonschema.validate(document, report.schema())


def test_a_search_is_written_and_read(tmp_path: Path) -> None:
    written = searched()
    report.dump(written, tmp_path / "report.json")
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, report.schema())
    assert report.load(tmp_path) == written
    assert document["pareto"][0]["axes"] == ["drop", "latency_ms", "size_bytes"]
    assert document["search"]["candidates"][-1]["refused"].endswith("cannot be built")
    rows = {row["id"]: row for row in document["variants"]}
    assert set(document["pareto"][0]["variants"]) <= set(rows)
    assert rows["host/w2/student-int8"]["latency_ms"]["rounds"] == "w2"
    assert rows["host/w20/student-int8"]["candidate"] == "w20"


def test_a_report_of_before_searches_were_told_is_read(tmp_path: Path) -> None:
    document = json.loads(json.dumps(dataclasses.asdict(realistic())))
    for key in ("nearest", "pareto", "search"):
        del document[key]
    del document["budget"]["max_memory_bytes"]
    for row in document["variants"]:
        del row["candidate"]
        if row["latency_ms"]:
            del row["latency_ms"]["rounds"]
        if row["verdict"]:
            del row["verdict"]["limits"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    jsonschema.validate(document, report.schema())
    read = report.load(tmp_path)
    assert (read.nearest, read.pareto, read.search) == ({}, (), None)
    assert report.rejudged(read, read.budget) == realistic()


def test_sensitivity_is_in_the_schema_and_reports_of_before_it_are_read(tmp_path: Path) -> None:
    written = dataclasses.replace(realistic(), sensitivity=(sensitive(5), sensitive(30, mixed=False, labels=False)))
    report.dump(written, tmp_path / "report.json")
    assert report.load(tmp_path) == written
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(document, report.schema())
    document["sensitivity"][0]["layers"][0]["kind"] = "neuron"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, report.schema())
    del document["sensitivity"]
    (tmp_path / "report.json").write_text(json.dumps(document))
    assert report.load(tmp_path) == realistic()
    jsonschema.validate(document, report.schema())


def drop_key(document: dict[str, Any]) -> None:
    """Take something away that must be there."""
    del document["variants"][0]["stage"]


def wrong_type(document: dict[str, Any]) -> None:
    """Text for a number."""
    document["variants"][1]["size_bytes"] = "many"


def older(document: dict[str, Any]) -> None:
    """A version of the past."""
    document["schema"] = 0


def newer(document: dict[str, Any]) -> None:
    """A version to come."""
    document["schema"] = 2


def twice(document: dict[str, Any]) -> None:
    """Two variants of one name."""
    document["variants"][1]["id"] = document["variants"][0]["id"]


def nobody(document: dict[str, Any]) -> None:
    """A choice that is no variant."""
    document["chosen"]["host"] = "nobody"


def endless(document: dict[str, Any]) -> None:
    """A number that JSON can spell and a float cannot hold."""
    document["variants"][0]["accuracy"]["high"] = 1e308 * 10


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop_key, "variants.0.stage"),
        (wrong_type, "variants.1.size_bytes"),
        (older, "run edgekd compress again"),
        (newer, "upgrade"),
        (twice, "several variants are called 'teacher'"),
        (nobody, "there is no variant 'nobody'"),
        (endless, "Infinity is no JSON number"),
    ],
)
def test_a_wrong_report_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], says: str) -> None:
    document = json.loads(json.dumps(dataclasses.asdict(realistic())))
    change(document)
    (tmp_path / "report.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="(?i)" + says):
        report.load(tmp_path)


@pytest.mark.parametrize("text", ["", "not json", "[1]", "{}", '{"schema": 1}', "\x00\xff", "[" * 100_000, "1e999"])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError):
        report.load(tmp_path)


def test_a_large_exponent_does_not_become_infinity(tmp_path: Path) -> None:
    text = json.dumps(dataclasses.asdict(realistic())).replace('"n": 9200', '"n": 9200, "x": 1e999', 1)
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(DataError, match="not finite"):
        report.load(tmp_path)


def test_a_missing_file_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such report"):
        report.load(tmp_path)


def test_numbers_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    first, *others = realistic().variants
    wrong = dataclasses.replace(realistic(), variants=(dataclasses.replace(first, agreement=float("nan")), *others))
    with pytest.raises(ValueError, match=r"report\.variants\[0\]\.agreement is not finite"):
        report.dump(wrong, tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        report.dump(realistic(), tmp_path / "absent" / "report.json")
