"""The arguments of sd-scripts' adapter tools as requests: what to read, what to do, what to write.

A request is plain data; `fluxsmith.tools` does the work.
"""

from dataclasses import dataclass
from typing import Literal

from fluxsmith.dialects.base import Draft

Dtype = Literal["fp32", "fp16", "bf16", "fp8"]
DTYPES: dict[str, Dtype] = {
    **dict.fromkeys(("float", "float32", "fp32"), "fp32"),
    **dict.fromkeys(("fp16", "float16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    **dict.fromkeys(("fp8", "fp8_e4m3fn"), "fp8"),
}
METHODS = {"sv_ratio": "ratio", "sv_fro": "energy", "sv_cumulative": "sum"}
LAYOUTS = {"ai-toolkit": "ai_toolkit", "sd-scripts": "kohya"}


@dataclass(frozen=True)
class ExtractRequest:
    """A LoRA from the difference of two models."""

    original: str
    tuned: str
    save_to: str
    rank: int
    clamp_quantile: float
    dtype: Dtype
    device: str
    has_metadata: bool


@dataclass(frozen=True)
class MergeRequest:
    """Adapters into models (role -> file), or with each other where no model is given (`save_to["dit"]` is the file)."""

    models: dict[str, str]
    save_to: dict[str, str]
    adapters: tuple[tuple[str, float], ...]
    dtype: Dtype
    device: str
    keeps_ranks: bool  # ranks side by side instead of a sum of the same rank
    has_metadata: bool


@dataclass(frozen=True)
class ConvertRequest:
    """An adapter in other key names: kohya or ai_toolkit."""

    source: str
    target: str
    read_as: str
    write_as: str


@dataclass(frozen=True)
class ResizeRequest:
    """An adapter of another rank; `method` None is that rank for every layer."""

    source: str
    target: str
    rank: int
    method: str | None
    parameter: float | None
    dtype: Dtype | None
    device: str
    is_verbose: bool


@dataclass(frozen=True)
class CheckRequest:
    """The weights of a file, all keys or those of an adapter."""

    file: str
    shows_all: bool


Request = ExtractRequest | MergeRequest | ConvertRequest | ResizeRequest | CheckRequest


def tool_request(draft: Draft) -> Request:
    """The request of a command. Raises ConfigError with everything that is missing."""
    draft.apply_rows()
    made = MAKERS[draft.script](draft)
    draft.finish(draft.script)
    return made


def _needs(draft: Draft, *names: str) -> None:
    for name in names:
        if not draft[name]:
            flag = draft.rows[name].flag
            draft.refuse(flag, f"{flag} is not given", f"add {flag}" + ("" if flag == name else " FILE.safetensors"))


def _dtype(draft: Draft) -> Dtype | None:
    given = draft["save_precision"]
    if given and given not in DTYPES:
        draft.refuse(
            draft.where("save_precision"), f"--save_precision {given} is written by no tool here", "write fp8_e4m3fn, bf16, fp16 or float"
        )
    return DTYPES.get(given or "")


def _extract(draft: Draft) -> ExtractRequest:
    _needs(draft, "model_org", "model_tuned", "save_to")
    return ExtractRequest(
        draft["model_org"] or "",
        draft["model_tuned"] or "",
        draft["save_to"] or "",
        draft["dim"],
        draft["clamp_quantile"],
        _dtype(draft) or "fp32",
        draft["device"] or "cpu",
        not draft["no_metadata"],
    )


def _merge(draft: Draft) -> MergeRequest:
    files, ratios = draft["models"] or [], draft["ratios"] or []
    if not files:
        draft.refuse("--models", "no LoRA is given", "add --models A.safetensors --ratios 1.0")
    if len(files) != len(ratios):
        draft.refuse(draft.where("ratios"), f"{len(files)} models and {len(ratios)} ratios", "give one ratio for each model")
    models = {role: draft[name] for role, name in (("dit", "flux_model"), ("clip_l", "clip_l"), ("t5xxl", "t5xxl")) if draft[name]}
    saved = {
        role: draft[name] for role, name in (("dit", "save_to"), ("clip_l", "clip_l_save_to"), ("t5xxl", "t5xxl_save_to")) if draft[name]
    }
    for role, name in (("dit", "save_to"), ("clip_l", "clip_l_save_to"), ("t5xxl", "t5xxl_save_to")):
        if role not in saved and (role in models or (role == "dit" and not models)):
            draft.refuse(f"--{name}", f"--{name} is not given", f"add --{name} FILE.safetensors")
    if models and draft["concat"]:
        draft.note("--concat", "has no effect on a merge into models")
    strengths = tuple(zip(files, ratios, strict=False))
    return MergeRequest(
        models, saved, strengths, _dtype(draft) or "fp32", draft["working_device"], draft["concat"] and not models, not draft["no_metadata"]
    )


def _convert(draft: Draft) -> ConvertRequest:
    _needs(draft, "src_path", "dst_path")
    if draft["src"] == draft["dst"]:
        draft.refuse(draft.where("dst"), f"--src and --dst are both {draft['src']}", "give --dst the other one")
    return ConvertRequest(draft["src_path"] or "", draft["dst_path"] or "", LAYOUTS[draft["src"]], LAYOUTS[draft["dst"]])


def _resize(draft: Draft) -> ResizeRequest:
    _needs(draft, "model", "save_to")
    if draft["save_to"] and not draft["save_to"].endswith(".safetensors"):
        draft.refuse(draft.where("save_to"), f"{draft['save_to']} is no .safetensors file", "give a name that ends in .safetensors")
    method, parameter = draft["dynamic_method"], draft["dynamic_param"]
    if (method is None) != (parameter is None):
        draft.refuse(draft.where("dynamic_method"), "--dynamic_method and --dynamic_param come together", "give both, or neither")
    if method == "sv_ratio" and parameter is not None and parameter < 2:
        draft.refuse(draft.where("dynamic_param"), f"sv_ratio of {parameter:g}", "give 2 or more")
    if method in ("sv_fro", "sv_cumulative") and parameter is not None and not 0 < parameter <= 1:
        draft.refuse(draft.where("dynamic_param"), f"{method} of {parameter:g}", "give a share above 0, at most 1")
    return ResizeRequest(
        draft["model"] or "",
        draft["save_to"] or "",
        draft["new_rank"],
        METHODS.get(method or ""),
        parameter,
        _dtype(draft),
        draft["device"] or "cpu",
        draft["verbose"],
    )


def _check(draft: Draft) -> CheckRequest:
    _needs(draft, "file")
    return CheckRequest(draft["file"] or "", draft["show_all_keys"])


MAKERS = {
    "flux_extract_lora": _extract,
    "flux_merge_lora": _merge,
    "convert_flux_lora": _convert,
    "resize_lora": _resize,
    "check_lora_weights": _check,
}
