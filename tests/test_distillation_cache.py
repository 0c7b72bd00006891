"""The teacher cache: what it gives is what was put in, whatever happens to the process, the files and the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from disk import mount
from PIL import Image

from edgekd.data.imagefolder import imagefolder
from edgekd.distillation import cache as module
from edgekd.distillation.cache import MANIFEST, TeacherCache, folder_of, remove_oldest
from edgekd.distillation.samples import Samples
from edgekd.errors import ModelError, StoreError
from edgekd.types import Augment, Json

FACTS: Mapping[str, Json] = {
    "teacher": "12ab", "data": "34cd", "split": "train", "precision": "fp32", "augment_version": 1,
    "augment": {"crop_pixels": 4, "flip": True, "seed": 0},
}  # fmt: skip
SHAPES: Mapping[str, tuple[int, ...]] = {"logits": (3,), "layer2:in": (2, 4, 4)}
GB = 10**9


class Told:
    """A `Say` that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Json]]] = []

    def __call__(self, event: str, /, **fields: Json) -> None:
        self.events.append((event, fields))


def made(root: Path, say: Told | None = None, **changes: Any) -> TeacherCache:
    options: dict[str, Any] = {"samples": 50, "limit_bytes": GB, "keep": SHAPES, "say": say or Told()} | changes
    return TeacherCache(root, options.pop("facts", FACTS), **options)


def said(view: int, indices: np.ndarray) -> dict[str, np.ndarray]:
    """What a teacher says of each sample in each view: whole numbers, which float16 holds."""
    place = (indices * 7 + view * 131)[:, None]
    return {
        name: ((place + np.arange(int(np.prod(shape)))) % 2039 - 1000).astype(np.float32).reshape(-1, *shape)
        for name, shape in SHAPES.items()
    }


def same(found: Mapping[str, np.ndarray] | None, expected: Mapping[str, np.ndarray]) -> bool:
    assert found is not None
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def filled(root: Path, views: int = 2, **changes: Any) -> TeacherCache:
    cache = made(root, **changes)
    for view in range(views):
        cache.put(view, np.arange(50), said(view, np.arange(50)))
    return cache


# ---------------------------------------------------------------- what is put in comes out


def test_what_is_put_in_comes_out_in_any_order_and_batch(tmp_path: Path) -> None:
    cache, rng = made(tmp_path), np.random.default_rng(0)
    for view in (0, 3, 1):
        for part in np.array_split(rng.permutation(50), 7):
            assert cache.take(view, part) is None
            assert same(cache.put(view, part, said(view, part)), said(view, part))
    for again in (cache, made(tmp_path)):
        for view in (1, 0, 3):
            for size in (1, 8, 50):
                chosen = rng.permutation(50)[:size]
                assert same(again.take(view, chosen), said(view, chosen))
        assert again.take(2, np.array([0])) is None


def test_values_survive_float16(tmp_path: Path) -> None:
    cache = made(tmp_path, keep={"logits": (6,)})
    given = np.array([[1e6, -np.inf, 0.1, 0.0, -0.0, 6e-8]], np.float32)
    kept = cache.put(0, np.array([3]), {"logits": given})["logits"]
    assert kept.dtype == np.float16
    assert kept.tolist() == [[65504.0, -65504.0, float(np.float16(0.1)), 0.0, 0.0, float(np.float16(6e-8))]]
    again = cache.take(0, np.array([3]))
    assert again is not None
    assert again["logits"].tobytes() == kept.tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_of_any_precision_may_be_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    cache = made(tmp_path, keep={"logits": (2,)})
    given = torch.tensor([[3.0e4, -0.25], [70000.0, 1.0]], dtype=dtype, requires_grad=True)
    kept = cache.put(0, np.array([0, 1]), {"logits": given})["logits"]
    assert kept.tolist() == [[float(torch.tensor(3.0e4, dtype=dtype).half()), -0.25], [65504.0, 1.0]]


