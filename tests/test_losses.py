"""What holds for every loss: its formula, its gradient, its minimum, its number type, what it may be given."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loss_formulas import FORMULAS
from torch import Tensor

import edgekd.losses
from edgekd import plugins
from edgekd.types import Part

NAMES = sorted(plugins.names("losses"))
ROWS, CLASSES = 6, 5
BATCH, TOKENS, CHANNELS = 4, 6, 72
LEVELS = ((4, 3, 9, 9), (4, 5, 4, 4), (4, 2, 1, 1))  # of review
OF_STUDENT = {
    "student_logits", "student_values", "exit_logits", "student_feature", "projected_feature", "fused_features",
}  # fmt: skip
OF_TEACHER = {"teacher_logits", "teacher_values", "teacher_feature", "teacher_features"}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "attention": ({"p": 1.0}, {"p": 4.0}),
    "ce": ({"label_smoothing": 0.2},),
    "dist": ({"temperature": 3.0, "inter": 0.5}, {"inter": 0.0}, {"intra": 0.0}),
    "dkd": ({"temperature": 1.0, "alpha": 0.5, "beta": 8.0}, {"alpha": 0.0}),
    "kd": ({"temperature": 1.0}, {"temperature": 2.0, "standardize": True}),
    "minilm": ({"heads": 3}, {"heads": 1}),
    "mse": ({"to": "labels"},),
    "nkd": ({"temperature": 3.0, "gamma": 0.5},),
    "ofa": ({"epsilon": 1.5}, {"epsilon": 0.5}),
}
LOSSES = {name: plugins.find("losses", name) for name in NAMES}
CASES = [(name, options) for name in NAMES for options in ({}, *VARIANTS.get(name, ()))]
EXTREMES = [
    (torch.float32, 1e-30), (torch.float32, 1e4), (torch.float32, 1e15), (torch.float32, 1e30),
    (torch.bfloat16, 1e-30), (torch.bfloat16, 1e4), (torch.bfloat16, 1e15), (torch.bfloat16, 1e30),
    (torch.float16, 1e-3), (torch.float16, 1e4),
]  # fmt: skip
SQUARED = ["hidden", "hint", "minilm", "mse", "review", "srd"]  # sums of squares beyond float32 are inf, as they should


def at_the_teacher(name: str, options: dict[str, Any]) -> bool:
    """Whether the minimum of the loss is where student and teacher are equal; else its docstring says where."""
    return name not in ("ce", "nkd") and options.get("to") != "labels" and options.get("epsilon", 1) == 1


def cases(chosen: list[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    labels = [name + "".join(f"-{key}={value}" for key, value in options.items()) for name, options in chosen]
    return pytest.mark.parametrize(("name", "options"), chosen, ids=labels)


every_case = cases(CASES)
every_loss = pytest.mark.parametrize("name", NAMES)


def given(name: str, seed: int = 0, size: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Random arguments of a loss by the names of its positional parameters, as the engine gives them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (size * torch.randn(*shape, generator=generator)).to(dtype)

    arguments: dict[str, Any] = {}
    for parameter in inspect.signature(LOSSES[name]).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.name == "mask":
            continue
        if parameter.name == "labels":
            classes = torch.randint(0, CLASSES, (ROWS,), generator=generator)
            arguments["labels"] = normal(ROWS, CLASSES) if name == "mse" else classes
        elif parameter.name.endswith("features"):
            arguments[parameter.name] = tuple(normal(*shape) for shape in LEVELS)
        elif parameter.name.endswith("feature"):
            arguments[parameter.name] = normal(BATCH, TOKENS, CHANNELS)
        else:
            arguments[parameter.name] = 2 * normal(ROWS, CLASSES)
    return arguments


def leaves(arguments: dict[str, Any], names: set[str]) -> list[Tensor]:
    """The tensors of one side."""
    found: list[Tensor] = []
    for name, value in arguments.items():
        if name in names:
            found += value if isinstance(value, tuple) else [value]
    return found


def learning(arguments: dict[str, Any]) -> list[Tensor]:
    """The student's tensors, which now collect gradients."""
    return [tensor.requires_grad_() for tensor in leaves(arguments, OF_STUDENT)]


