"""Tiny stand-ins for every model of DiffSynth-Studio's FLUX table, in the folders and under the names of the real ones.

`write_all(root)` once; examples and tests then name them as users do.
"""

from pathlib import Path

import control_files
import diffsynth_tiny
import net_files
import tiny_qwen
import tiny_run
import torch
from lora_sets import block_layers, write_lora
from torch import Tensor, nn

from fluxsmith.adapters.fusion import LoraFusion
from fluxsmith.controls.nexus_gen_model import Adapter, Merger, MergerParams
from fluxsmith.controls.nexus_gen_states import DRAWN, EDITED
from fluxsmith.controls.redux_model import ReduxEmbedder
from fluxsmith.controls.step1x_model import Connector, ConnectorParams
from fluxsmith.controls.step1x_prompt import INSTRUCTION
from fluxsmith.controls.value_model import ValueEncoder
from fluxsmith.io.keymaps import MAPS
from fluxsmith.io.keymaps.diffsynth import NEXUS_GEN
from fluxsmith.io.safetensors import save_weights

SMALL_HEADS = {  # constants to patch: real heads are 128 wide, those of the stand-ins are not
    "fluxsmith.controls.infiniteyou_model.HEAD": 8,
    "fluxsmith.controls.lora_encoder_model.HEAD": tiny_run.TEXT // 2,
    "fluxsmith.controls.step1x_model.HEAD": tiny_run.TEXT // 2,
    "fluxsmith.controls.nexus_gen_model.HEAD": tiny_qwen.HIDDEN // 2,
}
CONNECTOR = ConnectorParams(tiny_qwen.HIDDEN, tiny_run.TEXT, 24, tiny_run.TEXT, 2, 2)
MERGER = MergerParams(tiny_qwen.HIDDEN, 24, 1, 2, 1, 40, tiny_run.TEXT, (2, 3, 3))


def write_all(root: Path) -> Path:
    """Every model; returns root."""
    diffsynth_tiny.write_models(root)
    diffsynth_tiny.write_models(root, "black-forest-labs/FLUX.1-Krea-dev", "flux1-krea-dev.safetensors")
    diffsynth_tiny.write_models(root, "black-forest-labs/FLUX.1-Kontext-dev", "flux1-kontext-dev.safetensors")
    diffsynth_tiny.write_models(root, "black-forest-labs/FLUX.1-Fill-dev", "no-dit.safetensors")
    (root / "black-forest-labs/FLUX.1-Fill-dev/no-dit.safetensors").unlink()
    write_wide(root / "black-forest-labs/FLUX.1-Fill-dev/flux1-fill-dev.safetensors", 384)
    write_wide(root / "ostris/Flex.2-preview/Flex.2-preview.safetensors", 196)
    _controlnets(root)
    _encoders(root)
    _loras(root)
    _language_models(root)
    return root


def write_wide(path: Path, features: int) -> Path:
    """The tiny transformer with so many features a token."""
    tensors = tiny_run.random_dit().state_dict()
    tensors["img_in.weight"] = torch.randn(tiny_run.HIDDEN, features, generator=torch.Generator().manual_seed(features)) * 0.1
    return _saved(path, tensors)


def _saved(path: Path, tensors: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, tensors)
    return path


