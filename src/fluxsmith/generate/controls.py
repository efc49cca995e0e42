"""Controls around a picture: which act, whether they go together, and what each makes ready before the first step.

`check(configs, ground)` needs no weights; `chosen(pipeline's controls, request)` puts a request's own pictures in.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fluxsmith.config.choice import realise
from fluxsmith.config.control import ControlConfig, Ground
from fluxsmith.config.load import load_control
from fluxsmith.config.section import PluginConfig
from fluxsmith.controls.base import Control, Prepared, Scene, Site
from fluxsmith.errors import ConfigError, Problem
from fluxsmith.generate.request import Request
from fluxsmith.io.identify import identify
from fluxsmith.io.shards import read_model_header
from fluxsmith.io.sources import resolve
from fluxsmith.models.family.base import FamilyFacts
from fluxsmith.models.files import ModelFiles, locate
from fluxsmith.models.stream import Conditioner

IMPLIED = {384: "fill", 196: "flex2"}  # input features of a transformer -> the control without which it cannot be called
ALONE = "step1x"  # the family whose transformer knows no other text than its connector's
WIDENING = "img_in.lora_A.weight"  # what only BFL's control LoRAs have
NEEDS = {128: ("structure", "a canny or depth picture"), **{width: (name, "") for width, name in IMPLIED.items()}}


class Branches(NamedTuple):
    """Conditioners of the two branches of guidance."""

    positive: list[Conditioner]
    negative: list[Conditioner]


@dataclass(frozen=True)
class Wanted:
    """A request's controls, loaded and with the pictures it gives."""

    controls: Sequence[Control] = field(default_factory=tuple)

    def prepare(self, scene: Scene) -> Branches:
        """Every control made ready; encoders run here."""
        made: list[Prepared] = [control.prepare(scene) for control in self.controls]
        return Branches([one.positive for one in made], [one.negative for one in made])

    @property
    def nets(self) -> list[Any]:
        """Networks that every forward uses, each once."""
        return list({id(net): net for control in self.controls for net in control.denoising}.values())


def chosen(controls: Sequence[Control], request: Request, ground: Ground) -> Wanted:
    """The controls with what the request gives them. Raises ConfigError with everything that does not go together."""
    by_name = {control.name: control for control in controls}
    unknown = [name for name in request.controls if name not in by_name]
    if unknown:
        known = ", ".join(by_name) or "none"
        raise ConfigError(
            f"no control is called {unknown[0]}", why=f"loaded are: {known}", fix="load it with the pipeline, or correct the name"
        )
    made = [one.given(**request.controls[one.name]) if one.name in request.controls else one for one in controls]
    if request.control_image is not None:
        made = [one.given(image=request.control_image) if "image" in type(one.config).model_fields else one for one in made]
    check([one.config for one in made], ground)
    return Wanted(made)


def control_section(entry: ControlConfig | Mapping[str, Any]) -> ControlConfig:
    """A `[[control]]` section from a dict with its keys. Raises ConfigError that names what is wrong."""
    return entry if isinstance(entry, ControlConfig) else load_control(entry)


def ground_of(files: ModelFiles, facts: FamilyFacts) -> Ground:
    """What the header of the transformer's file tells. Raises ConfigError where only one of file and model section is Step1X-Edit's."""
    found = identify(files.path("dit"))
    if found.family != facts.name and ALONE in (found.family, facts.name):
        fix = f'write model.type = "{found.family}"' if found.family in (ALONE, "flux1", "chroma") else "give the right file"
        raise ConfigError(f"this is {found.describe()}, and model.type is {facts.name}", where=str(files.path("dit")), fix=fix)
    channels = int(found.sizes.get("in_channels") or 64)
    return Ground(family=facts.name, in_channels=channels, roles=facts.roles, implies=facts.implies)


def widened(ground: Ground, loras: Iterable[str | Path]) -> Ground:
    """The ground with these LoRAs on the transformer: BFL's control LoRAs give it more input features."""
    for path in loras:
        first = read_model_header(resolve(path, "lora")).tensors.get(WIDENING)
        if first is not None and len(first.shape) == len(("rank", "in")) and first.shape[1] > ground.in_channels:
            ground = ground._replace(in_channels=first.shape[1])
    return ground


