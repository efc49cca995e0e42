"""The page of a scan: self-contained, safe, and showing the crops that training makes."""

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fluxsmith.data.checks import report_on
from fluxsmith.data.scan import scan
from fluxsmith.data.sheet import sheet
from fluxsmith.data.sources.folder import Config

pytestmark = pytest.mark.ledger("FS-07")


def page(folder: Path) -> str:
    sets = scan([Config(path=folder, resolution=64, buckets={"enabled": False})])
    return sheet(sets, report_on(sets, token_counts=lambda text: {"t5xxl": (len(text.split()), 512)}))


def pictures(text: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/jpeg;base64,([^']+)'", text)]


def test_the_page_shows_every_picture_and_what_is_cut_off(tmp_path: Path) -> None:
    Image.new("RGB", (200, 100), (250, 250, 250)).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a wide one")
    found = pictures(page(tmp_path))
    assert len(found) == 1
    image = found[0].convert("L")
    middle, edge = image.getpixel((image.width // 2, image.height // 2)), image.getpixel((5, image.height // 2))
    assert isinstance(middle, int)
    assert isinstance(edge, int)
    assert middle > 240
    assert edge < 120
    lit = sum(value > 200 for value in list(image.crop((0, image.height // 2, image.width, image.height // 2 + 1)).tobytes()))
    assert lit == pytest.approx(image.width / 2, abs=4), "a 64 x 64 crop keeps half of a 2:1 picture"


def test_the_page_needs_nothing_else_and_runs_nothing(folder: Path) -> None:
    text = page(folder)
    assert "default-src 'none'" in text
    assert not re.search(r"<script|https?://|<link|url\(", text)
    assert text.count("data:image/jpeg;base64,") == 6


def test_captions_and_names_are_shown_as_text(folder: Path, picture: Callable[..., Path]) -> None:
    picture(folder / "<img src=x onerror=alert(1)>.png")
    (folder / "<img src=x onerror=alert(1)>.txt").write_text("<script>alert('caption')</script>")
    (folder / "bad<b>.png").write_bytes(b"x")

    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, list[str]]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.append((tag, [name for name, _ in attrs]))

    parser = Tags()
    parser.feed(page(folder))
    tags = {tag for tag, _ in parser.seen}
    assert not tags & {"script", "iframe", "link"}
    assert not any(name.startswith("on") for _, names in parser.seen for name in names)
    assert "&lt;script&gt;" in page(folder)


def test_problems_are_listed_with_their_cures(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"x")
    text = page(folder)
    assert "broken.png" in text
    assert "save it as PNG or JPEG" in text
    assert "A run will not start" in text


def test_masked_parts_are_red_and_used_columns_shown(tmp_path: Path) -> None:
    pictures_in, masks = tmp_path / "pictures", tmp_path / "masks"
    for folder in (pictures_in, masks):
        folder.mkdir()
    Image.new("RGB", (100, 100), (250, 250, 250)).save(pictures_in / "a.png")
    (pictures_in / "a.txt").write_text("a")
    mask = Image.new("L", (100, 100), 255)
    mask.paste(0, (0, 0, 50, 100))
    mask.save(masks / "a.png")
    sets = scan([Config(path=pictures_in, resolution=64, buckets={"enabled": False}, mask_dir=masks, group="<g>")])
    text = sheet(sets, report_on(sets))
    (image,) = pictures(text)
    left, right = image.convert("RGB").getpixel((20, 110)), image.convert("RGB").getpixel((200, 110))
    assert isinstance(left, tuple)
    assert isinstance(right, tuple)
    assert left[0] - left[1] > 80
    assert min(right) > 240
    assert "<th>group<th>masks</tr>" in text
    assert "&lt;g&gt;" in text
    assert "held out" not in text
    assert "<th>group" not in page(pictures_in)
