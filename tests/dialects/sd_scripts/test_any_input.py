"""Whatever stands on the command line or in a dataset file: a run, or errors that say what to do; never a traceback."""

import random
from pathlib import Path

import pytest
import tomlkit

from fluxsmith.dialects.sd_scripts.cache_tool import cache_request
from fluxsmith.dialects.sd_scripts.dataset_keys import KEYS
from fluxsmith.dialects.sd_scripts.drawing import drawing
from fluxsmith.dialects.sd_scripts.lower import lower
from fluxsmith.dialects.sd_scripts.options import read_options
from fluxsmith.dialects.sd_scripts.scripts import SCRIPTS, Script, option_rows
from fluxsmith.dialects.sd_scripts.tool_requests import tool_request
from fluxsmith.errors import FluxsmithError

TEXTS = (
    *("0", "-1", "1", "3", "1e-4", "nan", "inf", "", "x", "a=b", "a", "=1", "[1]", "data.toml", "true", "None", "1,2", "0.5", "10%", "é"),
    *("99999999999", "lr='x'", "weight_decay=None", "min_lr='a'", "betas=1", "in_dims=", "network_reg_dims==", "img_attn_dim=x"),
)
VALUES = (0, -1, 1, 3, 1.5, "", "x", True, False, [], [1, 2], ["a"], {}, {"a": 1}, 10**12, "é")


def outcome(script: Script, words: list[str]) -> list[str]:
    """Lines of the errors; empty for a run."""
    try:
        if script.kind == "train":
            lower([script.name, *words])
        else:
            {"draw": drawing, "cache": cache_request, "tool": tool_request}[script.kind](read_options(script, words))
    except FluxsmithError as error:
        return error.lines()
    return []


def some_words(script: Script, rng: random.Random) -> list[str]:
    words: list[str] = []
    for row in rng.sample(list(option_rows(script.name).values()), 2):
        text = rng.choice([*map(str, row.choices), *TEXTS])
        if row.type == "flag":
            words.append(row.flag)
        elif row.nargs:
            words += [row.flag, *[value for value in rng.sample(TEXTS, 2) if not value.startswith("-")]]
        else:
            words.append(f"{row.flag}={text}")
    return words


@pytest.mark.ledger("KS-52")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_any_command(script: Script, base_words: list[str]) -> None:
    rng = random.Random(script.name)
    start = base_words[1:] if script.name == "flux_train_network" else base_words[1:-2] if script.kind == "train" else []
    for _ in range(60):
        words = [*start, *some_words(script, rng)]
        assert [line for line in outcome(script, words) if "Fix:" not in line] == [], words


@pytest.mark.ledger("KS-06")
@pytest.mark.parametrize("seed", range(3))
def test_any_dataset_file(seed: int, work: Path, base_words: list[str]) -> None:
    rng = random.Random(seed)
    names = [*KEYS, "prior_loss_weight", "bach_size"]
    for _ in range(60):
        levels = [{rng.choice(names): rng.choice(VALUES) for _ in range(rng.randint(0, 2))} for _ in range(3)]
        subset = {"image_dir": "pictures", **levels[2]}
        tree = {"general": {"resolution": 512, **levels[0]}, "datasets": [{**levels[1], "subsets": [subset]}]}
        (work / "data.toml").write_text(tomlkit.dumps(tree), encoding="utf-8")
        assert [line for line in outcome(SCRIPTS[0], base_words[1:]) if "Fix:" not in line] == [], tree
