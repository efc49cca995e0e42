"""Files -> the `[[control]]` sections that they make possible, without pictures."""

from collections.abc import Iterator, Mapping
from typing import Any

from fluxsmith.config.control import Ground
from fluxsmith.dialects.diffsynth.opening import Opening, processor_folder
from fluxsmith.dialects.diffsynth.parts import BASE, Part, Parts
from fluxsmith.generate.controls import IMPLIED

FREE = ("kontext", "eligen")  # controls without weights of their own
Entry = dict[str, Any]


def ground_of(parts: Parts) -> Ground:
    """What the headers tell."""
    dit = parts.one("dit")
    sizes: Mapping[str, Any] = dit.identity.sizes if dit else {}
    family = dit.identity.family if dit else "flux1"
    there = tuple(role for role in BASE if parts.one(role))
    return Ground(family=family, in_channels=int(sizes.get("in_channels") or 64), roles=there)


def control_entries(parts: Parts, ground: Ground, how: Opening) -> Iterator[Entry]:
    """One section of each control."""
    for name in (*FREE, *filter(None, [IMPLIED.get(ground.in_channels)])):
        if name != "eligen" or "t5xxl" in ground.roles:
            yield {"type": name}
    for part in parts.all("controlnet"):
        yield {"type": "controlnet", "path": str(part.path)}
    for part in parts.all("value_encoder"):
        yield {"type": "value", "path": str(part.path)}
    if lora_encoder := parts.one("lora_encoder"):
        yield {"type": "lora_encoder", "path": str(lora_encoder.path)}
    yield from _seeing(parts)
    yield from _reading(parts, how)


def _seeing(parts: Parts) -> Iterator[Entry]:
    """Those that look at pictures with an encoder of their own."""
    if adapter := parts.one("ip_adapter"):
        family = "clip" if adapter.identity.variant == "xlabs" else "siglip"
        yield {"type": "ip_adapter", "path": str(adapter.path), **_encoder(parts, family)}
    if redux := parts.one("redux"):
        yield {"type": "redux", "path": str(redux.path), "keep_prompt": False, **_encoder(parts, "siglip")}
    if projector := parts.one("face_projector"):
        infuse = infuse_net(parts)
        yield {"type": "infiniteyou", "projector": str(projector.path), **({"path": str(infuse.path)} if infuse else {})}


def _encoder(parts: Parts, family: str) -> Entry:
    """The image encoder of a family; any, where there is none of it, so that the control says what is wrong."""
    there = parts.all("image_encoder")
    found = [part for part in there if part.identity.family == family] or there
    return {"encoder": str(found[0].path)} if found else {}


def infuse_net(parts: Parts) -> Part | None:
    """The ControlNet that is InfiniteYou's: a plain one with single blocks, else the first."""
    there = parts.all("controlnet")
    like = [part for part in there if part.identity.variant == "plain" and part.identity.sizes.get("single_blocks")]
    return (like or there or [None])[0]


def _reading(parts: Parts, how: Opening) -> Iterator[Entry]:
    """Those whose language model reads the prompt."""
    model, dit = parts.one("language_model"), parts.one("dit")
    if dit is not None and dit.identity.family == "step1x":
        reads = {"qwen": str(model.path), "tokenizer": processor_folder(how.step1x_processor_config, model)} if model else {}
        yield {"type": "step1x", "path": str(dit.path), **reads}
    elif dit is not None and model is not None:
        folder = processor_folder(how.nexus_gen_processor_config, model)
        yield {"type": "nexus_gen", "path": str(model.path), "decoder": str(dit.path), "tokenizer": folder}
