"""A model saved in another naming gives the same tensors under BFL names, one at a time."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fluxsmith.errors import ModelFileError
from fluxsmith.io.canonical import canonical
from fluxsmith.io.identify import require_role
from fluxsmith.io.keymaps import MAPS, bfl_keys, diffusers, source_of
from fluxsmith.io.keymaps.apply import assemble, disassemble
from fluxsmith.io.keymaps.recipe import Recipe
from fluxsmith.io.safetensors import open_weights, save_weights


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_weights(path) as weights:
        return {name: weights.tensor(name) for name in weights}


def renamed(tensors: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    """BFL tensors -> another naming."""
    hidden = tensors["img_in.weight"].shape[0]
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        made |= disassemble(source_of(key, style), tensor, hidden)
    return made


def same(read: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return read.keys() == expected.keys() and all(torch.equal(read[key], expected[key]) for key in expected)


@pytest.mark.parametrize(("style", "name"), [*((style, "flux-dev-tiny") for style in MAPS), ("diffusers", "chroma-tiny")])
def test_transformer_from_every_naming(tmp_path: Path, fixtures_root: Path, style: str, name: str) -> None:
    bfl = tensors_of(fixtures_root / name / "weights.safetensors")
    foreign = renamed(bfl, style)
    assert not foreign.keys() & {key for key in bfl if "blocks" in key}
    prefix = "pipe.dit." if style == "nexus_gen" else ""
    path = tmp_path / "m.safetensors"
    adapter = {"adapter.0.weight": torch.zeros(1)} if style == "nexus_gen" else {}
    save_weights(path, {prefix + key: tensor for key, tensor in foreign.items()} | adapter, {})
    identity = require_role(path, "dit")
    assert identity.key_style == style
    with open_weights(path) as weights:
        sources = canonical(weights, identity, "dit")
        read = {key: source.read() for key, source in sources.items()}
        assert all(source.shape == tuple(read[key].shape) for key, source in sources.items())
    assert same(read, bfl)


def test_swapped_halves_and_fused_rows_are_exact(fixtures_root: Path) -> None:
    bfl = tensors_of(fixtures_root / "flux-dev-tiny/weights.safetensors")
    foreign = renamed(bfl, "diffusers")
    h = bfl["img_in.weight"].shape[0]
    final = bfl["final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(foreign["norm_out.linear.weight"], torch.cat([final[h:], final[:h]]))
    linear1 = bfl["single_blocks.0.linear1.bias"]
    assert torch.equal(foreign["single_transformer_blocks.0.attn.to_v.bias"], linear1[2 * h : 3 * h])
    assert torch.equal(foreign["single_transformer_blocks.0.proj_mlp.bias"], linear1[3 * h :])


def test_diffusers_reads_our_naming(fixtures_root: Path) -> None:
    """The map against the oracle: diffusers' own module accepts exactly these keys and shapes."""
    from diffusers import FluxTransformer2DModel

    bfl = tensors_of(fixtures_root / "flux-dev-tiny/weights.safetensors")
    foreign = renamed(bfl, "diffusers")
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=bfl["txt_in.weight"].shape[1], pooled_projection_dim=bfl["vector_in.in_layer.weight"].shape[1],
        guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    assert {key: tuple(t.shape) for key, t in model.state_dict().items()} == {key: tuple(t.shape) for key, t in foreign.items()}


def test_missing_part_is_named(tmp_path: Path, fixtures_root: Path) -> None:
    foreign = renamed(tensors_of(fixtures_root / "flux-dev-tiny/weights.safetensors"), "diffusers")
    identity_path, path = tmp_path / "whole.safetensors", tmp_path / "part.safetensors"
    save_weights(identity_path, foreign, {})
    del foreign["transformer_blocks.0.attn.to_k.weight"]
    save_weights(path, foreign, {})
    with open_weights(path) as weights, pytest.raises(ModelFileError, match=r"transformer_blocks\.0\.attn\.to_k\.weight is missing"):
        canonical(weights, require_role(identity_path, "dit"), "dit")


