"""Everything that is not a transformer: encoders, autoencoders, controls, adapters, and models of other families.

Each rule looks at key names (and channel counts where names are shared); the first that answers wins.
"""

import re
from collections.abc import Callable
from dataclasses import replace

from fluxsmith.io.identify_dit import PART_ROLES
from fluxsmith.io.identity import Identity, Infos, first_few, indices, side
from fluxsmith.io.keymaps import comfy, diffusers

LATENT_CHANNELS = 16
PACKED_LATENTS = 64  # 2x2 cells
CLIP_G_WIDTH = 1280
CLIP_ENDS = ("embeddings.token_embedding.weight", "embeddings.position_embedding.weight", "final_layer_norm.weight")
LORA_KINDS = (  # variant, pattern; first match wins
    ("timestep", re.compile(r"\.lora_time_(gamma|beta)(\.|$)")),
    ("dora", re.compile(r"(dora_scale|lora_magnitude_vector)(\.weight)?$")),
    ("lokr", re.compile(r"\.lokr_w[12](_[ab])?$")),
    ("loha", re.compile(r"\.hada_w[12]_[ab]$")),
    ("ia3", re.compile(r"\.on_input$")),
    ("glora", re.compile(r"\.(a1|a2|b1|b2)\.weight$")),
    ("boft", re.compile(r"\.oft_blocks$")),
    ("oft", re.compile(r"\.oft_blocks\.\d+$")),
    ("full", re.compile(r"\.diff(_b)?$")),
    ("control", re.compile(r"\.lora_B\.bias$")),
    ("lora", re.compile(r"\.lora_(down|up)(\.\d+)?\.weight$")),
    ("lora", re.compile(r"\.lora_[AB](\.[\w-]+)?\.weight$")),
    ("lora", re.compile(r"(\.lora|_lora\d?)\.(down|up)\.weight$")),
)
LANGUAGE_LAYOUTS = (  # style, place of the image tower, of the layers
    ("hf", "visual.", "model.layers."),
    ("hf5", "model.visual.", "model.language_model.layers."),
)
LORA_STYLES = (
    ("kohya", re.compile(r"lora_(unet|te\d?)_")),
    ("kohya", re.compile(r"oft_(unet|te\d?)_")),
    ("lycoris", re.compile(r"lycoris_")),
    ("onetrainer", re.compile(r"lora_transformer_")),
    ("xlabs", re.compile(r"(double|single)_blocks\.\d+\.processor\.")),
    ("bfl_control", re.compile(r"(double_blocks|single_blocks|img_in|final_layer)\b.*lora_B\.bias$")),
    ("bfl_peft", re.compile(r"base_model\.model\.")),
    ("comfy_bfl", re.compile(r"diffusion_model\.|text_encoders\.(clip_l|t5xxl)\.transformer\.")),
    ("diffsynth", re.compile(r".*\.lora_[AB]\.default\.weight$")),
    ("peft", re.compile(r"(transformer|text_encoder(_2)?)\.")),
    ("bfl", re.compile(r"(double_blocks|single_blocks)\.")),
    ("diffusers", re.compile(r"(single_)?transformer_blocks\.")),
)
OTHER_ADAPTERS = (
    (
        re.compile(r"(lora_unet_|lycoris_|unet\.)(input_blocks|output_blocks|down_blocks|up_blocks|mid_block|middle_block)"),
        "a Stable Diffusion U-Net",
    ),
    (re.compile(r"(lora_unet_|diffusion_model\.|transformer\.)joint_blocks"), "a Stable Diffusion 3 transformer"),
    (re.compile(r"(lora_unet_|diffusion_model\.)blocks[._]\d+[._](self|cross)_attn"), "a video transformer"),
)
OTHER_MODELS = (
    (re.compile(r"(model\.diffusion_model\.)?input_blocks\."), "a Stable Diffusion U-Net"),
    (re.compile(r"(model\.diffusion_model\.)?joint_blocks\."), "a Stable Diffusion 3 transformer"),
    (re.compile(r".*double_stream_modulation_(img|txt)\."), "a FLUX.2 transformer"),
    (re.compile(r"down_blocks\."), "a diffusers U-Net"),
    (re.compile(r"(model\.)?layers\.\d+\.self_attn\."), "a language model"),
    (re.compile(r"blocks\.\d+\.cross_attn\."), "a video transformer"),
)


PIPELINE_PREFIXES = (  # of what DiffSynth-Studio's training scripts save
    "pipe.controlnet.models.0.", "controlnet.models.0.", "models.0.", "pipe.value_controller.encoders.0.", "value_controller.encoders.0.",
    "encoders.0.", "pipe.ipadapter.", "ipadapter.", "pipe.image_proj_model.", "image_proj_model.", "pipe.lora_encoder.", "lora_encoder.",
    "pipe.lora_patcher.", "lora_patcher.", "pipe.ipadapter_image_encoder.", "pipe.flux_redux_image_encoder.",
    "pipe.flux_redux_image_embedder.",
)  # fmt: skip


