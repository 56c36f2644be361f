"""Images: opened safely, upright, as RGB; sizes from headers alone; small random changes for training.

Nothing here fetches over the network, and no file outside an image's root is opened. Every failure is a
DataError whose `where` is the image's name, so that a caller can say which sample it belongs to.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from vlmtune.config.schema import AugmentConfig
from vlmtune.errors import DataError
from vlmtune.types import ImageRef, Size

MAX_PIXELS = 100_000_000
"""Largest image opened: 300 MB as RGB, above what public sets hold; more is a mistake or an attack."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Picture formats only: some of Pillow's other readers start programs (EPS runs Ghostscript)."""

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ENDS = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "GIF": b";"}
_TAIL = 64
"""Bytes read from a file's end: the longest mark above and some padding."""


def open_image(ref: ImageRef) -> Image.Image:
    """Returns the picture upright (EXIF) as 8-bit RGB, transparent parts on white.

    Of an animation, the first frame. Raises DataError: missing, outside its root, remote, empty, not an
    image, cut off, too large.
    """
    with _opened(ref) as image:
        turn = _TURNS.get(_orientation(image))
        picture = _rgb(image)
        return picture if turn is None else picture.transpose(turn)


def image_size(ref: ImageRef) -> Size:
    """Returns the upright size from the header alone: no pixel is decoded, so a cut-off file may still pass.

    Raises DataError as `open_image` does, for all that a header can tell.
    """
    with _opened(ref) as image:
        return _upright_size(image)


def check_image(ref: ImageRef) -> Size:
    """Returns the upright size of a file that is whole; raises DataError like `open_image`.

    Reads the header and the last bytes. Pixels are decoded only where the end is not that of the format
    (or has no mark), so an odd but readable file is never called broken.
    """
    with _opened(ref) as image:
        size = _upright_size(image)
        if not _has_end(image):
            image.load()
        return size


def augment(image: Image.Image, config: AugmentConfig, rng: np.random.Generator) -> Image.Image:
    """Returns the image shifted (edges repeated) and mirrored at random; itself when nothing is set."""
    if not (config.shift or config.flip_horizontal or config.flip_vertical):
        return image
    right, down = rng.integers(-config.shift, config.shift, size=2, endpoint=True)
    mirror, upset = rng.random(2) < 0.5
    columns = _line(image.width, int(right), bool(mirror) and config.flip_horizontal)
    rows = _line(image.height, int(down), bool(upset) and config.flip_vertical)
    pixels = np.asarray(image).take(rows, axis=0, mode="clip").take(columns, axis=1, mode="clip")
    return Image.fromarray(pixels)


def _line(length: int, shift: int, reverse: bool) -> np.ndarray:
    places = np.arange(-shift, length - shift)
    return places[::-1] if reverse else places


@contextmanager
def _opened(ref: ImageRef) -> Iterator[Image.Image]:
    """Yields the image with its header read; whatever goes wrong inside becomes a DataError about `ref`."""
    try:
        # Pillow warns of odd metadata, and of sizes below our own limit: neither is a fault of the sample.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _stream(ref) as stream, Image.open(stream, formats=FORMATS) as image:
                _refuse_huge(image.width * image.height, ref)
                yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_large(ref, str(error)) from None
    except Image.UnidentifiedImageError:
        raise DataError(
            "not an image, or its header is broken", ref.name, f"Readable formats: {', '.join(FORMATS)}."
        ) from None
    except Exception as error:  # Pillow's readers leak SyntaxError, struct.error ... on broken files
        raise DataError(
            f"the image cannot be read: {type(error).__name__}: {error}",
            ref.name,
            "The file is cut off or damaged; fetch it again or remove its samples.",
        ) from error


def _stream(ref: ImageRef) -> io.BytesIO | io.BufferedReader:
    if ref.data is not None:
        if not ref.data:
            raise DataError("the image has 0 bytes", ref.name, "Fetch it again or remove its samples.")
        return io.BytesIO(ref.data)
    path = _located(ref)
    if not os.path.isfile(path):
        found = "a folder, not a file" if os.path.isdir(path) else "missing"
        raise DataError(f"the image is {found}", ref.name, f"Looked at {path}.")
    if not os.path.getsize(path):
        raise DataError("the image file has 0 bytes", ref.name, f"Fetch {path} again or remove its samples.")
    return open(path, "rb")


def _located(ref: ImageRef) -> str:
    """Returns the real path of the file; links and `..` are followed first, then the root is enforced."""
    if _REMOTE.match(ref.name):
        raise DataError("remote images are not fetched", ref.name, "Download it first and give its path.")
    path = os.path.realpath(ref.name if ref.root is None else os.path.join(ref.root, ref.name))
    if ref.root is None:
        return path
    root = _real_root(ref.root)
    if os.path.commonpath((root, path)) != root:
        raise DataError(
            f"the path leaves the image root {root}",
            ref.name,
            "Put the file under the root, or set `images:` of the source to a folder that holds it.",
        )
    return path


@lru_cache(maxsize=64)
def _real_root(root: Path) -> str:
    return os.path.realpath(root)


def _refuse_huge(pixels: int, ref: ImageRef) -> None:
    if pixels > MAX_PIXELS:
        raise _too_large(ref, f"{pixels:,} pixels")


def _too_large(ref: ImageRef, found: str) -> DataError:
    return DataError(
        f"the image is too large, perhaps a decompression bomb: {found}",
        ref.name,
        f"At most {MAX_PIXELS:,} pixels are opened; scale it down or remove its samples.",
    )


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation (1 to 8) the header gives.

    Pillow turns TIFF itself. For PNG without an early eXIf chunk `getexif` would decode the whole picture
    in search of a late one; such a chunk is not looked for, neither here for the size nor for the pixels.
    """
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # broken metadata of a sound picture: viewers show it as stored
        return 1


def _upright_size(image: Image.Image) -> Size:
    if _orientation(image) in (5, 6, 7, 8):
        return Size(image.height, image.width)
    return Size(image.width, image.height)


def _rgb(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode.startswith("I"):  # 16 bits a pixel: convert() would clip all but the darkest to white
        grey = np.asarray(image).clip(0, 65535).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def _has_end(image: Image.Image) -> bool:
    stream, mark = image.fp, _ENDS.get(image.format or "")
    if stream is None or mark is None:
        return False
    stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
    return stream.read().rstrip(b"\0").endswith(mark)


__all__ = ["FORMATS", "MAX_PIXELS", "augment", "check_image", "image_size", "open_image"]
