"""Loading: layers and origins, every problem at once with place, nearest name and cure."""

import json
from pathlib import Path
from typing import Any

import pytest

from fluxsmith.config import load
from fluxsmith.config.load import load_config
from fluxsmith.errors import ConfigError

FAMILY = '''"""Stand-in family."""
from pathlib import Path
from typing import Literal

import a_package_that_does_not_exist
from fluxsmith.config.section import PluginConfig

PRESETS = {
    "dev": {"params": 1, "defaults": {"noise.shift": 2.5, "sample.*.guidance": 4.0, "train.max_grad_norm": 2.0}},
    "schnell": {"defaults": {"sample.*.steps": 4}},
}


class Config(PluginConfig):
    preset: Literal["dev", "schnell"] = "dev"
    """Which release."""
    path: Path
    """The transformer's file."""
'''
ADAPTER = '''"""Stand-in adapter."""
from fluxsmith.config.adapter import AdapterConfig


class Config(AdapterConfig):
    """The options that all adapters have."""
'''
SOURCE = '''"""Stand-in source."""
from pathlib import Path
from fluxsmith.config.dataset import DatasetConfig


class Config(DatasetConfig):
    path: Path
    """Folder of the pictures."""
'''
EMPTY = '''"""Stand-in."""
from fluxsmith.config.section import PluginConfig


class Config(PluginConfig):
    lr: float = 1e-4
    """Learning rate."""
'''
RUN = """\
model = { type = "flux1", path = "~/flux1-dev.safetensors" }
adapter = { type = "lora", rank = 8 }

[train]
steps = 100

[[data]]
type = "folder"
path = "cats"

[[sample]]
prompt = "a cat"

[run]
dir = "runs/cats"
"""