def identify_parts(infos: Infos) -> Identity | None:
    """The first rule that knows the file, or None."""
    prefixes = list(dict.fromkeys(prefix for name in infos if (prefix := next((p for p in PIPELINE_PREFIXES if name.startswith(p)), ""))))
    if prefixes and all(name.startswith(tuple(prefixes)) for name in infos):
        return _trained_parts(infos, prefixes)
    return _first_rule(infos)


def _trained_parts(infos: Infos, prefixes: list[str]) -> Identity | None:
    """Models that DiffSynth-Studio trained and saved under their places in its pipeline; two where two were trained together."""
    found: dict[str, Identity] = {}
    for prefix in prefixes:
        inner = _first_rule({name[len(prefix) :]: info for name, info in infos.items() if name.startswith(prefix)})
        if inner is None:
            return None
        found[prefix] = replace(inner, prefix=prefix + inner.prefix)
    first = min(found.values(), key=lambda identity: identity.role)  # controlnet before face_projector
    others = {identity.role: identity.prefix for identity in found.values() if identity is not first}
    return replace(first, sizes=first.sizes | {"parts": others}) if others else first


def _first_rule(infos: Infos) -> Identity | None:
    for rule in RULES:
        found = rule(infos)
        if found is not None:
            return found
    return None


def _single_keys(infos: Infos) -> Identity | None:
    """Models that one key gives away."""
    if any(name.startswith("embedder.model_dict.") for name in infos):
        return Identity("flux1", "lora_encoder", key_style="diffsynth")
    if any(name.startswith("model_dict.") and name.endswith(".weight_base") for name in infos):
        return Identity("flux1", "lora_fusion", key_style="diffsynth")
    if "prefer_value_embedder.0.weight" in infos:
        return Identity("attrictrl", "value_encoder", key_style="diffsynth", sizes=_some(tokens=side(infos, "positional_embedding", 0)))
    if "redux_up.weight" in infos:
        return Identity("flux1", "image_embedder", "redux", "bfl", sizes=_some(image_width=side(infos, "redux_up.weight", 1)))
    for prefix in ("image_proj.", ""):
        if f"{prefix}latents" in infos and f"{prefix}proj_in.weight" in infos:
            return Identity("infiniteyou", "face_projector", key_style="infiniteyou", prefix=prefix)
    return None


def is_adapter(infos: Infos) -> bool:
    """Does any key belong to an adapter?"""
    return any(pattern.search(name) for name in infos for _, pattern in LORA_KINDS)


def _lora(infos: Infos) -> Identity | None:
    kinds = [kind for kind, pattern in LORA_KINDS if any(pattern.search(name) for name in infos)]
    if not kinds:
        return None
    names = list(infos)
    style = next((style for style, pattern in LORA_STYLES if any(pattern.match(name) for name in names)), "unknown")
    kind = "control" if style == "bfl_control" else kinds[0]
    if kind == "boft" and all(len(info.shape) < 4 for name, info in infos.items() if name.endswith(".oft_blocks")):
        kind = "diag-oft"
    others = [other for other in dict.fromkeys(kinds) if other not in (kind, kinds[0], "lora")]
    notes = (f"{kind} over {others[0]}",) if others else ()
    foreign = next((title for pattern, title in OTHER_ADAPTERS if any(pattern.match(name) for name in names)), None)
    problems = (f"its layers are those of {foreign}",) if foreign else ()
    return Identity("unknown" if foreign else "flux1", "lora", kind, style, "", problems, notes, unusable=problems)


def _ip_adapter(infos: Infos) -> Identity | None:
    if any(name.endswith("ip_adapter_double_stream_k_proj.weight") for name in infos):
        return Identity("flux1", "ip_adapter", "xlabs", "xlabs")
    for style, stack in (("instantx", "ip_adapter."), ("diffsynth", "ipadapter_modules.")):
        if any(name.startswith(stack) and name.endswith(".to_k_ip.weight") for name in infos):
            return Identity("flux1", "ip_adapter", "instantx", style, sizes={"layers": len(indices(infos, stack))})
    return None


