"""Bad input, made by this script, each item with the outcome that it must have; `test_bad_input.py` runs them all.

An item's `make` writes into an empty folder. Outcomes:
used: the picture is trained (`words` are in its remarks, if any are given);
skipped: the picture is left out, with a line that names the file, a cure, and `words`;
error: the same, and the run does not start whatever `max_skipped` says;
2, 3, 4: the whole thing is refused with this exit code, by a message with the file, a cure, and `words`.
"""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

Outcome = Literal["used", "skipped", "error", 2, 3, 4]


class Item(NamedTuple):
    """`file` is the name that messages must contain; for trees and weights it is also what is opened."""

    name: str
    file: str
    make: Callable[[Path], object]
    outcome: Outcome
    words: tuple[str, ...] = ()
    options: dict[str, Any] = {}


# pictures --------------------------------------------------------------------------------------------------------------


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Smooth noise in any mode."""
    noise = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(format: str, mode: str = "RGB", **options: Any) -> bytes:
    """A small picture file."""
    buffer = io.BytesIO()
    picture(mode).save(buffer, format=format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, color: int = 2) -> bytes:
    """A PNG with any claim in its header."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """12000 x 12000 in a few kilobytes."""
    return png(12000, 12000, b"\0" * (1501 * 12000), depth=1, color=0)


def sixteen_bit() -> bytes:
    values = (np.arange(64 * 48, dtype=np.uint32).reshape(48, 64) * 20).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="PNG")
    return buffer.getvalue()


def floats(low: float, high: float) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.linspace(low, high, 64 * 48, dtype=np.float32).reshape(48, 64)).save(buffer, format="TIFF")
    return buffer.getvalue()


def whole_numbers() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64 * 48, dtype=np.int32).reshape(48, 64)).save(buffer, format="TIFF")
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", exif=exif)


def frames(format: str) -> bytes:
    buffer = io.BytesIO()
    others = [picture("L").convert("RGB"), picture().transpose(Image.Transpose.ROTATE_180)]
    picture().save(buffer, format=format, save_all=True, append_images=others)
    return buffer.getvalue()


def file_of(name: str, data: Callable[[], bytes]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(data())
        (folder / name).with_suffix(".txt").write_text("a caption")

    return make


def bad_picture(name: str, file: str, data: Callable[[], bytes], *words: str) -> Item:
    return Item(name, file, file_of(file, data), "skipped", words)


def odd_picture(name: str, file: str, data: Callable[[], bytes], *words: str) -> Item:
    return Item(name, file, file_of(file, data), "used", words)


PICTURES = [
    bad_picture("png cut in half", "x.png", lambda: encoded("PNG")[:600], "picture is"),
    bad_picture("jpeg cut in half", "x.jpg", lambda: encoded("JPEG")[:500], "picture is"),
    bad_picture("webp cut in half", "x.webp", lambda: encoded("WEBP")[:200]),
    bad_picture("gif cut in half", "x.gif", lambda: encoded("GIF")[:900]),
    bad_picture("tiff cut in half", "x.tiff", lambda: encoded("TIFF")[:900]),
    bad_picture("bmp cut in half", "x.bmp", lambda: encoded("BMP")[:900]),
    bad_picture("avif cut in half", "x.avif", lambda: encoded("AVIF")[:300]),
    bad_picture("no bytes", "x.png", lambda: b"", "not a picture"),
    bad_picture("text", "x.jpg", lambda: b"not a picture at all", "not a picture"),
    bad_picture("jpeg start only", "x.jpg", lambda: b"\xff\xd8\xff"),
    bad_picture("png signature and noise", "x.png", lambda: b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4),
    bad_picture("postscript called png", "x.png", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    bad_picture("pdf called jpg", "x.jpg", lambda: b"%PDF-1.4\n%\xe2\xe3\n1 0 obj\n", "not a picture"),
    bad_picture("photoshop called png", "x.png", lambda: b"8BPS\0\1" + b"\0" * 60, "not a picture"),
    bad_picture("svg called png", "x.png", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    bad_picture("error page called jpg", "x.jpg", lambda: b"<!doctype html><title>404</title>", "not a picture"),
    bad_picture("zip called png", "x.png", lambda: b"PK\3\4" + b"\0" * 60, "not a picture"),
    bad_picture("lfs pointer", "x.png", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "not a picture"),
    bad_picture("bomb", "x.png", bomb, "too many pixels"),
    bad_picture("claims 100000 x 100000", "x.png", lambda: png(100_000, 100_000, b"\0"), "too many pixels"),
    bad_picture("no width", "x.png", lambda: png(0, 8, b"\0" * 8)),
    bad_picture("checksum wrong in the header", "x.png", lambda: encoded("PNG").replace(b"IHDR", b"IHDS")),
    bad_picture("pixel data missing", "x.png", lambda: png(64, 64, b"\0" * 100)),
    bad_picture("float outside 0..1", "x.tiff", lambda: floats(-3.0, 700.0), "outside 0..1"),
    bad_picture("float with nan", "x.tiff", lambda: floats(0.0, float("nan")), "outside 0..1"),
    bad_picture("32-bit whole numbers", "x.tiff", whole_numbers, "no fixed meaning"),
    odd_picture("16-bit grey", "x.png", sixteen_bit),
    odd_picture("float in 0..1", "x.tiff", lambda: floats(0.0, 1.0)),
    odd_picture("cmyk", "x.jpg", lambda: encoded("JPEG", "CMYK")),
    odd_picture("palette", "x.png", lambda: encoded("PNG", "P", transparency=3)),
    odd_picture("grey with alpha", "x.png", lambda: encoded("PNG", "LA")),
    odd_picture("rgba", "x.png", lambda: encoded("PNG", "RGBA")),
    odd_picture("one bit", "x.png", lambda: encoded("PNG", "1")),
    odd_picture("turned by exif", "x.jpg", rotated),
    odd_picture("animated gif", "x.gif", lambda: frames("GIF"), "3 frames"),
    odd_picture("animated webp", "x.webp", lambda: frames("WEBP"), "3 frames"),
    odd_picture("tiff of several pages", "x.tif", lambda: frames("TIFF"), "3 frames"),
    odd_picture("jpeg called png", "x.png", lambda: encoded("JPEG")),
    odd_picture("bytes behind the end", "x.png", lambda: encoded("PNG") + b"trailing"),
    odd_picture("progressive jpeg", "x.jpeg", lambda: encoded("JPEG", progressive=True)),
    odd_picture("broken colour profile", "x.jpg", lambda: encoded("JPEG", "CMYK", icc_profile=b"not a profile")),
    odd_picture("upper case ending", "X.PNG", lambda: encoded("PNG")),
    Item("one pixel", "x.png", file_of("x.png", lambda: png(1, 1, b"\0abc")), "used", ("enlarged", "1 x 1 to")),
    Item("very wide", "x.png", file_of("x.png", lambda: png(3000, 10, (b"\0" + b"abc" * 3000) * 10)), "used", ("enlarged",)),
    Item(
        "smaller than a step", "x.png", file_of("x.png", lambda: png(9, 9, (b"\0" + b"abc" * 9) * 9)), "skipped",
        ("9 x 9", "buckets.upscale = true"), {"buckets": {"step": 16, "upscale": False}},
    ),
    Item(
        "more than max_pixels", "x.png", file_of("x.png", lambda: encoded("PNG")), "skipped",
        ("64 x 48", "max_pixels"), {"max_pixels": 3000},
    ),
]  # fmt: skip

# captions --------------------------------------------------------------------------------------------------------------


def caption(name: str, data: bytes, outcome: Outcome, *words: str, **options: Any) -> Item:
    def make(folder: Path) -> None:
        (folder / "x.png").write_bytes(encoded("PNG"))
        (folder / "x.txt").write_bytes(data)

    return Item(f"caption: {name}", "x.txt", make, outcome, words, {"captions": options} if options else {})


def caption_entry(name: str, make_entry: Callable[[Path], object], outcome: Outcome, *words: str) -> Item:
    def make(folder: Path) -> None:
        (folder / "x.png").write_bytes(encoded("PNG"))
        make_entry(folder / "x.txt")

    return Item(f"caption: {name}", "x.png", make, outcome, words)


CAPTIONS = [
    caption("latin-1", "café".encode("latin-1"), "skipped", "byte 3 (0xe9) is not utf-8", "captions.encoding"),
    caption("latin-1, and said so", "café".encode("latin-1"), "used", encoding="latin-1"),
    caption("cut in a character", "日本".encode()[:-1], "skipped", "byte 3"),
    caption("utf-16 cut in a character", "日本".encode("utf-16")[:-1], "skipped", "byte"),
    caption("a picture", encoded("PNG"), "skipped", "byte 0 (0x89)"),
    caption("utf-8 with mark", b"\xef\xbb\xbfa cat", "used"),
    caption("utf-16 with mark", "a cat".encode("utf-16"), "used"),
    caption("utf-16 without mark", "a cat".encode("utf-16-le"), "used"),
    caption("empty", b"", "used", "caption is empty"),
    caption("only spaces", b" \n\t\r\n", "used", "caption is empty"),
    caption("empty, error asked", b"", "error", "caption is empty", empty="error"),
    caption("several lines", b"one\r\ntwo\rthree", "used", "3 lines", "captions.wildcards"),
    caption("a megabyte", b"word, " * 200_000, "used"),
    caption("control characters", b"a \x1b[31mred\x07 cat", "used"),
    caption("markup", b"<script>alert(1)</script> & {a|b", "used"),
    caption("trigger without a word", b"[trigger] on a mat", "used", "captions.trigger"),
    caption_entry("none", lambda path: None, "error", "no caption", ".txt .caption", "captions.missing"),
    caption_entry("a folder", lambda path: path.mkdir(), "error", "no caption"),
    caption_entry("a pipe", lambda path: os.mkfifo(path), "error", "no caption"),
    caption_entry("a link to nowhere", lambda path: path.symlink_to("nowhere"), "error", "no caption"),
    caption_entry("another ending", lambda path: path.with_suffix(".json").write_text("{}"), "error", "no caption"),
]

# trees -----------------------------------------------------------------------------------------------------------------


def good(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded("PNG"))
    path.with_suffix(".txt").write_text("a caption")


def loop(folder: Path) -> None:
    good(folder / "set" / "x.png")
    (folder / "set" / "up").symlink_to(folder)


def deep(folder: Path) -> None:
    good(folder / "set" / "x.png")
    good(folder / "set" / "/".join(f"d{level}" for level in range(40)) / "y.png")


def pipe(folder: Path) -> None:
    good(folder / "set" / "x.png")
    os.mkfifo(folder / "set" / "pipe.png")


def broken(folder: Path) -> None:
    good(folder / "set" / "x.png")
    (folder / "set" / "x.png").write_bytes(b"")


def named(*names: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        for name in names:
            good(folder / "set" / name)

    return make


def tree(name: str, make: Callable[[Path], object], outcome: Outcome, *words: str, **options: Any) -> Item:
    return Item(f"tree: {name}", "set", make, outcome, words, options)


TREES = [
    tree("missing", lambda folder: None, 3, "not found"),
    tree("empty", lambda folder: (folder / "set").mkdir(), 3, "no pictures found", "empty"),
    tree("a file", lambda folder: (folder / "set").write_text("x"), 3, "is a file"),
    tree("a link to nowhere", lambda folder: (folder / "set").symlink_to("nowhere"), 3, "not found"),
    tree("only sub-folders", named("sub/x.png"), 3, "1 in sub-folders", "recursive = true"),
    tree("sub-folders, and said so", named("sub/x.png"), "used", recursive=True),
    tree("only hidden pictures", named(".x.png"), 3, "no pictures found"),
    tree("only other files", lambda folder: named("x.png")(folder) or (folder / "set" / "x.png").unlink(), 3, "no pictures found", ".txt"),
    tree(
        "nothing but broken pictures", lambda folder: named("x.png")(folder) or (folder / "set" / "x.png").write_bytes(b""), 3, "none of 1"
    ),
    tree("link loop", loop, "used", recursive=True),
    tree("too deep", deep, "used", "32 folders deep", recursive=True),
    tree("pipe", pipe, "used", "pipe.png"),
    tree("number in the folder name", named("10_cat/x.png"), "used", "repeats = 10", recursive=True),
    tree("two pictures of one name", named("x.png", "x.jpg"), "used", "share one caption"),
    tree("the same picture twice", named("x.png", "y.png"), "used", "several times"),
    tree("newline in a name", named("new\nline.png"), "used"),
    tree("dash, percent, quote, brackets in names", named("-x.png", "%00.png", "a'b\".png", "[b]{c}.png", "$(rm).png"), "used"),
    tree("a name that is not utf-8", named(os.fsdecode(b"x\xff.png")), "used"),
    tree("a name of 251 bytes", named("n" * 247 + ".png"), "used"),
]

# configs ---------------------------------------------------------------------------------------------------------------

RUN = """
model = {{ type = "flux1", path = "dit.safetensors" }}
train = {{ steps = 10 }}
run = {{ dir = "runs/x" }}
data = [{{ type = "folder", path = "cats"{more} }}]
"""


def config(name: str, text: str | bytes, *words: str, file: str = "run.toml") -> Item:
    data = text if isinstance(text, bytes) else text.encode()
    return Item(f"config: {name}", file, lambda folder: (folder / file).write_bytes(data), 2, words)


def data_option(name: str, option: str, *words: str) -> Item:
    return config(name, RUN.format(more=f", {option}"), *words)


CONFIGS = [
    Item("config: missing file", "run.toml", lambda folder: None, 2),
    config("no bytes", b"", "data"),
    config("not toml", "data = [", "run.toml"),
    config("not utf-8", b"data = '\xff'"),
    config("a picture", encoded("PNG")),
    config("json with a comma too much", '{"data": [],}', file="run.json"),
    config("json that is a list", "[1, 2]", file="run.json"),
    config("deeply nested", "[" * 5000, file="run.json"),
    config("deeply nested toml", "data = " + "[" * 5000),
    config("no data", 'model = { type = "flux1" }\ntrain = { steps = 1 }\nrun = { dir = "x" }\n', "data"),
    config("data of the wrong kind", RUN.format(more="").replace("data = [", "data = 3 # ["), "data"),
    config("unknown source", RUN.format(more="").replace('"folder"', '"foldr"'), "folder"),
    config("no path", RUN.format(more="").replace(', path = "cats"', ""), "path"),
    data_option("misspelt option", "repeat = 3", "repeats"),
    data_option("misspelt caption option", "captions = { shufle = true }", "shuffle"),
    data_option("resolution below zero", "resolution = -512", "resolution"),
    data_option("resolution as text", 'resolution = "big"', "resolution"),
    data_option("resolution of three", "resolution = [1, 2, 3]", "resolution"),
    data_option("batch of nothing", "batch_size = 0", "batch_size"),
    data_option("share above one", "max_skipped = 2", "max_skipped"),
    data_option("dropout above one", "captions = { dropout = 1.5 }", "dropout"),
    data_option("unknown filter", 'interpolation = "lanzcos"', "lanczos"),
    data_option("unknown word", 'captions = { missing = "ignore" }', "missing"),
    data_option("colour of two", "background = [1, 2]", "background"),
]

# weights ---------------------------------------------------------------------------------------------------------------


def weights(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def model_of(*names: str, shape: tuple[int, ...] = (4, 4)) -> bytes:
    """A complete file with these tensors."""
    size = 4 * int(np.prod(shape))
    header = {name: entry(list(shape), place * size, (place + 1) * size) for place, name in enumerate(names)}
    return weights(header, b"\0" * size * len(names))


TWICE = b'"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
T5 = ("shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
LORA = ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight")


def weights_file(name: str, data: bytes, *words: str, role: str = "dit", file: str = "w.safetensors") -> Item:
    return Item(f"weights: {name}", file, lambda folder: (folder / file).write_bytes(data), 4, words, {"role": role})


WEIGHTS = [
    Item("weights: missing file", "w.safetensors", lambda folder: None, 4, ("not found",), {"role": "dit"}),
    weights_file("no bytes", b"", "too short"),
    weights_file("four bytes", b"abcd", "too short"),
    weights_file("text", b"this is not a weights file at all"),
    weights_file("error page", b"<!doctype html><html><title>404</title></html>"),
    weights_file("lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    weights_file("pickle", b"\x80\x02}q\x00.", "pickle", file="w.pt"),
    weights_file("zip pickle under the right name", b"PK\3\4" + b"\0" * 60, "pickle"),
    weights_file("gguf, cut off", b"GGUF\3\0\0\0\x09" + b"\0" * 59, "GGUF"),
    weights_file("header length of an exabyte", b"\xff" * 8 + b"{}"),
    weights_file("header longer than the file", weights({}, length=5000), "truncated"),
    weights_file("header is not json", weights(b"{'a': 1}"), "header"),
    weights_file("header is a list", weights(b"[]"), "header"),
    weights_file("header nested deeply", weights(b"[" * 100_000), "header"),
    weights_file("a name twice", weights(b"{%s,%s}" % (TWICE, TWICE)), "twice"),
    weights_file("metadata of numbers", weights({"__metadata__": {"a": 1}}), "metadata"),
    weights_file("unknown type", weights({"a": entry([1], 0, 4, "F33")}, b"\0" * 4), "F33"),
    weights_file("shape below zero", weights({"a": entry([-1], 0, 4)}, b"\0" * 4), "shape"),
    weights_file("offsets that do not fit the shape", weights({"a": entry([2], 0, 4)}, b"\0" * 4), "8 bytes"),
    weights_file("tensors overlap", weights({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12), "overlap"),
    weights_file("a gap between tensors", weights({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12), "gap"),
    weights_file("data cut off", model_of(*T5)[:-10], "10 are missing"),
    weights_file("bytes behind the end", model_of(*T5) + b"more", "no tensor"),
    weights_file("t5 given as clip", model_of(*T5), "T5", role="clip_l"),
    weights_file("lora given as transformer", model_of(*LORA), "LoRA", role="dit"),
    weights_file("some other model", model_of("layer.weight", "head.bias"), role="ae"),
    weights_file("no tensors", weights({}), role="dit"),
    Item(
        "weights: one shard of two", "w-00001-of-00002.safetensors",
        lambda folder: (folder / "w-00002-of-00002.safetensors").write_bytes(model_of("a")), 4, ("1 of 2 shards missing",), {"role": "dit"},
    ),
    Item(
        "weights: index without its shards", "w-00001-of-00001.safetensors",
        lambda folder: (folder / "w.safetensors.index.json").write_text('{"weight_map": {"a": "w-00001-of-00001.safetensors"}}'), 4,
        ("1 of 1 shards missing",), {"role": "dit", "open": "w.safetensors.index.json"},
    ),
]  # fmt: skip
