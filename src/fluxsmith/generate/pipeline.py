"""Pipeline: a prompt becomes a picture. Text states, noise, the sampler's loop, the autoencoder.

`Pipeline.load(model_config).generate(Request("a cat", width=1024, height=1024))`. Training calls the same code to sample.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.lora import load_adapter
from fluxsmith.config.choice import realise
from fluxsmith.config.load import load_model
from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.guidance import guided
from fluxsmith.generate.request import Picture, Request
from fluxsmith.generate.samplers import SAMPLERS, Callback, Velocity
from fluxsmith.generate.schedule import sigmas
from fluxsmith.generate.step_cache import StepCaches
from fluxsmith.io.sources import resolve
from fluxsmith.memory.block_swap import BlockSwap, Streaming, evenly
from fluxsmith.memory.components import Components, blocks_over, size_of
from fluxsmith.memory.modulation import Conditioning, LookAhead, announce
from fluxsmith.models.assembly import Level, Models, Predictor, TextStates, velocity
from fluxsmith.models.backends import backend
from fluxsmith.models.files import locate
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.loading import LazyModels, Loading
from fluxsmith.models.ops import use_attention
from fluxsmith.models.packing import token_count
from fluxsmith.models.stream import Conditioner
from fluxsmith.models.tiling import tiled_decode, tiled_encode

Defaults = dict[str, float | str]  # steps, guidance, shift of the model


class Pipeline:
    """The parts of a loaded model, ready to draw."""

    def __init__(self, models: Models, defaults: Defaults, encode: Callable[[str], TextStates] | None = None) -> None:
        self.models = models
        self.defaults = defaults
        self.encode = encode or (lambda prompt: models.encode_text([prompt]))
        self.loras: list[AdapterSet] = []
        self.components: Components | None = None
        self.limit: tuple[float, torch.device] | None = None  # GiB of a device, met when the first picture is drawn

    @classmethod
    def load(
        cls,
        model: PluginConfig | Mapping[str, Any],
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        vram_limit: float | None = None,
    ) -> "Pipeline":
        """Load all parts of a `model` section (or a dict with its keys).

        `dtype` of the transformer: fp32 on the CPU and bf16 on a card by default; `attention` names a kernel of `models/backends.py`.
        With `vram_limit` (GiB) parts are on the device only while they work, and blocks beyond it are streamed; 0 streams all of them.
        """
        model = model if isinstance(model, PluginConfig) else load_model({"model": dict(model)})
        place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError("there is no CUDA device", fix="use --device cpu, or install torch for your card and its driver")
        dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
        lazy = LazyModels(locate(model), model, place if vram_limit is None else torch.device("cpu"), Loading(dtype))
        lazy.files.check(lazy.facts.roles)
        attend = backend(attention, place, trains=False, masked=lazy.facts.mask_text)
        models = lazy.get(lazy.facts.roles)
        if models.dit is not None:
            use_attention(models.dit, attend)
        made = cls(models, realise(model).sampling_defaults())
        if vram_limit is not None:
            made.limit = (vram_limit, place)
        return made

    def keep_within(self, vram_limit: float, device: torch.device) -> None:
        """From now on parts are on the device only while they work, and the transformer takes no more than this many GiB of it."""
        dit = self._dit()
        look = LookAhead(dit, device, bakes=True)
        if look.layers:
            look.attach()
        blocks = [size_of(block) for block in dit.blocks]
        count = blocks_over(blocks, size_of(dit) - sum(blocks), vram_limit)
        if count:
            BlockSwap(dit, Streaming(tuple(evenly(count, len(blocks)))), device).attach()
        self.components = Components(self.models.loaded(), device)

    def _work(self, *roles: str) -> None:
        if self.limit is not None and self.components is None:
            self.keep_within(*self.limit)
        if self.components is not None:
            self.components.on(*roles)

    def load_lora(self, path: str | Path, weight: float = 1.0) -> None:
        """Add a LoRA of any readable format at a weight; several add up. Raises ModelFileError if it does not fit this model."""
        if self.components is not None:
            raise ConfigError("adapters are loaded before the first picture where vram_limit is set", fix="load the pipeline anew")
        file = resolve(path, "lora")
        try:
            made = load_adapter(file, self.models.loaded(), strength=weight, name=f"lora{len(self.loras)}")
        except ModelFileError as error:
            problems = tuple(replace(problem, where=problem.where or str(file)) for problem in error.problems)
            raise ModelFileError(str(problems[0]), problems=problems) from error
        if weight == 0:
            made.detach()  # a layer with an adapter adds its bias apart, so even a zero would change the last bits
        self.loras.append(made)

    def clear_loras(self) -> None:
        """Take all LoRAs out again; the model is as it was loaded."""
        while self.loras:
            self.loras.pop().detach()

    @torch.no_grad()
    def generate(self, request: Request, callback: Callback | None = None) -> Picture:
        """Draw one picture. Raises ConfigError for settings that cannot be met."""
        request.check()
        begun = time.monotonic()
        request = self.completed(request)
        caches = StepCaches(request.cache)
        pixels = self.decode(self.latents(request, callback, caches), request)
        return Picture(to_image(pixels[0]), request, time.monotonic() - begun, caches.note())

    def completed(self, request: Request) -> Request:
        """The request with the model's defaults filled in."""
        steps = int(self.defaults["steps"]) if request.steps is None else request.steps
        guidance = float(self.defaults["guidance"]) if request.guidance is None else request.guidance
        shift = self.defaults["shift"] if request.shift is None else request.shift
        return replace(request, steps=steps, guidance=guidance, shift=shift)

    def latents(self, request: Request, callback: Callback | None = None, caches: StepCaches | None = None) -> Tensor:
        """The denoised latents (1, 16, H/8, W/8) of a completed request, in fp32. `caches` of this request, to see what they left out."""
        dit = self.models.dit
        if dit is None or self.models.ae is None:
            raise ValueError("drawing needs the transformer and the autoencoder")
        self._work("clip_l", "t5xxl")
        states = [self.encode(prompt) for prompt in ([request.prompt, request.negative] if request.cfg != 1 else [request.prompt])]
        self._work("dit")
        device, dtype = next(dit.parameters()).device, next(dit.parameters()).dtype
        reduction = self.models.ae.reduction
        height, width = request.height // reduction, request.width // reduction
        levels = sigmas(request.steps or 1, tokens=token_count(height, width), shift=request.shift or "none", strength=request.strength)
        x = start_noise(request.seed, dit.params.out_channels // 4, height, width).to(device)
        if request.image is not None and request.strength < 1:
            clean = self.encode_image(request, device)
            x = (1 - levels[0]) * clean + levels[0] * x
        condition = None if request.control_image is None else fitted(request.control_image, request).to(device)
        controls = self.models.conditioners(condition)
        texts = [state.to(device, dtype) for state in states]
        self._work("dit")
        announce(dit, self._conditionings(texts, request, levels.tolist()))
        caches, last = caches or StepCaches(request.cache), float(levels[-2])
        positive, *others = [self._velocity(caches.around(dit, last=last), text, request=request, controls=controls) for text in texts]
        negative = others[0] if others else None
        return SAMPLERS[request.sampler](guided(positive, negative, request.cfg), x, levels, callback)

    def _dit(self) -> FluxDiT:
        if self.models.dit is None:
            raise ValueError("the transformer is not loaded")
        return self.models.dit

    def _conditionings(self, texts: Sequence[TextStates], request: Request, levels: Sequence[float]) -> Iterator[Conditioning]:
        """All inputs of the conditioning path that a request will have, as `_velocity` makes them."""
        embeds = self._dit().params.guidance_embed
        for text in texts:
            for sigma in levels:
                t, guidance = (torch.full((1,), value, device=text.txt.device) for value in (sigma, float(request.guidance or 0.0)))
                yield Conditioning(t, guidance if embeds else None, text.pooled)

    def _velocity(self, dit: Predictor, text: TextStates, *, request: Request, controls: Sequence[Conditioner]) -> Velocity:
        device = text.txt.device
        guidance = torch.full((1,), float(request.guidance or 0.0), device=device)

        def call(x: Tensor, sigma: float) -> Tensor:
            t = torch.full((x.shape[0],), sigma, device=device)
            return velocity(dit, x, text, Level(t, guidance), mask_text=self.models.mask_text, controls=controls).float()

        return call

    def encode_image(self, request: Request, device: torch.device) -> Tensor:
        """The starting picture as latents, scaled and cropped at its centre to the request's size."""
        if request.image is None or self.models.ae is None:
            raise ValueError("no starting picture")
        self._work("ae")
        pixels = fitted(request.image, request).to(device)
        tiling = request.tiling()
        if tiling:
            return tiled_encode(self.models.ae, pixels, tiling)
        return self.models.ae.encode(pixels)

    def decode(self, latents: Tensor, request: Request) -> Tensor:
        """Latents -> pixels (1, 3, H, W), about [-1, 1]."""
        if self.models.ae is None:
            raise ValueError("the autoencoder is not loaded")
        self._work("ae")
        latents = latents.to(next(self.models.ae.parameters()).dtype)
        tiling = request.tiling()
        if tiling:
            return tiled_decode(self.models.ae, latents, tiling)
        return self.models.ae.decode(latents)


def start_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Unit noise (1, C, h, w) from a CPU generator, so that a seed means the same picture on every device."""
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(seed))


def fitted(image: Image.Image, request: Request) -> Tensor:
    """A picture scaled and cropped at its centre to the request's size: (1, 3, H, W) in [-1, 1]."""
    image = ImageOps.fit(image.convert("RGB"), (request.width, request.height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float().div(127.5).sub(1)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> 8-bit picture."""
    values = pixels.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
