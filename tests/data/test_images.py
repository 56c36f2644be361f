from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from vlmtune.config.schema import AugmentConfig
from vlmtune.data.images import MAX_PIXELS, augment, check_image, image_size, open_image
from vlmtune.errors import DataError
from vlmtune.types import ImageRef

ALL = (open_image, image_size, check_image)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def ref(data: bytes) -> ImageRef:
    return ImageRef("x.png", None, data)


def noise(width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """The first chunks of a PNG of any size, with hardly any pixel data: a decompression bomb's shell."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
def test_every_format_opens_from_file_and_from_bytes(form: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encoded(noise(), form))
    for where in (ImageRef("x", tmp_path), ref((tmp_path / "x").read_bytes())):
        assert open_image(where).mode == "RGB"
        assert {open_image(where).size, image_size(where), check_image(where)} == {(40, 30)}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_pixels_and_size(form: str, orientation: int) -> None:
    upright = Image.new("RGB", (16, 8), "black")
    upright.paste("white", (0, 0, 8, 4))  # the top left quarter
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpositions that put it back
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = ref(encoded(stored, form, exif=exif))
    opened = open_image(data)
    assert opened.size == image_size(data) == (16, 8)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data.data or b""))).convert("RGB")
    assert opened.tobytes() == reference.tobytes()
    assert min(opened.getpixel((2, 2))) > 200 and max(opened.getpixel((13, 6))) < 50
    assert max(opened.getpixel((13, 2))) < 50 and max(opened.getpixel((2, 6))) < 50


def test_a_late_exif_chunk_changes_neither_size_nor_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    early, plain = encoded(noise(), exif=exif), encoded(noise())
    start = early.index(b"eXIf") - 4
    length = struct.unpack(">I", early[start : start + 4])[0] + 12
    late = ref(plain[:-12] + early[start : start + length] + plain[-12:])
    assert open_image(late).size == image_size(late) == (40, 30)


def test_transparent_parts_become_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    for data in (
        encoded(clear),
        encoded(clear.convert("LA")),
        encoded(palette, transparency=0),
        encoded(palette, transparency=bytes([0] * 256)),
        encoded(keyed, transparency=(1, 2, 3)),
        encoded(palette, "GIF", transparency=0),
        encoded(clear, "WEBP", lossless=True),
    ):
        assert open_image(ref(data)).getpixel((1, 1)) == (255, 255, 255)
    half = open_image(ref(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))))
    assert abs(half.getpixel((0, 0))[0] - 127) <= 1


def test_grey_sixteen_bit_palette_and_cmyk_keep_their_brightness() -> None:
    wide = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    cases = [
        (encoded(Image.new("L", (4, 4), 100)), (100, 100, 100)),
        (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encoded(wide), (128, 128, 128)),
        (encoded(wide, "TIFF"), (128, 128, 128)),
        (encoded(palette), (10, 20, 30)),
    ]
    for data, color in cases:
        assert open_image(ref(data)).getpixel((1, 1)) == color
    red = open_image(ref(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))).getpixel((1, 1))
    assert red[0] > 200 and max(red[1:]) < 60


def test_an_animation_shows_its_first_frame() -> None:
    frames = [Image.new("RGB", (6, 6), color) for color in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(ref(data)).getpixel((1, 1)) == (255, 0, 0)


def test_a_decompression_bomb_is_refused_by_its_header() -> None:
    for side in (50_000, 13_000, 10_001):  # Pillow: error, error, warning
        for call in ALL:
            with pytest.raises(DataError, match="too large, perhaps a decompression bomb") as caught:
                call(ref(png_header(side, side)))
            assert f"{MAX_PIXELS:,}" in str(caught.value)
    assert image_size(ref(png_header(10_000, 10_000))) == (10_000, 10_000)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_cut_off_file_is_found_with_and_without_decoding_everything(form: str, kept: float) -> None:
    data = encoded(noise(200, 150), form)
    cut = ref(data[: int(kept * len(data))])
    for call in (open_image, check_image):
        with pytest.raises(DataError):
            call(cut)


def test_bytes_after_the_end_are_no_fault() -> None:
    for form in ("PNG", "JPEG", "GIF"):
        assert check_image(ref(encoded(noise(), form) + b"camera maker's notes")) == (40, 30)


def test_unusable_files_are_named_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "script.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    reasons = {
        "text.jpg": "not an image",
        "empty.jpg": "0 bytes",
        "folder.jpg": "a folder",
        "none.jpg": "missing",
        "": "a folder",
        "nul\0.jpg": "cannot be read",
        "lone \ud800.jpg": "cannot be read",
        "n" * 5000: "missing|cannot be read",
        "script.eps": "not an image",
        "https://example.org/a.png": "remote images are not fetched.*Download it first",
        "s3://bucket/a.png": "remote",
    }
    for name, reason in reasons.items():
        for call in ALL:
            with pytest.raises(DataError, match=reason) as caught:
                call(ImageRef(name, tmp_path))
            assert caught.value.faults[0].where == name
    with pytest.raises(DataError, match="0 bytes"):
        open_image(ref(b""))


def test_a_path_cannot_leave_its_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "inside").mkdir(parents=True)
    for folder in (tmp_path, root):
        noise().save(folder / "a.png")
    (root / "out.png").symlink_to(tmp_path / "a.png")
    (root / "outer").symlink_to(tmp_path)
    (tmp_path / "root2").mkdir()
    noise().save(tmp_path / "root2" / "a.png")
    leaving = (
        "../a.png",
        "inside/../../a.png",
        str(tmp_path / "a.png"),
        "out.png",
        "outer/a.png",
        "../root2/a.png",
    )
    for name in leaving:
        for call in ALL:
            with pytest.raises(DataError, match="leaves the image root"):
                call(ImageRef(name, root))
    (tmp_path / "link").symlink_to(root)
    for inside in (ImageRef("inside/../a.png", root), ImageRef("a.png", tmp_path / "link")):
        assert image_size(inside) == (40, 30)
    assert image_size(ImageRef(str(tmp_path / "a.png"))) == (40, 30)  # no root: the user named this file


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_files_raise_nothing_but_data_errors(data: st.DataObject) -> None:
    good = bytearray(
        encoded(noise(20, 20), data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF"])))
    )
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    for call in ALL:
        try:
            call(ref(bytes(good)))
        except DataError as error:
            assert error.faults[0].where == "x.png"


def test_augment_is_a_shift_with_repeated_edges() -> None:
    image = noise(9, 7)
    seen = set()
    padded = np.pad(np.asarray(image), ((3, 3), (3, 3), (0, 0)), mode="edge")
    windows = {padded[y : y + 7, x : x + 9].tobytes(): (x, y) for x in range(7) for y in range(7)}
    rng = np.random.default_rng(0)
    for _ in range(500):
        moved = augment(image, AugmentConfig(shift=3), rng)
        seen.add(windows[moved.tobytes()])
    assert len(seen) == 49


def test_augment_flips_half_of_the_time_on_the_named_axis_only() -> None:
    image, rng = noise(9, 7), np.random.default_rng(0)
    for config, axis in ((AugmentConfig(flip_horizontal=True), 1), (AugmentConfig(flip_vertical=True), 0)):
        pixels = np.asarray(image)
        flipped = np.flip(pixels, axis)
        results = [np.asarray(augment(image, config, rng)) for _ in range(200)]
        assert all((result == pixels).all() or (result == flipped).all() for result in results)
        assert 60 < sum((result == flipped).all() for result in results) < 140


def test_augment_without_options_and_its_determinism() -> None:
    image = noise()
    assert augment(image, AugmentConfig(), np.random.default_rng(0)) is image
    config = AugmentConfig(shift=50, flip_horizontal=True, flip_vertical=True)
    first, again = (augment(image, config, np.random.default_rng(5)) for _ in range(2))
    assert first.tobytes() == again.tobytes() and first.size == image.size
