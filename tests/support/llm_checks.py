"""Checks of fixtures with encoders of LoRAs and language models, for tests/parity."""

from collections.abc import Callable, Sequence

import torch
from control_checks import base_of
from fixture import Fixture
from torch import Tensor

from fluxsmith.adapters.base import AdapterSet, linear_layers
from fluxsmith.adapters.fusion import load_fusion
from fluxsmith.adapters.load import load_adapter
from fluxsmith.controls.base import Prepared, Unchanged
from fluxsmith.controls.lora_encoder import Config, Control, Rows
from fluxsmith.controls.lora_encoder_model import encoded, load_lora_encoder, path_of
from fluxsmith.controls.nexus_gen import Thought
from fluxsmith.controls.nexus_gen_model import editing_ids, load_merger, places
from fluxsmith.controls.nexus_gen_model import load_adapter as load_adapter_net
from fluxsmith.controls.step1x import Step1X
from fluxsmith.controls.step1x_model import load_connector
from fluxsmith.models.assembly import Level, TextStates, velocity
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.load import load_ae, load_dit
from fluxsmith.models.stream import Conditioner


def branch(f: Fixture, dit: FluxDiT, row: int, controls: Sequence[Conditioner] = ()) -> Tensor:
    """The prediction with one row of the fixture's text."""
    i = f.i
    text = TextStates(i["txt"][row : row + 1], i["y"][row : row + 1], torch.ones(1, i["txt"].shape[1], dtype=torch.bool))
    return velocity(dit, i["latents"], text, Level(i["timesteps"], i.get("guidance")), controls=controls)


def guided(run: Callable[[int, Conditioner], Tensor], prepared: Prepared, scale: float) -> Tensor:
    """Both branches, put together."""
    p, n = run(0, prepared.positive), run(1, prepared.negative)
    return n + scale * (p - n)


@torch.no_grad()
def check_lora_encoder(f: Fixture) -> None:
    """Tokens of two LoRAs (one in two formats), and the transformer with both behind its text."""
    dit, names = base_of(f), {"tokens_a": ("lora_a_kohya", "lora_a_training"), "tokens_b": ("lora_b_kohya_alpha",)}
    net = load_lora_encoder(f.folder / "weights.safetensors", heads=f.meta["config"]["heads"])
    for expected, files in names.items():
        for name in files:
            f.close(encoded(net, f.folder / f"{name}.safetensors"), expected, "tokens")
    files = [str(f.folder / f"{name}.safetensors") for name in ("lora_a_kohya", "lora_b_kohya_alpha")]
    rows = Control(net, Config(type="lora_encoder", path="", scale=f.meta["params"]["scale"])).rows(files)
    prepared = Prepared(Rows(rows), Unchanged())
    f.close(branch(f, dit, 0, [prepared.positive]), "output_ab", "output")
    f.close(guided(lambda row, one: branch(f, dit, row, [one]), prepared, 2.0), "output_cfg", "output")


@torch.no_grad()
def check_lora_fusion(f: Fixture) -> None:
    """Single layers and the whole transformer with two and three LoRAs, and without the mergers again."""
    dit, paths = base_of(f), sorted(f.folder.glob("lora_*.safetensors"))
    loras: list[AdapterSet] = []
    fusion = load_fusion(f.folder / "weights.safetensors")
    for number, (path, strength) in enumerate(zip(paths, f.meta["params"]["alphas"], strict=True), start=1):
        loras.append(load_adapter(path, {"dit": dit}, strength=strength, name=f"lora{number}"))
        fusion.attach(loras)
        for name in f.meta["params"]["linears"]:
            if f"linear_{number}/{name}" in f.e:
                layer = linear_layers({"dit": dit})[path_of(name.replace(".", "___"))]
                f.close(layer(f.i[f"x/{name}"]), f"linear_{number}/{name}", "linear")
        if f"output_{number}" in f.e:
            f.close(branch(f, dit, 0), f"output_{number}", "output")
        fusion.detach()
        if f"plain_{number}" in f.e:
            f.close(branch(f, dit, 0), f"plain_{number}", "output")


