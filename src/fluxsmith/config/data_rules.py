"""Rules about datasets: options of one that need or exclude each other, and what several have to agree in.

`data_findings(datasets, cache)` is asked when a config is loaded, and again by `data/dataset.prepare` with the caches that are wanted.
"""

from collections.abc import Callable, Iterator, Sequence

from fluxsmith.config.dataset import DatasetConfig
from fluxsmith.config.finding import Finding
from fluxsmith.config.schema import CacheConfig

Numbered = Sequence[tuple[int, DatasetConfig]]  # place in `data`, options
SHARED = ("resolution", "batch_size", "buckets")  # what the datasets of a group have in common


def data_findings(datasets: Numbered, cache: CacheConfig) -> Iterator[Finding]:
    """All broken rules."""
    for rule in RULES:
        yield from rule(datasets)
    if cache.latents != "off":
        yield from _color(datasets)


def _color(datasets: Numbered) -> Iterator[Finding]:
    """A cached latent has one colour."""
    for index, data in datasets:
        for name, is_on in (("color_jitter", data.color_jitter > 0), ("color_aug", data.color_aug)):
            if is_on:
                what = f"{name} changes nothing in cached latents"
                yield Finding(("data", index, name), what, f'write cache.latents = "off", or remove {name}')


def _groups(datasets: Numbered) -> Iterator[Finding]:
    """Pictures of one batch have one size, and batches have one length."""
    firsts: dict[str, tuple[int, DatasetConfig]] = {}
    for index, data in datasets:
        if not data.group:
            continue
        place, first = firsts.setdefault(data.group, (index, data))
        for name, one, other in zip(SHARED, _shared(first), _shared(data), strict=True):
            if one != other:
                what = f'data.{place} and data.{index} share batches (group "{data.group}") and differ in {name}'
                yield Finding(("data", index, name), what, f"write the same {name} in both, or another group", f"{one} and {other}")
        if bool(first.condition_dir) != bool(data.condition_dir):
            what = f'data.{place} and data.{index} share batches (group "{data.group}"), and only one has condition pictures'
            yield Finding(("data", index, "condition_dir"), what, "give both a condition_dir, or another group")


def _shared(data: DatasetConfig) -> tuple[object, ...]:
    resolution = (data.resolution, data.resolution) if isinstance(data.resolution, int) else data.resolution
    return resolution, data.batch_size, data.buckets


def _face_crop(datasets: Numbered) -> Iterator[Finding]:
    """A crop around a face has one size."""
    for index, data in datasets:
        if data.face_crop is None:
            continue
        low, high = data.face_crop
        if not 0 < low <= high:
            what = f"face_crop = [{low:g}, {high:g}] is not (smaller, larger)"
            yield Finding(("data", index, "face_crop"), what, "write two factors above 0, for example [2.0, 4.0]")
        if data.buckets.enabled:
            yield Finding(("data", index, "face_crop"), "face_crop needs one size for all pictures", "write buckets.enabled = false")


def _validation(datasets: Numbered) -> Iterator[Finding]:
    """Pictures that are only there to keep what the model knows are not measured; a seed needs a share."""
    for index, data in datasets:
        if data.regularisation and data.validation_share:
            what = "regularisation pictures are not held out"
            yield Finding(("data", index, "validation_share"), what, "remove validation_share, or regularisation")
        if data.validation_seed is not None and (data.regularisation or data.validation_share == 0):
            what = "validation_seed has no effect: nothing of this dataset is held out"
            yield Finding(("data", index, "validation_seed"), what, "remove it, or write validation_share = 0.1")


def _something_to_learn(datasets: Numbered) -> Iterator[Finding]:
    if datasets and all(data.regularisation for _, data in datasets):
        yield Finding(("data",), "all datasets are regularisation", "remove regularisation = true from the pictures to learn")


RULES: tuple[Callable[[Numbered], Iterator[Finding]], ...] = (_groups, _face_crop, _validation, _something_to_learn)
