"""One encoded image → uint8 height × width × channels, the same way wherever it is read."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

_PHOTOS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
EXTENSIONS = (*_PHOTOS, ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2")  # all that Pillow decodes without plugins
DEFAULT_SIZE = (224, 224)  # of images that differ in size: what ImageNet models are trained at
_ORIENTATION = 0x0112  # EXIF tag; 5 to 8 lie on their side (CIPA DC-008)
_GREY = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"})
_CORRUPT = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)  # Pillow's ways
_DRAFT = 2  # a JPEG is decoded at no less than this many times the size it is then resized to


class UnreadableError(ValueError):
    """An image that cannot be decoded; the message says why."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What every image of a data set becomes."""

    size: tuple[int, int]  # height, width in pixels
    channels: int  # 1 grey, 3 RGB

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return (*self.size, self.channels)


def opened(data: bytes) -> Image.Image:
    """The image, its header read.

    Raises:
        UnreadableError: it is empty, or no image Pillow knows.
    """
    if not data:
        raise UnreadableError("the file is empty")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise UnreadableError("not an image, whatever its name says") from None
    except _CORRUPT as problem:
        raise UnreadableError(str(problem)) from problem


def seen(image: Image.Image) -> Plan:
    """The size and channels an image has by itself, upright.

    Raises:
        UnreadableError: its EXIF block is corrupt.
    """
    width, height = image.size
    try:
        if _orientation(image) in (5, 6, 7, 8):
            width, height = height, width
    except _CORRUPT as problem:
        raise UnreadableError(f"its EXIF block is corrupt: {problem}") from problem
    return Plan((height, width), 1 if image.mode in _GREY else 3)


def fit(image: Image.Image, plan: Plan) -> np.ndarray:
    """The image as uint8 height × width × channels.

    It is turned upright (EXIF), its alpha channel dropped and 16-bit grey values divided by 256. Where its size is
    not the plan's, it is scaled (bilinear, with antialiasing) until it covers the plan's size, then cropped in the
    centre: for a square that is "resize the shorter side, then centre-crop".

    Raises:
        UnreadableError: the image is truncated, corrupt, or holds floating-point values.
    """
    try:
        orientation = _orientation(image)
        height, width = plan.size
        if image.size not in ((width, height), (height, width)):
            on_side = orientation in (5, 6, 7, 8)
            image.draft(None, _covering(image.size, (height, width) if on_side else (width, height), _DRAFT))
        turned = _upright(_eight_bit(image), orientation)
        converted = turned if turned.mode == ("L", "RGB")[plan.channels > 1] else _converted(turned, plan.channels)
        if converted.size != (width, height):
            converted = _cropped(converted, (width, height))
        array = np.asarray(converted)
    except UnreadableError:
        raise
    except _CORRUPT as problem:
        raise UnreadableError(str(problem)) from problem
    return array if array.ndim == 3 else array[:, :, None]


def decode(data: bytes, plan: Plan) -> np.ndarray:
    """An encoded image as `fit` makes it."""
    with opened(data) as image:
        return fit(image, plan)


def cut_short(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end marker: a check for truncation that decodes nothing."""
    if data.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in data[-65536:]  # cameras append data of their own after the marker
    return data.startswith(b"\x89PNG") and b"IEND" not in data[-4096:]


def _orientation(image: Image.Image) -> int:
    return int(Image.Image.getexif(image).get(_ORIENTATION, 1))  # PNG's own method would decode the whole image


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnreadableError("it holds floating-point values; save it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UnreadableError("it holds values of more than 16 bits; save it with 8 or 16 bits a channel")
        return Image.fromarray((values >> 8).astype(np.uint8))
    return image


def _converted(image: Image.Image, channels: int) -> Image.Image:
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when it is made RGB at once
    return image.convert("L" if channels == 1 else "RGB")


def _covering(size: tuple[int, int], goal: tuple[int, int], times: int = 1) -> tuple[int, int]:
    """`size` scaled until it covers `times` the goal (both width, height)."""
    scale = max(goal[0] * times / size[0], goal[1] * times / size[1])
    return max(goal[0], round(size[0] * scale)), max(goal[1], round(size[1] * scale))


def _cropped(image: Image.Image, goal: tuple[int, int]) -> Image.Image:
    scaled = image.resize(_covering(image.size, goal), Image.Resampling.BILINEAR)
    left, top = (scaled.width - goal[0]) // 2, (scaled.height - goal[1]) // 2
    return scaled.crop((left, top, left + goal[0], top + goal[1]))
