"""A ControlNet trained beside a frozen base, in both layouts: it learns, resumes, samples with a condition, and loads elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from PIL import Image
from ran import Go, same

from fluxsmith.controls.controlnet_model import load_controlnet
from fluxsmith.errors import ConfigError
from fluxsmith.io.safetensors import open_weights, read_header


@pytest.fixture(scope="module")
def conditions(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Edges, so to say: a grey picture for each training picture."""
    folder = tmp_path_factory.mktemp("conditions")
    for path in (tiny_model / "pictures").glob("*.png"):
        with Image.open(path) as image:
            grey = np.array(image.convert("L"))
        Image.fromarray(np.stack([grey] * 3, axis=-1)).save(folder / path.name)
    return folder


def control(conditions: Path, **options: Any) -> dict[str, Any]:
    entry = {"type": "controlnet", "train": True, "layout": "pixels", "double_blocks": 1, **options}
    return {"control": [entry], "data.0.condition_dir": str(conditions)}


@pytest.mark.ledger("KS-54")
@pytest.mark.parametrize("layout", ["pixels", "latents"])
def test_it_learns_and_its_file_loads(go: Go, conditions: Path, tiny_model: Path, layout: str) -> None:
    ran = go({**control(conditions, layout=layout), "optim.lr": 1e-2, "train.steps": 6, "checkpoint.dtype": "fp32"})
    assert ran.error is None
    assert ran.warnings == ""
    assert all(name.startswith("controlnet.") for name in ran.weights)
    path = ran.folder / "weights" / "w.safetensors"
    net = load_controlnet(path)
    assert any(param.any() for name, param in net.named_parameters() if name.startswith("controlnet_blocks."))
    metadata = read_header(path).metadata
    assert metadata["modelspec.architecture"] == "flux-1-dev"
    assert "ss_network_module" not in metadata
    with open_weights(path) as weights:
        assert ("pos_embed_input.weight" in weights) == (layout == "pixels")
        assert ("controlnet_x_embedder.weight" in weights) == (layout == "latents")


@pytest.mark.ledger("KS-54")
def test_the_condition_matters_and_the_base_stays(go: Go, conditions: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in conditions.iterdir():
        with Image.open(path) as image:
            Image.new("RGB", image.size, (255, 0, 0)).save(other / path.name)
    changes = {"optim.lr": 1e-2, "train.steps": 4}
    one, two = go({**control(conditions), **changes}, "one"), go({**control(other), **changes}, "two")
    assert one.losses[0] == two.losses[0]  # a new network adds nothing
    assert one.losses[3] != two.losses[3]


def test_it_resumes_exactly_and_can_be_continued_from_its_file(go: Go, conditions: Path) -> None:
    changes = {**control(conditions), "schedule.name": "constant", "checkpoint.every": 2}
    straight = go(changes, "straight")
    go({**changes, "train.steps": 2}, "cut")
    again = go(changes, "cut", resume=True)
    assert again.error is None
    assert same(straight.weights, again.weights)
    more = go({**changes, **control(conditions, path=str(straight.folder / "weights" / "w.safetensors"))}, "more")
    assert more.error is None
    assert not same(more.weights, straight.weights)


def test_samples_need_and_use_their_condition(go: Go, conditions: Path, tmp_path: Path) -> None:
    sample = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 2, "cfg": 2.0, "negative": "blue"}
    picture = next(conditions.iterdir())
    changes = {**control(conditions), "optim.lr": 0.1, "sample": [{**sample, "control_image": str(picture)}]}
    ran = go(changes)
    assert ran.warnings == ""
    first, last = sorted((ran.folder / "samples").iterdir())
    assert first.read_bytes() != last.read_bytes()
    with pytest.raises(ConfigError, match="control_image"):
        go({**changes, "sample": [sample]}, "without")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"adapter": {"type": "lora"}}, "both to be trained"),
        ({"data.0.condition_dir": None}, "no condition pictures"),
        ({"control": []}, "no control model reads these"),
        ({"control": [{"type": "kontext", "images": ["a.png"]}]}, "kontext is for drawing"),
    ],
    ids=["adapter", "no conditions", "no control", "for drawing"],
)
def test_what_does_not_go_together(go: Go, conditions: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        go({**control(conditions), **change})


def test_not_for_chroma(go: Go, conditions: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="Chroma has none"):
        go({**control(conditions), "model": tiny_run.chroma_model(tiny_model)})
    assert torch.get_num_threads() == 1