def _controlnet(infos: Infos) -> Identity | None:
    if "controlnet_x_embedder.weight" in infos:
        channels = side(infos, "controlnet_x_embedder.weight", 1)
        singles = len(indices(infos, "controlnet_single_blocks."))
        modes = side(infos, "controlnet_mode_embedder.weight", 0)
        latents = side(infos, "x_embedder.weight", 1) or PACKED_LATENTS
        variant = "union" if modes else "plain" if channels in (None, latents) else "inpainting" if channels == latents + 4 else "custom"
        sizes = {"double_blocks": len(indices(infos, "controlnet_blocks.")), "single_blocks": singles}
        sizes |= _some(condition_channels=channels, modes=modes)
        notes = ("InfuseNet of InfiniteYou has this structure too",) if variant == "plain" and singles else ()
        style = "diffsynth" if any(name.startswith(("blocks.", "single_blocks.")) for name in infos) else "diffusers"
        return Identity("flux1", "controlnet", variant, style, notes=notes, sizes=sizes)
    for prefix in ("", "controlnet."):
        if f"{prefix}controlnet_blocks.0.weight" in infos:
            sizes = {"double_blocks": len(indices(infos, f"{prefix}controlnet_blocks."))}
            return Identity("flux1", "controlnet", "pixels", "bfl", prefix, sizes=sizes)
    return None


def _autoencoder(infos: Infos) -> Identity | None:
    for prefix in ("", "vae.", "first_stage_model."):
        if f"{prefix}decoder.conv_in.weight" in infos or f"{prefix}encoder.conv_in.weight" in infos:
            return _full_autoencoder(infos, prefix)
    for prefix in ("", "vae."):
        halves = [half for half in ("encoder", "decoder") if f"{prefix}{half}.layers.0.weight" in infos]
        if halves and side(infos, f"{prefix}{halves[0]}.layers.0.weight", 3) is not None:
            return Identity("flux1", "tiny_ae", "" if len(halves) == 2 else f"{halves[0]} only", "diffusers", prefix)
    if {"0.weight", "1.conv.0.weight"} <= infos.keys():
        return Identity("flux1", "tiny_ae", "encoder only", "sequential")
    if {"1.weight", "3.conv.0.weight"} <= infos.keys() and "0.weight" not in infos:
        return Identity("flux1", "tiny_ae", "decoder only", "sequential")
    return None


def _full_autoencoder(infos: Infos, prefix: str) -> Identity:
    style = "diffusers" if any(name.startswith(f"{prefix}encoder.down_blocks.") for name in infos) else "ldm"
    channels = side(infos, f"{prefix}decoder.conv_in.weight", 1)
    unusable = []
    if channels is not None and channels != LATENT_CHANNELS:
        unusable.append(f"{channels} latent channels: this is the autoencoder of another model, FLUX's has {LATENT_CHANNELS}")
    missing = [
        name for name in ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight") if prefix + name not in infos
    ]
    if missing:
        unusable.append(f"{len(missing)} tensors are missing: {first_few(missing)}")
    extra = _unknown_ae_keys(infos, prefix, style)
    problems = [*unusable, f"{len(extra)} unknown tensors: {first_few(extra)}"] if extra else unusable
    return Identity("flux1", "ae", "", style, prefix, tuple(problems), sizes=_some(latent_channels=channels), unusable=tuple(unusable))


def _unknown_ae_keys(infos: Infos, prefix: str, style: str) -> list[str]:
    bare = [name.removeprefix(prefix) for name in infos if name.startswith(prefix)]
    if style == "diffusers":
        used = {key for recipe in diffusers.ae_recipes(bare).values() for key in recipe.keys}
        return sorted(set(bare) - used)
    return sorted(name for name in bare if not name.startswith(("encoder.", "decoder.")))


def _vision(infos: Infos) -> Identity | None:
    root = next((root for root in ("vision_model.", "") if f"{root}embeddings.patch_embedding.weight" in infos), None)
    if root is None:
        return None
    sizes = _some(width=side(infos, f"{root}embeddings.patch_embedding.weight", 0), layers=len(indices(infos, f"{root}encoder.layers.")))
    text = any(name.startswith("text_model.") for name in infos)
    style = "hf" if root else "hf without vision_model"
    if f"{root}embeddings.class_embedding" in infos:
        if text:
            found = _clip(infos, "with vision tower")
            return found and replace(found, sizes=found.sizes | {"parts": {"image_encoder": ""}})
        return Identity("clip", "image_encoder", "vision", style, sizes=sizes)
    return Identity("siglip", "image_encoder", "text and vision" if text else "vision", style, sizes=sizes)


