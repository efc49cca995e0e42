"""How well a model of drawn shapes follows captions it was not trained on, by the template judge.

`python -m fluxsmith.demo.measure --count 192` prints the shares of right positions, colours, shapes and backgrounds.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from fluxsmith.config.load import load_model
from fluxsmith.demo.judge import Reading, judge
from fluxsmith.demo.scenes import BASE_SHAPES, STYLES, Scene, caption, random_scene
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.randomness import python_random

SIDE = 64  # pixels of the bundled model's pictures


class Scores(NamedTuple):
    """Shares of pictures, 0..1."""

    position: float
    color: float
    shape: float
    background: float
    pictures: int


def scenes_to_draw(count: int, seed: int, *, shapes: Sequence[str] = BASE_SHAPES, styles: Sequence[str] = STYLES) -> list[Scene]:
    """Scenes whose combination of shape, colour, position and background is never in a training set."""
    return [random_scene(python_random(seed, "measure", number), shapes=shapes, styles=styles, held_out=True) for number in range(count)]


def read(image: Image.Image) -> Reading:
    """The judge's reading of a picture."""
    return judge(torch.from_numpy(np.array(image.convert("RGB"))))


def measure(pipeline: Pipeline, scenes: Sequence[Scene], settings: dict[str, object], *, seed: int = 0) -> Scores:
    """Draw every scene's caption once and compare."""
    hits = np.zeros(4)
    for number, scene in enumerate(scenes):
        request = Request(caption(scene), width=SIDE, height=SIDE, seed=seed + number, **settings)  # type: ignore[arg-type]  # fields of Request
        seen = read(pipeline.generate(request).image)
        hits += [getattr(seen, name) == getattr(scene, name) for name in ("position", "color", "shape", "background")]
    position, color, shape, background = (hits / len(scenes)).tolist()
    return Scores(position, color, shape, background, len(scenes))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fluxsmith.demo.measure", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="a run file whose model section is measured; the bundled model without")
    parser.add_argument("--lora", default="", help="an adapter to add")
    parser.add_argument("--count", type=int, default=192)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--guidance", type=float, nargs="+", default=[None])
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args(arguments)
    model = load_model(options.run) if options.run else load_model({"model": {"type": "flux1", "preset": "flux-shapes"}})
    pipeline = Pipeline.load(model, device="cpu")
    if options.lora:
        pipeline.load_lora(options.lora)
    scenes = scenes_to_draw(options.count, options.seed)
    for guidance in options.guidance:
        for cfg in options.cfg:
            settings = {"steps": options.steps, "guidance": guidance, "cfg": cfg}
            print(json.dumps({**settings, **measure(pipeline, scenes, settings, seed=options.seed)._asdict()}), flush=True)


if __name__ == "__main__":
    main()
