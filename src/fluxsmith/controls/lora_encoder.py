"""A LoRA's style as a word: `[[control]] type = "lora_encoder" path = "..." loras = ["style.safetensors"]`.

Each LoRA becomes one token behind the prompt's text (the negative prompt stays as it is); the LoRA itself is not applied.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from pydantic import PositiveInt
from torch import Tensor

from fluxsmith.config.control import ControlConfig, Ground
from fluxsmith.controls.base import TEXT, Prepared, Scene, Site, Unchanged
from fluxsmith.controls.base import Control as Base
from fluxsmith.controls.lora_encoder_model import LoraEncoder, encoded, load_lora_encoder
from fluxsmith.controls.text_rows import with_rows
from fluxsmith.errors import FluxsmithError, Problem
from fluxsmith.io.sources import resolve
from fluxsmith.models.stream import Tokens


class Config(ControlConfig):
    """One LoRA encoder, and the LoRAs that it reads."""

    path: str
    """File of the encoder."""
    loras: tuple[str, ...] = ()
    """LoRA files of any readable format; each must have every layer of the blocks."""
    scale: float = 1.0
    """Factor on the tokens."""
    heads: PositiveInt | None = None
    """Attention heads of the encoder; by default heads of 128."""

    def problems(self, ground: Ground) -> Iterator[Problem]:
        """LoRAs are needed, and must be there."""
        who = f"control {self.name or self.type}"
        if not self.loras:
            yield Problem(f"{who} has no LoRA to read", fix='give loras = ["style.safetensors"]')
        for path in self.loras:
            try:
                resolve(path, "lora")
            except FluxsmithError as error:
                yield from error.problems

    def build(self, site: Site) -> "Control":
        """The encoder on the transformer's device. Raises ModelFileError for a wrong file."""
        file = resolve(self.path, "lora_encoder")
        net = site.once(("lora_encoder", file), lambda: load_lora_encoder(file, device=site.device, dtype=site.dtype, heads=self.heads))
        return Control(net, self)


class Control(Base):
    """A loaded LoRA encoder."""

    role = "lora_encoder"
    loads = ("path", "heads")

    def __init__(self, net: LoraEncoder, config: Config) -> None:
        super().__init__(config, (net,), denoising=())
        self.net = net

    def rows(self, paths: Sequence[str | Path]) -> Tensor:
        """One row for each LoRA file, (1, LoRAs, D), scaled. Raises ModelFileError that names the layers a LoRA lacks."""
        return torch.cat([encoded(self.net, resolve(path, "lora")) for path in paths], dim=1) * self.config.scale

    def prepare(self, scene: Scene) -> Prepared:
        """Reads the LoRAs."""
        scene.work(self.net)
        rows = self.rows(self.config.loras)
        return Prepared(Rows(rows.to(scene.device, scene.dtype)), Unchanged())


class Rows(Unchanged):
    """Adds rows (1, S, D_txt) behind the text."""

    order = TEXT

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def tokens(self, tokens: Tokens) -> Tokens:
        """As Conditioner.tokens."""
        return with_rows(tokens, self.rows)