def test_no_value_is_taken_for_missing(tmp_path: Path) -> None:
    """All 63 488 finite float16 values come back to the bit."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = halves[np.isfinite(halves)][:, None]
    cache = made(tmp_path, keep={"logits": (1,)}, samples=len(every))
    indices = np.arange(len(every))
    cache.put(0, indices, {"logits": every})
    found = cache.take(0, indices)
    assert found is not None
    assert found["logits"].tobytes() == every.tobytes()


def test_nan_is_refused(tmp_path: Path) -> None:
    cache, outputs = made(tmp_path), said(0, np.arange(4))
    outputs["layer2:in"][2, 0, 1, 1] = np.nan
    with pytest.raises(ModelError, match=r"teacher: the teacher's 'layer2:in' holds values that are not numbers"):
        cache.put(0, np.arange(4), outputs)
    assert cache.take(0, np.arange(4)) is None
    outputs["layer2:in"][2, 0, 1] = (np.inf, -np.inf, 3.4e38, 3.4e38)  # whose sum is NaN or infinite
    cache.put(0, np.arange(4), outputs)


def test_another_shape_is_refused(tmp_path: Path) -> None:
    outputs = said(0, np.arange(4)) | {"logits": np.zeros((4, 5))}
    with pytest.raises(ModelError, match=r"'logits' has the shape \(5,\) now; expected \(3,\)"):
        made(tmp_path).put(0, np.arange(4), outputs)


def test_what_is_there_stays(tmp_path: Path) -> None:
    """Computed again in another batch, the last bits may differ; whoever comes later gets what the first one got."""
    cache = made(tmp_path)
    cache.put(0, np.array([1, 2]), said(0, np.array([1, 2])))
    other = said(5, np.array([0, 1, 2]))
    kept = cache.put(0, np.array([0, 1, 2]), other)
    assert same({name: kept[name][1:] for name in kept}, said(0, np.array([1, 2])))
    assert same({name: kept[name][:1] for name in kept}, {name: other[name][:1] for name in other})
    assert same(cache.take(0, np.array([0, 1, 2])), kept)


def test_each_tensor_is_kept_for_all_that_want_it(tmp_path: Path) -> None:
    filled(tmp_path)
    logits = made(tmp_path, keep={"logits": (3,)})
    assert same(logits.take(1, np.arange(50)), {"logits": said(1, np.arange(50))["logits"]})
    more = made(tmp_path, keep={**SHAPES, "head.0#2": (1,)})
    assert more.take(1, np.arange(5)) is None
    more.put(1, np.arange(5), said(7, np.arange(5)) | {"head.0#2": np.zeros((5, 1))})
    assert same(made(tmp_path).take(1, np.arange(5)), said(1, np.arange(5)))
    assert made(tmp_path, keep={"logits": (4,)}).take(1, np.arange(5)) is None, "of another shape: another tensor"


# ---------------------------------------------------------------- many classes


@pytest.mark.parametrize(("classes", "top", "bytes_"), [(2000, None, 402), (40_000, 8, 50), (1000, None, 2000)])
def test_of_many_classes_the_largest_are_kept(tmp_path: Path, classes: int, top: int | None, bytes_: int) -> None:
    rng, indices = np.random.default_rng(0), np.arange(6)
    logits = rng.normal(size=(6, classes)).astype(np.float32) * 4
    logits[0, classes - 1] = 30.0
    cache = made(tmp_path, keep={"logits": (classes,)}, samples=6, top=top)
    kept = cache.put(0, indices, {"logits": logits})["logits"]
    assert sum(path.stat().st_size for path in cache.folder.glob("logits*")) == 6 * bytes_
    found = cache.take(0, indices)
    assert found is not None
    assert found["logits"].tobytes() == kept.tobytes()
    if bytes_ == 2 * classes:
        np.testing.assert_array_equal(kept, logits.astype(np.float16))
        return
    count = top or 100
    largest = np.argsort(-logits, axis=1)[:, :count]
    np.testing.assert_allclose(
        np.take_along_axis(kept, largest, 1), np.take_along_axis(logits, largest, 1), rtol=1e-3, atol=1e-3
    )
    probabilities, right = (torch.from_numpy(each.astype(np.float64)).softmax(1).numpy() for each in (kept, logits))
    np.testing.assert_allclose(
        np.take_along_axis(probabilities, largest, 1), np.take_along_axis(right, largest, 1), rtol=2e-2
    )
    others = np.delete(kept[0], largest[0])
    assert len(np.unique(others)) == 1
    assert cache.check(lambda view, chosen: {"logits": logits[chosen]}).error < 1e-3


def test_as_many_as_there_are_is_all_of_them(tmp_path: Path) -> None:
    cache = made(tmp_path, keep={"logits": (3,)}, top=3)
    logits = said(0, np.arange(4))["logits"]
    assert np.array_equal(cache.put(0, np.arange(4), {"logits": logits})["logits"], logits)


# ---------------------------------------------------------------- the view the student sees


def test_replay_is_bit_equal_across_batch_sizes_orders_and_workers(tmp_path: Path) -> None:
    """Filled from one reading of streamed images, replayed to others: always what the teacher says of these bytes."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    augment = Augment(crop_pixels=2, flip=True, cutout_pixels=3, mixup=1.0)

    def steps(workers: int, batch_size: int, seed: int) -> tuple[int, Iterator[Any]]:
        data = imagefolder(0, path=str(tmp_path / "images"), memory_bytes=0, workers=workers)
        assert type(data.train).__name__ == "StreamedSplit"
        samples = Samples(
            data, augment, batch_size=batch_size, views=2, seed=seed, device=torch.device("cpu")
        )  # fmt: skip
        return samples.count, (step for epoch in (0, 1) for step in samples.epoch(epoch))

    def teacher(images: torch.Tensor) -> dict[str, np.ndarray]:
        """Sums of whole numbers: the same bits whatever the batch."""
        x = images.double()
        return {"logits": x.mean((1, 2)).round().numpy(), "map": (x[:, ::2, ::2] - x[:, 1::2, 1::2]).numpy()}

    count, filling = steps(0, 4, seed=0)
    keep = {"logits": (3,), "map": (4, 4, 3)}
    cache = made(tmp_path / "cache", samples=count, keep=keep)
    seen = 0
    for step in filling:
        assert cache.take(step.view, step.indices) is None
        put = cache.put(step.view, step.indices, teacher(step.inputs["image"]))
        assert same(put, teacher(step.inputs["image"]))
        seen += len(step.indices)
    for workers, batch_size, seed in ((0, 6, 1), (1, 4, 2), (2, 3, 0)):
        for step in steps(workers, batch_size, seed)[1]:
            kept = made(tmp_path / "cache", samples=count, keep=keep).take(step.view, step.indices)
            if kept is None:  # a last batch of one was left out while filling
                assert seen < 2 * count
                continue
            assert same(kept, teacher(step.inputs["image"]))


