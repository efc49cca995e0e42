"""Step1X-Edit: a picture is changed as the prompt says. `[[control]] type = "step1x" image = "cat.png"` beside model type "step1x".

A language model reads the prompt with the picture; the connector in the transformer's file makes the text of its states. The
picture's latents follow the denoised tokens, in the same places.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from PIL import Image
from pydantic import PositiveInt
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground, Picture
from fluxsmith.controls.base import TEXT, Prepared, Scene, Site, Unchanged
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.image_rows import part, with_image
from fluxsmith.controls.pictures import cover, opened, unreadable
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.controls.step1x_model import Connector, load_connector
from fluxsmith.controls.step1x_prompt import states_of
from fluxsmith.controls.text_rows import with_text
from fluxsmith.errors import Problem
from fluxsmith.io.sources import resolve
from fluxsmith.models.packing import pack
from fluxsmith.models.qwen_input import QwenText
from fluxsmith.models.qwen_vl import QwenVL, find_qwen_tokenizer, load_qwen, load_qwen_text
from fluxsmith.models.stream import Conditioner, Tokens, Window

FEATURES = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Config(ControlConfig):
    """The picture that is changed; the model section gives the files."""

    path: str = ""
    """File with the connector: the transformer's; by default model.path."""
    qwen: str = ""
    """Qwen2.5-VL-7B-Instruct: folder, shards or hub id; by default model.qwen."""
    tokenizer: str = ""
    """Folder of its tokenizer, when it is not beside the weights."""
    image: Picture | None = None
    """The picture, scaled and cropped at its centre to the size of the one that is drawn."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the language model's weights; auto is that of the transformer, or what model.text_dtype says."""
    heads: PositiveInt | None = None
    """Attention heads of the connector; by default heads of 128."""

    def misfits(self, ground: Ground) -> Iterator[Problem]:
        """It belongs to one transformer, and needs the language model."""
        if ground.family != "step1x" or ground.in_channels != FEATURES:
            why = "the connector is in the file of Step1X-Edit's transformer, which knows no other text"
            yield Problem("step1x needs Step1X-Edit's transformer", why=why, fix='write model.type = "step1x", or remove the control')
        elif not self.qwen:
            why = "it reads the prompt together with the picture"
            yield Problem("Step1X-Edit needs Qwen2.5-VL-7B-Instruct", why=why, fix="set model.qwen to its folder or hub id")

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """A picture is needed."""
        if self.image is None:
            yield Problem(f"control {self.name or self.type} has no picture to change", fix="give it an image")
        yield from unreadable([self.image])

    def build(self, site: Site) -> "Control":
        """Connector and language model. Raises ModelFileError for wrong files."""
        file, qwen = resolve(self.path, "dit"), resolve(self.qwen, "language_model")
        text = load_qwen_text(find_qwen_tokenizer(qwen, self.tokenizer))
        place = site.device
        connector = site.once(("connector", file), lambda: load_connector(file, device=place, dtype=site.dtype, heads=self.heads))
        model = site.once(("language_model", qwen), lambda: load_qwen(qwen, device=place, dtype=DTYPES.get(self.dtype, site.dtype)))
        return Control(connector, model, text, self)


class Control(Base):
    """The loaded connector and language model."""

    role = "step1x"
    loads = ("path", "qwen", "tokenizer", "dtype", "heads")

    def __init__(self, connector: Connector, model: QwenVL, text: QwenText, config: Config) -> None:
        super().__init__(config, (connector, model), denoising=(connector,))
        self.connector, self.model, self.text = connector, model, text

    def prepare(self, scene: Scene) -> Prepared:
        """Reads both prompts with the picture, and encodes it."""
        image = cover(opened(self.config.image), scene.width, scene.height)
        latents = scene.encode(to_pixels(image))
        positive = self._branch(scene.prompt, image, latents, scene)
        return Prepared(positive, positive if scene.negative is None else self._branch(scene.negative, image, latents, scene))

    def _branch(self, prompt: str, image: Image.Image, latents: Tensor, scene: Scene) -> "Step1X":
        scene.work(self.model)
        states, mask = states_of(prompt, image, self.model, self.text)
        return Step1X(self.connector, states.to(scene.device, scene.dtype), mask.to(scene.device), latents)


class Step1X(Unchanged):
    """The whole text of a branch: states (1, S, D) with their mask, and the picture's latents (1, 16, h, w)."""

    order = TEXT - 1  # other rows come behind these

    def __init__(self, connector: Connector, states: Tensor, mask: Tensor, latents: Tensor) -> None:
        self.connector, self.states, self.mask, self.latents = connector, states, mask, latents

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens."""
        b, n = tokens.t.shape[0], tokens.n_target or tokens.img.shape[1]
        weight = self.connector.global_proj_out.weight
        states = self.states.to(weight.dtype).expand(b, -1, -1)
        rows, pooled = self.connector(states, self.mask.expand(b, -1), tokens.t)
        return with_image(with_text(tokens, rows, y=pooled), pack(self.latents), tokens.img_ids[:, :n])

    def tile(self, window: Window) -> Conditioner:
        """The picture's part."""
        return Step1X(self.connector, self.states, self.mask, part(self.latents, window))
