"""Pictures side by side with their captions: rows by prompt, columns by seed or step."""

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

GAP, LINE, SMALLEST = 8, 14, 192  # pixels; small pictures are enlarged to at least SMALLEST without smoothing
INK, PAPER = (30, 30, 30), (255, 255, 255)


class Cell(NamedTuple):
    """One picture, the prompt above its row, and the label under it."""

    image: Image.Image
    prompt: str
    label: str = ""


def grid(cells: Sequence[Cell], *, columns: int) -> Image.Image:
    """One RGB picture; all cells get the size of the largest."""
    scale = max(1, -(-SMALLEST // max(cell.image.width for cell in cells)))
    width = max(cell.image.width for cell in cells) * scale
    height = max(cell.image.height for cell in cells) * scale
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    texts = [_wrapped(row[0].prompt, columns * (width + GAP)) for row in rows]
    heights = [len(text) * LINE + height + LINE + 2 * GAP for text in texts]
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, sum(heights) + GAP), PAPER)
    pen, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(), GAP
    for row, text, row_height in zip(rows, texts, heights, strict=True):
        for number, line in enumerate(text):
            pen.text((GAP, y + number * LINE), line, fill=INK, font=font)
        top = y + len(text) * LINE + GAP // 2
        for column, cell in enumerate(row):
            x = GAP + column * (width + GAP)
            size = (cell.image.width * scale, cell.image.height * scale)
            sheet.paste(cell.image.convert("RGB").resize(size, Image.Resampling.NEAREST), (x, top))
            pen.text((x, top + height + 1), cell.label, fill=INK, font=font)
        y += row_height
    return sheet


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(20, width // 7))[:3]