# ---------------------------------------------------------------- facts


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"teacher": "ffff"}, "teacher"),
        ({"augment": {"crop_pixels": 5, "flip": True, "seed": 0}}, "augment.crop_pixels"),
        ({"augment_version": 2}, "augment_version"),
        ({"precision": "bf16"}, "precision"),
        ({"new": 1}, "new"),
    ],
)
def test_outputs_of_other_facts_are_not_found_and_never_used(
    tmp_path: Path, change: dict[str, Json], named: str
) -> None:
    before = filled(tmp_path).folder
    facts = {**FACTS, **change}
    other = made(tmp_path, facts=facts)
    assert other.folder == folder_of(tmp_path, facts) != before
    assert other.take(0, np.arange(3)) is None
    (other.folder / MANIFEST).unlink()
    other.folder.rmdir()
    before.rename(other.folder)  # moved by hand under the other name
    with pytest.raises(StoreError, match=f"belongs to other facts: {named.replace('.', '[.]')}"):
        made(tmp_path, facts=facts)


def test_another_number_of_samples_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    with pytest.raises(StoreError, match="belongs to other facts: samples"):
        made(tmp_path, samples=51)


@pytest.mark.parametrize("damage", ["", "{", "[1]", None, b"\xff\xfe"])
def test_rows_whose_facts_are_lost_are_removed_and_it_is_said(tmp_path: Path, damage: str | bytes | None) -> None:
    path = filled(tmp_path).folder / MANIFEST
    path.unlink()
    if damage is not None:
        path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    told = Told()
    cache = made(tmp_path, told)
    assert [event for event, _ in told.events] == ["corrupt"]
    assert told.events[0][1]["path"] == str(path)
    assert cache.take(0, np.arange(3)) is None
    cache.put(0, np.arange(3), said(0, np.arange(3)))
    assert same(made(tmp_path).take(0, np.arange(3)), said(0, np.arange(3)))


