"""What the file shows is what comes out; anything else is refused with the file's name."""

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fluxsmith.errors import DataError
from fluxsmith.io.images import probe_size, read_image, write_png

ORIENTATION = 0x0112


def picture(width: int = 12, height: int = 8) -> Image.Image:
    """Four quadrants of different colour, so that every turn shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 0)
    return Image.fromarray(pixels)


def near(a: Image.Image, b: Image.Image, tolerance: int = 0) -> bool:
    return a.size == b.size and int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) <= tolerance


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "gif", "webp", "jpg", "avif"])
def test_every_format(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    picture(64, 32).save(path, **({"lossless": True} if ending == "webp" else {}))
    read = read_image(path)
    assert read.image.mode == "RGB"
    assert read.alpha is None
    assert read.warnings == ()
    assert probe_size(path) == (64, 32)
    corners = [read.image.getpixel(place) for place in [(3, 3), (60, 3), (3, 28), (60, 28)]]
    assert np.abs(np.array(corners) - [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
def test_exif_rotation(tmp_path: Path, ending: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{ending}"
    settings = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    picture().save(path, exif=exif, **settings)
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's Transpose members by EXIF value
    expected = picture().transpose(Image.Transpose(turned[orientation])) if orientation > 1 else picture()
    read = read_image(path)
    assert near(read.image, expected, 40)
    assert probe_size(path) == expected.size


def test_png_exif_behind_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    buffer = io.BytesIO()
    picture().save(buffer, format="PNG")
    content = buffer.getvalue()
    (tmp_path / "a.png").write_bytes(content[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + content[-12:])
    assert probe_size(tmp_path / "a.png") == (8, 12)
    assert near(read_image(tmp_path / "a.png").image, picture().transpose(Image.Transpose.ROTATE_270))


def test_transparency_is_laid_over_the_background(tmp_path: Path) -> None:
    rgba = picture().convert("RGBA")
    rgba.putalpha(Image.fromarray(np.repeat(np.uint8([[0], [255], [128], [255]] * 2), 12, axis=1)))
    rgba.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", background=(10, 20, 30))
    assert read.image.getpixel((0, 0)) == (10, 20, 30)
    assert read.image.getpixel((0, 1)) == (255, 0, 0)
    assert read.image.getpixel((0, 2)) == (133, 10, 15)
    assert read.alpha is not None
    assert read.alpha.mode == "L"
    assert read.alpha.getpixel((0, 2)) == 128


@pytest.mark.parametrize("mode", ["LA", "P", "PA", "L-key", "RGB-key"])
def test_other_kinds_of_transparency(tmp_path: Path, mode: str) -> None:
    if mode == "P":
        image = Image.new("P", (4, 4), 0)
        image.putpalette([255, 0, 0, 0, 255, 0])
        image.putpixel((1, 1), 1)
        image.save(tmp_path / "a.png", transparency=0)
    elif mode.endswith("-key"):
        image = Image.new(mode[:-4], (4, 4), 0)
        image.putpixel((1, 1), 200 if mode == "L-key" else (0, 255, 0))
        image.save(tmp_path / "a.png", transparency=0 if mode == "L-key" else (0, 0, 0))
    else:
        image = Image.new("LA", (4, 4), (0, 0))
        image.putpixel((1, 1), (200, 255))
        image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.image.getpixel((0, 0)) == (255, 255, 255)
    assert read.image.getpixel((1, 1)) != (255, 255, 255)
    assert read.alpha is not None
    assert (read.alpha.getpixel((0, 0)), read.alpha.getpixel((1, 1))) == (0, 255)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, ending: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    assert [p[0] for p in np.asarray(read_image(tmp_path / f"a.{ending}").image)[0].tolist()] == [0, 1, 128, 255]


def test_float_is_scaled_or_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "a.tiff")
    assert np.asarray(read_image(tmp_path / "a.tiff").image)[0, :, 0].tolist() == [0, 128, 255]
    for values in ([[0.0, 255.0]], [[-0.1, 0.5]], [[0.0, float("nan")]]):
        Image.fromarray(np.array(values, np.float32)).save(tmp_path / "b.tiff")
        with pytest.raises(DataError, match="outside 0..1"):
            read_image(tmp_path / "b.tiff")
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "c.tiff")
    with pytest.raises(DataError, match="kind I"):
        read_image(tmp_path / "c.tiff")


def test_cmyk(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    cmyk.save(tmp_path / "plain.tiff")
    assert read_image(tmp_path / "plain.tiff").image.getpixel((0, 0)) == (0, 255, 255)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"junk"):  # a profile for another colour space, and none at all: Pillow's formula
        cmyk.save(tmp_path / "a.tiff", icc_profile=profile)
        assert read_image(tmp_path / "a.tiff").image.getpixel((0, 0)) == (0, 255, 255)


def test_animated_gives_the_first_frame_and_a_remark(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "green")]
    for ending in ("gif", "webp", "png", "tiff"):
        path = tmp_path / f"a.{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if ending == "webp" else {}))
        read = read_image(path)
        assert read.image.getpixel((0, 0)) == (255, 0, 0)
        assert "3 frames" in read.warnings[0]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff", "gif", "bmp", "avif"])
def test_truncated_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"cat.{ending}"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "Fix:" in str(caught.value)


def test_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    def bomb(width: int, height: int) -> Path:
        head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
        path = tmp_path / "bomb.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
        return path

    for side in (9000, 12000, 40000):  # below Pillow's warning, above it, above its error
        for read in (read_image, probe_size):
            with pytest.raises(DataError, match="too many pixels"):
                read(bomb(side, side))
    picture().save(tmp_path / "a.png")
    with pytest.raises(DataError, match="12 x 8 = 96 pixels, at most 95"):
        read_image(tmp_path / "a.png", max_pixels=95)


def test_what_is_not_a_picture(tmp_path: Path) -> None:
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {"eps.png": "not a picture", "empty.png": "not a picture", "pipe.png": "regular", "none.png": "opened"}.items():
        for read in (read_image, probe_size):
            with pytest.raises(DataError, match=message) as caught:
                read(tmp_path / name)
            assert caught.value.exit_code == 3


def test_damaged_bytes_never_escape(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for ending in ("png", "jpg", "webp", "tiff", "gif", "bmp"):
        buffer = io.BytesIO()
        picture(32, 32).save(buffer, format={"jpg": "JPEG"}.get(ending, ending.upper()))
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for place in rng.integers(0, len(content), 4):
                content[place] = rng.integers(0, 256)
            (tmp_path / "a").write_bytes(content)
            with contextlib.suppress(DataError):  # anything else fails the test
                assert read_image(tmp_path / "a").image.mode == "RGB"


def test_png_with_text(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture(), {"parameters": "a cat\nSteps: 4", "fluxsmith": '{"prompt": "猫"}'})
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"parameters": "a cat\nSteps: 4", "fluxsmith": '{"prompt": "猫"}'}
    assert near(read_image(tmp_path / "a.png").image, picture())
