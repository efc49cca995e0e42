"""FluxImagePipeline: DiffSynth-Studio's pipeline for FLUX in front of the native one. It translates; all drawing is done by `generate`.

`FluxImagePipeline.from_pretrained(torch_dtype=torch.bfloat16, device="cuda", model_configs=[...])("a cat", seed=0).save("cat.jpg")`
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from fluxsmith.dialects.diffsynth import insert_anything
from fluxsmith.dialects.diffsynth.call import Call, taking
from fluxsmith.dialects.diffsynth.held import Held, HeldSeveral
from fluxsmith.dialects.diffsynth.loaded import Loaded, load
from fluxsmith.dialects.diffsynth.loras import Loras, in_memory
from fluxsmith.dialects.diffsynth.makers import controls_of, lora_files
from fluxsmith.dialects.diffsynth.memory import legacy
from fluxsmith.dialects.diffsynth.model_config import ModelConfig
from fluxsmith.dialects.diffsynth.opening import Opening
from fluxsmith.dialects.diffsynth.parts import sorted_parts
from fluxsmith.dialects.diffsynth.picture import to_image
from fluxsmith.dialects.diffsynth.schedule import levels
from fluxsmith.errors import ConfigError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.io.safetensors import open_weights

CHANNELS = 16
NO_DEFAULTS: dict[str, float | str] = {"steps": 30, "guidance": 3.5, "shift": "none"}  # a call always has its own
LoraSource = ModelConfig | str | Path


class FluxImagePipeline:
    """A loaded pipeline. `native` is the `fluxsmith.Pipeline` that draws."""

    def __init__(self, loaded: Loaded, opening: Opening | None = None, native: Pipeline | None = None) -> None:
        opening = opening or Opening()
        self.opening = opening
        self.torch_dtype = opening.torch_dtype
        self.device = torch.device(opening.device)
        self.loaded = loaded
        self.native = native or Pipeline(loaded.models, NO_DEFAULTS, ground=loaded.ground)
        self.management = loaded.management
        self.loras = Loras(self.native)
        self.merger_enabled = False

    @classmethod
    @taking(Opening)
    def from_pretrained(cls: type[Self], opening: Opening) -> Self:
        """Load the models that `model_configs` names. Raises one error with everything that is wrong before any weight is read."""
        return cls(load(sorted_parts(opening.model_configs), opening), opening)

    @taking(Call)
    def __call__(self, call: Call) -> Image.Image:
        """Draw one picture. Raises one ConfigError with everything that cannot be done."""
        problems = (*call.problems(), *insert_anything.problems(call))
        if problems:
            raise ConfigError(str(problems[0]), problems=problems)
        pair = insert_anything.pair_of(call)
        return self._drawn(call) if pair is None else pair.pasted(self._drawn(pair.call))

    @torch.no_grad()
    def _drawn(self, call: Call) -> Image.Image:
        native = self.native
        native.controls = controls_of(call, self.loaded.templates)
        if native.models.tokenizers is not None:
            native.models.tokenizers.t5_length = call.t5_sequence_length
        request = self.request(call)
        request.check()
        if native.residency is None:
            width, height = call.size
            started = self.management.start(self.loaded.models, self.loaded.controls(), self.loaded.refill, pixels=width * height)
            native.residency = started
        request = native.completed(request)
        latents = native.latents(request, _progress(call, request))
        return to_image(native.decode(latents, request)[0])

    def request(self, call: Call) -> Request:
        """The native request of a call."""
        width, height = call.size
        tile, overlap = call.tiles
        return Request(
            call.prompt,
            negative=call.negative_prompt if call.cfg_scale != 1 else "",
            width=width,
            height=height,
            steps=call.num_inference_steps,
            guidance=call.embedded_guidance,
            cfg=call.cfg_scale,
            seed=max(0, call.seed or 0),  # what it draws is given as noise
            image=call.input_image,
            strength=call.denoising_strength,
            tile=tile,
            overlap=overlap,
            sigmas=levels(call.num_inference_steps, call.denoising_strength, call.sigma_shift),
            noise=self.noise(call),
            denoise_tile=call.denoise_tile,
            denoise_overlap=call.denoise_overlap,
            cache=None if call.tea_cache_l1_thresh is None else {"type": "teacache", "threshold": call.tea_cache_l1_thresh},
        )

    def noise(self, call: Call) -> Tensor:
        """Unit noise (1, 16, H/8, W/8) in fp32 from a generator of `rand_device`; without a seed from torch's global one."""
        width, height = call.size
        ae, device = self.loaded.models.ae, torch.device(call.rand_device)
        reduction = ae.reduction if ae is not None else 8
        generator = None if call.seed is None else torch.Generator(device).manual_seed(call.seed)
        return torch.randn((1, CHANNELS, height // reduction, width // reduction), generator=generator, device=device)

    def load_lora(
        self,
        module: Any,
        lora_config: LoraSource | None = None,
        alpha: float = 1,
        hotload: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        verbose: int = 1,
    ) -> None:
        """Load a LoRA of any readable format on a network (`pipe.dit`) or on all of them (`pipe`).

        `hotload`: beside the weights, so that `clear_lora` takes it off; None does that where memory is managed, and else adds it to the
        weights for good. Raises ModelFileError for a LoRA with layers that have no place.
        """
        hot = self.vram_management_enabled or self.merger_enabled if hotload is None else hotload
        role = self._role(module)
        if state_dict is not None:
            self.loras.load(in_memory(state_dict), role, alpha, hot=hot)
            return
        if lora_config is None:
            raise ConfigError("load_lora has no LoRA", fix="give a path, a ModelConfig or a state_dict")
        for path in lora_files(lora_config):
            with open_weights(path) as weights:
                self.loras.load(weights, role, alpha, hot=hot)

    def load_loras(
        self, module: Held | nn.Module, lora_configs: Sequence[LoraSource], alpha: float = 1, hotload: bool | None = None
    ) -> None:
        """Several LoRAs at one strength."""
        for one in lora_configs:
            self.load_lora(module, one, alpha, hotload)

    def clear_lora(self, verbose: int = 1) -> None:
        """Take all LoRAs off that are beside the weights; fused ones stay."""
        self.loras.clear()
        self.native.fusion = self.loaded.fusion if self.merger_enabled else None

    def enable_lora_merger(self) -> None:
        """From now on hot LoRAs are weighed against each other by the LoRAFusion file among model_configs."""
        if self.loaded.fusion is None:
            fix = "add ModelConfig(...) of LoRAFusion-preview-FLUX.1-dev (model.safetensors) to model_configs"
            raise ConfigError("enable_lora_merger needs a model that is not loaded", fix=fix)
        self.merger_enabled = True
        self.native.fusion = self.loaded.fusion
        if self.native.loras:
            self.native.fusion.attach(self.native.loras)

    def enable_lora_magic(self) -> None:
        """Of older versions, before LoRAs with `hotload=True`: they need no preparation, and mergers act if they are loaded."""
        if self.loaded.fusion is not None:
            self.enable_lora_merger()

    def _role(self, module: Any) -> str:
        if module is self:
            return ""
        inner = module.module if isinstance(module, Held) else module
        for role, part in self.loaded.models.loaded().items():
            if part is inner:
                return role
        raise ConfigError("a LoRA cannot be loaded on this", fix="pass pipe.dit, pipe.text_encoder_1, pipe.text_encoder_2, or pipe")

    @property
    def vram_management_enabled(self) -> bool:
        """Are parts on the device only while they work?"""
        return self.management.is_on

    def enable_vram_management(
        self, num_persistent_param_in_dit: int | None = None, vram_limit: float | None = None, vram_buffer: float = 0.5
    ) -> None:
        """Keep parts on the device only while they work: with so many weights of the transformer there, or within a limit in GiB.

        To be called before the first picture. Without either, the limit is the device's whole memory; `vram_buffer` is taken off it.
        """
        if self.native.residency is not None:
            raise ConfigError("memory is managed already", why="a picture was drawn", fix="call it before the first picture")
        self.management = legacy(self.device, num_persistent_param_in_dit, vram_limit, vram_buffer)
        if self.device.type != "cpu":
            for part in [*self.loaded.models.loaded().values(), *(net for one in self.loaded.controls() for net in one.nets)]:
                part.to("cpu")

    def enable_cpu_offload(self) -> None:
        """The older name of `enable_vram_management()`."""
        self.enable_vram_management()

    def load_timestep_lora(self, lora_config: LoraSource, alpha: float = 2.0) -> None:
        """Not yet: LoRAs whose strength follows the noise level (MultiAlign)."""
        fix = "load a plain LoRA with pipe.load_lora, or use the model without it"
        raise ConfigError("timestep LoRAs cannot be used yet", why="their factors depend on the noise level", fix=fix)

    def load_models_to_device(self, model_names: Sequence[str] = ()) -> None:
        """Nothing to do: a call brings each part to the device when its turn comes."""

    def compile_pipeline(
        self,
        mode: str = "default",
        dynamic: bool = True,
        fullgraph: bool = False,
        compile_models: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """Compile the blocks of these networks (by default the transformer's) with torch.compile."""
        for name in compile_models or ("dit",):
            held = getattr(self, name, None)
            if not isinstance(held, Held):
                raise ConfigError(f"there is no network {name} to compile", fix="leave compile_models out, or name dit")
            blocks = getattr(held.module, "blocks", None)
            for module in [held.module] if blocks is None else blocks:
                module.compile(mode=mode, dynamic=dynamic, fullgraph=fullgraph, **options)

    @property
    def dit(self) -> Held | None:
        """The transformer."""
        return _held("dit", self.loaded.models.dit)

    @property
    def text_encoder_1(self) -> Held | None:
        """CLIP-L."""
        return _held("clip_l", self.loaded.models.clip_l)

    @property
    def text_encoder_2(self) -> Held | None:
        """T5."""
        return _held("t5xxl", self.loaded.models.t5xxl)

    @property
    def vae_encoder(self) -> Held | None:
        """The autoencoder; both halves are one network here."""
        return _held("ae", self.loaded.models.ae)

    @property
    def vae_decoder(self) -> Held | None:
        """The autoencoder."""
        return self.vae_encoder

    @property
    def controlnet(self) -> HeldSeveral | None:
        """The ControlNets, `models` in the order of model_configs."""
        return _several("controlnet", self.loaded.nets("controlnet"))

    @property
    def value_controller(self) -> HeldSeveral | None:
        """The value encoders, `encoders` in the order of model_configs."""
        return _several("value_encoder", self.loaded.nets("value"))

    @property
    def lora_encoder(self) -> Held | None:
        """The LoRA encoder."""
        return self._first("lora_encoder")

    @property
    def ipadapter(self) -> Held | None:
        """The IP-Adapter."""
        return self._first("ip_adapter")

    @property
    def image_proj_model(self) -> Held | None:
        """InfiniteYou's face projector."""
        nets = self.loaded.nets("infiniteyou")
        return Held("face_projector", nets[-1]) if nets else None

    def _first(self, control: str) -> Held | None:
        return next((Held(control, net) for net in self.loaded.nets(control)), None)


def _held(role: str, module: nn.Module | None) -> Held | None:
    return None if module is None else Held(role, module)


def _several(role: str, nets: Sequence[nn.Module]) -> HeldSeveral | None:
    return HeldSeveral([Held(role, net) for net in nets]) if nets else None


def _progress(call: Call, request: Request) -> Any:
    """A callback that moves the progress bar on by one after every step."""
    timesteps = torch.tensor(request.sigmas[:-1] if request.sigmas else ()) * 1000
    steps = iter(call.progress_bar_cmd(timesteps))
    next(steps, None)
    return lambda step, x, clean: next(steps, None)
