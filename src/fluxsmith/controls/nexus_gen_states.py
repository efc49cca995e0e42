"""What Nexus-Gen's language model says a picture should be: 81 states, read in one forward at the places of learned inputs.

The wording of the conversation is the one that the model was trained with (DiffSynth-Studio/Nexus-GenV2).
"""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from fluxsmith.errors import ModelFileError
from fluxsmith.models.qwen_input import PICTURE, SYSTEM, Pixels, QwenInput, QwenText, bounded, positions, tokens_of, turn
from fluxsmith.models.qwen_vl import QwenVL

PLACE = "<image>"  # where a prompt means the picture; without one it comes first
DRAWN = "Here is an image based on the description: "
EDITED = "Here is the image: "
LIMITS = Pixels(most=262_640)
SIDE = 252  # pixels of the white picture in the target's place: 18 x 18 patches


class Wish(NamedTuple):
    """The answer of the language model."""

    target: Tensor  # (1, 81, D)
    target_grid: tuple[int, int]
    reference: Tensor  # (1, R, D): what it sees of the reference picture; R = 0 without one
    reference_grid: tuple[int, int] | None


def conversation(prompt: str, *, edits: bool) -> str:
    """The whole text, with the target's picture last."""
    if not edits:
        asked, answer = prompt.replace(PLACE, "").strip(), DRAWN
    else:
        asked, answer = (prompt if PLACE in prompt else f"{PLACE} {prompt}"), EDITED
        before, _, after = asked.partition(PLACE)
        asked = before + PICTURE + after.replace(PLACE, "")
    return turn("system", SYSTEM) + turn("user", asked) + turn("assistant", answer + PICTURE)


@torch.no_grad()
def wish(prompt: str, image: Image.Image | None, model: QwenVL, text: QwenText) -> Wish:
    """States for a prompt, and for a picture that it is about.

    Raises ModelFileError for a model without the learned inputs, ConfigError for marks of the conversation in the prompt.
    """
    text.check(prompt)
    images = [] if image is None else [bounded(image.convert("RGB"), LIMITS)]
    white = Image.new("RGB", (SIDE, SIDE), "white")
    inputs = text.read(text.ids(conversation(prompt, edits=image is not None)), [*images, white])
    grid = inputs.grids[-1]
    count = tokens_of(grid)
    if model.params.prefill != count:
        why = f"it has {model.params.prefill} learned inputs, {count} are needed"
        raise ModelFileError("this language model is not Nexus-Gen's", why=why, fix="use DiffSynth-Studio/Nexus-GenV2")
    seen = _seen(inputs, model)
    is_image = (inputs.ids == text.image).to(seen.device)
    rows = model.embedded(inputs, is_image, torch.cat((seen, model.image_prefill_embeds.weight.to(seen.dtype))))
    states = model.vision_head(model.states(rows, positions(is_image, inputs.grids)))
    target = is_image[0].nonzero()[-count:, 0] - 1  # a state says what comes next
    return Wish(states[:, target], grid, seen[None], inputs.grids[0] if images else None)


def _seen(inputs: QwenInput, model: QwenVL) -> Tensor:
    """Tokens of the pictures but the last, whose place is filled with learned inputs."""
    grids = inputs.grids[:-1]
    if not grids:
        return model.image_prefill_embeds.weight[:0]
    patches = sum(rows * columns for rows, columns in grids)
    return model.see(inputs._replace(patches=inputs.patches[:patches], grids=grids))