def _text_encoders(infos: Infos) -> Identity | None:
    if any(re.search(r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.q\.weight$", name) for name in infos):
        return _t5(infos)
    if any(re.search(r"(^|\.)encoder\.layers\.\d+\.self_attn\.q_proj\.weight$", name) for name in infos):
        return _clip(infos, "")
    return None


def _clip(infos: Infos, variant: str) -> Identity | None:
    prefixes = ("", *comfy.BUNDLE_PREFIXES["clip_l"])
    prefix = next((p for p in prefixes if any(name.startswith(f"{p}{comfy.CLIP_ROOT}encoder.layers.") for name in infos)), None)
    rooted = prefix is not None
    if prefix is None and not any(name.startswith("encoder.layers.") for name in infos):
        return None
    root = f"{prefix or ''}{comfy.CLIP_ROOT if rooted else ''}"
    width = side(infos, f"{root}embeddings.token_embedding.weight", 1)
    layers = indices(infos, f"{root}encoder.layers.")
    problems = []
    if width == CLIP_G_WIDTH:
        problems.append("1280 wide: this is CLIP-G (of SDXL), FLUX uses CLIP-L")
    missing = [name for name in CLIP_ENDS if root + name not in infos]
    missing += [f"encoder.layers.{i}" for i in range(layers[-1] + 1 if layers else 1) if i not in layers]
    if missing:
        problems.append(f"{len(missing)} tensors or layers are missing: {first_few(missing)}")
    sizes = _some(width=width, layers=len(layers))
    style = "hf" if rooted else "hf without text_model"
    return Identity("clip", "clip_l", variant, style, prefix or "", tuple(problems), sizes=sizes, unusable=tuple(problems))


def _t5(infos: Infos) -> Identity | None:
    prefix = next(p for p in (*comfy.BUNDLE_PREFIXES["t5xxl"], "") if any(name.startswith(f"{p}encoder.block.") for name in infos) or not p)
    root = f"{prefix}encoder.block."
    layers = indices(infos, root)
    if not layers:
        return None
    tables = [name for name in infos if name.startswith(root) and name.endswith("relative_attention_bias.weight")]
    problems = []
    if len(tables) > 1 and len(layers) > 1:
        problems.append("every block has its own position table: this is UMT5, FLUX uses T5 v1.1 XXL")
    if f"{root}0.layer.1.DenseReluDense.wi_0.weight" not in infos:
        problems.append("its feed-forward is not gated: this is T5 1.0, FLUX uses T5 v1.1 XXL")
    missing = [f"block {i}" for i in range(layers[-1] + 1) if i not in layers]
    if not any(f"{prefix}{name}" in infos for name in comfy.T5_EMBEDDINGS):
        missing.append("shared.weight")
    missing += [] if f"{prefix}encoder.final_layer_norm.weight" in infos else ["encoder.final_layer_norm.weight"]
    if missing:
        problems.append(f"missing: {first_few(missing)}")
    scaled = [name for name in infos if name.endswith((".scale_weight", "scaled_fp8", ".weight_scale"))]
    if scaled:
        problems.append(f"weights are scaled 8-bit (e.g. {scaled[0]}): get the fp16 or plain fp8 file")
    sizes = _some(width=side(infos, f"{root}0.layer.0.SelfAttention.q.weight", 1), layers=len(layers))
    notes = ("weights are stored in 8 bits",) if any(info.dtype.startswith("F8_") for info in infos.values()) else ()
    return Identity("t5", "t5xxl", "", "hf", prefix, tuple(problems), notes, sizes, unusable=tuple(problems))


def _language_model(infos: Infos) -> Identity | None:
    for style, vision, layers in LANGUAGE_LAYOUTS:
        if f"{vision}patch_embed.proj.weight" in infos and indices(infos, layers):
            sizes = {"layers": len(indices(infos, layers))} | _some(width=side(infos, f"{layers}0.input_layernorm.weight", 0))
            if any(name.endswith("vision_head.weight") for name in infos):
                return Identity("nexus_gen", "language_model", "autoregressive", style, sizes=sizes)
            return Identity("qwen2_5_vl", "language_model", "", style, sizes=sizes)
    return None


def _nexus_parts(infos: Infos) -> Identity | None:
    """The adapters of Nexus-Gen's decoders, or Step1X-Edit's connector, without the transformer."""
    for part, role in PART_ROLES.items():
        if infos and all(name.startswith(part) for name in infos):
            family = "step1x" if role == "connector" else "nexus_gen"
            return Identity(family, role, "", family, part)
    return None


def other_model(infos: Infos) -> Identity:
    """A file that no rule knows; names another family if it looks like one."""
    for pattern, title in OTHER_MODELS:
        if any(pattern.match(name) for name in infos):
            return Identity("unknown", "unknown", notes=(f"it looks like {title}",))
    shown = first_few(sorted(infos), 3) if infos else "it holds no tensor"
    return Identity("unknown", "unknown", notes=(f"keys: {shown}" if infos else shown,))


def _some(**sizes: int | None) -> dict[str, int]:
    return {name: value for name, value in sizes.items() if value is not None}


RULES: tuple[Callable[[Infos], Identity | None], ...] = (
    _single_keys,
    _ip_adapter,
    _controlnet,
    _lora,
    _vision,
    _text_encoders,
    _language_model,
    _autoencoder,
    _nexus_parts,
)
