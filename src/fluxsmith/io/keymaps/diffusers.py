"""diffusers' names (FluxTransformer2DModel, ChromaTransformer2DModel, AutoencoderKL) <-> BFL names.

q, k, v (and the MLP of a single block) are separate there; `norm_out.linear` stores (scale, shift), BFL (shift, scale).
"""

import re
from collections.abc import Iterable

from fluxsmith.io.keymaps.recipe import LayerMap, Recipe

TRANSFORMER = LayerMap(
    double_prefix="transformer_blocks.",
    single_prefix="single_transformer_blocks.",
    double_layers={
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "img_attn.proj": ("attn.to_out.0",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "txt_attn.proj": ("attn.to_add_out",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
    },
    single_layers={
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
    outer_layers={
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
        "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
        "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
        "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
        "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
        "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    },
    double_norms={
        "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
        "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
        "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
        "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    },
    single_norms={"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"},
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    outer_keys={
        f"distilled_guidance_layer.{ours}": f"distilled_guidance_layer.{theirs}"
        for leaf in ("weight", "bias")
        for ours, theirs in (
            (f"in_proj.{leaf}", f"in_proj.{leaf}"),
            (f"out_proj.{leaf}", f"out_proj.{leaf}"),
            (f"layers.*.in_layer.{leaf}", f"layers.*.linear_1.{leaf}"),
            (f"layers.*.out_layer.{leaf}", f"layers.*.linear_2.{leaf}"),
        )
    }
    | {"distilled_guidance_layer.norms.*.scale": "distilled_guidance_layer.norms.*.weight"},
)

AE_RULES = (  # diffusers pattern -> BFL; an up block's number is turned round afterwards
    (r"(encoder|decoder)\.(conv_in|conv_out)\.", r"\1.\2."),
    (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.conv_shortcut\.", r"encoder.down.\1.block.\2.nin_shortcut."),
    (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.(norm1|norm2|conv1|conv2)\.", r"encoder.down.\1.block.\2.\3."),
    (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv\.", r"encoder.down.\1.downsample.conv."),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.conv_shortcut\.", r"decoder.up.\1.block.\2.nin_shortcut."),
    (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.(norm1|norm2|conv1|conv2)\.", r"decoder.up.\1.block.\2.\3."),
    (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv\.", r"decoder.up.\1.upsample.conv."),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.(norm1|norm2|conv1|conv2)\.", r"\1.mid.block_1.\2."),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.(norm1|norm2|conv1|conv2)\.", r"\1.mid.block_2.\2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.group_norm\.", r"\1.mid.attn_1.norm."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(?:to_q|query)\.", r"\1.mid.attn_1.q."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(?:to_k|key)\.", r"\1.mid.attn_1.k."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(?:to_v|value)\.", r"\1.mid.attn_1.v."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.(?:to_out\.0|proj_attn)\.", r"\1.mid.attn_1.proj_out."),
)
AE_ATTENTION = re.compile(r"(encoder|decoder)\.mid\.attn_1\.(q|k|v|proj_out)\.weight")


def ae_recipes(names: Iterable[str]) -> dict[str, Recipe]:
    """BFL autoencoder keys from AutoencoderKL keys; unknown names are left out."""
    names = list(names)
    highest = max((int(found[1]) for found in (re.match(r"decoder\.up_blocks\.(\d+)\.", name) for name in names) if found), default=0)
    made: dict[str, Recipe] = {}
    for name in names:
        for pattern, replacement in AE_RULES:
            key, count = re.subn("^" + pattern, replacement, name)
            if count:
                key = re.sub(r"^decoder\.up\.(\d+)\.", lambda found: f"decoder.up.{highest - int(found[1])}.", key)
                made[key] = Recipe((name,), "conv1x1" if AE_ATTENTION.fullmatch(key) else "copy")
                break
    return made
