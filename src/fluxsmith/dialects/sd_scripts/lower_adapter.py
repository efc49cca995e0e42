"""Options about what is trained beside the model -> `adapter` and `base_adapters`."""

from typing import Any

from fluxsmith.dialects.arguments import nearest
from fluxsmith.dialects.base import Draft
from fluxsmith.dialects.sd_scripts.adapter_args import LORA_KINDS, LYCORIS_KINDS, OFT_KINDS, TYPE_RANKS, Words
from fluxsmith.dialects.sd_scripts.lower_model import DOUBLE, SINGLE, depths, is_chroma

MODULES = ("networks.lora_flux", "networks.oft_flux", "lycoris.kohya")
DEFAULT_RANK = 4
INPUTS = (r"^dit\.img_in$", r"^dit\.time_in\.", r"^dit\.vector_in\.", r"^dit\.guidance_in\.", r"^dit\.txt_in$")
OFT_ATTENTION = r"dit\.double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)$"
LYCORIS = {
    "lora": "lora",
    "locon": "lora",
    "loha": "loha",
    "lokr": "lokr",
    "full": "full",
    "ia3": "ia3",
    "diag-oft": "diag_oft",
    "boft": "boft",
    "glora": "glora",
}
ROTATIONS = ("diag_oft", "boft")
WITH_FACTORS = ("lora", "dora")  # kinds that have network_dropout and rank_dropout
PRESETS = {"full": "blocks", "full-lin": "blocks", "attn-mlp": "blocks", "attn-only": "attention"}  # LyCORIS adapts no modulation
LYCORIS_FLAGS = {"decompose_both": "decompose_both", "full_matrix": "full_matrix", "unbalanced_factorization": "unbalanced"}
LYCORIS_OFF = (
    *("use_tucker", "use_cp", "use_scalar", "train_norm", "train_on_input", "bypass_mode", "wd_on_output"),
    "rank_dropout_scale",
)


def adapter(draft: Draft) -> None:
    """Kind, layers, ranks, dropouts and rates by --network_module and its arguments."""
    name = draft["network_module"]
    if not name:
        draft.refuse("--network_module", "what to train is not given", "add --network_module networks.lora_flux (or use flux_train)")
        return
    lowered = {"networks.lora_flux": _lora, "networks.oft_flux": _oft, "lycoris.kohya": _lycoris}.get(name)
    if lowered is None:
        close = {"networks.lora": MODULES[0], "networks.oft": MODULES[1]}.get(name) or nearest(name, MODULES)
        fix = f"write {close}" if close else f"choose one of {', '.join(MODULES)}"
        draft.refuse(draft.where("network_module"), f"--network_module {name} is not for FLUX or not known", fix)
        return
    lowered(draft)
    if draft["network_dropout"] and draft.get("adapter.type") in WITH_FACTORS:
        draft.put("adapter.dropout", draft["network_dropout"], "--network_dropout")
    elif draft["network_dropout"] and draft.get("adapter.type"):
        fix = "leave it out, or write module_dropout=0.1 in --network_args"
        draft.refuse(draft.where("network_dropout"), f"{draft.get('adapter.type')} has no --network_dropout", fix)


def _rank(draft: Draft) -> int:
    rank = draft["network_dim"]
    return DEFAULT_RANK if rank is None else rank


def _lora(draft: Draft) -> None:
    words = Words(draft, LORA_KINDS)
    _put(draft, {"type": "lora", "rank": _rank(draft), "targets": "all"})
    if draft["network_alpha"]:
        draft.put("adapter.alpha", draft["network_alpha"], "--network_alpha")
    _layers(draft, words)
    _patterns(draft, words)
    _extras(draft, words)
    for key in ("conv_dim", "conv_alpha", "verbose"):
        if words[key]:
            draft.note(
                "--network_args",
                f"{key} has no effect: {'FLUX has no convolutions' if 'conv' in key else 'layers are listed in the report'}",
            )


def _put(draft: Draft, values: dict[str, Any], option: str = "--network_module") -> None:
    for key, value in values.items():
        draft.put(f"adapter.{key}", value, option)


def _layers(draft: Draft, words: Words) -> None:
    """Ranks per kind of layer, block lists, and the input layers."""
    ranks = {kind: words[key] for key, kind in TYPE_RANKS.items() if words[key] is not None}
    if ranks:
        _put(draft, {"rank_by_type": ranks}, "--network_args")
    blocks = words["train_blocks"] or "all"
    if blocks not in ("all", "single", "double"):
        draft.refuse(draft.where("network_args"), f"train_blocks={blocks}", "write all, single or double")
    double, single = depths(draft)
    for stack, key, most, there in (
        ("double", "train_double_block_indices", DOUBLE, double),
        ("single", "train_single_block_indices", SINGLE, single),
    ):
        text = "none" if blocks not in ("all", stack) else _there(draft, key, words[key] or "all", (most, there))
        if text != "all":
            _put(draft, {f"{stack}_blocks": text}, "--network_args")
    if words["in_dims"]:
        _put(draft, {"targets": ["all", "inputs"]}, "--network_args")
        has = [not is_chroma(draft) or number in (0, 4) for number in range(5)]  # Chroma has img_in and txt_in only
        by_pattern = {pattern: rank for pattern, rank, here in zip(INPUTS, words["in_dims"], has, strict=True) if here}
        _put(draft, {"rank_by_pattern": by_pattern}, "--network_args")


