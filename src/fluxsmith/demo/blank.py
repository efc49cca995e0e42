"""Random starting weights for a small model of our own: what the recipes of the bundled flux-shapes begin with.

`python -m fluxsmith.demo.blank OUT --seed 0` writes dit, clip_l, t5xxl, ae and both tokenizers into OUT.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fluxsmith.demo.tokenizer import EOS, vocabulary, write_tokenizers
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.flux import FluxDiT, FluxParams, axes_for_head
from fluxsmith.models.linear import Linear, xavier_
from fluxsmith.models.text_encoders import CLIP_ROOT, ClipParams, ClipText, T5Params, T5Text
from fluxsmith.models.tiny_autoencoder import TinyAutoEncoder, TinyAutoEncoderParams

TEXT, HIDDEN, HEAD = 64, 128, 32  # widths of both text encoders and of the transformer, and its head
CLIP_HEADS, POSITIONS = 4, 24


def flux_params() -> FluxParams:
    """2 double and 4 single blocks of width 128: 2.36 M parameters."""
    return FluxParams(
        in_channels=64, out_channels=64, vec_in_dim=TEXT, context_in_dim=TEXT, hidden_size=HIDDEN, mlp_hidden=4 * HIDDEN,
        num_heads=HIDDEN // HEAD, depth=2, depth_single_blocks=4, axes_dim=axes_for_head(HEAD),
    )  # fmt: skip


def blank_dit(generator: torch.Generator) -> dict[str, Tensor]:
    """Xavier linears; modulations and the last projection start at zero, so every block starts as the identity."""
    dit = FluxDiT(flux_params())
    for name, module in dit.named_modules():
        if isinstance(module, Linear):
            xavier_(module, generator)
            if "mod" in name or name == "final_layer.linear":
                nn.init.zeros_(module.weight)
    return dit.state_dict()


def blank_texts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """CLIP and T5 in file keys, transformers' own initialisation (CLIP embeddings wider, std 0.5)."""
    size = len(vocabulary())
    clip = ClipText(ClipParams(size, TEXT, 2 * TEXT, 2, POSITIONS, CLIP_HEADS, vocabulary()[EOS]))
    nn.init.normal_(clip.model.get_input_embeddings().weight, std=0.5)  # type: ignore[arg-type]  # transformers types it loosely
    t5 = T5Text(T5Params(size, TEXT, TEXT // 4, 2 * TEXT, 2, 4, 32))
    clip_keys = {CLIP_ROOT + key: value for key, value in clip.model.state_dict().items() if "position_ids" not in key}
    return clip_keys, {key: value for key, value in t5.model.state_dict().items() if key != "encoder.embed_tokens.weight"}


def write_blank(folder: Path, seed: int = 0) -> None:
    """All files of an untrained model."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    clip, t5 = blank_texts()
    ae = TinyAutoEncoder(TinyAutoEncoderParams(32, 16, (1, 1, 1, 2), (2, 1, 1, 1)))
    hints = {"fluxsmith.model": json.dumps({"num_attention_heads": CLIP_HEADS, "eos_token_id": vocabulary()[EOS]})}
    save_weights(folder / "dit.safetensors", blank_dit(torch.Generator().manual_seed(seed)), {})
    save_weights(folder / "clip_l.safetensors", clip, hints)
    save_weights(folder / "t5xxl.safetensors", t5, {})
    save_weights(folder / "ae.safetensors", ae.state_dict(), {})
    write_tokenizers(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_blank(options.folder, options.seed)


if __name__ == "__main__":
    main()
