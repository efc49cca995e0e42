"""Checks of fixtures with networks beside the transformer (ControlNets as DiffSynth-Studio feeds them), for tests/parity."""

import re
import shutil
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from control_checks import base_of, tokens_of
from fixture import Fixture
from PIL import Image
from torch import Tensor

from fluxsmith.controls.base import Scene
from fluxsmith.controls.controlnet import Config, Control, Residual
from fluxsmith.controls.controlnet_condition import without
from fluxsmith.controls.controlnet_model import load_controlnet
from fluxsmith.controls.infiniteyou import Config as PersonConfig
from fluxsmith.controls.infiniteyou import Control as PersonControl
from fluxsmith.controls.infiniteyou_model import load_face_projector
from fluxsmith.controls.ip_adapter import Config as IpConfig
from fluxsmith.controls.ip_adapter import Control as IpControl
from fluxsmith.controls.ip_adapter_model import IpAdapter, load_ip_adapter
from fluxsmith.controls.span import Span
from fluxsmith.models.assembly import Level, Models, TextStates, velocity
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.load import load_ae
from fluxsmith.models.stream import Conditioner


def picture(f: Fixture, name: str) -> Image.Image:
    return Image.fromarray(f.i[name].numpy())


def scene_of(f: Fixture, steps: int = 1) -> Scene:
    """A scene that encodes with the fixture's autoencoder; levels fall evenly."""
    ae = load_ae(f.folder / f.meta["autoencoder"])
    levels = tuple(1 - step / steps for step in range(steps + 1))
    height, width = (8 * side for side in f.i["latents"].shape[-2:])

    def no_text(prompts: Sequence[str]) -> TextStates:
        raise AssertionError(prompts)

    place = (torch.device("cpu"), torch.float32)
    return Scene(Models(ae=ae), width, height, "", "", levels, *place, encode_text=no_text, encode=ae.encode)


def predicted(f: Fixture, dit: FluxDiT, controls: Sequence[Conditioner], row: int = 0) -> Tensor:
    txt, y = f.i["txt"][row : row + 1], f.i["y"][row : row + 1]
    text = TextStates(txt, y, torch.ones(txt.shape[:2], dtype=torch.bool))
    return velocity(dit, f.i["latents"], text, Level(f.i["timesteps"], f.i["guidance"]), controls=controls)


def guided(f: Fixture, dit: FluxDiT, controls: Sequence[Conditioner], negative: Sequence[Conditioner] | None = None) -> Tensor:
    """With the guidance scale of the meta."""
    positive, other = predicted(f, dit, controls), predicted(f, dit, controls if negative is None else negative, row=1)
    return other + f.meta["params"]["cfg_scale"] * (positive - other)


@torch.no_grad()
def check_controlnet_variants(f: Fixture) -> None:
    """Union with every mode by its name, inpainting, upscaler, two at once, and the table of the schedule."""
    dit, scene, params = base_of(f), scene_of(f), f.meta["params"]
    axes = f.meta["base_config"]["axes_dim"]
    nets = {kind: load_controlnet(f.folder / f"{kind}.safetensors", axes_dim=axes) for kind in ("union", "inpaint", "upscaler")}

    def control(kind: str, image: str = "control_image", **options: Any) -> Control:
        return Control(nets[kind], dit.params, Config(image=picture(f, image), **options))

    f.close(predicted(f, dit, []), "base_output", "output")
    for mode, number in f.meta["mode_ids"].items():
        one = control("union", mode=mode)
        assert one.config.mode_number() == number
        conditioner = one.prepare(scene).positive
        assert isinstance(conditioner, Residual)
        f.close(conditioner.condition, "condition", "condition")
        f.close(predicted(f, dit, [conditioner]), f"union_{mode}/output", "output")
        if f"union_{mode}/output_cfg" in f.e:
            f.close(guided(f, dit, [conditioner]), f"union_{mode}/output_cfg", "output")
    upscaler = control("upscaler", scale=params["upscaler_scale"]).prepare(scene).positive
    f.close(predicted(f, dit, [upscaler]), "upscaler/output", "output")
    _check_inpainting(f, dit, control("inpaint", mask=picture(f, "inpaint_mask"), scale=params["inpaint_scale"]))
    _check_schedule(f)
    options = [
        {"mode": one["processor_id"], "scale": one["scale"], "start": 1 - one["start"], "end": 1 - one["end"]} for one in params["two"]
    ]
    two = [control("union", **options[0]), control("upscaler", "control_image_2", **options[1])]
    scene = scene_of(f, params["two_steps"])
    ready = [one.prepare(scene).positive for one in two]
    for step in params["two_at"]:
        active = [one.at(scene.levels[step]) for one in ready]
        assert [one is not None for one in active] == f.e["two/active"][step].bool().tolist()
        f.close(predicted(f, dit, [one for one in active if one is not None]), f"two/output_step{step}", "output")