def equal_sides(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with the teacher's on the student's side."""
    theirs = next((value for name, value in arguments.items() if name in OF_TEACHER), None)
    return {name: theirs if name in OF_STUDENT else value for name, value in arguments.items()}


def moved(arguments: dict[str, Any], by: list[Tensor]) -> dict[str, Any]:
    """The same arguments with the student's tensors moved."""
    steps: Iterator[Tensor] = iter(by)
    out = dict(arguments)
    for name, value in arguments.items():
        if name in OF_STUDENT:
            with torch.no_grad():
                out[name] = tuple(v + next(steps) for v in value) if isinstance(value, tuple) else value + next(steps)
    return out


def exact(arguments: dict[str, Any]) -> list[Any]:
    """The arguments for the formula in float64."""

    def array(value: Any) -> Any:
        if isinstance(value, tuple):
            return [array(each) for each in value]
        return value.detach().double().numpy() if value.is_floating_point() else value.numpy()

    return [array(value) for value in arguments.values()]


def call(name: str, arguments: dict[str, Any], options: dict[str, Any] | None = None) -> Any:
    """The loss with its positional arguments in their order."""
    return LOSSES[name](*arguments.values(), **(options or {}))


def each(arguments: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The arguments with every tensor changed."""
    return {n: tuple(map(change, v)) if isinstance(v, tuple) else change(v) for n, v in arguments.items()}


def of_type(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments in another number type; class indices stay what they are."""
    return each(arguments, lambda x: x.detach().to(dtype) if x.is_floating_point() else x)


def test_every_loss_has_a_formula_here_and_is_exported() -> None:
    assert sorted(FORMULAS) == NAMES
    assert sorted(edgekd.losses.__all__) == NAMES
    for name in NAMES:
        assert getattr(edgekd.losses, name) is LOSSES[name]


@every_case
def test_a_recipe_may_set_its_options(name: str, options: dict[str, Any]) -> None:
    bound = plugins.bind("losses", Part(name, options))
    assert bound(*given(name).values()).item() == call(name, given(name), options).item()


def test_torch_is_imported_with_the_losses_and_not_with_edgekd() -> None:
    script = (
        "import sys, edgekd, edgekd.plugins as p; p.names('losses'); assert 'torch' not in sys.modules;"
        "from edgekd.losses import kd, srd; assert callable(kd) and callable(srd); assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_case
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_formula(name: str, options: dict[str, Any], seed: int) -> None:
    arguments = given(name, seed)
    expected = FORMULAS[name](*exact(arguments), **options)
    value = call(name, arguments, options)
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, rel=2e-5, abs=1e-6)


@every_case
def test_its_gradient_is_that_of_the_formula(name: str, options: dict[str, Any]) -> None:
    arguments = given(name, 2)
    student = learning(arguments)
    call(name, arguments, options).backward()
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        way = [torch.randn(leaf.shape, generator=generator) for leaf in student]
        parts = [(leaf.grad, w) for leaf, w in zip(student, way, strict=True) if leaf.grad is not None]
        slope = sum(float((gradient * w).double().sum()) for gradient, w in parts)
        h, wide = 1e-6, of_type(arguments, torch.float64)
        up, down = (FORMULAS[name](*exact(moved(wide, [by * w for w in way])), **options) for by in (h, -h))
        assert len(parts) == len(student)
        assert slope == pytest.approx((up - down) / (2 * h), rel=2e-3, abs=1e-5)


@cases([case for case in CASES if at_the_teacher(*case)])
def test_its_minimum_is_at_the_teacher(name: str, options: dict[str, Any]) -> None:
    arguments = equal_sides(given(name, 4))
    best = call(name, arguments, options).item()
    if name not in ("ofa", "srd"):  # an entropy, and log ε
        assert best == pytest.approx(0, abs=1e-5)
    generator = torch.Generator().manual_seed(5)
    for size in (1e-2, 0.1, 1.0, 10.0):
        for _ in range(5):
            way = [size * torch.randn(leaf.shape, generator=generator) for leaf in leaves(arguments, OF_STUDENT)]
            assert call(name, moved(arguments, way), options).item() > best - 1e-6
    assert call(name, moved(arguments, way), options).item() > best + 1e-3
    arguments = each(arguments, torch.clone)
    student = learning(arguments)
    call(name, arguments, options).backward()
    for leaf in student:
        assert leaf.grad is not None
        assert float(leaf.grad.abs().max()) < 1e-5


@every_loss
def test_it_moves_the_student_alone(name: str) -> None:
    arguments = given(name, 6)
    student = learning(arguments)
    teacher = [tensor.requires_grad_() for tensor in leaves(arguments, OF_TEACHER)]
    before = call(name, arguments)
    before.backward()
    assert all(leaf.grad is None for leaf in teacher)
    gradients = [leaf.grad for leaf in student if leaf.grad is not None]
    assert len(gradients) == len(student)
    norm = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt())
    assert norm > 1e-4
    with torch.no_grad():
        step = [-1e-2 / norm * g for g in gradients]
    assert call(name, moved(arguments, step)).item() < before.item()


@every_loss
def test_it_takes_what_inference_mode_gave(name: str) -> None:
    with torch.inference_mode():
        teacher = given(name, 7)
    arguments = given(name, 7)
    expected = call(name, arguments).item()
    arguments = {n: teacher[n] if n in OF_TEACHER else value for n, value in arguments.items()}
    student = learning(arguments)
    value = call(name, arguments)
    value.backward()
    assert value.item() == expected
    assert all(leaf.grad is not None for leaf in student)


@every_case
@pytest.mark.parametrize(("dtype", "size"), EXTREMES, ids=[f"{t}-{s:g}".removeprefix("torch.") for t, s in EXTREMES])
def test_it_is_finite_for_extremes(name: str, options: dict[str, Any], size: float, dtype: torch.dtype) -> None:
    arguments = given(name, 8, 1e17 if size > 1e17 and name in SQUARED else size, dtype)
    student = learning(arguments)
    value = call(name, arguments, options)
    value.backward()
    assert value.dtype == torch.float32
    assert bool(value.isfinite())
    for leaf in student:
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert bool(leaf.grad.isfinite().all())


@every_case
@pytest.mark.parametrize("fill", [0.0, 1e-12, 1.0, -3e4])
@pytest.mark.parametrize("sides", [OF_STUDENT, OF_TEACHER, OF_STUDENT | OF_TEACHER], ids=["student", "teacher", "both"])
def test_it_stays_small_where_all_is_alike(name: str, options: dict[str, Any], fill: float, sides: set[str]) -> None:
    """Zeros have no direction, equal numbers no correlation: not only finite, no gradient may explode."""
    arguments = given(name, 9)
    for tensor in leaves(arguments, sides):
        tensor.fill_(fill)
    student = learning(arguments)
    value = call(name, arguments, options)
    value.backward()
    assert bool(value.isfinite())
    for leaf in student:
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())
        assert float(leaf.grad.abs().max()) < 1e5


