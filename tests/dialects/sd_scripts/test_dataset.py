"""Dataset files, folders and metadata -> data entries: inheritance, levels, types, places of mistakes."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

SUBSET = '[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "pictures"\n'


@pytest.fixture
def data(work: Path, command: Callable) -> Callable:
    """Writes the dataset file and gives the entries of `data` (or the command's result with `whole`)."""

    def make(text: str, *words: str, whole: bool = False, script: str = "flux_train_network"):
        (work / "data.toml").write_text(text)
        made = command(*words, script=script)
        return made if whole else made.tree["data"]

    return make


@pytest.mark.ledger("KS-06")
def test_subset_before_dataset_before_general_before_command_line_before_default(data: Callable) -> None:
    text = """
[general]
keep_tokens = 1
flip_aug = true
caption_prefix = "g"
[[datasets]]
resolution = 512
keep_tokens = 2
caption_prefix = "d"
  [[datasets.subsets]]
  image_dir = "a"
  keep_tokens = 3
  flip_aug = false
  [[datasets.subsets]]
  image_dir = "b"
[[datasets]]
resolution = [768, 512]
batch_size = 4
  [[datasets.subsets]]
  image_dir = "a"
"""
    one, two, three = data(text, "--keep_tokens", "9", "--dataset_repeats", "5", "--train_batch_size", "2")
    assert [entry["captions"].get("keep_tokens") for entry in (one, two, three)] == [3, 2, 1]
    assert [entry["captions"]["prefix"] for entry in (one, two, three)] == ["d", "d", "g"]
    assert [entry.get("flip", False) for entry in (one, two, three)] == [False, True, True]
    assert [entry["repeats"] for entry in (one, two, three)] == [5, 5, 5]
    assert [entry["batch_size"] for entry in (one, two, three)] == [2, 2, 4]
    assert three["resolution"] == [768, 512]
    assert three["captions"]["extensions"] == [".caption"]
    assert one["group"] == two["group"]
    assert "group" not in three


@pytest.mark.ledger("KS-38")
def test_each_resolution_has_its_batch_size(data: Callable) -> None:
    entries = data(SUBSET.replace("512", "512\nbatch_size = 4") + SUBSET.replace("512", "1024"))
    assert [(entry["resolution"], entry["batch_size"]) for entry in entries] == [(512, 4), (1024, 1)]


def test_false_stops_the_search(data: Callable) -> None:
    (entry,) = data("[general]\nshuffle_caption = false\n" + SUBSET, "--shuffle_caption")
    assert "shuffle" not in entry["captions"]


@pytest.mark.ledger("KS-40")
@pytest.mark.parametrize("key", ["resize_interpolation", "interpolation_type"])
@pytest.mark.parametrize(
    ("given", "native"), [("bicubic", "bicubic"), ("linear", "bilinear"), ("area", "area"), ("box", "box"), ("cubic", "bicubic")]
)
def test_both_names_of_the_filter(data: Callable, key: str, given: str, native: str) -> None:
    (entry,) = data(SUBSET + f'{key} = "{given}"\n')
    assert entry["interpolation"] == native


@pytest.mark.ledger("KS-39")
def test_a_subset_may_be_held_out(data: Callable) -> None:
    made = data(
        SUBSET + "validation_split = 0.25\n" + SUBSET.replace("pictures", "b") + "validation_split = 1\nvalidation_seed = 3\n", whole=True
    )
    assert [entry["validation_share"] for entry in made.tree["data"]] == [0.25, 1.0]
    assert made.tree["data"][1]["validation_seed"] == 3
    assert made.tree["validation"] == {"every_epochs": 1, "seed": 42, "sigmas": [0.2, 0.4, 0.6, 0.8], "max_batches": 1_000_000}


@pytest.mark.ledger("KS-41")
def test_caption_options(data: Callable) -> None:
    text = """[[datasets]]
resolution = 512
[[datasets.subsets]]
image_dir = "a"
caption_extension = "txt"
class_tokens = "sks cat"
caption_separator = ";"
secondary_separator = ";;;"
shuffle_caption = true
keep_tokens_separator = "|||"
caption_suffix = "end"
caption_dropout_rate = 0.1
caption_dropout_every_n_epochs = 3
caption_tag_dropout_rate = 0.2
token_warmup_min = 2
token_warmup_step = 0.5
enable_wildcard = true
"""
    (entry,) = data(text)
    assert entry["captions"] == {
        "missing": "allow",
        "empty": "error",
        "first_line": False,
        "extensions": [".txt"],
        "trigger": "sks cat",
        "suffix": "end",
        "shuffle_affixes": True,
        "separator": ";",
        "secondary_separator": ";;;",
        "keep_separator": "|||",
        "shuffle": True,
        "wildcards": True,
        "dropout": 0.1,
        "dropout_every_epochs": 3,
        "tag_dropout": 0.2,
        "warmup_min": 2,
        "warmup_steps": 0.5,
    }


@pytest.mark.ledger("KS-42")
def test_pictures_masks_and_roles(data: Callable) -> None:
    text = (
        SUBSET
        + 'num_repeats = 3\nflip_aug = true\ncolor_aug = true\nrandom_crop = true\nalpha_mask = true\nconditioning_data_dir = "masks"\n'
    )
    text += (
        '[[datasets.subsets]]\nimage_dir = "reg"\nis_reg = true\n[datasets.subsets.custom_attributes]\ndiff_output_preservation = true\n'
    )
    one, two = data(text, "--masked_loss", "--prior_loss_weight", "0.5")
    assert {key: one[key] for key in ("repeats", "flip", "color_aug", "crop", "alpha_mask", "mask_dir")} == {
        "repeats": 3,
        "flip": True,
        "color_aug": True,
        "crop": "random",
        "alpha_mask": True,
        "mask_dir": "masks",
    }
    assert (two["regularisation"], two["weight"], two["preserve"]) == (True, 0.5, True)


@pytest.mark.ledger("KS-41")
def test_kept_tags_where_a_caption_has_no_separator(data: Callable) -> None:
    (entry,) = data(SUBSET + 'keep_tokens = 2\nkeep_tokens_separator = "|||"\n')
    assert (entry["captions"]["keep_tokens"], entry["captions"]["keep_separator"]) == (2, "|||")


def test_face_crop(data: Callable) -> None:
    (entry,) = data(SUBSET + "face_crop_aug_range = [2.0, 4.0]\n")
    assert entry["face_crop"] == [2.0, 4.0]


@pytest.mark.ledger("KS-38")
def test_buckets(data: Callable) -> None:
    (entry,) = data(
        SUBSET + "",
        "--enable_bucket",
        "--min_bucket_reso",
        "250",
        "--max_bucket_reso",
        "1000",
        "--bucket_reso_steps",
        "16",
        "--bucket_no_upscale",
    )
    assert entry["buckets"] == {"enabled": True, "min": 240, "max": 1008, "step": 16, "upscale": False}
    (entry,) = data(SUBSET)
    assert entry["buckets"] == {"enabled": False}


def test_left_out_subsets(data: Callable) -> None:
    made = data(
        SUBSET + '[[datasets.subsets]]\nimage_dir = "pictures"\n[[datasets.subsets]]\nimage_dir = "b"\nnum_repeats = 0\n', whole=True
    )
    assert len(made.tree["data"]) == 1
    assert "stands twice" in made.noted
    assert "num_repeats = 0" in made.noted


@pytest.mark.ledger("KS-06")
@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("[general]\nshufle_caption = true\n" + SUBSET, "data.toml:2:1", "write shuffle_caption"),
        ("[generel]\n" + SUBSET, "data.toml:1:1", "write general"),
        (SUBSET + "batch_size = 2\n", "data.toml:5:1", r"move it to \[general\] or \[\[datasets\]\]"),
        ('[general]\nimage_dir = "x"\n' + SUBSET, "data.toml:2:1", r"move it to \[\[datasets.subsets\]\]"),
        (SUBSET + "num_repeats = 1.5\n", "data.toml:5:1", "give a whole number"),
        (SUBSET + "flip_aug = 1\n", "data.toml:5:1", "give true or false"),
        (SUBSET + 'resize_interpolation = "fine"\n', "data.toml:5:1", "give one of lanczos"),
        (SUBSET + "prior_loss_weight = 1.0\n", "data.toml:5:1", "--prior_loss_weight on the command line"),
        (SUBSET + 'conditioning_data_dir = "m"\n', "data.toml:3:3|data.toml:3:1", "add --masked_loss"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'a'\n", "data.toml:2", "add resolution"),
        ("[[datasets]]\nresolution = 512\n", "data.toml:1:1", "add"),
        ("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nnum_repeats = 2\n", "data.toml:3", "add image_dir"),
        (SUBSET + '[[datasets.subsets]]\nmetadata_file = "m.json"\n', "data.toml:1:1", "of their own"),
        ("[general]\nenable_bucket = true\n" + SUBSET.replace("512", "2048"), "data.toml:5", "max_bucket_reso = 4096"),
        ("[general]\nenable_bucket = true\nbucket_reso_steps = 24\n" + SUBSET, "data.toml:6", "16, 32 or 64"),
        (SUBSET.replace("512", "500"), "data.toml:3", "enable_bucket = true"),
        ("", "data.toml", r"add \[\[datasets\]\]"),
    ],
)
def test_mistakes(data: Callable, text: str, place: str, says: str) -> None:
    made = data(text, whole=True)
    assert re.search(says, made.refused)
    assert re.search(place, made.refused)


