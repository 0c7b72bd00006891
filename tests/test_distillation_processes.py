"""Several processes train what one would: the same weights, the same files, and a clear end where one is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import together
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm

from edgekd import plugins
from edgekd.data.digits import digits
from edgekd.distillation import Lesson, Teacher, checkpoint, distill, distill_tasks, shares, train
from edgekd.errors import EdgekdError, ModelError
from edgekd.models.network import Network
from edgekd.processes import here
from edgekd.recipe import loss_term
from edgekd.store import Store, sha256_of
from edgekd.types import Augment, Dataset, Json, LossTerm, Outputs, Part, Preprocessing, Task, TrainOptions

# 1437 samples: batches of 250 and one of 187, so that shares differ by one
OPTIONS = TrainOptions(epochs=2, batch_size=250, learning_rate=0.05, precision="fp32", threads=1, views=1)
AUGMENT = Augment(crop_pixels=1)


class Plain(nn.Module):
    """What normalises nothing, so that a sample's output is its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 2, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.linear = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv2(self.conv1(x).relu()).relu()
        logits: Tensor = self.linear(adaptive_avg_pool2d(maps, 2).flatten(1))
        return logits


class Normalised(nn.Module):
    """Batch normalisation of maps and of vectors, one of them without running statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, 2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.hidden = nn.Linear(4 * width, 16, bias=False)
        self.last = nn.BatchNorm1d(16, track_running_stats=False)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        maps = adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 2)
        logits: Tensor = self.linear(self.last(self.hidden(maps.flatten(1))).relu())
        return logits


class Heads(nn.Module):
    """Two heads on one body; a step of one leaves the other without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Plain(6)
        self.heads = nn.ModuleDict({"one": nn.Linear(10, 10), "two": nn.Linear(10, 10)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x).relu()
        return {name: head(features) for name, head in self.heads.items()}


def _data() -> Dataset:
    return digits(0)


def _task() -> Task:
    task: Task = plugins.build("tasks", Part("classification"))
    return task


def _network(module: nn.Module, data: Dataset) -> Network:
    return Network(module, data.inputs, Preprocessing((8, 8), (0.5,), (0.5,)))


def _built(kind: type[nn.Module], *args: Any, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return _network(kind(*args), _data())


def _terms(names: Sequence[str | dict[str, Any]]) -> list[LossTerm]:
    return [loss_term({"name": name} if isinstance(name, str) else name, "loss") for name in names]


class Told:
    """A `Say` that remembers, and ends the process after an epoch."""

    def __init__(self, last: int | None = None) -> None:
        self.events: list[tuple[str, dict[str, Json]]] = []
        self._last = last

    def __call__(self, event: str, /, **fields: Json) -> None:
        self.events.append((event, fields))
        if event == "epoch" and fields["epoch"] == self._last:
            os.kill(os.getpid(), signal.SIGKILL)


def _distilled(
    work: Path, kind: type[nn.Module], names: Sequence[str | dict[str, Any]], options: TrainOptions, last: int | None
) -> tuple[dict[str, np.ndarray], list[str], dict[str, Json]]:
    work.mkdir(exist_ok=True)
    told, data = Told(last), _data()
    teacher, student = _built(Plain, 12, seed=5), _built(kind, 6)
    meta = distill(
        student, teacher, data, _terms(names), options, AUGMENT,
        task=_task(), seed=0, work=work, cache=work / "answers", say=told,
    )  # fmt: skip
    return _state(student.module), [event for event, _ in told.events], meta


def _state(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


def _assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=tolerance, rtol=tolerance, err_msg=name)


def _assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


# ---------------------------------------------------------------- what one process would


@pytest.mark.parametrize(
    ("kind", "losses", "world"),
    [
        (Plain, ["kd", {"name": "ce", "weight": 0.1}], 3),
        (Plain, ["dist"], 2),  # correlations along the batch
        (Plain, ["similarity", "srd"], 2),  # of features: the batch's similarities, its statistics, projectors
        (Normalised, ["kd", "similarity"], 2),
    ],
)
def test_several_processes_end_with_the_weights_of_one(
    tmp_path: Path, kind: type[nn.Module], losses: list[str | dict[str, Any]], world: int
) -> None:
    alone, _, _ = _distilled(tmp_path / "alone", kind, losses, OPTIONS, None)
    found = together(_distilled, tmp_path / "shared", kind, losses, OPTIONS, None, world=world)
    for state, told, meta in found:
        _assert_equal(state, found[0][0])
        assert meta["processes"] == world
        assert bool(told) == (state is found[0][0])  # the first one alone tells
    _assert_close(found[0][0], alone)
    _assert_equal(load_file(tmp_path / "shared" / "weights.safetensors"), found[0][0])
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["answers", "weights.safetensors"]


def _trained(work: Path, optimizer: str) -> tuple[dict[str, np.ndarray], dict[str, Json]]:
    work.mkdir(exist_ok=True)
    network = _built(Normalised, 6)
    options = replace(OPTIONS, optimizer=optimizer, views=0)  # type: ignore[arg-type]
    meta = train(network, _data(), options, AUGMENT, task=_task(), seed=0, work=work, say=Told())
    return _state(network.module), meta


def test_a_teacher_is_trained_by_several_processes(tmp_path: Path) -> None:
    alone, meta = _trained(tmp_path / "alone", "sgd")
    shared = together(_trained, tmp_path / "shared", "sgd")
    _assert_close(shared[0][0], alone)
    history: list[Any] = [each["history"] for each in (meta, *(found for _, found in shared))]
    losses = [[row["loss"] for row in rows] for rows in history]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert losses[1] == losses[2]  # everybody knows the loss of the whole


def _two_tasks(work: Path) -> dict[str, np.ndarray]:
    work.mkdir(exist_ok=True)
    data, student = _data(), _built(Heads)
    lessons = [
        Lesson(data, _task(), [Teacher(_built(Plain, 8, seed=5))], _terms(["kd"]), "one"),
        Lesson(data, _task(), [Teacher(_built(Plain, 8)), Teacher(_built(Plain, 4), 0.5)], _terms(["kd"]), "two"),
    ]
    distill_tasks(student, lessons, OPTIONS, AUGMENT, seed=0, work=work, cache=work / "answers", say=Told())
    return _state(student.module)


def test_several_tasks(tmp_path: Path) -> None:
    shared = together(_two_tasks, tmp_path / "shared")
    _assert_close(shared[0], _two_tasks(tmp_path / "alone"))
    _assert_equal(shared[1], shared[0])


def _unlike(work: Path) -> dict[str, np.ndarray]:
    """Initial weights that differ, as a careless caller has them."""
    work.mkdir(exist_ok=True)
    network = _built(Plain, 4, seed=here().rank)
    train(network, _data(), replace(OPTIONS, epochs=1, views=0), AUGMENT, task=_task(), seed=0, work=work, say=Told())
    return _state(network.module)


def test_all_start_from_the_first_ones_weights(tmp_path: Path) -> None:
    first, second = together(_unlike, tmp_path)
    _assert_equal(first, second)


def _other_teacher(work: Path) -> None:
    distill(
        _built(Plain, 4), _built(Plain, 8, seed=here().rank), _data(), _terms(["kd"]), OPTIONS, AUGMENT,
        task=_task(), seed=0, work=work, cache=None, say=Told(),
    )  # fmt: skip


def test_what_is_trained_must_be_the_same_everywhere(tmp_path: Path) -> None:
    first, second = together(_other_teacher, tmp_path)
    assert "what is to be trained of process 1 is not that of the first process" in str(second)
    assert "another process of this run has stopped" in str(first)


# ---------------------------------------------------------------- what goes wrong


def test_a_process_is_killed_and_the_same_command_goes_on(tmp_path: Path) -> None:
    kind, losses = Normalised, ["kd", "srd"]
    undisturbed = together(_distilled, tmp_path / "a", kind, losses, OPTIONS, None)
    killed, survivor = together(_distilled, tmp_path / "b", kind, losses, OPTIONS, 1)
    assert killed is None
    assert isinstance(survivor, EdgekdError)
    assert "another process of this run has stopped" in str(survivor)
    assert "the same command goes on where it stopped" in survivor.fix
    assert (tmp_path / "b" / checkpoint.NAME).exists()
    again = together(_distilled, tmp_path / "b", kind, losses, OPTIONS, None)
    assert "resumed" in again[0][1]
    _assert_equal(again[0][0], undisturbed[0][0])
    _assert_equal(again[1][0], undisturbed[0][0])


def _refused() -> str:
    def work() -> str:
        assert here().world == 1
        assert here().once(lambda: "inside") == "inside"  # not waited for by anybody
        raise ModelError("no", where="model", fix="another")

    try:
        here().once(work)
    except ModelError as problem:
        return f"{problem} {here().world}"
    return "nothing"


def test_what_the_first_one_refuses_is_refused_by_all() -> None:
    assert together(_refused, world=3) == ["model: no. Another. 3"] * 3


RECIPE = """
name = "small"
[data]
name = "digits"
[teacher]
model = "resnet8"
width = 8
[teacher.train]
epochs = 3
precision = "fp32"
[student]
model = "resnet8"
width = 4
[distill]
epochs = 12
precision = "fp32"
[[loss]]
name = "kd"
[[loss]]
name = "srd"
[augment]
crop_pixels = 1
"""


def _launched(folder: Path, victim: int | None = None) -> tuple[int, str]:
    """`torchrun -m edgekd distill`; `victim` is killed in the middle. The launcher's exit code, and what all said."""
    import psutil

    folder.mkdir(exist_ok=True)
    (folder / "edgekd.toml").write_text(RECIPE)
    log, words = folder / "runs" / "small" / "log.jsonl", folder / "words.txt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "edgekd"]
    with words.open("w") as out:
        launcher = subprocess.Popen([*command, "distill"], cwd=folder, stdout=out, stderr=out)
    while victim is not None and launcher.poll() is None:
        epochs = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        if any(line.get("step") == "distill" and line.get("epoch", 0) >= 4 for line in epochs):
            for worker in psutil.Process(launcher.pid).children():
                if worker.environ().get("RANK") == str(victim):
                    worker.kill()
            break
        time.sleep(0.05)
    return launcher.wait(), words.read_text()


@pytest.mark.slow
def test_a_launcher_one_of_whose_workers_is_killed(tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    code, words = _launched(calm)
    assert code == 0, words
    assert words.count("accuracy") == 1  # the first process alone tells
    trained = [path for path in calm.glob(".edgekd/*/weights.safetensors") if not path.parent.is_symlink()]
    results = [*trained, calm / "runs" / "small" / "student.safetensors"]
    expected = {path.relative_to(calm): sha256_of(path) for path in results}
    assert len(expected) == 3
    for victim in (1, 0):
        folder = tmp_path / f"victim{victim}"
        code, words = _launched(folder, victim)
        assert code != 0
        survivor = "edgekd" if victim else r"edgekd \(process 1\)"
        assert re.search(f"^{survivor}: .* of (this|its) run has stopped", words, re.MULTILINE), words
        assert "exitcode  : 2" in words
        assert "RuntimeError" not in words
        code, words = _launched(folder)
        assert code == 0, words
        assert "goes on at epoch" in words
        assert {path: sha256_of(folder / path) for path in expected} == expected


# ---------------------------------------------------------------- the store


def _stepped(root: Path, shared: bool) -> tuple[str, dict[str, Json], list[str]]:
    told = Told()
    store = Store(root, here().heard(told))

    def build(work: Path) -> dict[str, Json]:
        if here().rank == 0:
            (work / "file").write_text("made")
        return {"world": here().world, "seen": here().once(lambda: here().rank)}

    for _ in range(2):
        made = store.step("step", 1, {"shared": shared}, [], build, together=shared)
    return (made.path / "file").read_text(), dict(made.meta), [event for event, _ in told.events]


@pytest.mark.parametrize("shared", [False, True])
def test_the_store_has_one_builder(tmp_path: Path, shared: bool) -> None:
    first, second = together(_stepped, tmp_path, shared)
    assert first[:2] == second[:2] == ("made", {"world": 2 if shared else 1, "seen": 0})
    assert (first[2], second[2]) == (["building", "cached"], [])


# ---------------------------------------------------------------- shares of a batch


def _gathered() -> list[Any]:
    total, rank = 7, here().rank
    here().join()
    first = 0 if rank == 0 else 4
    values = torch.arange(float(total * 3)).reshape(total, 3)
    share = values[first : first + (4 if rank == 0 else 3)].clone().requires_grad_()
    (shares.whole(share, total).square() * (1 + torch.arange(total))[:, None]).sum().backward()  # type: ignore[no-untyped-call]
    flags = shares.whole(torch.tensor([True, False, True, True][: len(share)]), total)
    # a sequence of 2 positions here, of 5 there, as a recurrent network gives them
    ragged = torch.full((len(share), 2 + 3 * rank, 2), 1.0 + rank)
    outputs = shares.whole_outputs(Outputs(share.detach(), {"lstm": ragged}), total, {"lstm"})
    half = shares.whole(share.detach().bfloat16(), total)
    assert share.grad is not None
    return [share.grad.numpy(), flags.tolist(), outputs.features["lstm"].numpy(), half.float().numpy()]


def test_shares_become_the_whole_and_gradients_come_back() -> None:
    found = together(_gathered)
    values = np.arange(21.0).reshape(7, 3)
    gradient = 2 * values * (1 + np.arange(7))[:, None]
    np.testing.assert_allclose(np.concatenate([each[0] for each in found]), gradient)
    for _, flags, ragged, half in found:
        assert flags == [True, False, True, True, True, False, True]
        assert ragged.shape == (7, 5, 2)
        assert ragged[:4, :2].min() == ragged[:4].max() == 1.0
        assert ragged[:4, 2:].max() == 0.0
        assert ragged[4:].min() == 2.0
        np.testing.assert_array_equal(half, values)


def _normalised(shape: tuple[int, ...]) -> list[np.ndarray]:
    here().join()
    rank, total = here().rank, shape[0]
    torch.manual_seed(0)
    batch, weight = torch.randn(shape) * 3 + 50, torch.rand(shape[1])
    wanted = torch.randn(shape)  # of the gradient
    mean, variance = torch.zeros(shape[1]), torch.ones(shape[1])
    counts = shares.sizes(total)
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    share, weight = batch[own].clone().requires_grad_(), weight.requires_grad_()
    with shares.one_batch(here().world > 1):
        found = batch_norm(share, mean, variance, weight, None, training=True, momentum=0.3)
    (shares.whole(found, total) * wanted).sum().backward()  # type: ignore[no-untyped-call]
    shares.sum_gradients([nn.Parameter(weight.detach())], [])  # parameters without gradients stay without
    assert share.grad is not None
    assert weight.grad is not None
    return [each.detach().numpy() for each in (found, mean, variance, share.grad, weight.grad)]


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4, 4), (7, 2, 6)])
def test_batch_normalisation_sees_the_whole_batch(shape: tuple[int, ...]) -> None:
    (alone,) = together(_normalised, shape, world=1)
    first, second = together(_normalised, shape)
    np.testing.assert_allclose(np.concatenate([first[0], second[0]]), alone[0], atol=2e-5)
    for found in (first, second):
        np.testing.assert_allclose(found[1], alone[1], rtol=1e-5)
        np.testing.assert_allclose(found[2], alone[2], rtol=1e-4)
    np.testing.assert_allclose(np.concatenate([first[3], second[3]]), alone[3], atol=2e-5)
    np.testing.assert_allclose(first[4] + second[4], alone[4], rtol=1e-4, atol=1e-4)
