"""Every example of examples/diffsynth, with tiny models under the real names: as it is, and with --low-vram. No socket is opened."""

import runpy
import socket
import sys
import warnings
from pathlib import Path

import diffsynth_models
import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "diffsynth"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "options")
TABLE = {  # ledger row -> examples that must be there
    "DS-09": "flux_dev",
    "DS-10": "flux_krea",
    "DS-11": "flux_kontext",
    "DS-12": "controlnet_inpainting",
    "DS-13": "controlnet_union",
    "DS-14": "controlnet_upscaler",
    "DS-15": "ip_adapter",
    "DS-16": "infiniteyou",
    "DS-17": "eligen",
    "DS-18": "lora_encoder",
    "DS-19": "lora_fusion",
    "DS-20": "step1x_edit",
    "DS-21": "flex2",
    "DS-22": "nexus_gen_generation",
    "DS-36": "fill",
}


def test_the_whole_table_has_examples() -> None:
    assert set(TABLE.values()) | {"redux", "attrictrl", "insert_anything", "nexus_gen_editing", "lora"} == set(EXAMPLES)
    text = (FOLDER.parents[1] / "docs" / "how-to" / "from-diffsynth.md").read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if f"{name}.py" not in text] == []


@pytest.mark.ledger("DS-08G")
@pytest.mark.ledger("DS-09")
@pytest.mark.ledger("DS-10")
@pytest.mark.parametrize("low_vram", [False, True], ids=["plain", "low-vram"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, low_vram: bool, all_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    for place, value in diffsynth_models.SMALL_HEADS.items():
        monkeypatch.setattr(place, value)
    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr("fluxsmith.dialects.diffsynth.insert_anything.SIDE", 32)
    monkeypatch.setattr("fluxsmith.controls.infiniteyou.face_vector", lambda image, **options: torch.linspace(-1, 1, 8))
    monkeypatch.setattr("fluxsmith.controls.infiniteyou.missing_packages", list)
    Image.new("RGB", (64, 64), "tan").save(tmp_path / "face.png")
    line = (
        f"--models {all_models} --offline --device cpu --out {tmp_path / 'out'} --steps 1 --size 32 --face {tmp_path / 'face.png'}".split()
    )
    monkeypatch.setattr(sys, "argv", [name, *line, *(["--low-vram", "--vram-limit", "0"] if low_vram else [])])
    monkeypatch.syspath_prepend(FOLDER)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    made = sorted((tmp_path / "out").glob("*.png"))
    assert made
    for path in made:
        with Image.open(path) as image:
            assert min(image.size) >= 16
