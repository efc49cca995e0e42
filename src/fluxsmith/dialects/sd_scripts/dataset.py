"""What to train on -> `[[data]]`: a dataset file, folders named `10_cats`, or a metadata file.

A value comes from the subset, its dataset, `[general]`, the command line, or sd-scripts' default, the first of them that has one.
Subsets of one dataset share their batches (`group`).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fluxsmith.dialects.arguments import nearest
from fluxsmith.dialects.base import Draft
from fluxsmith.dialects.sd_scripts.dataset_keys import KEYS, check_keys, from_options, wrong_kind
from fluxsmith.dialects.sd_scripts.options import read_text_file
from fluxsmith.dialects.sd_scripts.subset import entry
from fluxsmith.errors import DataError

FOLDER_NAME = re.compile(r"(\d+)(?:_(.*))?")


class Subset(NamedTuple):
    """One subset with the tables above it, nearest first, and where it stands."""

    tables: tuple[dict[str, Any], ...]
    number: int  # of its dataset
    where: str


class Values:
    """The values of one subset by inheritance; `values["flip_aug"]`."""

    def __init__(self, draft: Draft, subset: Subset) -> None:
        self.draft = draft
        self.subset = subset

    def __getitem__(self, name: str) -> Any:
        for table in self.subset.tables:
            if table.get(name) is not None:
                return table[name]
        return from_options(self.draft, name)

    @property
    def own(self) -> dict[str, Any]:
        """The subset's own table."""
        return self.subset.tables[0]


def dataset(draft: Draft) -> None:
    """All subsets as entries of `data`."""
    _check_options(draft)
    subsets = list(_subsets(draft))
    counts = [subset.number for subset in subsets]
    entries = []
    for subset in subsets:
        group = f"dataset {subset.number + 1}" if counts.count(subset.number) > 1 else ""
        made = entry(draft, Values(draft, subset), where=subset.where, group=group)
        if made is not None:
            entries.append(made)
    if not entries and not draft.problems:
        draft.refuse(
            draft["dataset_config"] or draft["train_data_dir"] or "--dataset_config", "there is nothing to train on", "add a subset"
        )
    draft.put("data", entries, "--dataset_config")


def _subsets(draft: Draft) -> Iterator[Subset]:
    if draft["dataset_config"]:
        for name in ("train_data_dir", "reg_data_dir", "in_json"):
            if draft.has(name):
                draft.note(f"--{name}", "has no effect beside --dataset_config")
        yield from _from_file(draft, Path(draft["dataset_config"]))
    elif draft["in_json"]:
        table = {"metadata_file": draft["in_json"], "image_dir": draft["train_data_dir"]}
        yield Subset((table,), 0, "--in_json")
    elif draft["train_data_dir"]:
        yield from _from_folders(draft)
    else:
        draft.refuse("--dataset_config", "what to train on is not given", "add --dataset_config FILE.toml (or --train_data_dir DIR)")


def _check_options(draft: Draft) -> None:
    """Values of the command line obey the same rules as those of the file."""
    for name, key in KEYS.items():
        option = key.option or name
        if not draft.has(option) or key.kind in ("size", "range", "bool", "text", "table"):
            continue
        wanted = wrong_kind(key.kind, draft[option])
        if wanted:
            draft.refuse(draft.where(option), f"--{option} = {draft[option]!r} is not {wanted}", f"give {wanted}")


def _from_file(draft: Draft, path: Path) -> Iterator[Subset]:
    file = read_text_file(path, what="the dataset file")
    tree = file.tree if isinstance(file.tree, dict) else {}
    for name in tree:
        if name not in ("general", "datasets"):
            close = nearest(name, ("general", "datasets"))
            draft.refuse(file.place(name), f"{name} is not known", f"write {close}" if close else "the file has [general] and [[datasets]]")
    general = check_keys(draft, file, tree.get("general", {}), "g", ("general",))
    datasets = tree.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        draft.refuse(file.name, "the file has no [[datasets]]", "add [[datasets]] and [[datasets.subsets]]")
        return
    for number, table in enumerate(datasets):
        path_ = ("datasets", number)
        own = check_keys(draft, file, table, "d", path_)
        below = table.get("subsets") if isinstance(table, dict) else None
        if not isinstance(below, list) or not below:
            draft.refuse(file.place(*path_), "this dataset has no subsets", "add [[datasets.subsets]] below it")
            continue
        checked = [check_keys(draft, file, subset, "s", (*path_, "subsets", index)) for index, subset in enumerate(below)]
        if len({"metadata_file" in subset for subset in checked}) > 1:
            fix = "put them into [[datasets]] of their own"
            draft.refuse(file.place(*path_), "subsets with and without metadata_file stand in one dataset", fix)
        for index, subset in enumerate(_without_twins(draft, checked)):
            yield Subset((subset, own, general), number, file.place(*path_, "subsets", index))


def _without_twins(draft: Draft, subsets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first subset of each folder, as in sd-scripts."""
    seen: set[str] = set()
    kept = []
    for subset in subsets:
        folder = subset.get("image_dir")
        if folder and "metadata_file" not in subset and folder in seen:
            draft.note("--dataset_config", f"{folder} stands twice in one dataset: the second one is left out")
            continue
        seen.add(folder or "")
        kept.append(subset)
    return kept


def _from_folders(draft: Draft) -> Iterator[Subset]:
    """`10_cats` below --train_data_dir: repeats and class tokens; the same below --reg_data_dir. A ControlNet takes the folder itself."""
    condition = draft["conditioning_data_dir"] if draft.script == "flux_train_control_net" else None
    if condition:
        yield Subset(({"image_dir": draft["train_data_dir"], "conditioning_data_dir": condition},), 0, "--train_data_dir")
        return
    for option, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        root = Path(draft[option]) if draft[option] else None
        if root is None:
            continue
        if not root.is_dir():
            raise DataError("the folder is not there", where=f"--{option} {root}", fix="check the path")
        found = 0
        for folder in sorted(root.iterdir()):
            match = FOLDER_NAME.fullmatch(folder.name)
            if not folder.is_dir():
                continue
            if match is None or int(match[1]) < 1:
                draft.note(f"--{option}", f"{folder.name} is left out: names begin with the repeats, as 10_{folder.name}")
                continue
            found += 1
            table = {"image_dir": str(folder), "num_repeats": int(match[1]), "class_tokens": match[2] or "", "is_reg": is_reg}
            yield Subset((table,), 0, str(folder))
        if not found:
            draft.refuse(
                draft.where(option), f"{root} has no folders such as 10_cats", "name the folders REPEATS_WORDS, or use --dataset_config"
            )