def _check_inpainting(f: Fixture, dit: FluxDiT, control: Control) -> None:
    seen = without(picture(f, "control_image"), picture(f, "inpaint_mask"))
    f.close(torch.from_numpy(np.array(seen)), "inpaint/masked_image", "masked_image")
    conditioner = control.prepare(scene_of(f)).positive
    assert isinstance(conditioner, Residual)
    f.close(conditioner.condition, "inpaint/condition", "condition")
    f.close(predicted(f, dit, [conditioner]), "inpaint/output", "output")


def _check_schedule(f: Fixture) -> None:
    for name in (name for name in f.e if name.startswith("active/")):
        steps, start, end = map(float, re.findall(r"[\d.]+", name))
        levels = tuple(1 - step / steps for step in range(int(steps) + 1))
        span = Span(levels, 1 - start, 1 - end)
        assert [span.covers(level) for level in levels[:-1]] == f.e[name].bool().tolist(), name


def ip_control(net: IpAdapter, dit: FluxDiT) -> IpControl:
    """Without an image encoder: the fixtures give its vectors."""
    return IpControl(net, None, dit.params, IpConfig(type="ip_adapter"))  # type: ignore[arg-type]


@torch.no_grad()
def check_ip_adapter_instantx(f: Fixture) -> None:
    """One and two pictures, two scales."""
    dit, net = base_of(f), load_ip_adapter(f.folder / "weights.safetensors")
    f.close(predicted(f, dit, []), "base_output", "output")
    f.close(net.tokens(f.i["image_embeds"]), "image_tokens_two_pictures", "output")
    for name in (name for name in f.e if name.startswith("pictures")):
        pictures, scale = re.findall(r"[\d.]+", name)
        conditioner = ip_control(net, dit).conditioner_of(f.i["image_embeds"][: int(pictures)], float(scale))
        f.close(predicted(f, dit, [conditioner]), name, "output")


@torch.no_grad()
def check_ip_adapter_xlabs(f: Fixture) -> None:
    """Two scales, on a batch of two with a picture each."""
    dit, net = base_of(f), load_ip_adapter(f.folder / "weights.safetensors")
    f.close(net.tokens(f.i["image_embeds"]), "image_tokens", "output")
    for name in (name for name in f.e if name.startswith("scale_")):
        scale = float(name.removeprefix("scale_").partition("/")[0])
        hooks = ip_control(net, dit).conditioner_of(f.i["image_embeds"], scale).hooks(tokens_of(f))
        f.close(dit(tokens_of(f), hooks), name, "output")


@torch.no_grad()
def check_infiniteyou(f: Fixture) -> None:
    """The projector from both files, a black and a given control picture, its own guidance, and both branches."""
    dit, params, heads = base_of(f), f.meta["params"], f.meta["config"]["projector"]["heads"]
    net = load_controlnet(f.folder / "infusenet.safetensors", axes_dim=f.meta["base_config"]["axes_dim"])
    projector = load_face_projector(f.folder / "image_proj.safetensors", num_heads=heads)
    with TemporaryDirectory() as folder:  # a pickle's tensors are written beside it
        pickled = load_face_projector(shutil.copy(f.folder / "image_proj_model.bin", folder), num_heads=heads)
    for one in (projector, pickled):
        f.close(one(f.i["face_embedding"]), "id_tokens", "id_tokens")

    def person(**options: Any) -> Residual:
        config = PersonConfig(type="infiniteyou", embedding=tuple(f.i["face_embedding"][0].tolist()), **options)
        made = PersonControl(net, projector, dit.params, config).prepare(scene_of(f)).positive
        assert isinstance(made, Residual)
        return made

    f.close(predicted(f, dit, []), "no_control/output", "output")
    f.close(person().condition, "black/condition", "id_tokens")
    f.close(predicted(f, dit, [person()]), "black/output", "output")
    f.close(predicted(f, dit, [person(guidance=3.5)]), "black/output_guidance", "output")
    shown = person(image=picture(f, "control_image"), scale=params["scale"])
    f.close(predicted(f, dit, [shown]), "picture/output", "output")
    f.close(guided(f, dit, [shown]), "picture/output_cfg", "output")
