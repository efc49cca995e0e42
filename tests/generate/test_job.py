"""Several pictures in one go: names, grid, sizes, what is written into the PNG."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fluxsmith.config.load import load_control, load_model
from fluxsmith.errors import ConfigError, DataError
from fluxsmith.generate.job import Job, draw_all, picture_size, save_grid

SETTINGS = {"width": 32, "height": 32, "steps": 1}


def opened(path: Path) -> Image.Image:
    """The picture with its texts, the file closed."""
    with Image.open(path) as image:
        image.load()
        return image


@pytest.fixture
def job(tiny_section: dict[str, str], tmp_path: Path) -> Any:
    def make(**changes: Any) -> Job:
        values = {
            "prompts": ("a red circle",),
            "seeds": (0,),
            "settings": SETTINGS,
            "place": {"device": "cpu"},
            "out": tmp_path / "out.png",
        }
        return Job(load_model({"model": tiny_section}), **{**values, **changes})

    return make


def test_one_picture(job: Any, tmp_path: Path) -> None:
    (record,) = draw_all(job())
    assert record["path"] == str(tmp_path / "out.png")
    assert opened(tmp_path / "out.png").size == (32, 32)


def test_prompts_times_seeds_with_a_grid(job: Any, tmp_path: Path) -> None:
    records = list(draw_all(job(prompts=("a red circle", "a blue star"), seeds=(7, 8, 9), out=tmp_path / "many")))
    names = [Path(record["path"]).name for record in records]
    assert names == ["000_s7.png", "001_s8.png", "002_s9.png", "003_s7.png", "004_s8.png", "005_s9.png", "grid.png"]
    assert [record["prompt"] for record in records[:6]] == ["a red circle"] * 3 + ["a blue star"] * 3
    sheet = opened(tmp_path / "many" / "grid.png")
    assert sheet.width == 3 * (192 + 8) + 8


def test_a_folder_for_one_picture(job: Any, tmp_path: Path) -> None:
    (tmp_path / "dotted.folder").mkdir()
    for folder in ("plain", "dotted.folder"):
        (record,) = draw_all(job(out=tmp_path / folder))
        assert record["path"] == str(tmp_path / folder / "000_s0.png")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": (0, 1)}, "2 pictures and one file name"),
        ({"out": Path("out.jpg")}, "use out.png"),
        ({"settings": {**SETTINGS, "sampler": "ddim"}}, "there is no such sampler"),
    ],
)
def test_wrong_wishes_are_refused_before_anything_is_loaded(
    job: Any, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxsmith.generate.job.Pipeline.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError) as caught:
        list(draw_all(job(**changes)))
    assert words in "\n".join(caught.value.lines())


def test_the_problems_of_all_pictures_are_listed_once(job: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        job(settings={"width": 30, "height": 32, "steps": 0}, prompts=("a", "b"), seeds=(0, -1)).requests()
    assert len(caught.value.problems) == 3


def test_a_bad_starting_picture_is_named(job: Any, tmp_path: Path) -> None:
    (tmp_path / "start.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"start\.png"):
        job(image=tmp_path / "start.png").requests()


def test_the_png_says_what_made_it(job: Any, tmp_path: Path) -> None:
    """Both texts are enough to draw it again."""
    prompt = 'a "red" circle, très grand 猫\nsecond line'
    settings = {**SETTINGS, "negative": "blue", "cfg": 2.0, "guidance": 1.5, "shift": 2.0, "sampler": "heun"}
    (record,) = draw_all(job(prompts=(prompt,), seeds=(11,), settings=settings))
    text = opened(tmp_path / "out.png").info
    assert text["parameters"].splitlines()[:3] == [*prompt.splitlines(), "Negative prompt: blue"]
    last = dict(part.split(": ", 1) for part in text["parameters"].splitlines()[3].split(", "))
    assert last["Steps"] == "1"
    assert last["Seed"] == "11"
    assert last["Sampler"] == "Heun"
    assert last["CFG scale"] == "2.0"
    assert last["Distilled CFG Scale"] == "1.5"
    assert last["Size"] == "32x32"
    assert last["Model"] == "dit.safetensors"
    values = json.loads(text["fluxsmith"])
    assert values["prompt"] == prompt
    names = ("negative", "width", "height", "steps", "guidance", "cfg", "seed", "shift", "sampler", "strength")
    again = job(prompts=(values["prompt"],), seeds=(values["seed"],), settings={k: values[k] for k in names if k != "seed"})
    first = opened(tmp_path / "out.png").tobytes()
    list(draw_all(again))
    assert opened(tmp_path / "out.png").tobytes() == first
    assert record["seconds"] > 0


def test_loras_are_written_down_and_act(job: Any, make_lora: Any, tmp_path: Path) -> None:
    list(draw_all(job()))
    plain = opened(tmp_path / "out.png").tobytes()
    path = make_lora("a", seed=1)
    list(draw_all(job(loras=((str(path), 0.5), (str(path), 0.25)))))
    picture = opened(tmp_path / "out.png")
    assert picture.tobytes() != plain
    assert json.loads(picture.info["fluxsmith"])["loras"] == [[str(path), 0.5], [str(path), 0.25]]


@pytest.mark.ledger("DS-04")
@pytest.mark.parametrize(
    ("width", "height", "size", "expected"),
    [
        (None, None, None, (64, 64)),
        (128, None, None, (128, 128)),
        (128, 96, (300, 200), (128, 96)),
        (None, None, (60, 30), (64, 32)),
        (None, None, (600, 300), (96, 48)),  # as many pixels as a square of the model's side at most
        (96, None, (200, 100), (96, 48)),
        (None, 96, (200, 100), (192, 96)),
        (None, None, (3000, 10), (1104, 16)),
    ],
)
def test_sizes(width: int | None, height: int | None, size: tuple[int, int] | None, expected: tuple[int, int]) -> None:
    assert picture_size(width, height, side=64, shown=size) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"type": "kontext", "images": [Image.new("RGB", (20, 10)), Image.new("RGB", (9, 9))]},
            (96, 48),
        ),  # the shape, at the model's pixels
        ({"type": "kontext"}, (64, 64)),
        ({"type": "fill", "image": Image.new("RGBA", (30, 60))}, (32, 64)),
        ({"type": "fill"}, (64, 64)),
        ({"type": "structure", "image": Image.new("RGB", (30, 60))}, (32, 64)),
        ({"type": "flex2", "control_image": Image.new("RGB", (60, 30))}, (64, 32)),
        ({"type": "flex2", "image": Image.new("RGB", (30, 60)), "control_image": Image.new("RGB", (60, 30))}, (32, 64)),
        ({"type": "controlnet", "image": Image.new("RGB", (30, 60))}, (64, 64)),
    ],
)
def test_the_size_of_a_control_where_none_is_asked_for(options: dict[str, Any], expected: tuple[int, int]) -> None:
    model = load_model({"model": {"type": "flux1", "preset": "flux-shapes"}})
    (request,) = Job(model, ("x",), (0,), {}, controls=(load_control(options),)).requests()
    assert (request.width, request.height) == expected
    (request,) = Job(model, ("x",), (0,), {"width": 32, "height": 32}, controls=(load_control(options),)).requests()
    assert (request.width, request.height) == (32, 32)


def test_pictures_of_others_make_a_grid(tmp_path: Path) -> None:
    save_grid(tmp_path / "new" / "grid.png", [Image.new("RGB", (16, 16))] * 3, ["a", "b", "c"], columns=2)
    assert opened(tmp_path / "new" / "grid.png").width > 2 * 192