def with_implied(configs: Sequence[ControlConfig], ground: Ground) -> list[ControlConfig]:
    """The controls, and those that this transformer or its family always has; one that is given takes its files from the family's."""
    name = implied(configs, ground.in_channels)
    made = [*configs, *([control_section({"type": name})] if name else [])]
    kind = ground.implies.get("type")
    if kind and all(config.type != kind for config in made):
        made.append(control_section(ground.implies))
    return named([_with_files(config, ground.implies) if config.type == kind else config for config in made])


def _with_files(config: ControlConfig, files: Mapping[str, Any]) -> ControlConfig:
    given = config.model_dump()
    return config.model_copy(update={key: value for key, value in files.items() if not given[key] or given[key] == "auto"})


def masks_attention(configs: Iterable[ControlConfig]) -> bool:
    """Does any of them need an attention kernel that takes masks?"""
    return any(type(realise(config)).masks_attention for config in configs)


def check_early(
    model: PluginConfig, controls: Sequence[ControlConfig], requests: Sequence[Request], *, loras: Sequence[tuple[str | Path, float]] = ()
) -> None:
    """Raise one ConfigError with everything about the controls of these requests that cannot work; only headers are read."""
    ground = widened(ground_of(locate(model), realise(model).facts()), [path for path, weight in loras if weight])
    entries = with_implied(named(controls), ground)
    for request in requests:
        check(entries, with_request(ground, request))


def with_request(ground: Ground, request: Request) -> Ground:
    """The ground of one picture."""
    return ground._replace(width=request.width, height=request.height, cfg=request.cfg, has_image=request.image is not None)


def check(configs: Sequence[ControlConfig], ground: Ground, *, pictures: bool = True) -> None:
    """Raise one ConfigError with everything that cannot work, before any weight is read. `pictures`: a request is known too."""
    problems = [*_twins(configs), *needed(configs, ground, may_widen=not pictures)]
    for index, config in enumerate(configs):
        others = tuple(other.type for place, other in enumerate(configs) if place != index)
        real, seen = realise(config), ground._replace(others=others)
        problems += real.misfits(seen)
        problems += real.problems(seen) if pictures else ()
    if problems:
        raise ConfigError(str(problems[0]), problems=tuple(dict.fromkeys(problems)))


def implied(configs: Iterable[ControlConfig], in_channels: int) -> str:
    """The control that this transformer always has, where none is given; it then works without a picture."""
    name = IMPLIED.get(in_channels, "")
    return "" if any(config.type == name for config in configs) else name


def needed(configs: Sequence[ControlConfig], ground: Ground, *, may_widen: bool = False) -> Iterator[Problem]:
    """Controls and transformer must agree on the features of an image token; a control LoRA that is still to come `may_widen` it."""
    types = {config.type for config in configs}
    name, what = NEEDS.get(ground.in_channels, ("", ""))
    if what and name not in types:
        yield Problem(
            f"this transformer needs {what}", why=f"it takes {ground.in_channels} features a token", fix=f'add [[control]] type = "{name}"'
        )
    for width, (other, _) in NEEDS.items():
        if other in types and ground.in_channels != width and not (may_widen and other == "structure"):
            why = f"this one takes {ground.in_channels} features a token, not {width}"
            fix = "use that model, or its control LoRA" if other == "structure" else "use that model, or remove the control"
            yield Problem(f"control {other} needs a transformer made for it", why=why, fix=fix)


def _twins(configs: Sequence[ControlConfig]) -> Iterator[Problem]:
    names = [config.name or config.type for config in configs]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield Problem(
            f"two controls are called {name}", why="requests and messages could not tell them apart", fix="give each a name of its own"
        )


def named(configs: Sequence[ControlConfig]) -> list[ControlConfig]:
    """The same with a name for each that has none: its type, with a number from the second on."""
    made: list[ControlConfig] = []
    for config in configs:
        same = sum(other.type == config.type for other in made)
        name = config.name or (config.type if not same else f"{config.type}-{same + 1}")
        made.append(config.model_copy(update={"name": name}))
    return made


def build(configs: Sequence[ControlConfig], site: Site) -> list[Control]:
    """The controls, each network loaded once."""
    return [realise(config).build(site) for config in configs]
