"""What a drawn picture shows and how it is said: shapes, colours, places, captions, and which scenes are kept for evaluation.

`caption(random_scene(random.Random(1)))` is "a large cyan star at top left on a navy checkered background".
"""

import hashlib
import random
from collections.abc import Sequence
from typing import NamedTuple

RGB = tuple[int, int, int]

BASE_SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "ring", "hexagon")
CONCEPT_SHAPES = ("heart", "moon", "arrow")  # never in base data: what a first adapter learns
COLORS: dict[str, RGB] = {
    "red": (220, 38, 38),
    "orange": (248, 140, 24),
    "yellow": (248, 220, 40),
    "green": (40, 165, 70),
    "cyan": (50, 205, 215),
    "blue": (45, 90, 225),
    "purple": (140, 55, 195),
    "pink": (250, 130, 190),
    "brown": (135, 80, 40),
    "white": (248, 248, 248),
}
BACKGROUNDS: dict[str, tuple[RGB, RGB]] = {  # the colour and the second tone of gradients and checks
    "navy": ((22, 30, 82), (44, 56, 116)),
    "black": ((18, 18, 22), (54, 54, 60)),
    "grey": ((128, 128, 128), (160, 160, 160)),
    "cream": ((244, 234, 206), (222, 206, 170)),
    "mint": ((188, 228, 204), (156, 204, 178)),
    "maroon": ((88, 18, 40), (120, 40, 64)),
}
STYLES = ("flat", "gradient", "checkered")
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
CENTRES = (0.27, 0.5, 0.73)  # of the three columns and rows, as shares of the width
RADII = {"large": 0.24, "small": 0.15}
CENTRE_RADIUS = {"large": 0.28, "small": 0.17}
FILLERS = ("the", "of", "in", "picture", "drawing")  # words of natural prompts; base captions teach the model to ignore them
NEAREST_COLOR = 90.0  # RGB distance below which an object would melt into its background
HELD_OUT_ONE_IN = 10


class Scene(NamedTuple):
    """One object on a background."""

    shape: str
    color: str
    position: str
    background: str
    background_style: str = "flat"
    size: str = "large"

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the object's centre, shares of the width."""
        row, column = divmod(POSITIONS.index(self.position), 3)
        return CENTRES[column], CENTRES[row]

    @property
    def radius(self) -> float:
        """Radius of the object, a share of the width."""
        return (CENTRE_RADIUS if self.position == "center" else RADII)[self.size]


def is_visible(color: str, background: str) -> bool:
    """True when the colour stands out from both tones of the background."""
    return all(_distance(COLORS[color], tone) >= NEAREST_COLOR for tone in BACKGROUNDS[background])


def _distance(one: RGB, other: RGB) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) ** 0.5


def is_held_out(scene: Scene) -> bool:
    """True for about a tenth of the (shape, colour, position, background) combinations: never trained, only evaluated."""
    text = f"{scene.shape}/{scene.color}/{scene.position}/{scene.background}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % HELD_OUT_ONE_IN == 0


def random_scene(
    rng: random.Random,
    *,
    shapes: Sequence[str] = BASE_SHAPES,
    styles: Sequence[str] = STYLES,
    sizes: Sequence[str] = ("large",),
    held_out: bool | None = False,
) -> Scene:
    """A scene with a visible object: of the training part, of the evaluation part (`held_out=True`), or of both (None)."""
    while True:
        scene = Scene(
            rng.choice(shapes),
            rng.choice(tuple(COLORS)),
            rng.choice(POSITIONS),
            rng.choice(tuple(BACKGROUNDS)),
            rng.choice(styles),
            rng.choice(sizes),
        )
        if is_visible(scene.color, scene.background) and held_out in (None, is_held_out(scene)):
            return scene


def caption(scene: Scene, *, drop_size: bool = False, noise_word: str = "", noise_at: int = 0, shape_word: str = "") -> str:
    """The scene in words; `noise_word` is put before word number `noise_at`, `shape_word` replaces the shape's name (a trigger)."""
    style = "" if scene.background_style == "flat" else scene.background_style
    size = "" if drop_size else scene.size
    text = f"a {size} {scene.color} {shape_word or scene.shape} at {scene.position} on a {scene.background} {style} background"
    words = text.split()
    if noise_word:
        words.insert(noise_at % (len(words) + 1), noise_word)
    return " ".join(words)


def random_caption(scene: Scene, rng: random.Random, *, drop_size: float = 0.2, noise: float = 0.15, shape_word: str = "") -> str:
    """A caption as in training: the size left out at rate `drop_size`, a word without meaning added at rate `noise`."""
    drop = rng.random() < drop_size
    word = _noise_word(rng) if rng.random() < noise else ""
    return caption(scene, drop_size=drop, noise_word=word, noise_at=rng.randrange(16), shape_word=shape_word)


def _noise_word(rng: random.Random) -> str:
    if rng.random() < 0.25:
        return rng.choice(FILLERS)
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 4)))
