"""The one extension rule: found by file name, options checked against the signature, three doors alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgekd import plugins
from edgekd.errors import PartError
from edgekd.types import Part

OWN = """
def scaled(student, teacher, labels, *, factor: float = 2.0, modes: tuple[str, ...] = ("a",)):
    return factor

def two(classes, inputs): return (classes, inputs)
def one(classes): return classes
def three(a, b, c): return None
class Loss:
    def __init__(self, *, power: int): self.power = power
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_parts.py").write_text(OWN)
    (tmp_path / "broken_parts.py").write_text("import a_package_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("own_parts", None)
    return "own_parts"


def test_built_in_parts_are_listed_without_importing_them() -> None:
    names = plugins.names("models")
    assert {"resnet8", "resnet20", "resnet32", "resnet56", "timm", "torchvision"} <= set(names)
    assert "network" not in names
    assert "weights" not in names
    assert "kd" in plugins.names("losses")


def test_a_built_in_part_and_a_users_own_go_through_the_same_door(own: str) -> None:
    assert plugins.find("losses", "kd").__name__ == "kd"
    assert plugins.bind("losses", Part(f"{own}:scaled", {"factor": 3}))(None, None, None) == 3


def test_a_misspelt_option_names_the_nearest_and_where_it_stands(own: str) -> None:
    with pytest.raises(PartError) as caught:
        plugins.bind("losses", Part(f"{own}:scaled", {"facotr": 3}), where="edgekd.toml: loss[0]")
    assert "edgekd.toml: loss[0]: unknown option 'facotr'" in str(caught.value)
    assert "takes factor, modes" in str(caught.value)
    assert "did you mean 'factor'?" in str(caught.value)


def test_an_option_of_another_type_is_refused_and_a_list_becomes_a_tuple(own: str) -> None:
    with pytest.raises(PartError, match="does not fit"):
        plugins.bind("losses", Part(f"{own}:scaled", {"factor": "3"}))
    bound = plugins.bind("losses", Part(f"{own}:scaled", {"modes": ["x", "y"]}))
    assert bound.keywords == {"modes": ("x", "y")}  # type: ignore[attr-defined]


def test_a_missing_option_is_named(own: str) -> None:
    with pytest.raises(PartError, match="needs the option 'power'"):
        plugins.bind("losses", Part(f"{own}:Loss"))
    assert plugins.bind("losses", Part(f"{own}:Loss", {"power": 2}))().power == 2


def test_a_callable_gets_as_many_positional_arguments_as_it_takes(own: str) -> None:
    assert plugins.build("models", Part(f"{own}:two"), 10, "specs") == (10, "specs")
    assert plugins.build("models", Part(f"{own}:one"), 10, "specs") == 10
    with pytest.raises(PartError, match="needs 3 positional"):
        plugins.build("models", Part(f"{own}:three"), 10, "specs")


def test_an_unknown_name_is_an_error_with_the_nearest(own: str) -> None:
    with pytest.raises(PartError, match=r"did you mean 'resnet\d+'"):
        plugins.find("models", "resnet21")
    with pytest.raises(PartError, match="did you mean 'scaled'"):
        plugins.find("losses", f"{own}:scald")
    with pytest.raises(PartError, match="cannot be imported"):
        plugins.find("losses", "no_such_module:thing")
    with pytest.raises(PartError, match="a_package_that_is_not_there"):
        plugins.find("losses", "broken_parts:thing")
