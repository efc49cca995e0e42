"""DiffSynth-Studio's own names of the FLUX transformer <-> BFL names.

Its fused layers and its final modulation are in BFL order, except in Nexus-Gen's decoder files (`NEXUS_GEN`).
"""

from dataclasses import replace

from fluxsmith.io.keymaps.recipe import LayerMap

TRANSFORMER = LayerMap(
    double_prefix="blocks.",
    single_prefix="single_blocks.",
    double_layers={
        "img_mod.lin": ("norm1_a.linear",),
        "txt_mod.lin": ("norm1_b.linear",),
        "img_attn.qkv": ("attn.a_to_qkv",),
        "img_attn.proj": ("attn.a_to_out",),
        "img_mlp.0": ("ff_a.0",),
        "img_mlp.2": ("ff_a.2",),
        "txt_attn.qkv": ("attn.b_to_qkv",),
        "txt_attn.proj": ("attn.b_to_out",),
        "txt_mlp.0": ("ff_b.0",),
        "txt_mlp.2": ("ff_b.2",),
    },
    single_layers={"linear1": ("to_qkv_mlp",), "linear2": ("proj_out",), "modulation.lin": ("norm.linear",)},
    outer_layers={
        "img_in": ("x_embedder",),
        "txt_in": ("context_embedder",),
        "time_in.in_layer": ("time_embedder.timestep_embedder.0",),
        "time_in.out_layer": ("time_embedder.timestep_embedder.2",),
        "guidance_in.in_layer": ("guidance_embedder.timestep_embedder.0",),
        "guidance_in.out_layer": ("guidance_embedder.timestep_embedder.2",),
        "vector_in.in_layer": ("pooled_text_embedder.0",),
        "vector_in.out_layer": ("pooled_text_embedder.2",),
        "final_layer.linear": ("final_proj_out",),
        "final_layer.adaLN_modulation.1": ("final_norm_out.linear",),
    },
    double_norms={
        "img_attn.norm.query_norm.scale": "attn.norm_q_a.weight",
        "img_attn.norm.key_norm.scale": "attn.norm_k_a.weight",
        "txt_attn.norm.query_norm.scale": "attn.norm_q_b.weight",
        "txt_attn.norm.key_norm.scale": "attn.norm_k_b.weight",
    },
    single_norms={"norm.query_norm.scale": "norm_q_a.weight", "norm.key_norm.scale": "norm_k_a.weight"},
)

NEXUS_GEN = replace(TRANSFORMER, swapped=frozenset({"final_layer.adaLN_modulation.1"}))
