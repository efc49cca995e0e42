"""Options about the model's files, its precision and its memory -> `model`, `train`, `quant`, `memory`, `cache`, `control`."""

from pathlib import Path

from fluxsmith.dialects.base import Draft
from fluxsmith.errors import ModelFileError
from fluxsmith.io.identify import identify
from fluxsmith.io.identity import Identity
from fluxsmith.models.family.flux1 import PRESETS

DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1
MOST_SWAPPED = 35
PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
CONTROL_BLOCKS = 2  # of the ControlNet that sd-scripts trains
CACHE_FOLDER = "fluxsmith-cache"
TOKENIZERS = {"tokenizer": "openai_clip-vit-large-patch14", "tokenizer_2": "google_t5-v1_1-xxl"}


def is_chroma(draft: Draft) -> bool:
    """Does the command ask for Chroma?"""
    return draft["model_type"] == "chroma"


def identity_of(path: str | None) -> Identity | None:
    """What a weights file is; None where it cannot be read here (the run itself will say why)."""
    try:
        return identify(path) if path and Path(path).is_file() else None
    except ModelFileError:
        return None


def transformer(draft: Draft) -> Identity | None:
    """What the file of the transformer is."""
    return identity_of(draft["pretrained_model_name_or_path"])


def depths(draft: Draft) -> tuple[int, int]:
    """Double and single blocks of the model; FLUX.1's where the file is not here."""
    found = transformer(draft)
    sizes = found.sizes if found else {}
    return int(sizes.get("double_blocks", DOUBLE)), int(sizes.get("single_blocks", SINGLE))


def model(draft: Draft) -> None:
    """Family, transformer and CLIP-L, and the rule that Chroma hides its padding."""
    path, chroma = draft["pretrained_model_name_or_path"], is_chroma(draft)
    needed = [("pretrained_model_name_or_path", "the transformer"), ("t5xxl", "the T5-XXL text encoder"), ("ae", "the autoencoder")]
    for name, what in needed if chroma else [*needed[:1], ("clip_l", "the CLIP-L text encoder"), *needed[1:]]:
        if not draft[name]:
            draft.refuse(f"--{name}", f"{what} is not given", f"add --{name} FILE.safetensors")
    if path and Path(path).is_dir():
        fix = "give one file in the original layout, such as flux1-dev.safetensors of black-forest-labs/FLUX.1-dev"
        draft.refuse(draft.where("pretrained_model_name_or_path"), f"{path} is a folder", fix)
    draft.put("model.path", path or "", "--pretrained_model_name_or_path")
    if chroma:
        _chroma(draft)
        return
    found = transformer(draft)
    if found and found.family == "chroma":
        draft.refuse(draft.where("model_type"), f"{path} is {found.describe()}", "write --model_type chroma")
    draft.put("model.preset", found.variant if found and found.variant in PRESETS else "dev")
    draft.put("model.clip_l", draft["clip_l"] or "", "--clip_l")
    if draft["apply_t5_attn_mask"]:
        draft.put("model.mask_text", True, "--apply_t5_attn_mask")


def _chroma(draft: Draft) -> None:
    if draft.script == "flux_train_control_net":
        draft.refuse(draft.where("model_type"), "there are no ControlNets of Chroma", "write --model_type flux")
    if not draft["apply_t5_attn_mask"]:
        draft.refuse("--apply_t5_attn_mask", "Chroma is trained with the padding of T5 hidden", "add --apply_t5_attn_mask")
    if draft.has("clip_l"):
        draft.note("--clip_l", "Chroma has no CLIP-L; the file is not read")


def tokenizers(draft: Draft) -> None:
    """Folders that sd-scripts has filled under --tokenizer_cache_dir; without them tokenizers are looked for beside the encoders."""
    root = draft["tokenizer_cache_dir"]
    if not root:
        return
    for key, name in TOKENIZERS.items():
        folder = Path(root) / name
        if folder.is_dir():
            if not (key == "tokenizer" and is_chroma(draft)):
                draft.put(f"model.{key}", str(folder), "--tokenizer_cache_dir")
        else:
            draft.note("--tokenizer_cache_dir", f"{folder} is not there: the tokenizer is looked for beside the text encoder instead")


