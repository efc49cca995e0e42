"""What Step1X-Edit's language model is asked: a fixed instruction, the picture, the prompt, with quoted words letter by letter.

INSTRUCTION is the text that the model was trained with, from stepfun-ai/Step1X-Edit, modules/conditioner.py; so are the
limits of the picture, the 217 states that are dropped (those of the instruction) and the length of 640.
"""

import torch
from PIL import Image
from torch import Tensor

from fluxsmith.models.qwen_input import PICTURE, SYSTEM, Pixels, QwenText, turn
from fluxsmith.models.qwen_vl import QwenVL

INSTRUCTION = """Given a user prompt, generate an "Enhanced prompt" that provides detailed visual descriptions suitable for image generation. Evaluate the level of detail in the user prompt:
- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to create vivid and concrete scenes.
- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.

Here are examples of how to transform or refine prompts:
- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.
- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.

Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:
User Prompt:"""  # noqa: E501  the model knows it line for line
LIMITS = Pixels(256 * 28 * 28, 324 * 28 * 28)
DROPPED, LENGTH = 217, 640
MARKS = "\"“”'"
OPEN, CLOSE = "“", "”"


@torch.no_grad()
def states_of(prompt: str, image: Image.Image, model: QwenVL, text: QwenText) -> tuple[Tensor, Tensor]:
    """States (1, 640, D) of a prompt about a picture, zero where there are none, and the mask (1, 640) of real ones."""
    inputs = text.read(question(prompt, text), [image], LIMITS)
    found = model(inputs, text.image)[:, DROPPED : DROPPED + LENGTH]
    count = found.shape[1]
    states = found.new_zeros(1, LENGTH, found.shape[2])
    states[:, :count] = found
    return states, torch.arange(LENGTH, device=found.device)[None] < count


def question(prompt: str, text: QwenText) -> list[int]:
    """The conversation's ids, with one for the picture. Raises ConfigError for marks of the conversation in the prompt."""
    text.check(prompt)
    whole = turn("system", SYSTEM) + turn("user", f"{INSTRUCTION}Picture 1: {PICTURE}") + "<|im_start|>assistant\n"
    place = whole.index(PICTURE) + len(PICTURE)
    made = text.ids(whole[:place])
    *quoted, last = pieces(prompt)
    for piece, is_letter in quoted:
        made += letter(piece, text) if is_letter else text.ids(piece)
    return made + text.ids(last[0] + whole[place:])


def letter(character: str, text: QwenText) -> list[int]:
    """A character by itself: read between curly quotes, whose own ids go where they stand alone."""
    (opening, *_), (*_, closing) = text.ids(OPEN), text.ids(CLOSE)
    made = text.ids(f"{OPEN}{character}{CLOSE}")
    return made[1:-1] if made[0] == opening and made[-1] == closing else made


def pieces(prompt: str) -> list[tuple[str, bool]]:
    """Text, and single characters of what stands between two quotation marks (True). The last piece is text, maybe empty.

    All marks are written as straight ones. An apostrophe within a word, and a mark without another, are no quotation.
    """
    marks = [place for place, one in enumerate(prompt) if one in MARKS and not _is_apostrophe(prompt, place)]
    made, start, before = list[tuple[str, bool]](), 0, ""
    for first, second in zip(marks[::2], marks[1::2], strict=False):
        made.append((f'{before}{prompt[start:first]}"', False))
        made += [(one, True) for one in prompt[first + 1 : second]]
        start, before = second + 1, '"'
    return [*made, (before + prompt[start:], False)]


def _is_apostrophe(prompt: str, place: int) -> bool:
    return prompt[place] == "'" and prompt[place - 1 : place].isalnum() and prompt[place + 1 : place + 2].isalnum()
