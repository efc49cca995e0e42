"""Prompt files in their three formats, and every option of a line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

CADENCE = {"every": 1, "every_epochs": 0, "first": False, "last": False}
PLAIN = {"width": 512, "height": 512, "steps": 20, "guidance": 3.5, "cfg": 1.0, "seed": 42}


@pytest.fixture
def samples(work: Path, command: Callable) -> Callable:
    """The result of a command whose prompt file has this text."""

    def make(text: str, name: str = "p.txt"):
        (work / name).write_text(text, encoding="utf-8")
        return command("--sample_prompts", name, "--sample_every_n_steps", "1")

    return make


@pytest.mark.ledger("KS-43")
def test_lines(samples: Callable) -> None:
    made = samples("a cat --n blurry, low-res --w 777 --h 40 --d 5 --s 30 --l 4 --g 1.5\n\n# nothing\na dog -- red\nx --W 64 --H 64\n")
    assert made.tree["sample"][0] == CADENCE | {
        "prompt": "a cat", "negative": "blurry, low-res", "width": 768, "height": 64, "steps": 30, "guidance": 1.5, "cfg": 4.0, "seed": 5,
    }  # fmt: skip
    assert made.tree["sample"][1] == CADENCE | PLAIN | {"prompt": "a dog"}
    assert made.tree["sample"][2]["width"] == 64
    assert "drawn with seed 42" in made.noted
    assert "p.txt:4" in made.noted


@pytest.mark.ledger("KS-43")
def test_what_flux_does_not_use(samples: Callable) -> None:
    made = samples("a --n bad --ss euler_a --ctr 1 --rcfg 1 --fs 3 --cn edge.png --q 1 --wd 5\n")
    for text in ("sample_sampler", "cfg_trunc_ratio", "renorm_cfg", "flow_shift", "--cn is for the ControlNet", "no effect without --l"):
        assert text in made.noted
    assert "--wd 5 is no option of a prompt and is left out; write --w" in made.noted
    assert "negative" not in made.tree["sample"][0]


@pytest.mark.ledger("KS-43")
def test_toml(samples: Callable) -> None:
    text = '[prompt]\nwidth = 256\nheight = 320\nscale = 3.0\n[[prompt.subset]]\nprompt = "a cat --g 2"\nseed = 1\n'
    made = samples(text + '[[prompt.subset]]\nprompt = "b"\nnegative_prompt = "c"\n', "p.toml")
    one, two = made.tree["sample"]
    assert (one["prompt"], one["width"], one["height"], one["cfg"], one["guidance"], one["seed"]) == ("a cat", 256, 320, 3.0, 2.0, 1)
    assert (two["negative"], two["cfg"]) == ("c", 3.0)
    refused = samples('[prompt]\nwidth = 1\n[[prompt.subset]]\nwidth = 2\nprompt = "x"\nhight = 3\n', "p.toml").refused
    assert "width stands in [prompt] and in its subset" in refused
    assert "write height" in refused


@pytest.mark.ledger("KS-43")
def test_json(samples: Callable) -> None:
    made = samples(json.dumps(["a cat --d 3", {"prompt": "b", "sample_steps": 4, "guidance_scale": 0}]), "p.json")
    assert [(entry["prompt"], entry["steps"], entry["seed"], entry["guidance"]) for entry in made.tree["sample"]] == [
        ("a cat", 20, 3, 3.5),
        ("b", 4, 42, 0.0),
    ]


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("", "p.txt", "write one prompt a line"),
        ("a --w wide\n", "p.txt", "p.txt:1: width = 'wide' is not a number"),
        ("--w 5\n", "p.txt", "write what to draw"),
        ("x", "p.md", "give a .txt, .toml or .json file"),
    ],
)
def test_mistakes(samples: Callable, text: str, name: str, says: str) -> None:
    made = samples(text, name)
    assert says in made.refused or says in made.noted
