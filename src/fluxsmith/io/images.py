"""Pictures in and out: what a file shows is what training sees (rotation, transparency, 16 bit, CMYK), or it is refused by name.

`read_image("cat.png", max_pixels=64_000_000, background=(255, 255, 255)).image` is an RGB picture of Pillow.
"""

import io
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from fluxsmith.errors import DataError, FluxsmithError
from fluxsmith.io.durable import Disk, FileRecord

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")  # Pillow sniffs content: a list keeps Ghostscript and PSD out
MAX_PIXELS = 64_000_000
WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
DIRECT = ("1", "L", "P", "RGB", "RGBA", "RGBa", "LA", "La", "PA", "RGBX", "YCbCr", "HSV")
Colour = tuple[int, int, int]


class ReadImage(NamedTuple):
    """A decoded picture: RGB with transparency laid over the background, its alpha (mode L) if it had one, and remarks."""

    image: Image.Image
    alpha: Image.Image | None
    warnings: tuple[str, ...]


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS, background: Colour = WHITE) -> ReadImage:
    """Decode the first picture of a file, turned as EXIF says. Raises DataError that names the file and a cure."""
    path = Path(path)
    with _opened(path, max_pixels) as image:
        remarks = _remarks(image)
        turn = TURNS.get(_orientation(image, path))
        image.load()
        image = image if turn is None else _turned(image, turn)
        rgb, alpha = _to_rgb(image, path)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    return ReadImage(rgb, alpha, remarks)


def probe_size(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height after EXIF rotation, from the header only. Raises DataError."""
    path = Path(path)
    with _opened(path, max_pixels) as image:
        width, height = image.size
        return (height, width) if _orientation(image, path) in SWAPS_SIDES else (width, height)


def write_png(
    path: str | os.PathLike[str], image: Image.Image, text: Mapping[str, str] | None = None, *, disk: Disk | None = None
) -> FileRecord:
    """Write a PNG atomically, with text entries (settings) in its header. Raises StorageError."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return (disk or Disk()).write_bytes(Path(path), buffer.getvalue())


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """The opened file; whatever a decoder raises on it becomes a DataError."""
    try:
        with _open_regular(path) as file, Image.open(file, formats=FORMATS) as image:
            _check_size(image, path, max_pixels)
            yield image
    except (FluxsmithError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"not a picture that can be read ({', '.join(FORMATS)})", where=str(path), fix="save it as PNG or JPEG") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError("too many pixels", where=str(path), why=str(error), fix="make it smaller") from error
    except Exception as error:  # decoders raise anything on damaged files
        what = "picture is truncated" if "truncated" in str(error) else "picture is damaged"
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(what, where=str(path), why=why, fix="export the file again, or delete it") from error


@contextmanager
def _open_regular(path: Path) -> Iterator[BinaryIO]:
    """Only regular files: opening a pipe would wait for ever."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError("not a regular file", where=str(path), fix="remove it from the folder")
        file = path.open("rb")
    except OSError as error:
        raise DataError("picture cannot be opened", where=str(path), why=str(error), fix="check the path and its permissions") from error
    with file:
        yield file


def _check_size(image: Image.Image, path: Path, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        why = f"{width} x {height} = {width * height} pixels, at most {max_pixels} are allowed"
        raise DataError("too many pixels", where=str(path), why=why, fix="make it smaller, or raise max_pixels")
    if not width * height:
        raise DataError("picture has no pixels", where=str(path), fix="delete it")


def _remarks(image: Image.Image) -> tuple[str, ...]:
    count = getattr(image, "n_frames", 1)  # only formats with several pictures have it
    return (f"has {count} frames or pages, the first is used",) if count > 1 else ()


def _orientation(image: Image.Image, path: Path) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF by itself, and gives the turned size before decoding
    exif = Image.Image.getexif(image)  # not PngImageFile.getexif, which decodes the picture to look for late chunks
    if image.format == "PNG" and ORIENTATION not in exif:
        late = _png_exif(path)
        if late:
            exif.load(late)
    value = exif.get(ORIENTATION, 1)
    return value if isinstance(value, int) else 1


def _png_exif(path: Path) -> bytes:
    """The eXIf chunk of a PNG wherever it stands; ExifTool writes it behind the picture."""
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"eXIf":
                return b"Exif\x00\x00" + file.read(min(length, 1 << 20))
            file.seek(length + 4, os.SEEK_CUR)
    return b""


def _turned(image: Image.Image, turn: Image.Transpose) -> Image.Image:
    turned = image.transpose(turn)
    turned.info, turned.format = dict(image.info), image.format
    return turned


def _to_rgb(image: Image.Image, path: Path) -> tuple[Image.Image, Image.Image | None]:
    """RGB and alpha of any mode that has one meaning; others are refused by name."""
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format == "PNG"):
        return _from_sixteen_bit(image)
    if image.mode == "F":
        return _from_float(image, path), None
    if image.mode == "CMYK":
        return _from_cmyk(image), None
    if image.mode not in DIRECT:
        raise DataError(f"pixels of kind {image.mode} have no fixed meaning", where=str(path), fix="save it as 8-bit PNG")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    return image.convert("RGB"), None


def _from_sixteen_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """0..65535 -> 0..255 by dividing by 257; one grey value may stand for transparent."""
    values = np.asarray(image, dtype=np.int64)
    grey = Image.fromarray(((values + 128) // 257).clip(0, 255).astype(np.uint8))
    transparent = image.info.get("transparency")
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)) if isinstance(transparent, int) else None
    return grey.convert("RGB"), alpha


def _from_float(image: Image.Image, path: Path) -> Image.Image:
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
        why = f"values go from {values.min():g} to {values.max():g}, 0 to 1 was expected"
        raise DataError("floating-point picture outside 0..1", where=str(path), why=why, fix="save it as 8-bit or 16-bit PNG")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _from_cmyk(image: Image.Image) -> Image.Image:
    """Through the embedded colour profile when it is valid, else by Pillow's formula."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB")
    try:
        converted = ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError):
        return image.convert("RGB")
    return converted or image.convert("RGB")