def _there(draft: Draft, key: str, text: str, sizes: tuple[int, int]) -> str:
    """The blocks of a list that a smaller model has. Numbers that FLUX.1 itself lacks are refused."""
    most, there = sizes
    if text in ("all", "none"):
        return text
    numbers: list[int] = []
    for item in text.split(","):
        first, _, last = item.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    if max(numbers) >= most:
        draft.refuse(draft.where("network_args"), f"{key}={text}: there is no block {max(numbers)}", f"use 0 to {most - 1}")
    kept = [number for number in numbers if number < there]
    if len(kept) < len(numbers):
        draft.note("--network_args", f"{key}: this model has {there} blocks, so {len(numbers) - len(kept)} of {len(numbers)} are left out")
        return ",".join(map(str, kept)) or "none"
    return text


def _patterns(draft: Draft, words: Words) -> None:
    """Ranks and rates by patterns that are searched in sd-scripts' own layer names; the last match wins, as its documents say."""
    if words["network_reg_dims"]:
        named = {f"kohya:{pattern}": rank for pattern, rank in words["network_reg_dims"].items()}
        _put(draft, {"rank_by_pattern": {**(draft.get("adapter.rank_by_pattern") or {}), **named}}, "--network_args")
    if words["network_reg_lrs"]:
        _put(draft, {"lr_by_pattern": {f"kohya:{pattern}": rate for pattern, rate in words["network_reg_lrs"].items()}}, "--network_args")


def _extras(draft: Draft, words: Words) -> None:
    """Dropouts, split qkv, GGPO, LoRA+ and T5."""
    for key in ("rank_dropout", "module_dropout"):
        if words[key]:
            _put(draft, {key: words[key]}, "--network_args")
    if words["split_qkv"]:
        _put(draft, {"split_qkv": True}, "--network_args")
    given = [key for key in ("ggpo_sigma", "ggpo_beta") if words[key] is not None]
    if len(given) == 1:
        other = "ggpo_beta" if given == ["ggpo_sigma"] else "ggpo_sigma"
        draft.refuse(draft.where("network_args"), f"{given[0]} has no effect without {other}", f"add {other}, or drop {given[0]}")
    elif given:
        _put(draft, {key: words[key] for key in given}, "--network_args")
    general = words["loraplus_lr_ratio"]
    for key, native in (("loraplus_unet_lr_ratio", "loraplus_dit_ratio"), ("loraplus_text_encoder_lr_ratio", "loraplus_text_ratio")):
        ratio = words[key] if words[key] is not None else general
        if ratio and (native == "loraplus_dit_ratio" or not draft["network_train_unet_only"]):
            _put(draft, {native: ratio}, "--network_args")
    if words["train_t5xxl"]:
        draft.put("adapter.text_encoders", ["t5xxl"], "--network_args")


def _oft(draft: Draft) -> None:
    words = Words(draft, OFT_KINDS)
    _put(draft, {"type": "oft", "rank": _rank(draft)})
    _put(draft, {"targets": "all" if words["enable_all_linear"] else [OFT_ATTENTION]}, "--network_args")
    if draft.has("network_alpha"):
        _put(draft, {"constraint": draft["network_alpha"]}, "--network_alpha")
    else:
        _put(draft, {"constraint": 1.0}, "--network_alpha")
        draft.note(
            "--network_alpha", "for OFT it is a limit of the rotation, and sd-scripts' 1 hardly limits; advised: --network_alpha 1e-3"
        )


def _lycoris(draft: Draft) -> None:
    words = Words(draft, LYCORIS_KINDS)
    algo = (words["algo"] or "lora").lower()
    kind = LYCORIS.get(algo)
    if kind is None:
        close = nearest(algo, LYCORIS)
        fix = f"write algo={close}" if close else f"choose one of {', '.join(sorted(set(LYCORIS)))}"
        draft.refuse(draft.where("network_args"), f"algo={algo} is not known here", fix)
        return
    if words["dora_wd"] and kind not in ("lora", "loha", "lokr"):
        draft.refuse(draft.where("network_args"), f"dora_wd=True with algo={algo}", "write algo=lora, loha or lokr, or drop dora_wd")
    elif words["dora_wd"]:
        kind = "dora" if kind == "lora" else kind
    preset = words["preset"] or "full"
    if preset not in PRESETS:
        draft.refuse(draft.where("network_args"), f"preset={preset} is not known here", f"choose one of {', '.join(PRESETS)}")
    _put(draft, {"type": kind, "targets": PRESETS.get(preset, "blocks")})
    if kind not in ("full", "ia3"):
        _put(draft, {"rank": _rank(draft)}, "--network_dim")
        if draft["network_alpha"] and kind not in ROTATIONS:
            _put(draft, {"alpha": draft["network_alpha"]}, "--network_alpha")
    if words["module_dropout"]:
        _put(draft, {"module_dropout": words["module_dropout"]}, "--network_args")
    if words["rank_dropout"] and kind in WITH_FACTORS:
        _put(draft, {"rank_dropout": words["rank_dropout"]}, "--network_args")
    elif words["rank_dropout"]:
        draft.refuse(draft.where("network_args"), f"rank_dropout is not for {kind}", "write module_dropout, or algo=lora")
    _lycoris_extras(draft, words, kind)


