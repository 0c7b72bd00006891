"""The [prune] table and the options of `edgekd prune`: what goes together, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import recipe, target, toml
from edgekd.errors import RecipeError, TargetError
from edgekd.goals import Prune, goals_of
from edgekd.starter import built_in

TEXT = """
name = "plants"
[data]
name = "digits"
[teacher]
model = "resnet8"
[student]
model = "pruned"
[prune]
macs = 0.5
ignore = ["layer1"]
"""


def read(text: str) -> recipe.Recipe:
    return recipe.parse(toml.loads(text), source="edgekd.toml", folder=Path())


def test_a_pruned_student_and_its_goal() -> None:
    found = read(TEXT)
    assert found.student.name == "pruned"
    assert found.prune == Prune(macs=0.5, ignore=("layer1",))
    assert found.prune.goal == ("macs", 0.5)
    again = read(found.to_toml(Path()))
    assert (again.prune, again.student) == (found.prune, found.student)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("macs = 0.5", "mac = 0.5", r"edgekd\.toml: prune: unknown key 'mac'.*did you mean 'macs'"),
        ("macs = 0.5", "macs = 1.5", r"edgekd\.toml: prune\.macs: 1\.5 does not fit"),
        ("macs = 0.5", "", r"there is no goal to prune for.*macs = 0\.5"),
        ("macs = 0.5", "macs = 0.5\nlatency_ms = 2.0", "several goals: macs, latency_ms"),
        ("macs = 0.5", 'macs = 0.5\nimportance = "l2"', r"prune\.importance"),
        ("[prune]", "[pruning]", "unknown key 'pruning'"),
        ('model = "pruned"', 'model = "resnet8"', "the student is resnet8, not cut out of its teacher"),
        ('model = "pruned"', 'model = "pruned"\nwidth = 8', "it takes no option"),
        ('[prune]', '[[distill.assistants]]\nmodel = "resnet8"\n[prune]', "a pruned student has no assistants"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(old: str, new: str, told: str) -> None:
    assert old in TEXT
    with pytest.raises(RecipeError, match=told):
        read(TEXT.replace(old, new))


def test_a_student_without_a_goal_and_one_of_several_tasks_are_refused() -> None:
    with pytest.raises(RecipeError, match="there is no goal to prune for"):
        read(TEXT[: TEXT.index("[prune]")])
    heads = TEXT.replace(
        '[data]\nname = "digits"\n[teacher]\nmodel = "resnet8"\n',
        '[[task]]\nhead = "one"\ndata = {name = "digits"}\nteacher = {model = "resnet8"}\n',
    )
    with pytest.raises(RecipeError, match="several tasks cannot be cut out of one teacher"):
        read(heads)


def test_the_command_line_takes_the_teacher_for_the_student() -> None:
    found = recipe.pruned(built_in(), goals_of("50%", None, None, None))
    assert (found.student.name, found.assistants) == ("pruned", ())
    assert found.prune == Prune(macs=0.5)
    other = recipe.pruned(read(TEXT), goals_of(None, None, "2MB", None))
    assert other.prune == Prune(size_bytes=2_000_000, ignore=("layer1",))
    assert recipe.pruned(read(TEXT), {}).prune == Prune(macs=0.5, ignore=("layer1",))
    assert goals_of(None, "0.3", None, "2ms") == {"parameters": 0.3, "latency_ms": 2.0}
    with pytest.raises(RecipeError, match="several goals"):
        recipe.pruned(built_in(), goals_of("50%", "30%", None, None))
    with pytest.raises(RecipeError, match="there is no goal"):
        recipe.pruned(built_in(), {})
    for wrong in ("0%", "100%", "half"):
        with pytest.raises(RecipeError, match="--macs"):
            goals_of(wrong, None, None, None)


@pytest.mark.parametrize("name", target.names())
def test_targets_say_what_widths_they_like(name: str) -> None:
    found = target.load(name)
    assert found.pruning.channel_multiple in (4, 8, 16, 32)
    assert len(found.sources["pruning"]) > 10
    assert f"multiples of {found.pruning.channel_multiple}" in target.as_text([found])


def test_a_target_of_ones_own_may_leave_it_out(tmp_path: Path) -> None:
    text = target.names()["host"].read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(text.replace("[pruning]\nchannel_multiple = 8\n", ""))
    assert target.load(str(tmp_path / "own.toml")).pruning.channel_multiple == 1
    (tmp_path / "own.toml").write_text(text.replace("channel_multiple = 8", "channel_multiple = 0"))
    with pytest.raises(TargetError, match=r"pruning\.channel_multiple"):
        target.load(str(tmp_path / "own.toml"))
