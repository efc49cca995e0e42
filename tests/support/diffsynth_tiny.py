"""The tiny model under the names and in the folders that DiffSynth-Studio's scripts use, and checks of its pipeline fixture."""

import shutil
from pathlib import Path
from typing import Any

import tiny_run
import torch
from fixture import Fixture
from PIL import Image

from fluxsmith.config.control import Ground
from fluxsmith.dialects.diffsynth import ModelConfig
from fluxsmith.dialects.diffsynth.call import Call
from fluxsmith.dialects.diffsynth.loaded import Loaded
from fluxsmith.dialects.diffsynth.opening import Opening
from fluxsmith.dialects.diffsynth.picture import to_image
from fluxsmith.dialects.diffsynth.pipeline import NO_DEFAULTS, FluxImagePipeline
from fluxsmith.dialects.diffsynth.schedule import levels
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.models.assembly import Models, TextStates
from fluxsmith.models.load import load_ae, load_dit

DEV = "black-forest-labs/FLUX.1-dev"
PLACES = {  # in the repository -> file of tiny_run
    "flux1-dev.safetensors": "dit.safetensors",
    "text_encoder/model.safetensors": "clip_l.safetensors",
    "text_encoder_2/model-00001-of-00001.safetensors": "t5xxl.safetensors",
    "ae.safetensors": "ae.safetensors",
    "tokenizer": "tokenizer",
    "tokenizer_2": "tokenizer_2",
}

FILES = ("flux1-dev.safetensors", "text_encoder/model.safetensors", "text_encoder_2/*.safetensors", "ae.safetensors")
SHORT: dict[str, Any] = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 1, "progress_bar_cmd": lambda x: x}


def write_models(root: Path, model_id: str = DEV, dit: str = "flux1-dev.safetensors") -> Path:
    """root/model_id with everything a pipeline needs; returns root."""
    files = root / "files"
    if not files.is_dir():
        tiny_run.write_model(files)
    for place, name in PLACES.items():
        target = root / model_id / (dit if place == "flux1-dev.safetensors" else place)
        target.parent.mkdir(parents=True, exist_ok=True)
        if (files / name).is_dir():
            shutil.copytree(files / name, target, dirs_exist_ok=True)
        else:
            target.hardlink_to(files / name)
    return root


def configs(root: Path, *patterns: str, **options: Any) -> list[ModelConfig]:
    """One ModelConfig for each pattern of FLUX.1-dev, from local files."""
    given = {"local_model_path": str(root), "skip_download": True, **options}
    return [ModelConfig(model_id=DEV, origin_file_pattern=pattern, **given) for pattern in patterns or FILES]


def load(root: Path, *more: ModelConfig, **options: Any) -> FluxImagePipeline:
    """A pipeline in fp32 on the CPU."""
    given: dict[str, Any] = {"torch_dtype": torch.float32, "device": "cpu", "model_configs": [*configs(root), *more], **options}
    return FluxImagePipeline.from_pretrained(**given)


@torch.no_grad()
def check_pipeline(f: Fixture) -> None:
    """Whole calls, from the seed to 8-bit pictures, with text states that are looked up; and the table of noise levels."""
    for steps in f.meta["params"]["table"]["steps"]:
        for strength in f.meta["params"]["table"]["denoising_strength"]:
            for shift in f.meta["params"]["table"]["shift"]:
                made = torch.tensor(levels(steps, strength, shift)[:-1])
                name = f"steps{steps}_strength{strength}_shift{shift}"
                f.close(made, f"sigmas/{name}", "sigmas")
                f.close(made * 1000, f"timesteps/{name}", "timesteps")
    pipe = pipeline_of(f)
    assert torch.equal(pipe.noise(Call(height=64, width=96, seed=f.meta["params"]["seed"])), f.i["noise"])
    for name, given in f.meta["params"]["runs"].items():
        options = dict(given)
        if options.pop("input_image", False):
            options["input_image"] = Image.fromarray(f.i["input_image"].numpy())
        call = Call("positive", "negative", seed=f.meta["params"]["seed"], **options)
        request = pipe.request(call)
        request.check()
        latents = pipe.native.latents(request)
        f.close(latents, f"{name}/latents", "latents")
        picture = to_image(pipe.native.decode(latents, request)[0])
        difference = (torch.tensor(list(picture.tobytes())) - f.e[f"{name}/image"].flatten().int()).abs()
        assert difference.max() <= 1, name
        assert pipe("positive", "negative", seed=f.meta["params"]["seed"], **options).tobytes() == picture.tobytes()


def pipeline_of(f: Fixture) -> FluxImagePipeline:
    """The fixture's transformer and autoencoder; "positive" and "negative" are its two rows of text."""
    dit = load_dit(f.weights, axes_dim=f.meta["config"]["axes_dim"])
    models = Models(dit=dit, ae=load_ae(f.folder / f.meta["autoencoder"]))

    def encode(prompt: str) -> TextStates:
        row = slice(0, 1) if prompt == "positive" else slice(1, 2)
        return TextStates(f.i["txt"][row], f.i["y"][row], torch.ones(1, f.i["txt"].shape[1], dtype=torch.bool))

    native = Pipeline(models, NO_DEFAULTS, encode, ground=Ground(in_channels=dit.params.in_channels))
    return FluxImagePipeline(Loaded(models, native.ground), Opening(torch_dtype=torch.float32, device="cpu"), native)