@pytest.mark.parametrize(
    ("key", "words", "says"),
    [
        ("shuffle_caption = true", ["--cache_text_encoder_outputs"], "shuffle_caption makes captions that cannot be cached"),
        ("enable_wildcard = true", ["--cache_text_encoder_outputs_to_disk"], "enable_wildcard makes captions"),
        ("color_aug = true", ["--cache_latents"], "color_aug and cached latents exclude"),
        ("random_crop = true", ["--cache_latents_to_disk"], "random_crop and cached latents exclude"),
        ("face_crop_aug_range = [1.0, 2.0]", ["--enable_bucket"], "face_crop_aug_range needs one size"),
    ],
)
def test_options_that_exclude_each_other(data: Callable, key: str, words: list[str], says: str) -> None:
    assert says in data(SUBSET + key + "\n", *words, whole=True).refused


def test_dropout_goes_with_cached_text(data: Callable) -> None:
    """sd-scripts refuses it; here the empty caption is cached too."""
    assert data(SUBSET + "caption_dropout_rate = 0.1\n", "--cache_text_encoder_outputs", whole=True).problems == []


def test_folders_with_repeats(work: Path, command: Callable) -> None:
    for name in ("tr/10_sks cat", "tr/notes", "re/1_cat"):
        (work / name).mkdir(parents=True)
    made = command("--dataset_config", "", "--train_data_dir", "tr", "--reg_data_dir", "re", "--resolution", "512,768")
    one, two = made.tree["data"]
    assert (one["path"], one["repeats"], one["captions"]["trigger"], one["resolution"]) == ("tr/10_sks cat", 10, "sks cat", [512, 768])
    assert (two["regularisation"], two["weight"], one["group"]) == (True, 1.0, two["group"])
    assert "notes is left out" in made.noted


def test_metadata_file(work: Path, command: Callable) -> None:
    made = command("--dataset_config", "", "--in_json", "m.json", "--train_data_dir", "pictures", "--resolution", "512")
    (entry,) = made.tree["data"]
    assert (entry["type"], entry["metadata_file"], entry["path"]) == ("metadata", "m.json", "pictures")
    assert "extensions" not in entry["captions"]


def test_json_dataset_file(work: Path, command: Callable) -> None:
    (work / "data.json").write_text(json.dumps({"datasets": [{"resolution": 512, "subsets": [{"image_dir": "a"}]}]}))
    (entry,) = command("--dataset_config", "data.json").tree["data"]
    assert entry["path"] == "a"


@pytest.mark.ledger("KS-54")
def test_condition_pictures_of_a_controlnet(data: Callable) -> None:
    text = SUBSET + 'conditioning_data_dir = "edges"\n'
    made = data(text, whole=True, script="flux_train_control_net")
    assert made.tree["data"][0]["condition_dir"] == "edges"
    assert "condition pictures are missing" in data(SUBSET, whole=True, script="flux_train_control_net").refused
