"""A control section in one option of the command line."""

from pathlib import Path

import pytest

from fluxsmith.cli.control_options import controls, entry
from fluxsmith.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("kontext", {"type": "kontext"}),
        ("controlnet path=a/b.safetensors scale=0.5 mode=2", {"type": "controlnet", "path": "a/b.safetensors", "scale": 0.5, "mode": 2}),
        ("kontext images=['a b.png', \"c.png\"]", {"type": "kontext", "images": ["a b.png", "c.png"]}),
        ("kontext images='a b.png'  name=cat", {"type": "kontext", "images": "a b.png", "name": "cat"}),
        ("eligen entities=[{prompt='a cat', mask='m.png'}]", {"type": "eligen", "entities": [{"prompt": "a cat", "mask": "m.png"}]}),
        ("redux keep_prompt=false", {"type": "redux", "keep_prompt": False}),
    ],
)
def test_an_option_becomes_a_table(text: str, made: dict[str, object]) -> None:
    assert entry(text) == made


@pytest.mark.parametrize("text", ["", "path=a.png", "kontext a.png", "kontext images=['a.png'", "kontext images='a"])
def test_what_is_no_section_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--control"):
        controls(None, [text])


def test_a_misspelt_type_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="controlnet"):
        controls(None, ["controlnett image=a.png"])


def test_those_of_the_run_file_come_first_and_their_files_are_found_beside_it(tmp_path: Path) -> None:
    (tmp_path / "pose.png").write_bytes(b"")
    run = tmp_path / "run.toml"
    run.write_text('[[control]]\ntype = "controlnet"\nimage = "pose.png"\n', encoding="utf-8")
    first, second = controls(run, ["controlnet name=second image=other.png"])
    assert first.model_dump()["image"] == tmp_path / "pose.png"
    assert (second.name, second.model_dump()["image"]) == ("second", Path("other.png"))


def test_a_mistake_in_the_run_file_is_told_with_its_place(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text('[[control]]\ntype = "controlnet"\nimagee = "pose.png"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run.toml:3"):
        controls(run, [])