def precision(draft: Draft) -> None:
    """Autocast, the frozen weights' type and the trained weights' type."""
    mixed, is_adapter = draft["mixed_precision"], "network_module" in draft.rows
    for name, wanted in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
        if draft[name] and mixed != wanted:
            draft.refuse(draft.where(name), f"--{name} needs --mixed_precision {wanted}", f"add --mixed_precision {wanted}")
    draft.put("train.precision", mixed, "--mixed_precision")
    if draft.script != "flux_train":
        draft.put("train.base_dtype", PRECISIONS[mixed], "--mixed_precision")
    weights = "bf16" if draft["full_bf16"] else "fp16" if draft["full_fp16"] else "fp32"
    if not is_adapter and weights == "fp32":
        weights = PRECISIONS[mixed]  # sd-scripts loads what it trains in the type of the autocast
    draft.put("train.weights_dtype", weights, "--full_bf16" if weights == "bf16" else "--full_fp16")


def fp8(draft: Draft) -> None:
    """The frozen transformer in 8 bits."""
    name = "fp8_base_unet" if draft["fp8_base_unet"] else "fp8_base"
    if not draft[name]:
        return
    if draft["mixed_precision"] == "no":
        draft.refuse(draft.where(name), f"--{name} needs mixed precision", "add --mixed_precision bf16")
    draft.put("quant.type", "fp8", f"--{name}")
    draft.put("quant.compute", "weight_only", f"--{name}")  # sd-scripts stores in 8 bits and multiplies in 16
    if name == "fp8_base":
        draft.put("quant.text_encoders", True, "--fp8_base")
    draft.note(f"--{name}", "weights are scaled row by row before they are rounded to 8 bits; sd-scripts only rounds them")


def swap(draft: Draft) -> None:
    """Blocks that wait in host memory; the old forms become the new one."""
    count, option = draft["blocks_to_swap"], "--blocks_to_swap"
    if draft["double_blocks_to_swap"] or draft["single_blocks_to_swap"]:
        option = "--double_blocks_to_swap"
        if count is None:
            count = (draft["double_blocks_to_swap"] or 0) + (draft["single_blocks_to_swap"] or 0) // 2
            draft.note(option, f"the old form of --blocks_to_swap {count}")
    if draft["split_mode"]:
        draft.note("--split_mode", "an old way to save memory: its right name is --blocks_to_swap" + (" 18" if count is None else ""))
        count, option = (18, "--split_mode") if count is None else (count, option)
    if not count:
        return
    if count > MOST_SWAPPED or count < 0:
        draft.refuse(
            draft.where("blocks_to_swap"), f"{option} = {count}", f"give 0 to {MOST_SWAPPED}", "some blocks have to stay on the card"
        )
        return
    if draft["cpu_offload_checkpointing"]:
        fix = "drop one of them; --blocks_to_swap saves more"
        draft.refuse(draft.where("cpu_offload_checkpointing"), f"{option} and --cpu_offload_checkpointing exclude each other", fix)
    if not draft["gradient_checkpointing"]:
        draft.put("memory.checkpointing", True, option)
        draft.note(option, "--gradient_checkpointing is switched on, for swapping needs it")
    most = most_swapped(*depths(draft))
    if count > most:
        draft.note(option, f"{count} is more than this small model has: {most} are swapped")
    draft.put("memory.swap_blocks", min(count, most), option)
    if most and _trains_all(draft) and not (draft["fused_backward_pass"] or draft["blockwise_fused_optimizers"]):
        draft.put("memory.optimizer_offload", "states", option)
        text = "trained blocks that wait in host memory are updated there, with optimizer states; to update them on the card add"
        draft.note(option, f"{text} --blockwise_fused_optimizers, or --fused_backward_pass --optimizer_type adafactor")