def test_the_manifest_can_be_read_by_people(tmp_path: Path) -> None:
    found = json.loads((made(tmp_path).folder / MANIFEST).read_text())
    assert found == {**FACTS, "samples": 50, "format": module.FORMAT}


# ---------------------------------------------------------------- damage and kills


def test_a_file_of_the_wrong_size_is_made_again_and_it_is_said(tmp_path: Path) -> None:
    folder = filled(tmp_path).folder
    damaged = next(folder.glob("layer2_in*.1"))
    os.truncate(damaged, damaged.stat().st_size - 2)
    told = Told()
    cache = made(tmp_path, told)
    assert cache.take(1, np.arange(50)) is None
    assert [(event, fields["path"]) for event, fields in told.events] == [("corrupt", str(damaged))]
    assert same(cache.take(0, np.arange(50)), said(0, np.arange(50))), "other views are as they were"
    assert same(cache.put(1, np.arange(50), said(1, np.arange(50))), said(1, np.arange(50)))
    assert same(cache.take(1, np.arange(50)), said(1, np.arange(50)))
    assert len(told.events) == 1


def test_what_a_power_cut_kept_from_the_disk_is_missing(tmp_path: Path) -> None:
    """Blocks that were never written read as zeros; so does the rest of a row that was being written."""
    folder = filled(tmp_path).folder
    path = next(folder.glob("layer2_in*.0"))
    content = bytearray(path.read_bytes())
    content[7 * 64 + 10 : 9 * 64] = bytes(2 * 64 - 10)  # from inside the row of sample 7 to the end of sample 8's
    path.write_bytes(content)
    cache = made(tmp_path)
    assert cache.take(0, np.array([7])) is None
    assert cache.take(0, np.array([1, 8])) is None
    rest = np.delete(np.arange(50), [7, 8])
    assert same(cache.take(0, rest), said(0, rest))


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    folder = filled(tmp_path).folder
    (folder / ".logits.7.partial").write_bytes(b"0" * 100)
    told = Told()
    made(tmp_path, told)
    assert not list(folder.glob("*.partial"))
    assert not told.events


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    for path in cache.folder.iterdir():
        path.unlink()
    cache.folder.rmdir()
    assert cache.take(0, np.arange(3)) is None
    cache.put(0, np.arange(3), said(0, np.arange(3)))
    assert same(made(tmp_path).take(0, np.arange(3)), said(0, np.arange(3)))


# ---------------------------------------------------------------- disk


def test_views_beyond_the_limit_are_not_kept_and_it_is_said_once(tmp_path: Path) -> None:
    told = Told()
    view_bytes = 50 * 2 * (3 + 32)
    cache = filled(tmp_path, views=5, say=told, limit_bytes=2 * view_bytes + 2000)
    assert [cache.take(view, np.arange(50)) is not None for view in range(5)] == [True, True, False, False, False]
    assert [event for event, _ in told.events] == ["note"]
    assert "from view 2 on: " in str(told.events[0][1]["text"])
    assert "cache_gb" in str(told.events[0][1]["text"])
    assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= 2 * view_bytes + 2000
    rounded = cache.put(4, np.array([0]), {name: value + 0.00001 for name, value in said(4, np.array([0])).items()})
    assert same(rounded, said(4, np.array([0]))), "rounded as if it were kept"


