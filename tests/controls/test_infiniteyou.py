"""InfiniteYou: the person has an effect in both branches, with and without a control picture; what is refused. Numbers: tests/parity."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from net_files import controlnet_file, face_projector_file
from PIL import Image
from small_dit import tokens
from tiny_pipeline import latents, load

from fluxsmith.config.control import Ground
from fluxsmith.config.nearby import find_nearby
from fluxsmith.controls import infiniteyou
from fluxsmith.controls.face_embedding import read_embedding
from fluxsmith.controls.infiniteyou import Config, Control, Person
from fluxsmith.controls.infiniteyou_model import FaceProjector, FaceProjectorParams
from fluxsmith.controls.span import Span
from fluxsmith.errors import ConfigError, DataError, ModelFileError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.fill import check_keys, meta, shapes_of
from fluxsmith.models.stream import Window

Draw = Callable[..., Image.Image]
ME, YOU = (0.5, -0.5) * 4, (0.1, 0.7, -0.3, 0.2) * 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("person")
    net, projector = controlnet_file(folder / "infuse.safetensors"), face_projector_file(folder / "proj.safetensors")
    return {"path": str(net), "projector": str(projector)}


@pytest.fixture(scope="module")
def pipeline(plain_model: Path, files: dict[str, str]) -> Pipeline:
    return load(plain_model, {"type": "infiniteyou", **files, "embedding": ME})


def drawn(pipeline: Pipeline, *, request: dict[str, Any] | None = None, **options: Any) -> torch.Tensor:
    return latents(pipeline, **(request or {}), controls={"infiniteyou": options})


def differ(*results: torch.Tensor) -> bool:
    return all((a - b).abs().max() > 1e-5 for number, a in enumerate(results) for b in results[:number])


@pytest.mark.ledger("DS-16")
def test_person_picture_guidance_scale_and_span_have_an_effect(pipeline: Pipeline, picture: Draw) -> None:
    cases = [{"scale": 0.0}, {}, {"embedding": YOU}, {"guidance": 3.5}, {"image": picture(1)}, {"scale": 0.5}, {"end": 0.0}, {"start": 1.0}]
    assert differ(*(drawn(pipeline, **case) for case in cases))
    black = Image.new("RGB", (64, 64))
    assert torch.equal(drawn(pipeline), drawn(pipeline, image=black))


def test_the_prompt_does_not_reach_it_but_the_pooled_text_does(pipeline: Pipeline) -> None:
    control = pipeline.controls[0]
    assert isinstance(control, Control)
    rows = control.identity(torch.tensor(ME))
    person = Person(control, torch.zeros(1, 16, 4, 4), rows, Span((1.0, 0.5, 0.0), 0.0, 0.4))
    given = tokens()._replace(mask=torch.ones(1, 1, 1, 7, dtype=torch.bool), n_prompt=2)
    own = person.own(given)
    assert torch.equal(own.txt, rows)
    assert (own.txt_ids.shape, own.txt_ids.any()) == ((1, 3, 3), False)
    assert (own.mask, own.n_prompt) == (None, 0)
    assert own.guidance is not None
    assert own.guidance.tolist() == [1.0]
    assert torch.equal(own.y, given.y)
    part = person.tile(Window(0, 0, 2, 4, 4, 4))
    assert isinstance(part, Person)
    assert part.condition.shape == (1, 16, 2, 4)
    assert part.at(0.5) is None


def test_it_acts_in_the_negative_branch_too(pipeline: Pipeline) -> None:
    control = pipeline.controls[0]
    assert isinstance(control, Control)
    assert control.denoising == (control.net,)
    guided = {"cfg": 2.0, "negative": "blue"}
    assert differ(drawn(pipeline, request=guided), drawn(pipeline, request=guided, embedding=YOU), drawn(pipeline))


def test_vectors_come_from_numbers_and_files(pipeline: Pipeline, tmp_path: Path) -> None:
    expected = drawn(pipeline)
    (tmp_path / "me.json").write_text(json.dumps(ME))
    save_weights(tmp_path / "me.safetensors", {"face": torch.tensor([ME])}, {})
    for name in ("me.json", "me.safetensors"):
        assert torch.equal(drawn(pipeline, embedding=str(tmp_path / name)), expected)
    (tmp_path / "bad.json").write_text("{")
    save_weights(tmp_path / "two.safetensors", {"a": torch.ones(2), "b": torch.ones(2)}, {})
    for name, words in (
        ("bad.json", "cannot be read"),
        ("two.safetensors", "one tensor, the file holds 2"),
        ("none.json", "cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            read_embedding(tmp_path / name)
    with pytest.raises(ConfigError, match="it has 3 numbers, the projector takes 8"):
        drawn(pipeline, embedding=(1.0, 2.0, 3.0))


def test_its_files_are_found_beside_the_run_file(tmp_path: Path) -> None:
    for name in ("me.png", "me.json"):
        (tmp_path / name).write_text("x")
    tree = {
        "control": [{"type": "infiniteyou", "face": "me.png"}, {"type": "infiniteyou", "embedding": "me.json"}, {"embedding": [0.5, 1.0]}]
    }
    find_nearby(tree, tmp_path)
    assert tree["control"][0]["face"] == str(tmp_path / "me.png")
    assert tree["control"][1]["embedding"] == str(tmp_path / "me.json")
    assert tree["control"][2]["embedding"] == [0.5, 1.0]


def problems(**options: Any) -> list[str]:
    config = Config.model_validate({"type": "infiniteyou", **options})
    return [str(one) for one in (*config.misfits(Ground()), *config.problems(Ground()))]


@pytest.mark.ledger("DS-16")
def test_what_is_refused_before_weights_are_read(files: dict[str, str], picture: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems(**files, embedding=ME) == []
    (found,) = problems(path=files["path"], embedding=ME)
    assert "has no projector (the person would have no effect)" in found
    (found,) = problems(path=files["path"], projector=files["path"], embedding=ME)
    assert "this is a ControlNet" in found
    (found,) = problems(**files)
    assert "has no face" in found
    assert "a face and an embedding" in problems(**files, embedding=ME, face=picture(1))[0]
    monkeypatch.setattr(infiniteyou, "missing_packages", lambda: ("insightface",))
    (found,) = problems(**files, face=picture(1))
    assert "needs insightface. Fix: pip install insightface onnxruntime facexlib" in found


def test_parts_that_do_not_go_together(files: dict[str, str], plain_model: Path, tmp_path: Path) -> None:
    wide = face_projector_file(tmp_path / "wide.safetensors", text=24)
    with pytest.raises(ModelFileError, match="its tokens are 24 wide, InfuseNet reads 16"):
        load(plain_model, {"type": "infiniteyou", **files, "projector": str(wide), "embedding": ME})


def test_the_published_projector_fits(manifests_root: Path) -> None:
    stored = json.loads((manifests_root / "infiniteyou-image-proj.json").read_text())["tensors"]
    shapes = {key.removeprefix("image_proj."): tuple(shape) for key, shape in stored.items()}
    params = FaceProjectorParams.from_shapes(shapes)
    assert params == FaceProjectorParams(512, 8, 1280, 1280, 5120, 4, 4096, 20)
    check_keys(shapes_of(meta(lambda: FaceProjector(params))), shapes, "image_proj_model.bin")