@pytest.fixture(autouse=True)
def stand_in_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders of plug-ins are replaced by small ones, so that these tests say what loading does and nothing else."""
    files = {"models.family": ("flux1", FAMILY), "adapters": ("lora", ADAPTER), "data.sources": ("folder", SOURCE)}
    files |= {"optim": ("torch", EMPTY), "train.objectives": ("flow", EMPTY), "train.sinks": ("tensorboard", EMPTY)}
    for package, (name, text) in files.items():
        folder = tmp_path / "plugins" / package
        folder.mkdir(parents=True)
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr("fluxsmith.config.choice.folder_of", lambda package: tmp_path / "plugins" / package.removeprefix("fluxsmith."))


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN)
    return Path("run.toml")


def problems(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    assert caught.value.exit_code == 2
    return [str(problem) for problem in caught.value.problems]


def test_values_and_origins(run_file: Path) -> None:
    loaded = load_config(run_file, ["train.seed=7", "adapter.rank=4", "data.0.path=~/dogs", "checkpoint.title=my title"])
    config, origins = loaded.config, loaded.origins
    assert (config.train.steps, config.train.seed, config.adapter.rank) == (100, 7, 4)
    assert config.noise.shift == 2.5
    assert config.sample[0].guidance == 4.0
    assert config.data[0].path == Path.home() / "dogs"
    assert config.model.path == Path.home() / "flux1-dev.safetensors"
    assert config.checkpoint.title == "my title"
    assert config.optim.type == "torch"
    expected = {
        "train.steps": "run.toml:5:1",
        "train.seed": "command line",
        "adapter.rank": "command line",
        "adapter.type": "run.toml:2:13",
        "adapter.targets": "default",
        "data.0.path": "command line",
        "data.0.type": "run.toml:8:1",
        "data.0.buckets.min": "default",
        "noise.shift": "preset flux1/dev",
        "sample.0.guidance": "preset flux1/dev",
        "sample.0.steps": "default",
        "model.path": "run.toml:1:27",
        "optim.type": "default",
        "sinks": "default",
    }
    assert {key: origins[key] for key in expected} == expected


def test_file_and_command_line_win_over_the_preset(run_file: Path) -> None:
    run_file.write_text(RUN.replace('prompt = "a cat"', 'prompt = "a cat"\nguidance = 1.5'))
    loaded = load_config(run_file, ["noise.shift=3", "model.preset=dev"])
    assert (loaded.config.sample[0].guidance, loaded.config.noise.shift) == (1.5, 3.0)
    assert loaded.config.train.max_grad_norm == 2.0
    assert load_config(run_file, ["model.preset=schnell"]).config.sample[0].steps == 4


def test_same_config_from_toml_json_and_dict(run_file: Path) -> None:
    loaded = load_config(run_file)
    plain = loaded.config.model_dump(mode="json", exclude_none=True)
    Path("run.json").write_text(json.dumps(plain))
    assert load_config("run.json").config == loaded.config
    assert load_config(plain).config == loaded.config
    assert load_config("run.json").origins["train.steps"] == "run.json"


def test_all_problems_at_once_with_places(run_file: Path) -> None:
    text = RUN.replace("steps = 100", "stepz = 100\nseed = -1\nlr = 3\nprecision = 'bf61'\nmax_grad_norm = 'much'")
    run_file.write_text(text.replace("rank = 8", "ranks = 8").replace('dir = "runs/cats"', ""))
    assert problems(run_file, "noise.guidance=[1]", "adaptr=1", "oops", "data.3.path=x") == [
        "command line: oops: this is no change of an option. Fix: write it as train.steps=500",
        "command line: data.3.path=x: the list has 1 entries, so there is no entry 3. "
        "Fix: check the key and the value; lists are counted from 0",
        "run.toml:2:28: adapter.ranks is not an option. Fix: write adapter.rank",
        "command line: noise.guidance: noise.guidance = [1] is not valid (should be a valid number, or field required). "
        "Fix: change noise.guidance: Value of the guidance embedder, or (low, high) drawn uniformly per sample; "
        "models without the embedder ignore it",
        "run.toml:6:1: train.seed = -1 is not valid (should be greater than or equal to 0). Fix: change train.seed: Seed of every draw",
        'run.toml:9:1: train.max_grad_norm = "much" is not valid (should be a valid number, unable to parse string as a number). '
        "Fix: change train.max_grad_norm: Clip the global gradient norm to this; 0 is off",
        "run.toml:8:1: train.precision = \"bf61\" is not valid (should be 'auto', 'no', 'fp16' or 'bf16'). Fix: write \"bf16\"",
        "run.toml:5:1: train.stepz is not an option. Fix: write train.steps",
        "run.toml:7:1: train.lr is not an option. Fix: write optim.lr",
        "run.toml:18:1: run.dir is missing. Fix: add run.dir: The run folder; everything the run writes is in it",
        "command line: adaptr: adaptr is not an option. Fix: write adapter",
    ]


def test_unknown_plugin_is_named_with_the_nearest(run_file: Path) -> None:
    expected = ['run.toml:2:13: adapter.type = "lroa" does not exist (available: lora). Fix: write "lora"']
    run_file.write_text(RUN.replace('"lora"', '"lroa"'))
    assert problems(run_file) == expected
    assert problems(run_file, "adapter.type=os.system")[0].startswith(
        'command line: adapter.type: adapter.type = "os.system" does not exist'
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb = = 2\n", "run.toml:2:5: this is not TOML (Invalid value)"),
        ("a = 1\na = 2\n", "run.toml:2:6: this is not TOML (Cannot overwrite a value)"),
        ("a = [1,", "run.toml:1:"),
        ("path = C:\\cats", "text values need quotes"),
    ],
)
def test_broken_toml_has_a_place(run_file: Path, text: str, expected: str) -> None:
    run_file.write_text(text)
    assert expected in problems(run_file)[0]


def test_unreadable_files(run_file: Path) -> None:
    assert "nothing.toml: there is no such file" in problems("nothing.toml")[0]
    run_file.write_bytes(b"a = '\xff'")
    assert "run.toml, byte 5: the file is not UTF-8 text" in problems(run_file)[0]
    Path("run.json").write_text('{"a": 1,}')
    assert "run.json:1:" in problems("run.json")[0]
    assert "cannot be read" in problems(".")[0]


@pytest.mark.parametrize(("version", "word"), [("2", "newer"), ("0", "not a version"), ('"1"', "not a version")])
def test_version_of_the_file(run_file: Path, version: str, word: str) -> None:
    run_file.write_text(f"fluxsmith_config = {version}\n{RUN}")
    (problem,) = problems(run_file)
    assert problem.startswith("run.toml:1:1: ")
    assert word in problem


def test_older_file_is_migrated_with_a_note(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(tree: dict[str, Any]) -> str:
        tree["train"]["steps"] = tree["train"].pop("max_steps")
        return "train.max_steps is train.steps now"

    monkeypatch.setattr(load, "MIGRATIONS", ((1, rename),))
    run_file.write_text(RUN.replace("steps", "max_steps"))
    loaded = load_config(run_file)
    assert (loaded.config.train.steps, loaded.notes) == (100, ("train.max_steps is train.steps now",))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("checkpoint.title=1 2", "1 2"),
        ('checkpoint.title="500"', "500"),
        ("checkpoint.title=", ""),
        ("checkpoint.title=a=b", "a=b"),
        ("checkpoint.title=x\ny=3", "x\ny=3"),
    ],
)
def test_values_on_the_command_line(run_file: Path, override: str, value: str) -> None:
    assert load_config(run_file, [override]).config.checkpoint.title == value


def test_null_takes_a_key_away_and_lists_grow_by_one(run_file: Path) -> None:
    loaded = load_config(run_file, ["train.steps=null", "train.epochs=2", "sample.1.prompt=a dog", "train.ema.decay=0.9"])
    assert (loaded.config.train.steps, loaded.config.train.epochs) == (None, 2)
    assert [sample.prompt for sample in loaded.config.sample] == ["a cat", "a dog"]
    assert loaded.config.sample[1].guidance == 4.0
    assert loaded.config.train.ema is not None
    assert loaded.origins["train.steps"] == "command line"


def test_plugin_file(run_file: Path, tmp_path: Path) -> None:
    Path("mine.py").write_text(ADAPTER)
    loaded = load_config(run_file, ["adapter.type=mine"], plugin_files=[tmp_path / "mine.py"])
    assert loaded.config.adapter.rank == 8
    with pytest.raises(ConfigError, match="gone.py"):
        load_config(run_file, plugin_files=["gone.py"])


RULE_CASES = {
    "no length": (["train.steps=null"], "the length of the run is missing", "run.toml:4:1"),
    "two lengths": (["train.epochs=2"], "both given", "command line: train.epochs"),
    "adapter and components": (["train.components=['dit', 'clip_l']"], "no effect beside an adapter", "train.components"),
    "rate without encoder": (["adapter.clip_l_lr=1e-5"], "clip_l is not adapted", "adapter.clip_l_lr"),
    "ranks of no file": (["adapter.rank_from_file=true"], "needs a file", "adapter.rank_from_file"),
    "no components": (["adapter=null", "train.components=[]"], "each trained component once", "train.components"),
    "trained encoder cached": (["adapter=null", "train.components=['t5xxl']"], "cannot be cached", "run.toml"),
    "adapter in encoder cached": (["adapter.text_encoders=['t5xxl']"], "cannot be cached", "run.toml"),
    "trained ae cached": (["adapter=null", "train.components=['ae']"], "cannot be cached", "run.toml"),
    "jitter": (["data.0.color_jitter=0.1"], "changes nothing in cached latents", "data.0.color_jitter"),
    "sigma range": (["noise.min_sigma=0.5", "noise.max_sigma=0.5"], "must be below", "noise.min_sigma"),
    "guidance range": (["noise.guidance=[2, 1]"], "(low, high)", "noise.guidance"),
    "density": (["noise.weighting=mode"], "is a density", "noise.weighting"),
    "weighting": (["noise.weighting=cosmap"], "belongs to prediction", "noise.weighting"),
    "custom levels": (["noise.sampling=custom"], "belongs to", "noise.custom"),
    "custom range": (["noise.sampling=custom", "noise.custom=[2.0]"], "at most 1", "noise.custom"),
    "custom as they are": (["noise.sampling=custom", "noise.custom=[0.5]", "noise.min_sigma=0.1"], "as they are", "noise.custom"),
    "auto shift": (["noise.auto_shift=true", "noise.sampling=sigma"], "no effect", "noise.auto_shift"),
    "rules without name": (["schedule.rules='1:5,2'"], 'has no effect on schedule "constant"', "schedule.rules"),
    "decay without name": (["schedule.decay=5"], 'schedule.decay has no effect on schedule "constant"', "schedule.decay"),
    "timescale without name": (["schedule.timescale=50"], "no effect on schedule", "schedule.timescale"),
    "decay shape without name": (["schedule.decay_shape=cosine"], "no effect on schedule", "schedule.decay_shape"),
    "class without name": (["schedule.path=StepLR"], "no effect on schedule", "schedule.path"),
    "options of no class": (["schedule.options={T_max = 3}"], "no effect on schedule", "schedule.options"),
    "piecewise without rules": (["schedule.name=piecewise_constant"], "needs schedule.rules", "schedule"),
    "imported without class": (["schedule.name=imported"], "needs schedule.path", "schedule"),
    "long warm-up": (["schedule.warmup=101"], "take 101 of 100 steps", "schedule.warmup"),
    "sample size": (["sample.0.width=1000"], "not a multiple of 16. Fix: write 992", "sample.0.width"),
    "negative": (["sample.0.negative=bad"], "no effect while cfg is 1", "sample.0.negative"),
    "bucket step": (["data.0.buckets.step=24"], "not a multiple", "data.0.buckets.step"),
    "bucket order": (["data.0.buckets.min=4096"], "above buckets.max", "data.0.buckets.min"),
    "resolution": (["data.0.resolution=100", "data.0.buckets.enabled=false"], "does not fit", "data.0.resolution"),
    "no separator": (["data.0.captions.shuffle=true", "data.0.captions.separator="], "without a separator", "separator"),
    "colour": (["data.0.color_aug=true"], "changes nothing in cached latents", "data.0.color_aug"),
    "face crop with buckets": (["data.0.face_crop=[2.0, 4.0]"], "one size", "face_crop"),
    "face crop range": (["data.0.face_crop=[4.0, 2.0]", "data.0.buckets.enabled=false"], "(smaller, larger)", "face_crop"),
    "held out, not measured": (["data.0.validation_share=0.1"], "never measured", "run.toml"),
    "seed without share": (["data.0.validation_seed=1", "data.0.validation_share=0"], "no effect", "validation_seed"),
    "only regularisation": (["data.0.regularisation=true"], "all datasets are regularisation", "run.toml:7:1"),
    "no validation pictures": (["validation.every=10"], "no pictures", "run.toml"),
    "no validation": (["validation.share=0.1"], "never measured", "run.toml"),
    "validation levels": (["validation.sigmas=[0.0, 0.5]"], "noise levels above 0", "validation.sigmas"),
    "run inside data": (["run.dir=cats/run"], "lies inside the pictures", "run.dir"),
}


@pytest.mark.parametrize(("overrides", "expected", "where"), RULE_CASES.values(), ids=RULE_CASES)
def test_rules_across_sections(run_file: Path, overrides: list[str], expected: str, where: str) -> None:
    (problem,) = problems(run_file, *overrides)
    assert expected in problem
    assert where in problem[: problem.index(expected)]
    assert ". Fix: " in problem


def test_several_rules_are_reported_together(run_file: Path) -> None:
    assert len(problems(run_file, "train.epochs=2", "sample.0.width=100", "noise.min_sigma=1")) == 3