def _trains_all(draft: Draft) -> bool:
    """Is the transformer itself trained?"""
    return draft.script == "flux_train"


def most_swapped(double: int, single: int) -> int:
    """Largest number that leaves two blocks of each kind on the card: half of it are double blocks, twice the rest single ones."""
    fitting = [count for count in range(MOST_SWAPPED + 1) if count // 2 <= double - 2 and 2 * (count - count // 2) <= single - 2]
    return max(fitting, default=0)


def checkpointing(draft: Draft) -> None:
    """Inputs of recomputed blocks in host memory."""
    if not draft["cpu_offload_checkpointing"]:
        return
    if is_chroma(draft):
        draft.refuse(draft.where("cpu_offload_checkpointing"), "it is not for Chroma", "write --blocks_to_swap 18 instead")
    if not draft["gradient_checkpointing"]:
        if "network_module" in draft.rows:
            draft.note("--cpu_offload_checkpointing", "without effect, for --gradient_checkpointing is not given")
            return
        draft.put("memory.checkpointing", True, "--cpu_offload_checkpointing")
    draft.put("memory.checkpointing_offload", True, "--cpu_offload_checkpointing")


def fused(draft: Draft) -> None:
    """Updates inside the backward pass."""
    for name, mode in (("fused_backward_pass", "tensor"), ("blockwise_fused_optimizers", "block")):
        if not draft[name]:
            continue
        if draft["gradient_accumulation_steps"] != 1:
            draft.refuse(draft.where(name), f"--{name} needs --gradient_accumulation_steps 1", "leave out one of them")
        if name == "fused_backward_pass" and (draft["optimizer_type"] or "").lower() != "adafactor":
            draft.refuse(draft.where(name), "--fused_backward_pass needs Adafactor", "add --optimizer_type adafactor")
        if draft.get("memory.fused_update"):
            draft.refuse(draft.where(name), "two kinds of fused update", "keep --fused_backward_pass or --blockwise_fused_optimizers")
        draft.put("memory.fused_update", mode, f"--{name}")


def caches(draft: Draft) -> None:
    """Where latents and text states are kept. Folders beside the pictures are not written."""
    for kind, name in (("latents", "cache_latents"), ("text", "cache_text_encoder_outputs")):
        place = "disk" if draft[f"{name}_to_disk"] else "memory" if draft[name] else "off"
        draft.put(f"cache.{kind}", place, f"--{name}")
    if "disk" in (draft.get("cache.latents"), draft.get("cache.text")):
        draft.put("cache.dir", str(cache_folder(draft)), "--cache_latents_to_disk")
        draft.note("--cache_latents_to_disk", f"caches are kept in {cache_folder(draft)}, not beside the pictures; .npz files are not read")
    sizes = [draft[name] for name in ("vae_batch_size", "text_encoder_batch_size") if draft.has(name)]
    if sizes:
        draft.put("cache.batch_size", max(sizes), "--vae_batch_size")


def cache_folder(draft: Draft) -> Path:
    """Beside the description of the data, so that all runs on the same data share it."""
    described = draft["dataset_config"] or draft["in_json"] or draft["train_data_dir"]
    return Path(described).parent / CACHE_FOLDER if described else Path(CACHE_FOLDER)


def control(draft: Draft) -> None:
    """What flux_train_control_net trains."""
    entry: dict[str, str | bool | int] = {"type": "controlnet", "train": True, "layout": "pixels"}
    if depths(draft)[0] < CONTROL_BLOCKS:
        entry["double_blocks"] = depths(draft)[0]
    start = draft["controlnet_model_name_or_path"]
    if start:
        entry["path"] = start
    draft.put("control", [entry], "--controlnet_model_name_or_path")
