"""Pipeline: a prompt becomes a picture. Text states, noise, the sampler's loop, the autoencoder.

`Pipeline.load(model_config).generate(Request("a cat", width=1024, height=1024))`. Training calls the same code to sample.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor, nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.fusion import LoraFusion, load_fusion
from fluxsmith.adapters.lora import load_adapter
from fluxsmith.config.choice import realise
from fluxsmith.config.control import ControlConfig, Ground
from fluxsmith.config.load import load_model
from fluxsmith.config.section import PluginConfig
from fluxsmith.controls.base import Control, Scene, Site
from fluxsmith.controls.pictures import cover
from fluxsmith.controls.pictures import pixels as to_pixels
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.generate.branch import Branch
from fluxsmith.generate.controls import build, check, chosen, control_section, ground_of, masks_attention, named, with_implied, with_request
from fluxsmith.generate.guidance import guided
from fluxsmith.generate.place import Options, place_of
from fluxsmith.generate.request import Picture, Request
from fluxsmith.generate.residency import Named, Residency
from fluxsmith.generate.samplers import SAMPLERS, Callback
from fluxsmith.generate.schedule import sigmas
from fluxsmith.generate.step_cache import StepCaches
from fluxsmith.io.sources import resolve
from fluxsmith.memory.modulation import announce, confirm
from fluxsmith.models.assembly import Models, TextStates
from fluxsmith.models.backends import backend
from fluxsmith.models.compiling import compile_blocks
from fluxsmith.models.files import locate
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.loading import LazyModels
from fluxsmith.models.ops import use_attention
from fluxsmith.models.packing import token_count
from fluxsmith.models.tiling import Tiling, tiled_decode, tiled_encode

Defaults = dict[str, float | str]  # steps, guidance, shift of the model


class Pipeline:
    """The parts of a loaded model, ready to draw."""

    def __init__(
        self,
        models: Models,
        defaults: Defaults,
        encode: Callable[[str], TextStates] | None = None,
        *,
        controls: Sequence[Control] = (),
        ground: Ground | None = None,
    ) -> None:
        self.models = models
        self.defaults = defaults
        self.encode = encode or self._encode_prompt
        self.controls = list(controls)
        self.ground = ground or Ground(in_channels=models.dit.params.in_channels if models.dit is not None else 64)
        self.loras: list[AdapterSet] = []
        self.fusion: LoraFusion | None = None
        self.residency: Named | None = None
        self.limit: tuple[float, torch.device, Path | None] | None = None  # for `keep_within`, when the first picture is drawn

    @classmethod
    def load(
        cls,
        model: PluginConfig | Mapping[str, Any],
        *,
        controls: Sequence[ControlConfig | Mapping[str, Any]] = (),
        **options: Unpack[Options],
    ) -> "Pipeline":
        """Load all parts of a `model` section (or a dict with its keys) and of `[[control]]` sections; options of `place.Options`.

        Raises ConfigError or ModelFileError for whatever does not go together, before weights are read.
        """
        model = model if isinstance(model, PluginConfig) else load_model({"model": dict(model)})
        files, facts = locate(model), realise(model).facts()
        files.check(facts.roles)
        ground = ground_of(files, facts)
        entries = with_implied(named([*map(control_section, controls)]), ground)
        check(entries, ground, pictures=False)
        place = place_of(options, files, facts.roles)
        attend = backend(place.attention, place.device, trains=False, masked=facts.mask_text or masks_attention(entries))
        models = LazyModels(files, model, place.loads_to, place.loading()).get(facts.roles)
        made = cls(models, realise(model).sampling_defaults(), ground=ground)
        if models.dit is not None:
            place.finish("dit", models.dit)
            made.controls = build(entries, Site(models.dit, place.dtype, place.loads_to))
            for net in (models.dit, *(net for control in made.controls for net in control.nets)):
                use_attention(net, attend)
            if place.compile:
                compile_blocks(models.dit, "dynamic")
        if place.limit is not None:
            made.limit = (place.limit, place.device, place.folder)
        return made

    def keep_within(self, vram_limit: float, device: torch.device, folder: Path | None = None, *, pixels: int = 0) -> None:
        """From now on parts are on the device only while they work, and what each phase needs of it stays within this many GiB."""
        self.residency = Residency(self.models, self.controls, vram_limit, device, pixels=pixels, folder=folder)

    def _work(self, *parts: str | nn.Module) -> None:
        """These parts of the model and networks of controls work next; under a limit, only they are on the device."""
        if self.residency is not None:
            self.residency.on(*parts)

    def load_lora(self, path: str | Path, weight: float = 1.0) -> None:
        """Add a LoRA of any readable format at a weight; several add up. Raises ModelFileError if it does not fit this model."""
        file = resolve(path, "lora")
        self._work()  # adapters are made where their layers rest, and travel with them
        try:
            made = load_adapter(file, self.models.loaded(), strength=weight, name=f"lora{len(self.loras)}")
        except ModelFileError as error:
            problems = tuple(replace(problem, where=problem.where or str(file)) for problem in error.problems)
            raise ModelFileError(str(problems[0]), problems=problems) from error
        if weight == 0:
            made.detach()  # a layer with an adapter adds its bias apart, so even a zero would change the last bits
        self.add_lora(made)

    def add_lora(self, made: AdapterSet) -> None:
        """Take an attached adapter into the pipeline's own, so that it is fused and cleared with them.

        Raises ConfigError if it cannot be fused where the others are; it is detached then.
        """
        try:
            self._fuse(self.fusion, [*self.loras, made])
        except (ConfigError, ModelFileError):
            made.detach()
            raise
        self.loras.append(made)
        self._see_width()

    def fuse_loras(self, path: str | Path) -> None:
        """Weigh the LoRAs against each other by the mergers of a LoRAFusion file, those that are loaded and those to come.

        Raises ConfigError for adapters that cannot be fused, ModelFileError for a file that is none or does not fit.
        """
        self._work()
        dit = self._dit()
        self._fuse(load_fusion(resolve(path, "lora_fusion"), device=dit.img_in.weight.device, dtype=dit.dtype), self.loras)

    def _fuse(self, fusion: LoraFusion | None, loras: Sequence[AdapterSet]) -> None:
        if fusion is not None:
            fusion.check(loras)
            if self.fusion is not None:
                self.fusion.detach()
            fusion.attach(loras)
            self.fusion = fusion

    def clear_loras(self) -> None:
        """Take all LoRAs out again, and what fused them; the model is as it was loaded."""
        if self.fusion is not None:
            self.fusion.detach()
            self.fusion = None
        while self.loras:
            self.loras.pop().detach()
        self._see_width()

    def _see_width(self) -> None:
        """A control LoRA gives the transformer more input features."""
        if self.models.dit is not None:
            self.ground = self.ground._replace(in_channels=self.models.dit.img_in.in_features)

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
        dit, ae = self._dit(), self.models.ae
        if ae is None:
            raise ValueError("drawing needs the autoencoder")
        wanted = chosen(self.controls, request, with_request(self.ground, request))
        if self.limit is not None and self.residency is None:
            self.keep_within(*self.limit, pixels=request.width * request.height)
        self._work("clip_l", "t5xxl")
        states = [self.encode(prompt) for prompt in ([request.prompt, request.negative] if request.cfg != 1 else [request.prompt])]
        self._work("dit")
        device, dtype = next(dit.parameters()).device, dit.dtype
        height, width = request.height // ae.reduction, request.width // ae.reduction
        levels = levels_of(request, token_count(height, width))
        noise = request.noise if request.noise is not None else start_noise(request.seed, dit.params.out_channels // 4, height, width)
        x = noise.to(device)
        clean = None if request.image is None else self.encode_image(request, device)
        if clean is not None and request.strength < 1:
            x = (1 - levels[0]) * clean + levels[0] * x
        texts = [state.to(device, dtype) for state in states]
        branches = wanted.prepare(self._scene(request, levels, clean, (device, dtype)))
        self._work("dit", *wanted.nets)
        caches, last = caches or StepCaches(request.cache), float(levels[-2])
        calls = [
            Branch(self.models, caches.around(dit, last=last), text, request, conditioners)
            for text, conditioners in zip(texts, branches, strict=False)
        ]
        announce(dit, (one for call in calls for one in call.conditionings(x, levels.tolist())))
        positive, *others = calls
        drawn = SAMPLERS[request.sampler](guided(positive, others[0] if others else None, request.cfg), x, levels, callback)
        confirm(dit)
        return drawn

    def _scene(self, request: Request, levels: Tensor, clean: Tensor | None, place: tuple[torch.device, torch.dtype]) -> Scene:
        return Scene(
            self.models,
            request.width,
            request.height,
            request.prompt,
            request.negative if request.cfg != 1 else None,
            tuple(levels.tolist()),
            *place,
            encode_text=self._encode_texts,
            encode=lambda pixels: self._encode_pixels(pixels.to(place[0]), request.tiling()),
            work=self._work,
            clean=clean,
        )

    def _encode_prompt(self, prompt: str) -> TextStates:
        """Text states of one prompt; a model without text encoders starts from no text, which its control then gives."""
        dit = self._dit()
        if self.models.t5xxl is None:
            txt = torch.zeros(1, 0, dit.params.context_in_dim, dtype=dit.dtype)
            return TextStates(txt, txt.new_zeros(1, dit.params.vec_in_dim), torch.zeros(1, 0, dtype=torch.bool))
        return self.models.encode_text([prompt])

    def _encode_texts(self, prompts: Sequence[str]) -> TextStates:
        self._work("clip_l", "t5xxl")
        return self.models.encode_text(prompts)

    def _encode_pixels(self, pixels: Tensor, tiling: Tiling | None) -> Tensor:
        ae = self.models.ae
        if ae is None:
            raise ValueError("the autoencoder is not loaded")
        self._work("ae")
        pixels = pixels.to(next(ae.parameters()).dtype)
        return tiled_encode(ae, pixels, tiling) if tiling else ae.encode(pixels)

    def _dit(self) -> FluxDiT:
        if self.models.dit is None:
            raise ValueError("the transformer is not loaded")
        return self.models.dit

    def encode_image(self, request: Request, device: torch.device) -> Tensor:
        """The starting picture as latents, scaled and cropped at its centre to the request's size."""
        if request.image is None:
            raise ValueError("no starting picture")
        pixels = to_pixels(cover(request.image.convert("RGB"), request.width, request.height))
        return self._encode_pixels(pixels.to(device), request.tiling())

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


def levels_of(request: Request, tokens: int) -> Tensor:
    """The noise levels of a completed request, the last one 0, fp32."""
    if request.sigmas is not None:
        return torch.tensor(request.sigmas)
    return sigmas(request.steps or 1, tokens=tokens, shift=request.shift or "none", strength=request.strength)


def start_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Unit noise (1, C, h, w) from a CPU generator, so that a seed means the same picture on every device."""
    return torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(seed))


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> 8-bit picture."""
    values = pixels.float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())
