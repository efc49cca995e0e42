"""tools/cache_latents.py and tools/cache_text_encoder_outputs.py -> which caches to fill, in the folder that trainings look into."""

from typing import Any, NamedTuple

from fluxsmith.config.load import load_config
from fluxsmith.config.schema import RunConfig
from fluxsmith.dialects.base import Draft
from fluxsmith.dialects.sd_scripts.dataset import dataset
from fluxsmith.dialects.sd_scripts.lower_model import cache_folder, identity_of, is_chroma, tokenizers
from fluxsmith.dialects.sd_scripts.lower_run import SEED
from fluxsmith.models.family.flux1 import PRESETS

LATENTS, TEXT = "latents", "text"


class CacheRequest(NamedTuple):
    """What is to be encoded: `kind` is latents or text; only model, data and cache of the config matter."""

    kind: str
    config: RunConfig
    notes: tuple[str, ...]


def cache_request(draft: Draft) -> CacheRequest:
    """The caches that a command asks for. Raises ConfigError with everything that is wrong."""
    kind = LATENTS if draft.script == "cache_latents" else TEXT
    draft.apply_rows()
    if not draft["flux"]:
        draft.refuse("--flux", "sd-scripts' cache tools serve several models", "add --flux")
    needed = ["ae"] if kind == LATENTS else ["t5xxl"] if is_chroma(draft) else ["clip_l", "t5xxl"]
    for name in needed:
        if not draft[name]:
            draft.refuse(f"--{name}", f"--{name} is not given", f"add --{name} FILE.safetensors")
    _model(draft)
    tokenizers(draft)
    draft.put(f"cache.{kind}", "disk")
    draft.put(f"cache.{TEXT if kind == LATENTS else LATENTS}", "off")
    draft.put("cache.dir", str(cache_folder(draft)))
    sizes = {LATENTS: draft["vae_batch_size"], TEXT: draft["text_encoder_batch_size"]}
    if sizes[kind]:
        draft.put("cache.batch_size", sizes[kind])
    dataset(draft)
    draft.finish(draft.script)
    tree: dict[str, Any] = {name: draft.tree[name] for name in ("model", "cache", "data")}
    tree |= {"train": {"steps": 1, "seed": SEED if draft["seed"] is None else draft["seed"]}, "run": {"dir": str(cache_folder(draft))}}
    draft.report.differs.clear()  # advice about trainings
    draft.note("", f"caches are kept in {cache_folder(draft)}; trainings on the same data with --cache_..._to_disk find them there")
    return CacheRequest(kind, load_config(tree).config, tuple(draft.report.lines()))


def _model(draft: Draft) -> None:
    draft.put("model.type", "chroma" if is_chroma(draft) else "flux1")
    if is_chroma(draft):
        return
    found = identity_of(draft["pretrained_model_name_or_path"])
    draft.put("model.preset", found.variant if found and found.variant in PRESETS else "dev")
    draft.put("model.clip_l", draft["clip_l"] or "")
    if draft["apply_t5_attn_mask"]:
        draft.put("model.mask_text", True)
