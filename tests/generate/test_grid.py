"""The sheet of pictures: rows, columns, captions, enlargement."""

import numpy as np
import pytest
from PIL import Image

from fluxsmith.generate.grid import GAP, LINE, PAPER, SMALLEST, Cell, grid

COLOURS = [(255, 0, 0), (0, 160, 0), (0, 0, 255), (255, 200, 0), (160, 0, 160), (0, 160, 160)]


def cells(count: int, size: tuple[int, int] = (200, 100)) -> list[Cell]:
    return [Cell(Image.new("RGB", size, COLOURS[number]), f"prompt {number // 3}", f"seed {number}") for number in range(count)]


def blocks(sheet: Image.Image) -> dict[tuple[int, int, int], tuple[int, int, int, int]]:
    """Colour -> left, top, width, height."""
    values = np.asarray(sheet)
    found = {}
    for colour in COLOURS:
        rows, columns = np.nonzero((values == colour).all(axis=-1))
        if len(rows):
            found[colour] = (columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1)
    return {key: tuple(map(int, value)) for key, value in found.items()}  # type: ignore[misc]


def test_rows_and_columns() -> None:
    found = blocks(grid(cells(6), columns=3))
    assert list(found) == COLOURS
    lefts, tops = [found[c][0] for c in COLOURS], [found[c][1] for c in COLOURS]
    assert lefts[:3] == lefts[3:] == [GAP, GAP + 208, GAP + 416]
    assert len(set(tops[:3])) == len(set(tops[3:])) == 1
    assert tops[3] - tops[0] >= 100 + 2 * LINE  # a caption line below and one above
    assert all(found[c][2:] == (200, 100) for c in COLOURS)


def test_nothing_is_cut_off() -> None:
    sheet = grid(cells(6), columns=3)
    for left, top, width, height in blocks(sheet).values():
        assert left + width + GAP <= sheet.width
        assert top + height + GAP <= sheet.height
    edge = np.concatenate([np.asarray(sheet)[-1], np.asarray(sheet)[:, -1], np.asarray(sheet)[0], np.asarray(sheet)[:, 0]])
    assert (edge == PAPER).all()


def test_small_pictures_are_enlarged_by_whole_numbers() -> None:
    found = blocks(grid(cells(2, (64, 32)), columns=2))
    assert all(found[c][2:] == (192, 96) for c in COLOURS[:2])
    assert SMALLEST == 192


def test_a_last_row_may_be_short() -> None:
    assert len(blocks(grid(cells(4), columns=3))) == 4


def test_labels_and_prompts_are_drawn() -> None:
    plain = [cell._replace(prompt="", label="") for cell in cells(1)]
    empty, labelled = np.asarray(grid(plain, columns=1)), np.asarray(grid(cells(1), columns=1))
    assert labelled.shape[0] > empty.shape[0]
    ink = (labelled < 128).all(axis=-1).any(axis=1).nonzero()[0]
    top = blocks(grid(cells(1), columns=1))[COLOURS[0]][1]
    assert ink.min() < top  # the prompt above
    assert ink.max() >= top + 100  # the label below


@pytest.mark.parametrize("prompt", ["word " * 200, "x" * 400, "éèüß 猫 \U0001f600"])
def test_long_and_foreign_prompts(prompt: str) -> None:
    sheet = grid([Cell(Image.new("RGB", (200, 100), COLOURS[0]), prompt)], columns=1)
    assert sheet.height <= 100 + 4 * LINE + 4 * GAP