def _lycoris_extras(draft: Draft, words: Words, kind: str) -> None:
    if kind == "lokr":
        _put(draft, {native: True for key, native in LYCORIS_FLAGS.items() if words[key]}, "--network_args")
        if (words["factor"] or 0) > 0:
            _put(draft, {"factor": words["factor"]}, "--network_args")
    elif words["factor"] is not None:
        draft.note("--network_args", f"factor has no effect on {kind}")
    if words["rs_lora"]:
        _put(draft, {"rslora": True}, "--network_args")
    if words["dora_wd"] and kind in ("loha", "lokr"):
        _put(draft, {"weight_decompose": True}, "--network_args")
    if kind in ROTATIONS:
        named = {"constraint": words["constraint"], "rescale": words["rescaled"]}
        _put(draft, {key: value for key, value in named.items() if value}, "--network_args")
    for key in LYCORIS_OFF:
        if words[key]:
            draft.refuse(draft.where("network_args"), f"--network_args {key}=True is not known here", f"leave {key} out")
    if words["conv_dim"] or words["conv_alpha"]:
        draft.note("--network_args", "conv_dim and conv_alpha have no effect: FLUX has no convolutions")


def text_encoders(draft: Draft) -> None:
    """CLIP-L is trained unless --network_train_unet_only; T5 with train_t5xxl=True. Their rates come in this order."""
    if not draft["network_module"]:
        return
    only_dit, only_text = draft["network_train_unet_only"], draft["network_train_text_encoder_only"]
    wants_t5 = "t5xxl" in (draft.get("adapter.text_encoders") or [])
    if only_dit and only_text:
        where = draft.where("network_train_text_encoder_only")
        draft.refuse(where, "nothing would be trained", "drop --network_train_unet_only or --network_train_text_encoder_only")
    if draft.get("adapter.type") == "oft" or draft["network_module"] == "networks.oft_flux":
        names: list[str] = []
    elif only_dit:
        names = []
    else:
        names = ([] if is_chroma(draft) else ["clip_l"]) + (["t5xxl"] if wants_t5 else [])
    if only_text:
        _put(draft, {"double_blocks": "none", "single_blocks": "none"}, "--network_train_text_encoder_only")
    draft.put("adapter.text_encoders", names, "--network_train_unet_only")
    if wants_t5 and names and draft.get("cache.text") not in (None, "off"):
        fix = "drop train_t5xxl=True, or --cache_text_encoder_outputs (CLIP-L alone can be trained with cached T5 outputs)"
        draft.refuse(draft.where("network_args"), "train_t5xxl=True and cached text encoder outputs exclude each other", fix)
    _rates(draft, names)


def _rates(draft: Draft, names: list[str]) -> None:
    rates = draft["text_encoder_lr"]
    if not rates:
        return
    if len(rates) > 2:
        draft.refuse(draft.where("text_encoder_lr"), f"--text_encoder_lr has {len(rates)} rates", "give one, or two: CLIP-L, then T5")
    for name, rate in (("clip_l", rates[0]), ("t5xxl", rates[-1])):
        if name in names:
            draft.put(f"adapter.{name}_lr", rate, "--text_encoder_lr")
    if not names:
        draft.note("--text_encoder_lr", "no text encoder is trained, so it has no effect")


def start_weights(draft: Draft) -> None:
    """The file that training starts from."""
    if draft["dim_from_weights"] and not draft["network_weights"]:
        draft.refuse(draft.where("dim_from_weights"), "--dim_from_weights needs a file", "add --network_weights FILE.safetensors")
    if draft["network_weights"]:
        draft.put("adapter.init_from", draft["network_weights"], "--network_weights")
        draft.put("adapter.init_unused", "ignore", "--network_weights")  # as sd-scripts, which takes what fits
        if draft["dim_from_weights"]:
            draft.put("adapter.rank_from_file", True, "--dim_from_weights")


def base_weights(draft: Draft) -> None:
    """Adapters merged into the base; missing strengths are 1."""
    files, strengths = draft["base_weights"] or [], draft["base_weights_multiplier"] or []
    if len(strengths) > len(files):
        fix = "give one --base_weights file for each"
        draft.refuse(draft.where("base_weights_multiplier"), f"{len(strengths)} strengths for {len(files)} files", fix)
    if files:
        padded = [*strengths, *[1.0] * len(files)]
        entries = [{"path": path, "strength": strength} for path, strength in zip(files, padded, strict=False)]
        draft.put("base_adapters", entries, "--base_weights")