def test_a_cache_leaves_half_of_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    cache = made(tmp_path, told)
    usage = type("usage", (), {"free": 2 * 50 * 2 * 35 - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert same(cache.put(0, np.arange(3), said(0, np.arange(3))), said(0, np.arange(3)))
    assert cache.take(0, np.arange(3)) is None
    assert "the disk has 7e-06 GB free" in str(told.events[0][1]["text"])


def test_a_full_disk_ends_no_training(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    cache = made(small_disk, told, samples=500, keep={"logits": (40,)})
    whole = np.ones((500, 40), np.float32)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": GB}))
    for view in range(4):
        assert (cache.put(view, np.arange(500), {"logits": whole})["logits"] == 1).all()
    assert [cache.take(view, np.arange(500)) is not None for view in range(4)] == [True, True, False, False]
    assert [event for event, _ in told.events] == ["note"]
    assert "the disk is full" in str(told.events[0][1]["text"])
    assert not list(small_disk.rglob("*.partial"))


def test_a_disk_that_cannot_be_written_is_told(small_disk: Path) -> None:
    cache = filled(small_disk, views=1)
    cache.close()
    assert mount("-o", "remount,ro", str(small_disk)).returncode == 0
    with pytest.raises(StoreError, match="the file system is read-only"):
        made(small_disk)
    with pytest.raises(StoreError, match="the file system is read-only"):
        cache.put(3, np.arange(2), said(3, np.arange(2)))


def test_the_caches_opened_longest_ago_are_removed_first(tmp_path: Path) -> None:
    folders = []
    for number in range(4):
        folders.append(filled(tmp_path, facts={**FACTS, "teacher": number}).folder)
        os.utime(folders[-1] / MANIFEST, (number, number))
    size = sum(path.stat().st_size for path in folders[0].iterdir())
    told = Told()
    remove_oldest(tmp_path, 4 * size, say=told)
    assert not told.events
    made(tmp_path, facts={**FACTS, "teacher": 1})  # opened again: now the youngest
    remove_oldest(tmp_path, 2 * size, say=told)
    assert [folder.exists() for folder in folders] == [False, True, False, True]
    gone = [folders[0], folders[2]]
    assert [str(folder) in str(fields["text"]) for folder, (_, fields) in zip(gone, told.events, strict=True)]


# ---------------------------------------------------------------- verification


def test_a_check_computes_some_samples_of_some_views_again(tmp_path: Path) -> None:
    cache = filled(tmp_path, views=9)
    asked: list[tuple[int, int]] = []

    def live(view: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        asked.append((view, len(indices)))
        return {name: value + 0.001 for name, value in said(view, indices).items()}

    done = cache.check(live, count=32)
    assert [size for _, size in asked] == [8] * 4
    assert len({view for view, _ in asked}) == 4
    assert done.samples == 32
    assert 0 < done.error < 0.001
    assert made(tmp_path / "empty").check(live).samples == 0
    partly = made(tmp_path / "partly")
    partly.put(2, np.arange(10, 15), said(2, np.arange(10, 15)))
    assert partly.check(lambda view, indices: said(view, indices)).samples == 5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda value: value * 1.0005, {"fp32": False, "bf16": False}),
        (lambda value: value * 1.02, {"fp32": True, "bf16": False}),
        (lambda value: value[::-1], {"fp32": True, "bf16": True}),
        (lambda value: value * np.nan, {"fp32": True, "bf16": True}),
    ],
)
def test_a_check_refuses_what_the_teacher_no_longer_says(
    tmp_path: Path, change: Callable[[np.ndarray], np.ndarray], refused: dict[str, bool], precision: str
) -> None:
    cache = filled(tmp_path, facts={**FACTS, "precision": precision})

    def live(view: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        outputs = said(view, indices)
        return {**outputs, "logits": change(outputs["logits"])}

    if not refused[precision]:
        cache.check(live)
        return
    with pytest.raises(StoreError, match=r"'logits' of sample \d+ in view 0 differs by \d+%") as caught:
        cache.check(live)
    assert str(cache.folder) in str(caught.value)
