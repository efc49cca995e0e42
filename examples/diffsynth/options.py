"""What all examples of this folder share: where models are, how little memory there is, and how large and how long to draw.

The first run downloads what is not under --models (as DiffSynth-Studio does, from ModelScope or, with
DIFFSYNTH_DOWNLOAD_SOURCE=huggingface, from Hugging Face); --offline never does.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

STORED_IN_8_BITS = {  # weights wait on the host in 8 bits and visit the card
    "offload_dtype": torch.float8_e4m3fn,
    "offload_device": "cpu",
    "onload_dtype": torch.float8_e4m3fn,
    "onload_device": "cpu",
    "preparing_dtype": torch.float8_e4m3fn,
}


@dataclass
class Given:
    """The parsed command line. `file` goes into every ModelConfig, `vram_limit` into from_pretrained."""

    device: str
    dtype: torch.dtype
    out: Path
    only_steps: int | None = None
    only_side: int | None = None
    face: Path | None = None
    file: dict[str, Any] = field(default_factory=dict)
    vram_limit: float | None = None

    def steps(self, usual: int) -> int:
        """--steps, else what the model likes."""
        return self.only_steps or usual

    def side(self, usual: int) -> int:
        """--size in place of 1024, other sides in proportion."""
        return usual if self.only_side is None else usual * self.only_side // 1024 // 16 * 16


def parse(text: str | None) -> Given:
    """Read the command line; `text` is the example's own description."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of models, MODELS/owner/name/file")
    parser.add_argument("--offline", action="store_true", help="never download")
    parser.add_argument("--low-vram", action="store_true", help="8-bit weights on the host, streamed; see --vram-limit")
    parser.add_argument("--vram-limit", type=float, help="GiB of the card; by default all but half a GiB of what is free")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--size", type=int, help="in place of 1024 pixels")
    parser.add_argument("--face", type=Path, help="portrait, for infiniteyou.py")
    given = parser.parse_args()
    file: dict[str, Any] = {"local_model_path": given.models, "skip_download": True if given.offline else None}
    dtype, limit = torch.bfloat16 if given.device != "cpu" else torch.float32, given.vram_limit
    if given.low_vram:
        file |= {**STORED_IN_8_BITS, "preparing_device": given.device, "computation_dtype": dtype, "computation_device": given.device}
        if limit is None and given.device != "cpu":
            limit = torch.cuda.mem_get_info()[0] / 2**30 - 0.5
    given.out.mkdir(parents=True, exist_ok=True)
    return Given(given.device, dtype, given.out, given.steps, given.size, given.face, file, limit)
