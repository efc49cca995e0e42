"""Prefixes that ComfyUI-style files put before a model's own keys, and the layouts of the text encoders.

An all-in-one checkpoint holds several models, each under its prefix: `split(names)["ae"]` is ("vae.", its keys).
"""

from collections.abc import Iterable

from fluxsmith.io.keymaps.recipe import Recipe

DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "pipe.dit.", "transformer.", "dit.", "net.")
BUNDLE_PREFIXES = {
    "dit": ("model.diffusion_model.",),
    "clip_l": ("text_encoders.clip_l.transformer.", "cond_stage_model.clip_l.transformer."),
    "t5xxl": ("text_encoders.t5xxl.transformer.", "cond_stage_model.t5xxl.transformer."),
    "ae": ("vae.", "first_stage_model."),
}
CLIP_ROOT = "text_model."
CLIP_IGNORED = ("text_model.embeddings.position_ids", "text_projection.weight", "logit_scale")
T5_IGNORED = ("decoder.", "lm_head.", "logit_scale", "spiece_model")
T5_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")


def clip_recipes(names: Iterable[str]) -> dict[str, Recipe]:
    """CLIP text tower keys as in clip_l.safetensors (`text_model.*`), also from files without that root; extras are left out."""
    names = list(names)
    rooted = any(name.startswith(CLIP_ROOT) for name in names)
    found = {name if rooted else CLIP_ROOT + name: Recipe((name,)) for name in names if not rooted or name.startswith(CLIP_ROOT)}
    return {key: recipe for key, recipe in found.items() if key not in CLIP_IGNORED and key.removeprefix(CLIP_ROOT) not in CLIP_IGNORED}


def t5_recipes(names: Iterable[str]) -> dict[str, Recipe]:
    """T5 encoder keys with the one embedding table as `shared.weight`, from files that hold either name or both."""
    names = list(names)
    table = next((name for name in T5_EMBEDDINGS if name in names), None)
    made = {T5_EMBEDDINGS[0]: Recipe((table,))} if table else {}
    rest = (name for name in names if name not in T5_EMBEDDINGS and not name.startswith(T5_IGNORED))
    return made | {name: Recipe((name,)) for name in rest}


def split(names: Iterable[str]) -> dict[str, tuple[str, list[str]]]:
    """Role -> (prefix, keys without it) of an all-in-one checkpoint; roles that are absent are left out."""
    names, parts = list(names), {}
    for role, prefixes in BUNDLE_PREFIXES.items():
        for prefix in prefixes:
            keys = [name[len(prefix) :] for name in names if name.startswith(prefix)]
            if keys:
                parts[role] = (prefix, keys)
                break
    return parts