@torch.no_grad()
def check_diffsynth_lora(f: Fixture) -> None:
    """Both files that DiffSynth's training writes are one LoRA, at two strengths."""
    dit = f.dit()
    f.close(branch(f, dit, 0), "base_output", "output")
    for name in ("raw", "aligned"):
        for strength in (1.0, 0.6):
            lora = load_adapter(f.folder / f"{name}.safetensors", {"dit": dit}, strength=strength)
            f.close(branch(f, dit, 0), f"output/scale_{strength}", "output")
            lora.detach()


@torch.no_grad()
def check_step1x(f: Fixture) -> None:
    """The connector by itself, the picture's latents, and the transformer with both, guided too."""
    config, i = f.meta["config"], f.i
    dit = load_dit(f.folder / "weights.safetensors", axes_dim=config["transformer"]["axes_dim"])
    connector = load_connector(f.folder / "weights.safetensors", heads=config["connector"]["heads"])
    mask = i["llm_mask"].bool()
    rows, pooled = connector(i["llm_hidden"], mask, i["timesteps"].expand(len(mask)))
    f.close(rows, "text_tokens", "text_tokens")
    f.close(pooled, "pooled", "pooled")
    latents = load_ae(f.folder / f.meta["autoencoder"]).encode(i["reference_image"].permute(2, 0, 1)[None].float() / 127.5 - 1)
    f.close(latents, "reference_latents", "text_tokens")

    def run(row: int) -> Tensor:
        control = Step1X(connector, i["llm_hidden"][row : row + 1], mask[row : row + 1], latents)
        nothing = torch.zeros(1, 0, dtype=torch.bool)
        text = TextStates(torch.zeros(1, 0, dit.params.context_in_dim), torch.zeros(1, dit.params.vec_in_dim), nothing)
        return velocity(dit, i["latents"], text, Level(i["timesteps"]), controls=[control])

    p, n = run(0), run(1)
    f.close(p, "output", "output")
    f.close(n + f.meta["params"]["cfg_scale"] * (p - n), "output_cfg", "output")


@torch.no_grad()
def check_nexus_gen(f: Fixture) -> None:
    """Both decoders' rows and ids on given states, the transformer with them, and the other branch's plain text."""
    config, i = f.meta["config"], f.i
    dit = load_dit(f.folder / "generation_decoder.safetensors", axes_dim=config["transformer"]["axes_dim"])
    sizes = config["projector"]
    merger = load_merger(f.folder / "edit_decoder.safetensors", heads=sizes["heads"], sections=sizes["mrope"])
    target, reference = (tuple(i[f"{name}_grid"][0, 1:].tolist()) for name in ("target", "reference"))
    ids = editing_ids((target, reference), (i["latents"].shape[-2], i["latents"].shape[-1]))
    made = {
        "generation": Thought(load_adapter_net(f.folder / "generation_decoder.safetensors")(i["target_embeds"])),
        "editing": Thought(merger(i["target_embeds"], i["reference_embeds"], (target, reference)), ids),
    }
    f.close(places((target, reference))[:, None], "editing/position_ids", "text_ids")
    for name, thought in made.items():
        f.close(thought.rows, f"{name}/tokens", "tokens")
        f.close(torch.zeros_like(f.e[f"{name}/text_ids"]) if thought.ids is None else thought.ids, f"{name}/text_ids", "text_ids")
        f.close(branch(f, dit, 0, [thought]), f"{name}/output", "output")
        prepared = Prepared(thought, Unchanged())
        scale = f.meta["params"]["cfg_scale"]
        f.close(guided(lambda row, one: branch(f, dit, row, [one]), prepared, scale), f"{name}/output_cfg", "output")