def to_diffusers_ae(key: str) -> str:
    """An independent way from BFL autoencoder names to diffusers'."""
    blocks = 4
    half, _, rest = key.partition(".")
    parts = rest.split(".")
    if parts[0] in ("down", "up"):
        number = int(parts[1]) if parts[0] == "down" else blocks - 1 - int(parts[1])
        if parts[2] == "block":
            leaf = parts[4].replace("nin_shortcut", "conv_shortcut")
            return f"{half}.{parts[0]}_blocks.{number}.resnets.{parts[3]}.{leaf}.{parts[5]}"
        return f"{half}.{parts[0]}_blocks.{number}.{parts[2]}rs.0.conv.{parts[4]}"
    if parts[0] == "mid" and parts[1] == "attn_1":
        leaf = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}[parts[2]]
        return f"{half}.mid_block.attentions.0.{leaf}.{parts[3]}"
    if parts[0] == "mid":
        return f"{half}.mid_block.resnets.{int(parts[1][-1]) - 1}.{parts[2]}.{parts[3]}"
    return f"{half}.{rest.replace('norm_out', 'conv_norm_out')}"


def test_autoencoder_from_diffusers(tmp_path: Path, fixtures_root: Path) -> None:
    bfl = tensors_of(fixtures_root / "ae-tiny/weights.safetensors")
    foreign = {to_diffusers_ae(key): t.flatten(1) if "attn_1" in key and t.dim() == 4 else t for key, t in bfl.items()}
    path = tmp_path / "vae.safetensors"
    save_weights(path, foreign, {})
    identity = require_role(path, "ae")
    assert (identity.key_style, identity.problems) == ("diffusers", ())
    with open_weights(path) as weights:
        assert same({key: source.read() for key, source in canonical(weights, identity, "ae").items()}, bfl)
    names = diffusers.ae_recipes(foreign)
    assert names["decoder.up.3.block.0.conv1.weight"] == Recipe(("decoder.up_blocks.0.resnets.0.conv1.weight",))


def test_text_encoders_under_prefixes_and_other_names(tmp_path: Path, fixtures_root: Path) -> None:
    clip = tensors_of(fixtures_root / "clip_l-tiny/weights.safetensors")
    t5 = tensors_of(fixtures_root / "t5-tiny/weights.safetensors")
    bundle = {"text_encoders.clip_l.transformer." + key: t for key, t in clip.items()}
    bundle |= {"text_encoders.t5xxl.transformer." + key.replace("shared.weight", "encoder.embed_tokens.weight"): t for key, t in t5.items()}
    bundle["text_encoders.clip_l.transformer.text_projection.weight"] = torch.eye(3)
    save_weights(tmp_path / "b.safetensors", bundle, {})
    bare = {key.removeprefix("text_model."): t for key, t in clip.items()}
    save_weights(tmp_path / "c.safetensors", bare, {})
    for path, role, expected in (("b", "clip_l", clip), ("b", "t5xxl", t5), ("c", "clip_l", clip)):
        with open_weights(tmp_path / f"{path}.safetensors") as weights:
            identity = require_role(tmp_path / f"{path}.safetensors", role)
            assert same({key: source.read() for key, source in canonical(weights, identity, role).items()}, expected)


def test_layers_of_adapters() -> None:
    table = MAPS["diffusers"]
    assert table.layer("double_blocks.3.txt_attn.qkv") == tuple(f"transformer_blocks.3.attn.add_{x}_proj" for x in "qkv")
    assert table.layer("single_blocks.0.linear2") == ("single_transformer_blocks.0.proj_out",)
    assert table.layer("final_layer.linear") == ("proj_out",)
    assert table.layer("double_blocks.3.nothing") is None
    place = table.bfl_layer("single_transformer_blocks.12.proj_mlp")
    assert place is not None
    assert (place.name, place.part, place.parts) == ("single_blocks.12.linear1", 3, 4)
    assert table.bfl_layer("unknown.layer") is None
    with pytest.raises(KeyError):
        source_of("not.a.key", "diffusers")
    assert bfl_keys(["p.img_in.weight", "other"], "bfl", "p.") == {"img_in.weight": Recipe(("p.img_in.weight",))}


def test_assemble_reads_only_what_it_needs() -> None:
    asked: list[str] = []

    def read(name: str) -> Tensor:
        asked.append(name)
        return torch.ones(1, 2)

    assert assemble(source_of("double_blocks.0.img_attn.qkv.weight", "diffusers"), read).shape == (3, 2)
    assert asked == [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]