def as_pickle(path: Path) -> None:
    """A file as torch.save writes it, in place of a safetensors file of the same stem."""
    from safetensors.torch import load_file

    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _controlnets(root: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    net_files.controlnet_file(_place(root / "alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta" / name), seed=1, channels=68)
    net_files.controlnet_file(_place(root / "InstantX/FLUX.1-dev-Controlnet-Union-alpha" / name), seed=2, modes=10)
    net_files.controlnet_file(_place(root / "jasperai/Flux.1-dev-Controlnet-Upscaler" / name), seed=3)
    infinite = root / "ByteDance/InfiniteYou/infu_flux_v1.0/aes_stage2"
    net_files.controlnet_file(_place(infinite / "InfuseNetModel/diffusion_pytorch_model-00001-of-00001.safetensors"), seed=4)
    net_files.face_projector_file(infinite / "image_proj_model.safetensors")
    as_pickle(infinite / "image_proj_model.safetensors")


def _encoders(root: Path) -> None:
    adapter = _place(root / "InstantX/FLUX.1-dev-IP-Adapter/ip-adapter.safetensors")
    net_files.ip_adapter_file(adapter, "instantx")
    as_pickle(adapter)
    net_files.vision_file(_place(root / "google/siglip-so400m-patch14-384/model.safetensors"), "siglip")
    redux = root / "black-forest-labs/FLUX.1-Redux-dev"
    net_files.vision_file(_place(redux / "image_encoder/model.safetensors"), "siglip", seed=1)
    embedder = ReduxEmbedder(control_files.VISION, 24, tiny_run.TEXT)
    control_files.random_file(embedder, _place(redux / "image_embedder/diffusion_pytorch_model.safetensors"))
    values = root / "DiffSynth-Studio/AttriCtrl-FLUX.1-Dev/models"
    for name in ("brightness", "detail"):
        control_files.random_file(ValueEncoder(8, tiny_run.TEXT, 3), _place(values / f"{name}.safetensors"), 1.0)


def _loras(root: Path) -> None:
    dit = tiny_run.random_dit()
    for seed, name in enumerate(
        (
            "VoidOc/flux_animal_forest1/20",
            "cancel13/cxsk/30",
            "DiffSynth-Studio/ArtAug-lora-FLUX.1dev-v1/merged_lora",
            "DiffSynth-Studio/Eligen/model_bf16",
            "HuanJue/Insert-Anything/20250321_steps5000_pytorch_lora_weights",
        )
    ):
        write_lora(_place(root / f"{name}.safetensors"), dit, seed=seed + 20)
    control_files.write_lora_encoder(_place(root / "DiffSynth-Studio/LoRA-Encoder-FLUX.1-Dev/model.safetensors"), dit)
    widths = {MAPS["diffsynth"].layer(name)[0].replace(".", "___"): one.out_features for name, one in block_layers(dit).items()}  # type: ignore[index]
    control_files.random_file(LoraFusion(widths), _place(root / "DiffSynth-Studio/LoRAFusion-preview-FLUX.1-dev/model.safetensors"))


def _language_models(root: Path) -> None:
    qwen = root / "Qwen/Qwen2.5-VL-7B-Instruct"
    tiny_qwen.write_qwen(qwen, texts=[INSTRUCTION])
    (qwen / "model.safetensors").rename(qwen / "model-00001-of-00001.safetensors")
    step1x = root / "stepfun-ai/Step1X-Edit"
    dit = {key: value for key, value in tiny_run.random_dit().state_dict().items() if not key.startswith("guidance_in.")}
    _saved(step1x / "step1x-edit-i1258.safetensors", dit | _random(Connector(CONNECTOR), "connector."))
    (step1x / "vae.safetensors").hardlink_to(root / "files/ae.safetensors")
    nexus = root / "DiffSynth-Studio/Nexus-GenV2"
    tiny_qwen.write_qwen(nexus, prefill=81, texts=[DRAWN, EDITED])
    (nexus / "processor").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (nexus / name).rename(nexus / "processor" / name)
    decoder = dict[str, Tensor]()
    for key, value in tiny_run.random_dit().state_dict().items():
        recipe = NEXUS_GEN.recipe(key)
        assert recipe is not None
        decoder[f"pipe.dit.{recipe.keys[0]}"] = torch.cat(value.chunk(2)[::-1]) if key.startswith("final_layer.adaLN") else value
    for name, net, prefix in (
        ("generation_decoder", Adapter(tiny_qwen.HIDDEN, tiny_run.TEXT), "adapter."),
        ("edit_decoder", Merger(MERGER), "embedding_merger."),
    ):
        as_pickle(_saved(nexus / f"{name}.safetensors", decoder | _random(net, prefix)))


def _random(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {prefix + key: torch.randn(value.shape, generator=generator) * 0.3 for key, value in net.state_dict().items()}
