"""Put the trained parts of flux-shapes together: four bf16 files and two tokenizers, under 6 MB in all.

`python -m fluxsmith.demo.bundle --dit A --clip-l B --t5xxl C --ae D --out src/fluxsmith/bundle/flux-shapes`
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fluxsmith.demo.tokenizer import write_tokenizers
from fluxsmith.io.safetensors import open_weights, save_weights

LIMIT = 6_000_000  # bytes of all files together
ABOUT = {
    "modelspec.title": "flux-shapes",
    "modelspec.description": "A tiny FLUX trained from scratch on drawn shapes; see recipes/flux-shapes.",
    "modelspec.license": "same as fluxsmith",
}
ROLES = ("dit", "clip_l", "t5xxl", "ae")


def write_bundle(parts: dict[str, Path], out: Path) -> int:
    """Cast every part to bf16, keep what its file says about its form; returns the bytes of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    for role, path in parts.items():
        with open_weights(path) as weights:
            tensors = {name: weights.tensor(name, dtype=torch.bfloat16) for name in weights}
            form = {key: value for key, value in weights.metadata.items() if key.startswith("fluxsmith.")}
        save_weights(out / f"{role}.safetensors", tensors, {**form, **ABOUT})
    write_tokenizers(out)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m fluxsmith.demo.bundle", description=(__doc__ or "").splitlines()[0])
    for role in ROLES:
        parser.add_argument(f"--{role.replace('_', '-')}", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = vars(parser.parse_args(arguments))
    size = write_bundle({role: options[role] for role in ROLES}, options["out"])
    print(f"{size} bytes in {options['out']}")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT} bytes")


if __name__ == "__main__":
    main()
