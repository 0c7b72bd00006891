"""Images in folders and zip files."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekd.data import images
from edgekd.data.imagefolder import imagefolder
from edgekd.data.images import Plan, UnreadableError
from edgekd.data.listing import ZipFiles
from edgekd.errors import DataError
from edgekd.types import Dataset, Split


def pixels(seed: int, height: int = 12, width: int = 12, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def tree(root: Path, *folders: str, count: int = 12, size: tuple[int, int] = (12, 12), channels: int = 3) -> Path:
    """Folders of random PNG images."""
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for index in range(count):
            image = Image.fromarray(pixels(number * 1000 + index, *size, channels))
            image.save(root / folder / f"{index:03}.png")
    return root


def zipped(root: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + file.relative_to(root).as_posix())
    return path


def whole(split: Split) -> np.ndarray:
    (batch,) = split.batches([np.arange(len(split))])
    return batch.inputs["image"]


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def error(root: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        imagefolder(0, path=str(root), workers=0, **options)  # type: ignore[arg-type]
    return str(caught.value)


def same(a: Dataset, b: Dataset) -> bool:
    return a.fingerprint == b.fingerprint and all(
        np.array_equal(whole(x), whole(y))
        for x, y in ((a.train, b.train), (a.calibration, b.calibration), (a.test, b.test))
    )


# ---------------------------------------------------------------- layouts


def test_class_folders_are_divided(tmp_path: Path) -> None:
    data = imagefolder(0, path=str(tree(tmp_path, "cat", "dog", count=20)))
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.calibration), len(data.test)) == (29, 3, 8)
    assert data.inputs[0].shape == ("batch", 12, 12, 3)
    assert data.notes == ()


@pytest.mark.parametrize("test", ["test", "val", "Validation"])
def test_own_test_folder_is_the_test_split(tmp_path: Path, test: str) -> None:
    root = tree(tmp_path, "train/a", "train/b", f"{test}/a", f"{test}/b")
    data = imagefolder(0, path=str(root))
    expected = [np.asarray(Image.open(file)) for file in sorted((root / test).rglob("*.png"))]
    assert np.array_equal(whole(data.test), np.stack(expected))
    assert len(data.train) + len(data.calibration) == 24


def test_train_folder_alone_is_divided(tmp_path: Path) -> None:
    data = imagefolder(0, path=str(tree(tmp_path, "train/a", "train/b")), test_fraction=0.25, calibration=4)
    assert (len(data.train), len(data.calibration), len(data.test)) == (14, 4, 6)


def test_a_zip_file_with_a_folder_around_everything_is_the_same_data(tmp_path: Path) -> None:
    root = tree(tmp_path / "tree", "train/a", "train/b", "test/a", "test/b")
    packed = zipped(root, tmp_path / "with a space.zip", prefix="wrapper/")
    assert same(imagefolder(0, path=str(root)), imagefolder(0, path=str(packed)))


def test_upper_case_deep_and_hidden_files(tmp_path: Path) -> None:
    tree(tmp_path, "a", "b")
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "000.PNG")
    (tmp_path / "b" / "deep").mkdir()
    (tmp_path / "b" / "000.png").rename(tmp_path / "b" / "deep" / "000.png")
    (tmp_path / "a" / "._001.png").write_bytes(b"mac")
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"windows")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    data = imagefolder(0, path=str(tmp_path))
    assert len(data.train) + len(data.calibration) + len(data.test) == 24
    assert data.notes == ("1 files that are not images were ignored: a/notes.txt",)


def test_unused_folders_are_noted(tmp_path: Path) -> None:
    data = imagefolder(0, path=str(tree(tmp_path, "train/a", "train/b", "test/a", "test/b", "val/a", "val/b")))
    assert data.notes == ("val/ (24 images) was not used",)


# ---------------------------------------------------------------- in memory and streamed


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_and_in_memory_give_the_same_bytes(tmp_path: Path, workers: int) -> None:
    root = tree(tmp_path / "tree", "train/a", "train/b", "test/a", "test/b", size=(20, 14))
    packed = str(zipped(root, tmp_path / "data.zip"))
    kept = imagefolder(0, path=packed, size=(9, 11))
    streamed = imagefolder(0, path=packed, size=(9, 11), memory_bytes=0, workers=workers)
    assert type(kept.train).__name__ == "ArraySplit"
    assert type(streamed.train).__name__ == "StreamedSplit"
    assert kept.fingerprint == streamed.fingerprint
    order = [np.array([3, 1]), np.array([0, 7, 5]), np.array([], dtype=np.int64), np.array([2])]
    for a, b in zip(kept.train.batches(order), streamed.train.batches(order), strict=True):
        assert np.array_equal(a.indices, b.indices)
        assert np.array_equal(a.labels, b.labels)
        assert np.array_equal(a.inputs["image"], b.inputs["image"])
    assert list(streamed.train.batches([])) == []


def test_streaming_leaves_the_random_state_alone(tmp_path: Path) -> None:
    import torch

    data = imagefolder(0, path=str(tree(tmp_path, "a", "b")), memory_bytes=0, workers=0)
    before = torch.random.get_rng_state()
    whole(data.train)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_bad_while_streaming_is_named(tmp_path: Path, workers: int) -> None:
    data = imagefolder(0, path=str(tree(tmp_path, "a", "b")), memory_bytes=0, workers=workers)
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(DataError, match=r"an image cannot be decoded: a/\d+\.png"):
        whole(data.train)


def test_zip_files_can_be_sent_to_another_process(tmp_path: Path) -> None:
    packed = ZipFiles(zipped(tree(tmp_path / "tree", "a", count=1), tmp_path / "data.zip"))
    again = pickle.loads(pickle.dumps(packed))
    assert again.read("a/000.png") == packed.read("a/000.png")


# ---------------------------------------------------------------- sizes and kinds of images


def test_images_that_differ_become_224_and_the_notes_say_so(tmp_path: Path) -> None:
    tree(tmp_path, "a", "b", size=(12, 20))
    Image.fromarray(pixels(5, 30, 10)).save(tmp_path / "a" / "tall.png")
    data = imagefolder(0, path=str(tmp_path))
    assert data.inputs[0].shape == ("batch", 224, 224, 3)
    assert "from 12×20 to 30×10" in data.notes[0]
    assert imagefolder(0, path=str(tmp_path), size=16).notes == ()


def test_size_may_be_any_rectangle(tmp_path: Path) -> None:
    data = imagefolder(0, path=str(tree(tmp_path, "a", "b", size=(20, 30))), size=(8, 24))
    assert whole(data.test).shape[1:] == (8, 24, 3)


def test_grey_images_have_one_channel_and_mixed_ones_three(tmp_path: Path) -> None:
    tree(tmp_path, "a", "b", channels=1)
    assert imagefolder(0, path=str(tmp_path)).inputs[0].shape == ("batch", 12, 12, 1)
    assert imagefolder(0, path=str(tmp_path), channels=3).inputs[0].shape == ("batch", 12, 12, 3)
    Image.fromarray(pixels(9)).save(tmp_path / "b" / "colour.png")
    mixed = imagefolder(0, path=str(tmp_path))
    assert mixed.inputs[0].shape == ("batch", 12, 12, 3)
    assert "24 of 25 images are grey" in mixed.notes[0]


def test_resizing_covers_and_crops_the_centre() -> None:
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 200  # the middle third is what a square crop keeps
    assert (images.decode(encoded(Image.fromarray(stripes)), Plan((10, 10), 3)) == 200).all()
    assert (images.decode(encoded(Image.fromarray(stripes)), Plan((20, 20), 3))[:, 2:-2] == 200).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    from PIL import ImageOps

    image = Image.fromarray(pixels(1, 6, 9))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, exif=exif)
    with images.opened(data) as opened:
        plan = images.seen(opened)
        assert plan.size == ((9, 6) if orientation > 4 else (6, 9))
        upright = ImageOps.exif_transpose(opened)
        assert np.array_equal(images.decode(data, plan), np.asarray(upright))


def test_alpha_palette_and_sixteen_bits() -> None:
    rgba = np.dstack([pixels(2), np.zeros((12, 12), np.uint8)])
    assert np.array_equal(images.decode(encoded(Image.fromarray(rgba)), Plan((12, 12), 3)), rgba[:, :, :3])
    palette = Image.fromarray(pixels(3)).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(images.decode(encoded(palette, transparency=0), Plan((12, 12), 3)), expected)
    sixteen = np.random.default_rng(4).integers(0, 65536, (12, 12)).astype(np.uint16)
    decoded = images.decode(encoded(Image.fromarray(sixteen)), Plan((12, 12), 1))
    assert np.array_equal(decoded[:, :, 0], sixteen >> 8)
    one_bit = Image.fromarray(pixels(5, channels=1) > 127)
    assert set(np.unique(images.decode(encoded(one_bit), Plan((12, 12), 1)))) == {0, 255}
    cmyk = encoded(Image.fromarray(pixels(6)).convert("CMYK"), "JPEG")
    assert images.decode(cmyk, Plan((12, 12), 3)).shape == (12, 12, 3)


def test_floating_point_images_are_refused() -> None:
    with pytest.raises(UnreadableError, match="floating-point"):
        images.decode(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), Plan((4, 4), 1))


def test_large_photos_are_drafted_without_visible_change() -> None:
    y, x = np.mgrid[0:1200, 0:1600]
    waves = 127 + 120 * np.sin(x / 40) * np.cos(y / 60)
    data = encoded(Image.fromarray(np.dstack([x / 1600 * 255, y / 1200 * 255, waves]).astype(np.uint8)), "JPEG")
    drafted = images.decode(data, Plan((100, 100), 3)).astype(int)
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        exact = np.asarray(opened.resize((133, 100), Image.Resampling.BILINEAR).crop((16, 0, 116, 100))).astype(int)
    assert np.abs(drafted - exact).max() <= 2
    assert np.abs(drafted - exact).mean() < 0.25


# ---------------------------------------------------------------- errors


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    tree(tmp_path, "images/a")
    assert "did you mean 'images'?" in error(tmp_path / "imags")
    assert "does not exist either" in error(tmp_path / "nowhere" / "images")


def test_places_without_images(tmp_path: Path) -> None:
    assert "It is empty" in error(tmp_path)
    (tmp_path / "readme.txt").write_text("hello")
    assert "it holds 1 other files, e.g. readme.txt" in error(tmp_path).replace("It", "it")
    assert "neither a folder nor a zip file" in error(tmp_path / "readme.txt")
    Image.fromarray(pixels(1)).save(tmp_path / "flat.png")
    assert "1 images lie in no class folder, e.g. flat.png" in error(tmp_path)


def test_empty_class_folder_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "a", "b")
    (tmp_path / "empty").mkdir()
    assert "a class folder has no images: empty" in error(tmp_path)


def test_a_class_in_one_split_only_is_named(tmp_path: Path) -> None:
    tree(tmp_path / "x", "train/cat", "train/dog", "test/cat", "test/dog", "test/doge")
    message = error(tmp_path / "x")
    assert "a class is in test/ and not in train/: 'doge'" in message
    assert "did you mean 'dog'?" in message
    tree(tmp_path / "y", "train/cat", "train/dog", "test/cat")
    message = error(tmp_path / "y")
    assert "a class is in train/ and not in test/: 'dog'" in message
    assert "Give test/ images of the same classes, or take them out of train/." in message


def test_test_folder_without_train_and_a_single_class(tmp_path: Path) -> None:
    tree(tmp_path / "x", "test/a", "test/b")
    assert "there is test/ but no train/" in error(tmp_path / "x")
    tree(tmp_path / "y", "only")
    assert "there is 1 class (only); expected at least two" in error(tmp_path / "y")


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0])
def test_bad_images_are_counted_and_the_first_named(tmp_path: Path, memory_bytes: int) -> None:
    tree(tmp_path, "a", "b")
    whole_image = encoded(Image.fromarray(pixels(1, 64, 64)), "JPEG")
    (tmp_path / "a" / "000.png").write_bytes(b"")
    (tmp_path / "a" / "001.png").write_text("no image at all")
    (tmp_path / "a" / "002.png").write_bytes(whole_image[: len(whole_image) // 2])
    (tmp_path / "b" / "003.png").write_bytes((tmp_path / "b" / "003.png").read_bytes()[:80])
    message = error(tmp_path, memory_bytes=memory_bytes, size=12)
    assert "4 images cannot be decoded: a/000.png (the file is empty), a/001.png (not an image" in message
    assert "a/002.png" in message
    assert "and 1 more" in message


def test_bad_zip_files(tmp_path: Path) -> None:
    packed = zipped(tree(tmp_path / "tree", "a", "b"), tmp_path / "data.zip")
    content = bytearray(packed.read_bytes())
    content[60:200] = bytes(140)  # inside the first stored image: its checksum no longer holds
    packed.write_bytes(content)
    assert "an image cannot be decoded: a/000.png (Bad CRC-32" in error(packed)
    packed.write_bytes(content[:500])
    assert "neither a folder nor a zip file" in error(packed)


def test_options_out_of_range(tmp_path: Path) -> None:
    root = tree(tmp_path, "a", "b")
    assert "size is 0" in error(root, size=0)
    assert "test_fraction is 0" in error(root, test_fraction=0.0)
    with pytest.raises(DataError, match="workers is -1"):
        imagefolder(0, path=str(root), workers=-1)


# ---------------------------------------------------------------- real data


def test_a_zip_of_55000_images_is_read_whole(shared_data: Path) -> None:
    data = imagefolder(0, path=str(shared_data / "cifar10" / "cifar10-images.zip"))
    assert (len(data.train), len(data.calibration), len(data.test)) == (49488, 512, 5000)
    assert data.inputs[0].shape == ("batch", 32, 32, 3)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
