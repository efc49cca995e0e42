"""Checks of the fixtures whose controls change the transformer's input: Kontext, Fill, structure, Flex.2, Redux, EliGen, AttriCtrl."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from fixture import Fixture
from PIL import Image
from torch import Tensor

from fluxsmith.controls import eligen, fill, flex2, kontext, structure
from fluxsmith.controls.pictures import pixels, stretch
from fluxsmith.controls.redux import Variation
from fluxsmith.controls.redux_model import load_redux
from fluxsmith.controls.value import Rows
from fluxsmith.controls.value_model import load_value_encoder
from fluxsmith.models.assembly import Level, TextStates, model_input, velocity
from fluxsmith.models.autoencoder import AutoEncoder
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.load import load_ae, load_dit
from fluxsmith.models.packing import pack
from fluxsmith.models.stream import Conditioner, Tokens
from fluxsmith.models.tiny_autoencoder import TinyAutoEncoder


class Case:
    """A transformer, and the inputs of a fixture for it."""

    def __init__(self, f: Fixture) -> None:
        self.f = f
        config = f.meta.get("base_config", f.meta["config"])
        self.dit: FluxDiT = load_dit(f.weights, axes_dim=config["axes_dim"])
        self.latents: Tensor = f.i["latents"]

    def text(self, row: int) -> TextStates:
        txt = self.f.i["txt"][row : row + 1]
        return TextStates(txt, self.f.i["y"][row : row + 1], torch.ones(txt.shape[:2], dtype=torch.bool))

    def level(self, t: float | None = None) -> Level:
        given = self.f.meta.get("params", {}).get("guidance")
        return Level(
            self.f.i["timesteps"] if t is None else torch.tensor([t]), self.f.i["guidance"] if given is None else torch.tensor([given])
        )

    def v(self, controls: Sequence[Conditioner], row: int = 0, t: float | None = None) -> Tensor:
        return velocity(self.dit, self.latents, self.text(row), self.level(t), controls=controls)

    def tokens(self, controls: Sequence[Conditioner], t: float | None = None) -> Tokens:
        return model_input(self.dit, self.latents, self.text(0), self.level(t), controls=controls)

    def cfg(self, positive: Sequence[Conditioner], negative: Sequence[Conditioner]) -> Tensor:
        p, n = self.v(positive), self.v(negative, 1)
        return n + self.f.meta["params"]["cfg_scale"] * (p - n)

    def encode(self, image: Image.Image) -> Tensor:
        return encoder(self.f.folder / self.f.meta["autoencoder"]).encode(pixels(image))

    def picture(self, name: str) -> Image.Image:
        return Image.fromarray(self.f.i[name].numpy())

    @property
    def size(self) -> tuple[int, int]:
        return self.latents.shape[-1] * 8, self.latents.shape[-2] * 8


@cache
def encoder(path: Path) -> AutoEncoder | TinyAutoEncoder:
    return load_ae(path)


@torch.no_grad()
def check_kontext(f: Fixture) -> None:
    case = Case(f)
    latents = [case.encode(case.picture(name)) for name in sorted(f.i) if name.startswith("image_")]
    f.close(case.v([]), "base_output", "output")
    for name, used in (("one", latents[:1]), ("two", latents)):
        made = kontext.Kontext.of(used)
        f.close(made.rows, f"{name}/reference_tokens", "reference_latents")
        f.close(made.ids, f"{name}/reference_ids", "ids")
        f.close(case.v([made]), f"{name}/output", "output")
    both = [kontext.Kontext.of(latents)]
    f.close(case.cfg(both, both), "two/output_cfg", "output")


@torch.no_grad()
def check_fill(f: Fixture) -> None:
    case = Case(f)
    holes = fill.hole(stretch(case.picture("mask"), *case.size))
    seen = encoder(f.folder / f.meta["autoencoder"]).encode(pixels(stretch(case.picture("image"), *case.size)) * (1 - holes))
    made = fill.Filled(torch.cat((seen, fill.cells(holes)), dim=1))
    f.close(made.condition, "condition", "condition")
    f.close(case.tokens([made]).img, "tokens", "condition")
    f.close(case.v([made]), "output", "output")
    blank = fill.Filled(fill.empty(*case.size))
    f.close(blank.condition, "empty/condition", "condition")
    f.close(case.v([blank]), "empty/output", "output")


@torch.no_grad()
def check_structure(f: Fixture) -> None:
    case = Case(f)
    made = structure.Structure(case.encode(case.picture("control_image")))
    f.close(made.latents, "control_latents", "tokens")
    f.close(case.tokens([made]).img, "tokens", "tokens")
    f.close(case.v([made]), "output", "output")


@torch.no_grad()
def check_flex2(f: Fixture) -> None:
    """The condition before and after the stop, the case without pictures, and the table of when the control picture acts."""
    case, params = Case(f), f.meta["params"]
    cells = (case.latents.shape[-1], case.latents.shape[-2])
    image, control = case.encode(case.picture("inpaint_image")), case.encode(case.picture("control_image"))
    mask = flex2.repaint(flex2.cover_to(case.picture("inpaint_mask"), cells))
    levels = [*(f.e["timesteps_used"] / 1000).tolist(), 0.0]
    last = flex2.last_level(levels, params["control_stop"])
    assert abs(last * 1000 - f.e["stop_timestep"].item()) < 1e-3
    made = flex2.Flex.of(image, mask, control * params["control_strength"], last)
    before, after = levels[params["before_step"]], levels[params["after_step"]]
    f.close(made.at(before).condition, "condition", "condition")
    f.close(made.at(after).condition, "uncondition", "condition")
    for name, t in (("before", before), ("after", after)):
        f.close(case.tokens([made.at(t)], t).img, f"tokens_{name}", "condition")
        f.close(case.v([made.at(t)], t=t), f"{name}/output", "output")
    nothing = torch.zeros_like(image)
    blank = flex2.Flex.of(nothing, torch.ones_like(mask), nothing, 0.0)
    f.close(blank.condition, "empty/condition", "condition")
    f.close(case.v([blank], t=before), "empty/output", "output")
    for name in f.e:
        if name.startswith("control_active/"):
            steps, _, stop = name.removeprefix("control_active/steps").partition("_stop")
            schedule = [1 - step / int(steps) for step in range(int(steps) + 1)]
            shown = flex2.Flex(made.condition, flex2.last_level(schedule, 1.0 if stop == "None" else float(stop)))
            active = [int(bool(shown.at(sigma).condition[:, 17:].any())) for sigma in schedule[:-1]]
            f.close(torch.tensor(active), name, "control_active")


@torch.no_grad()
def check_redux(f: Fixture) -> None:
    case = Case(f)
    rows = load_redux(f.folder / "weights.safetensors")(f.i["siglip_tokens"])
    f.close(rows, "image_tokens", "tokens")
    f.close(case.v([Variation(rows)]), "output_with_prompt", "output")
    f.close(case.v([Variation(rows, keep_prompt=False)]), "output_promptless", "output")


@torch.no_grad()
def check_eligen(f: Fixture) -> None:
    """Masks, who may attend to whom, outputs, and the background rule."""
    case = Case(f)
    texts = f.i["txt"][2:]
    width, height = case.size
    for name, files in (("", ["mask_1", "mask_2"]), ("empty/", ["mask_1", "mask_empty"])):
        regions = eligen.regions_of([case.picture(file).convert("RGB") for file in files], width, height)
        f.close(regions.masks[None, :, None].float(), f"{name}masks", "masks")
        made = eligen.Entities(texts, None, regions)
        mask = case.tokens([made]).mask
        assert mask is not None
        f.close(mask[0, 0].to(torch.uint8), f"{name}attention_allowed", "attention_allowed")
        f.close(case.v([made]), f"{name}output", "output")
        if not name:
            f.close(case.cfg([made], []), "output_cfg", "output")
            again = eligen.Entities(f.i["txt"][1:2].expand(len(texts), -1, -1), None, regions)
            f.close(case.cfg([made], [again]), "output_cfg_negative_too", "output")
            check_background(case, regions)


def check_background(case: Case, regions: eligen.Regions) -> None:
    """DiffSynth's old rule holds for the positive branch alone; ours in both, so that guidance changes nothing outside."""
    f = case.f
    clean = case.encode(case.picture("picture"))
    f.close(clean, "inpaint/clean_latents", "clean_latents")
    f.close(regions.foreground.to(torch.uint8), "inpaint/foreground", "masks")
    sigma, x = f.e["inpaint/sigma"].item(), f.e["inpaint/latents"]
    kept = eligen.Kept(regions, f.e["inpaint/clean_latents"])
    p, n = kept.correct(f.i["velocity_positive"], x, sigma), f.i["velocity_negative"]
    f.close(p, "inpaint/velocity", "inpaint")
    f.close(n + f.meta["params"]["cfg_scale"] * (p - n), "inpaint/velocity_cfg", "inpaint")


@torch.no_grad()
def check_attrictrl(f: Fixture) -> None:
    case = Case(f)
    nets = {name: load_value_encoder(f.folder / f"{name}.safetensors") for name in ("brightness", "detail")}
    for name, net in nets.items():
        f.close(net(f.i["values"]), f"tokens/{name}", "tokens")
    controls = [Rows(net(torch.tensor([value]))) for net, value in zip(nets.values(), f.meta["params"]["values"], strict=True)]
    f.close(case.v(controls[:1]), "output_one", "output")
    f.close(case.v(controls), "output_two", "output")
    f.close(case.cfg(controls, controls), "output_two_cfg", "output")
    assert pack(case.latents).shape[1] == case.tokens(controls).img.shape[1]
