"""Checks of fixtures with control models, for tests/parity."""

import torch
from fixture import Fixture

from fluxsmith.controls.controlnet import Config, Control, Residual
from fluxsmith.controls.controlnet_model import load_controlnet
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.load import load_dit
from fluxsmith.models.packing import unpack
from fluxsmith.models.stream import Tokens

Part = tuple[int | None, float, str]  # mode, scale, name of the condition


def base_of(f: Fixture) -> FluxDiT:
    return load_dit(f.folder / f.meta["base_weights"], axes_dim=f.meta["base_config"]["axes_dim"])


def tokens_of(f: Fixture) -> Tokens:
    i = f.i
    return Tokens(i["img"], i["img_ids"], i["txt"], i["txt_ids"], i["y"], i["timesteps"], i.get("guidance"))


def cases(names: list[str]) -> dict[str, list[Part]]:
    """`union_mode3_scale0.7` and `union_two_controls_mode0x0.6_mode3x0.5` as modes and scales."""
    made: dict[str, list[Part]] = {}
    for name in names:
        if "two_controls" in name:
            pairs = [part.removeprefix("mode").split("x") for part in name.partition("two_controls_")[2].split("_")]
            made[name] = [(int(mode), float(scale), cond) for (mode, scale), cond in zip(pairs, ("cond", "cond2"), strict=True)]
        else:
            mode = int(name.split("mode")[1].split("_")[0]) if "mode" in name else None
            made[name] = [(mode, float(name.partition("scale")[2]), "cond")]
    return made


@torch.no_grad()
def check_controlnet(f: Fixture) -> None:
    """InstantX layout: residuals and the transformer's output; a union network's modes, and two controls at once."""
    dit, tokens = base_of(f), tokens_of(f)
    names = list(dict.fromkeys(key.partition("/")[0] for key in f.e))
    for name, parts in cases(names).items():
        kind = name.partition("_")[0]
        file = f.folder / ("weights_union.safetensors" if kind == "union" else "weights.safetensors")
        net = load_controlnet(file, axes_dim=f.meta["config"][kind]["axes_dim"])
        total: dict[str, torch.Tensor] = {}
        for mode, scale, cond in parts:
            made = net.residuals(tokens, f.i[cond], mode)
            for stack, values in (("double", made.double), ("single", made.single)):
                for index, value in enumerate(values):
                    key = f"{name}/{stack}_residual_{index}"
                    total[key] = total.get(key, torch.zeros(())) + scale * value
        assert total.keys() == {key for key in f.e if key.startswith(f"{name}/") and "residual" in key}
        for key, value in total.items():
            f.close(value, key, "residuals")
        side = (f.i["img_ids"][0, -1, 1:].long() * 2 + 2).tolist()
        controls = [
            Residual(Control(net, dit.params, Config(scale=scale, mode=mode)), unpack(f.i[cond], *side)) for mode, scale, cond in parts
        ]
        f.close(dit(tokens, [hook for control in controls for hook in control.hooks(tokens)]), f"{name}/output", "output")


@torch.no_grad()
def check_controlnet_pixels(f: Fixture) -> None:
    """XLabs layout, as sd-scripts trains it."""
    dit, tokens = base_of(f), tokens_of(f)
    net = load_controlnet(f.folder / "weights.safetensors", axes_dim=f.meta["config"]["axes_dim"])
    for index, value in enumerate(net.residuals(tokens, f.i["image"]).double):
        f.close(value, f"double_residual_{index}", "residuals")
    f.close(dit(tokens, Residual(Control(net, dit.params, Config()), f.i["image"]).hooks(tokens)), "output", "output")
