"""The first-run story: teach the bundled model a shape it has never seen, and show pictures from before and after.

`fluxsmith demo` draws two dozen hearts called "zibbo", trains a LoRA on them, measures what changed, and says what it did.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from fluxsmith.config.load import LoadedConfig, load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.demo.measure import SIDE, Scores, measure, read, scenes_to_draw
from fluxsmith.demo.scenes import COLORS, POSITIONS, Scene, caption, random_scene
from fluxsmith.demo.shapes import Drawings, draw, write_dataset
from fluxsmith.events import Bus
from fluxsmith.generate.grid import Cell, grid
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.io.images import write_png
from fluxsmith.randomness import python_random
from fluxsmith.train.run import train

RUN_FILE = Path(__file__).parent / "run.toml"
CONCEPT, TRIGGER = "heart", "zibbo"
PICTURES, KEEPERS = 24, 144  # of the concept, and of what the model should not forget
TRIGGER_SCENES, BASE_SCENES = 10, 40
SHOWN_BASE = 5  # base captions under the concept's pictures in the grids
SEED = 2000
COLUMNS = 5

REAL_FLUX = """the same with FLUX.1-dev, on a card:
  fluxsmith data scan my-pictures/
  fluxsmith train examples/flux-dev/run.toml data.0.path=my-pictures/ run.dir=runs/mine
  fluxsmith generate runs/mine/run.toml --lora runs/mine/weights/mine.safetensors --prompt "..." """


@dataclass(frozen=True)
class Look:
    """What a model draws: pictures with the concept among those that ask for it, and how well base captions are followed."""

    concept: int
    base: Scores
    cells: tuple[Cell, ...]


def concept_scenes() -> list[Scene]:
    """Two dozen scenes of the concept that go through all places and colours in turn, none of them kept for evaluation."""
    scenes: list[Scene] = []
    for number in range(PICTURES):
        rng = python_random(SEED, "concept", number)
        wanted = (POSITIONS[number % len(POSITIONS)], tuple(COLORS)[number % len(COLORS)])
        draws = (random_scene(rng, shapes=(CONCEPT,), styles=("flat",)) for _ in range(10_000))
        scenes.append(next(scene for scene in draws if (scene.position, scene.color) == wanted))
    return scenes


def write_pictures(folder: Path) -> None:
    """The concept's pictures with their trigger, and drawings of known shapes that keep the model from forgetting."""
    for number, scene in enumerate(concept_scenes()):
        path = folder / "zibbo" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(scene, SIDE, seed=number).numpy()).save(path)
        path.with_suffix(".txt").write_text(caption(scene, shape_word=TRIGGER) + "\n", encoding="utf-8")
    write_dataset(folder / "known", KEEPERS, seed=6, drawings=Drawings())


def demo_config(folder: Path, changes: Sequence[str] = ()) -> LoadedConfig:
    """The demo's run file with its pictures and run folder under `folder`."""
    own = [f"run.dir={folder}", f"data.0.path={folder / 'pictures' / 'zibbo'}", f"data.1.path={folder / 'pictures' / 'known'}"]
    return load_config(RUN_FILE, [*own, *changes])


def look(pipeline: Pipeline) -> Look:
    """Draw trigger captions and base captions, and judge them."""
    scenes = scenes_to_draw(TRIGGER_SCENES, SEED, shapes=(CONCEPT,), styles=("flat",))
    concept, cells = 0, []
    for number, scene in enumerate(scenes):
        cell, shape = _draw(pipeline, scene, caption(scene, shape_word=TRIGGER), SEED + number)
        concept += shape == CONCEPT
        cells.append(cell)
    base = scenes_to_draw(BASE_SCENES, SEED + 1)
    cells += [_draw(pipeline, scene, caption(scene), SEED + number)[0] for number, scene in enumerate(base[:SHOWN_BASE])]
    return Look(concept, measure(pipeline, base, {}, seed=SEED), tuple(cells))


def _draw(pipeline: Pipeline, scene: Scene, text: str, seed: int) -> tuple[Cell, str]:
    picture = pipeline.generate(Request(text, width=SIDE, height=SIDE, seed=seed))
    shape = read(picture.image).shape
    short = text.removesuffix(" background").replace("a large ", "").replace(" on a ", ", ")
    return Cell(picture.image, "", short), shape


def write_look(path: Path, seen: Look) -> None:
    """The grid of a Look."""
    write_png(path, grid(seen.cells, columns=COLUMNS), {})


def run_demo(folder: Path, bus: Bus, say: Callable[[str], None], changes: Sequence[str] = ()) -> dict[str, Any]:
    """The whole story; returns what was measured (also in demo.json)."""
    begun = time.monotonic()
    say(f"drawing {PICTURES} pictures of a shape the model has never seen, called '{TRIGGER}'")
    write_pictures(folder / "pictures")
    config = demo_config(folder, changes).config
    torch.set_num_threads(max(1, config.train.threads))  # tiny tensors: more threads only wait for each other
    before = _look_at(config, None)
    write_look(folder / "before.png", before)
    say(f"before: {before.concept} of {TRIGGER_SCENES} pictures show it")
    trained = time.monotonic()
    weights = train(config, bus=bus)
    seconds = time.monotonic() - trained
    after = _look_at(config, weights)
    write_look(folder / "after.png", after)
    result = {
        "concept_before": before.concept, "concept_after": after.concept, "of": TRIGGER_SCENES,
        "base_before": before.base._asdict(), "base_after": after.base._asdict(),
        "train_seconds": round(seconds, 1), "seconds": round(time.monotonic() - begun, 1), "weights": str(weights),
    }  # fmt: skip
    (folder / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in story(folder, result):
        say(line)
    return result


def _look_at(config: RunConfig, weights: Path | None) -> Look:
    pipeline = Pipeline.load(config.model, device="cpu")
    if weights is not None:
        pipeline.load_lora(weights)
    return look(pipeline)


def story(folder: Path, result: dict[str, Any]) -> list[str]:
    """What was done and measured, for people."""
    base_before, base_after = result["base_before"], result["base_after"]
    shares = [f"{name} {base_before[name]:.2f} -> {base_after[name]:.2f}" for name in ("position", "color", "shape")]
    return [
        f"after: {result['concept_after']} of {result['of']} pictures show it",
        f"other captions ({base_before['pictures']} that were not trained): {', '.join(shares)}",
        f"training took {result['train_seconds']} s, everything {result['seconds']} s",
        f"look at {folder / 'before.png'}, {folder / 'after.png'} and {folder / 'report.html'}",
        f"the LoRA: {result['weights']}",
        REAL_FLUX,
    ]
