"""The words of `--network_args`: `key=value` read by the keys that each module of sd-scripts has.

sd-scripts passes over keys it does not know and takes any text but `True` for false; here both are refused.
"""

import re
from collections.abc import Mapping
from typing import Any

from fluxsmith.dialects.arguments import nearest
from fluxsmith.dialects.base import Draft

TYPE_RANKS = {
    "img_attn_dim": "img_attn", "txt_attn_dim": "txt_attn", "img_mlp_dim": "img_mlp", "txt_mlp_dim": "txt_mlp",
    "img_mod_dim": "img_mod", "txt_mod_dim": "txt_mod", "single_dim": "single", "single_mod_dim": "single_mod",
}  # fmt: skip
LORA_KINDS = {
    **dict.fromkeys(TYPE_RANKS, "int"),
    **dict.fromkeys(("conv_dim", "conv_alpha"), "conv"),
    **dict.fromkeys(("rank_dropout", "module_dropout", "ggpo_sigma", "ggpo_beta"), "float"),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio"), "float"),
    **dict.fromkeys(("split_qkv", "train_t5xxl", "verbose"), "bool"),
    "in_dims": "ranks",
    "train_double_block_indices": "blocks",
    "train_single_block_indices": "blocks",
    "train_blocks": "text",
    "network_reg_dims": "int patterns",
    "network_reg_lrs": "float patterns",
}
OFT_KINDS = {"enable_all_linear": "bool", "verbose": "bool"}
LYCORIS_SWITCHES = (
    "dora_wd", "decompose_both", "full_matrix", "rs_lora", "use_tucker", "use_cp", "use_scalar", "train_norm", "train_on_input",
    "bypass_mode", "rescaled", "wd_on_output", "rank_dropout_scale", "unbalanced_factorization",
)  # fmt: skip
LYCORIS_KINDS = {
    "algo": "text",
    "preset": "text",
    "factor": "int",
    "block_size": "int",
    **dict.fromkeys(("conv_dim", "conv_alpha"), "conv"),
    **dict.fromkeys(("rank_dropout", "module_dropout", "constraint"), "float"),
    **dict.fromkeys(LYCORIS_SWITCHES, "bool"),
}
BLOCK_LIST = re.compile(r"all|none|\d+(-\d+)?(,\d+(-\d+)?)*")
NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


class Words:
    """The words of one command, checked; `words["rank_dropout"]` is None where it was not given."""

    def __init__(self, draft: Draft, kinds: Mapping[str, str]) -> None:
        self.draft = draft
        self.found: dict[str, Any] = {}
        where = draft.where("network_args")
        for item in draft["network_args"] or []:
            key, equals, text = item.partition("=")
            key = key.strip()
            if not equals:
                draft.refuse(where, f"--network_args {item}", "write it as key=value, without spaces around the equals sign")
            elif key not in kinds:
                draft.refuse(where, f"--network_args {key} is not known", _cure(key, kinds))
            else:
                self._read(where, key, kinds[key], text.strip())

    def __getitem__(self, key: str) -> Any:
        return self.found.get(key)

    def _read(self, where: str, key: str, kind: str, text: str) -> None:
        try:
            self.found[key] = READ[kind](text)
        except ValueError:
            self.draft.refuse(where, f"--network_args {key}={text} is not {WORDS[kind]}", f"give {WORDS[kind]}")


def _cure(key: str, kinds: Mapping[str, str]) -> str:
    if key == "dropout":
        return "write --network_dropout"
    close = nearest(key, kinds)
    return f"write {close}" if close else f"choose of {', '.join(kinds)}"


def _bool(text: str) -> bool:
    if text not in ("True", "False", "true", "false"):
        raise ValueError(text)
    return text in ("True", "true")


def _ranks(text: str) -> list[int]:
    """`[4,2,2,2,4]`: img, time, vector, guidance, txt."""
    values = [int(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]
    if len(values) != 5 or min(values) < 0:
        raise ValueError(text)
    return values


def _blocks(text: str) -> str:
    text = text.replace(" ", "")
    if not BLOCK_LIST.fullmatch(text):
        raise ValueError(text)
    return text


def _patterns(text: str, number: str) -> dict[str, float]:
    """`pattern=value,pattern=value`: a pattern may hold commas and equals signs, for an item ends at `=NUMBER` before a comma."""
    found: dict[str, float] = {}
    place = 0
    item = re.compile(rf"\s*(.+?)=({number})\s*(?:,|$)")
    while place < len(text):
        match = item.match(text, place)
        if match is None:
            raise ValueError(text)
        try:
            re.compile(match[1])
        except re.error as error:
            raise ValueError(str(error)) from None
        found.pop(match[1], None)
        found[match[1]] = float(match[2])
        place = match.end()
    return found


def _nothing(text: str) -> str:
    return text


READ = {
    "int": int,
    "float": float,
    "bool": _bool,
    "text": str,
    "conv": _nothing,
    "ranks": _ranks,
    "blocks": _blocks,
    "int patterns": lambda text: {key: int(value) for key, value in _patterns(text, r"\d+").items()},
    "float patterns": lambda text: _patterns(text, NUMBER),
}
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "text": "text",
    "conv": "a number",
    "ranks": "five ranks (img, time, vector, guidance, txt), such as [4,2,2,2,4]",
    "blocks": "all, none, or block numbers such as 0,1,8-12",
    "int patterns": "patterns with ranks, such as img_attn=8,single.*=4",
    "float patterns": "patterns with rates, such as double_blocks=2e-3",
}