@every_loss
def test_it_is_computed_in_float32(name: str) -> None:
    arguments = given(name, 10)
    expected = call(name, arguments).item()
    with torch.autocast("cpu", torch.bfloat16):
        inside = call(name, arguments)
    assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(expected, rel=1e-6)
    half = of_type(arguments, torch.bfloat16)
    assert call(name, half).item() == call(name, of_type(half, torch.float32)).item()


@every_loss
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    arguments = given(name, 11)
    order = {BATCH: torch.tensor([2, 0, 3, 1]), ROWS: torch.tensor([5, 2, 0, 4, 1, 3])}
    shuffled = each(arguments, lambda x: x[order[len(x)]])
    assert call(name, shuffled).item() == pytest.approx(call(name, arguments).item(), rel=1e-5)


@every_loss
def test_it_changes_nothing_that_it_is_given(name: str) -> None:
    arguments, before = given(name, 12), given(name, 12)
    call(name, arguments)
    for mine, theirs in zip(arguments.values(), before.values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.slow
@every_loss
def test_it_compiles_into_one_graph(name: str) -> None:
    arguments = given(name, 13)
    student = learning(arguments)
    expected = torch.autograd.grad(call(name, arguments), student)
    torch.compiler.reset()
    value = torch.compile(LOSSES[name], backend="aot_eager", fullgraph=True)(*arguments.values())
    for mine, theirs in zip(torch.autograd.grad(value, student), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
