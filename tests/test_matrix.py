"""Every plug-in, found by listing its folder, goes through the contract of its kind: a new file is tested before its author writes a test.

What a plug-in cannot do without (a guidance range for distillation) stands in NEEDS.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import tiny_run as small_models
import torch
from PIL import Image
from pydantic_core import PydanticUndefined
from torch import Tensor, nn

from fluxsmith import events
from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.formats.files import FORMATS, Format, read_adapter, write_adapter
from fluxsmith.adapters.load import load_adapter
from fluxsmith.config.choice import config_class, literal, plugin_names, realise
from fluxsmith.config.dump import to_toml
from fluxsmith.config.load import load_config, load_model
from fluxsmith.config.section import PluginConfig
from fluxsmith.errors import ConfigError, ModelFileError
from fluxsmith.events import Bus
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.generate.request import Request
from fluxsmith.io.safetensors import open_weights, save_weights
from fluxsmith.models.assembly import Level, Models, velocity
from fluxsmith.models.family import flux1
from fluxsmith.optim.groups import Group
from fluxsmith.train.checkpoint import join_optimizer, split_optimizer
from fluxsmith.train.distributed import World
from fluxsmith.train.run import train
from fluxsmith.train.setup import Parts, build

Make = Callable[..., dict[str, Any]]

PLACES = {  # section of a run -> folder of its plug-ins
    "model": "fluxsmith.models.family",
    "adapter": "fluxsmith.adapters",
    "optim": "fluxsmith.optim",
    "objective": "fluxsmith.train.objectives",
    "data": "fluxsmith.data.sources",
    "sinks": "fluxsmith.train.sinks",
}
LISTS = ("data", "sinks")
PLUGINS = [(section, name) for section, package in PLACES.items() for name in plugin_names(package)]
NEEDS: dict[tuple[str, str], dict[str, Any]] = {
    ("objective", "guidance"): {"noise.guidance": [1.0, 4.0], "adapter": None},
    ("objective", "reconstruction"): {"cache.latents": "off", "train.components": ["ae"], "adapter": None},
    ("objective", "flow"): {"adapter": None},
}


ADAPTERS: dict[str, dict[str, Any]] = {  # how wide an adapter is in these tests; butterflies need even blocks in every layer
    "boft": {"rank": 96},
    "oft": {"constraint": 0.1},
    "loha": {"alpha": 64},  # products of four small numbers
}
FORMATS_OF = {  # formats that hold a whole adapter of a kind; the others must refuse it
    "lora": set(FORMATS) - {"xlabs"},
    "dora": set(FORMATS) - {"xlabs", "bfl_control", "diffsynth"},
    "loha": {"kohya", "comfy", "lycoris", "ai_toolkit", "onetrainer"},
    "full": {"kohya", "comfy", "lycoris", "ai_toolkit", "onetrainer"},
    "ia3": {"kohya", "comfy", "lycoris", "ai_toolkit", "onetrainer"},
    "glora": {"kohya", "comfy", "lycoris", "ai_toolkit", "onetrainer"},
    "lokr": {"kohya", "comfy"},  # its blocks go over the borders of q, k and v in the tiny model
    "diag_oft": {"kohya", "comfy", "lycoris", "ai_toolkit", "onetrainer"},
    "boft": {"kohya", "comfy"},
    "oft": {"kohya"},
}

GIVEN: dict[tuple[str, str], dict[str, Any]] = {("optim", "imported"): {"path": "torch.optim.AdamW"}}
QUICKER: dict[tuple[str, str], dict[str, Any]] = {  # they find their rate, or begin late: three steps shall be seen in bf16
    ("prodigy", ""): {"d0": 1.0},
    ("prodigy_plus", ""): {"d0": 1.0},
    **{("dadapt", name): {"d0": 1.0} for name in ("adam", "adagrad", "lion", "sgd", "adan", "adan_ip", "adam_preprint")},
    ("schedulefree", "radam"): {"silent_sgd_phase": False},
}


def variants(section: str, name: str) -> list[dict[str, Any]]:
    """The plug-in with its defaults, and once for each other value of its `name` or `preset`."""
    fields = config_class(PLACES[section], name).model_fields
    made: list[dict[str, Any]] = [{"type": name, **GIVEN.get((section, name), {})}]
    for key in ("name", "preset"):
        choice = fields[key].annotation if key in fields else None
        if get_origin(choice) is Literal:
            made = [{"type": name, key: value} for value in get_args(choice)]
    return made


FOR_DRAWING = ("step1x", "nexus_gen")  # families that cannot be trained: tests/controls draws with them
CASES = [(section, values) for section, name in PLUGINS for values in variants(section, name) if name not in FOR_DRAWING]
BY_KIND = {kind: [values for section, values in CASES if section == kind] for kind in PLACES}


def title(value: Any) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.fixture(scope="session")
def family_sections(tiny_section: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Files of a tiny model for each family."""
    chroma = small_models.chroma_model(small_models.write_model(tmp_path_factory.mktemp("chroma")))
    return {"flux1": tiny_section, "chroma": chroma}


@pytest.fixture
def run_values(
    tiny_run: Make, tiny_pictures: Path, tmp_path: Path, family_sections: dict[str, dict[str, str]]
) -> Callable[..., dict[str, Any]]:
    """A run that has the plug-in in its section, with what the plug-in needs."""

    def make(section: str, values: Mapping[str, Any], *, run_dir: str = "run", **changes: Any) -> dict[str, Any]:
        plain = tiny_run(tmp_path / run_dir, {**NEEDS.get((section, values["type"]), {}), **changes})
        given = {**required(section, values["type"], tiny_pictures), **values}
        if section == "model":
            given = {**family_sections[values["type"]], **given}
        plain[section] = [given] if section in LISTS else given
        return plain

    return make


def required(section: str, name: str, folder: Path) -> dict[str, Any]:
    """Plausible values of options that have no default."""
    if (section, name) == ("data", "metadata"):  # a file that lists the pictures of the folder with their captions
        listed = folder.with_name(f"{folder.name}.json")
        listed.write_text(json.dumps({path.name: {"caption": path.with_suffix(".txt").read_text()} for path in folder.glob("*.png")}))
        return {"metadata_file": str(listed), "path": str(folder)}
    made: dict[str, Any] = {}
    for key, field in config_class(PLACES[section], name).model_fields.items():
        if field.default is PydanticUndefined and field.default_factory is None:
            made[key] = str(folder) if field.annotation in (Path, str) else 1
    return made


# ---- all kinds ------------------------------------------------------------------------------------------------------


def test_all_folders_have_plugins() -> None:
    assert {section for section, _ in PLUGINS} == set(PLACES)


@pytest.mark.parametrize(("section", "values"), CASES, ids=title)
def test_configs_survive_toml(run_values: Make, section: str, values: dict[str, Any], tmp_path: Path) -> None:
    config = load_config(run_values(section, values)).config
    path = tmp_path / "again.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    again = load_config(path).config
    assert again == config
    assert to_toml(again) == to_toml(config)


@pytest.mark.parametrize(("section", "values"), CASES, ids=title)
def test_the_checked_config_is_the_real_one(run_values: Make, section: str, values: dict[str, Any]) -> None:
    config = getattr(load_config(run_values(section, values)).config, section)
    light: PluginConfig = config[0] if section in LISTS else config
    real = realise(light)
    assert real.model_dump() == light.model_dump()
    assert set(type(real).model_fields) == set(type(light).model_fields)
    assert callable(getattr(real, "build", None)) or section == "model"


@pytest.mark.parametrize(("section", "name"), PLUGINS)
def test_every_option_is_explained(section: str, name: str) -> None:
    fields = config_class(PLACES[section], name).model_fields
    assert [key for key, field in fields.items() if not field.description] == []


BESIDE = [(package, name) for package in ("fluxsmith.controls", "fluxsmith.quant") for name in plugin_names(package)]


@pytest.mark.parametrize(("package", "name"), BESIDE)
def test_what_stands_beside_a_model_is_explained_and_checked_as_it_is(package: str, name: str) -> None:
    light = config_class(package, name)
    required_values = {key: "x" for key, field in light.model_fields.items() if field.is_required()}
    real = realise(light.model_validate({"type": name, **required_values}))
    assert set(type(real).model_fields) == set(light.model_fields)
    assert [key for key, field in light.model_fields.items() if not field.description] == []
    assert callable(getattr(real, "build" if package.endswith("controls") else "require"))


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", BY_KIND["model"], ids=title)
def test_families_load_and_draw(family_sections: dict[str, dict[str, str]], values: dict[str, Any]) -> None:
    section = load_model({"model": {**family_sections[values["type"]], **values}})
    defaults = realise(section).sampling_defaults()
    assert {"steps", "guidance", "shift", "side"} <= set(defaults) <= {"steps", "guidance", "cfg", "shift", "side"}
    pipeline = Pipeline.load(section, device="cpu")
    picture = pipeline.generate(Request("a red circle", width=16, height=16, steps=1))
    assert picture.image.size == (16, 16)


@pytest.mark.parametrize("values", [values for name in FOR_DRAWING for values in variants("model", name)], ids=title)
def test_families_for_drawing_are_told_apart_and_refused_in_training(values: dict[str, Any], tiny_run: Make, tmp_path: Path) -> None:
    light = load_model({"model": values})
    real = realise(light)
    assert real.model_dump() == light.model_dump()
    assert set(type(real).model_fields) == set(type(light).model_fields)
    assert {"steps", "guidance", "cfg", "shift", "side"} == set(real.sampling_defaults())
    assert real.facts().implies["type"] == values["type"]
    with pytest.raises(ConfigError, match=values["type"]):
        load_config({**tiny_run(tmp_path / "run"), "model": values})


def test_presets_name_real_options(run_values: Make) -> None:
    """`load_config` refuses a preset whose defaults are no options."""
    for name in sorted(set(plugin_names(PLACES["model"])) - set(FOR_DRAWING)):
        presets = literal(Path(str(flux1.__file__)).with_name(f"{name}.py"), "PRESETS")
        for preset, content in presets.items():
            plain = run_values("model", {"type": name, "preset": preset}, sample=[{"prompt": "a"}], **{"data.0.resolution": None})
            origins = load_config(plain).origins
            assert {origins[key.replace("*", "0")] for key in content["defaults"]} <= {f"preset {name}/{preset}"}


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tiny_section: dict[str, str]) -> Models:
    return Pipeline.load(load_model({"model": tiny_section}), device="cpu").models


@pytest.fixture
def adapted(models: Models) -> Callable[[dict[str, Any]], tuple[Models, AdapterSet]]:
    """A copy of the models with the adapter on it, its values random."""

    def make(values: dict[str, Any]) -> tuple[Models, AdapterSet]:
        own = copy.deepcopy(models)
        config = config_class(PLACES["adapter"], values["type"]).model_validate({**values, "rank": 2, **ADAPTERS.get(values["type"], {})})
        adapters = realise(config).build(own.loaded(), seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for param in adapters.params.values():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
        for module in adapters.modules:
            module.eval()
        return own, adapters

    return make


@torch.no_grad()
def output(models: Models) -> Tensor:
    assert models.dit is not None
    latents = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    return velocity(models.dit, latents, models.encode_text(["a red circle"]), Level(torch.tensor([0.5]), torch.tensor([2.0])))


@pytest.mark.parametrize("values", BY_KIND["adapter"], ids=title)
class TestAdapters:
    def test_it_starts_as_the_base(self, models: Models, values: dict[str, Any]) -> None:
        own = copy.deepcopy(models)
        config = config_class(PLACES["adapter"], values["type"]).model_validate({**values, **ADAPTERS.get(values["type"], {})})
        adapters = realise(config).build(own.loaded(), seed=1)
        for module in adapters.modules:
            module.eval()
        assert torch.allclose(output(own), output(models), atol=1e-5)

    def test_forward_equals_merge(self, models: Models, adapted: Any, values: dict[str, Any]) -> None:
        own, adapters = adapted(values)
        forward = output(own)
        assert (forward - output(models)).abs().max() > 1e-2
        adapters.merge()
        assert torch.allclose(output(own), forward, atol=1e-4)

    def test_strength_disabling_and_detaching(self, models: Models, adapted: Any, values: dict[str, Any]) -> None:
        own, adapters = adapted(values)
        base, forward = output(models), output(own)
        with adapters.disabled():
            assert torch.allclose(output(own), base, atol=1e-5)
        assert torch.equal(output(own), forward)
        adapters.scale(0.0)
        assert torch.allclose(output(own), base, atol=1e-5)
        adapters.scale(1.0)
        assert torch.equal(output(own), forward)
        adapters.detach()
        assert torch.equal(output(own), base)

    @pytest.mark.parametrize("format", FORMATS)
    def test_files_hold_it_all(self, models: Models, adapted: Any, values: dict[str, Any], format: Format, tmp_path: Path) -> None:
        own, adapters = adapted(values)
        path, fitting = tmp_path / "a.safetensors", FORMATS_OF[values["type"]]
        if format not in fitting:
            with pytest.raises(ModelFileError, match=r"Fix: |diffusers has no layer"):
                write_adapter(path, adapters.state(), format=format, dtype=torch.float32)
            return
        verdict = write_adapter(path, adapters.state(adapters.params), format=format, dtype=torch.float32)
        if values["type"] == "lora" and format in ("kohya", "peft"):
            assert verdict.loads_in
            assert not verdict.lost.get("diffusers")
        other = copy.deepcopy(models)
        load_adapter(path, other.loaded())
        assert torch.allclose(output(other), output(own), atol=1e-5)

    def test_a_file_goes_back_into_the_adapter_bit_by_bit(self, adapted: Any, values: dict[str, Any], tmp_path: Path) -> None:
        _, adapters = adapted(values)
        path = tmp_path / "a.safetensors"
        write_adapter(path, adapters.state(), dtype=torch.float32)
        _, empty = adapted(values)
        with torch.no_grad():
            for param in empty.params.values():
                param.zero_()
        empty.load(read_adapter(path))
        assert list(empty.params) == list(adapters.params)
        assert [name for name, param in empty.params.items() if not torch.equal(param, adapters.params[name])] == []

    def test_a_run_trains_it(self, run_values: Make, values: dict[str, Any], tmp_path: Path) -> None:
        plain = run_values("adapter", {"rank": 2, **values, **ADAPTERS.get(values["type"], {})}, **{"train.steps": 2})
        train(load_config(plain).config)
        state = read_adapter(tmp_path / "run" / "weights" / "run.safetensors")
        assert any(tensor.any() for layer in state.layers.values() for part in layer.parts for tensor in part.tensors.values())

    def test_gradients_reach_every_tensor_and_nothing_else(self, adapted: Any, values: dict[str, Any]) -> None:
        own, adapters = adapted(values)
        for module in own.loaded().values():
            module.requires_grad_(False)
        for param in adapters.params.values():
            param.requires_grad_(True)
        text = own.encode_text(["a red circle"])
        velocity(own.dit, torch.ones(1, 16, 4, 4), text, Level(torch.tensor([0.5]), torch.tensor([2.0]))).square().mean().backward()
        assert [name for name, param in adapters.params.items() if param.grad is None or not param.grad.any()] == []
        trained = {id(param) for param in adapters.params.values()}
        assert all(param.grad is None for module in own.loaded().values() for param in module.parameters() if id(param) not in trained)

    def test_groups_hold_every_tensor_once(self, adapted: Any, values: dict[str, Any]) -> None:
        _, adapters = adapted(values)
        grouped = [id(param) for group in adapters.groups for param in group.params]
        assert sorted(grouped) == sorted(id(param) for param in adapters.params.values())


# ---- optimizers -----------------------------------------------------------------------------------------------------


def weights(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """A matrix, a bias, a kernel."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"linear.weight": (6, 4), "linear.bias": (6,), "conv.weight": (4, 3, 3, 3)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def steps(params: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Gradients depend on the step alone."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        torch.manual_seed(step)  # stochastic rounding
        optimizer.step()


def built(values: dict[str, Any], params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """With a rate that bf16 can show in three steps: the optimizers of torch lose smaller ones, which is what adamw_bf16 is for."""
    key = (values["type"], values.get("name", ""))
    quicker = {"options": QUICKER[key]} if key in QUICKER else {}
    config = realise(config_class(PLACES["optim"], values["type"]).model_validate({**values, "lr": 0.5, **quicker}))
    factor = 1.0 if config.has_one_rate() else 2.0
    groups = (Group("a", (params["linear.weight"],)), Group("b", (params["linear.bias"], params["conv.weight"]), lr_factor=factor))
    return config.build(groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("values", BY_KIND["optim"], ids=title)
class TestOptimizers:
    def test_steps_move_the_weights(self, values: dict[str, Any], dtype: torch.dtype) -> None:
        params, start = weights(dtype), weights(dtype)
        optimizer = built(values, params)
        has_one_rate = values["type"] == "dadapt"
        assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {"a": 0.5, "b": 0.5 if has_one_rate else 1.0}
        steps(params, optimizer, 0, 3)
        for name, param in params.items():
            assert bool(param.isfinite().all()), name
            assert not torch.equal(param, start[name]), name

    def test_state_goes_through_files_and_the_run_stays_exact(self, values: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
        straight = weights(dtype)
        steps(straight, built(values, straight), 0, 5)
        cut = weights(dtype)
        optimizer = built(values, cut)
        steps(cut, optimizer, 0, 2)
        tensors, numbers = split_optimizer(cut, optimizer)
        save_weights(tmp_path / "optimizer.safetensors", tensors, {})
        resumed = {name: nn.Parameter(param.detach().clone()) for name, param in cut.items()}
        optimizer = built(values, resumed)
        with open_weights(tmp_path / "optimizer.safetensors") as stored:
            join_optimizer(resumed, optimizer, {key: stored.tensor(key) for key in stored}, numbers)
        steps(resumed, optimizer, 2, 5)
        for name, param in resumed.items():
            assert torch.equal(param, straight[name]), name

    def test_a_schedule_that_reaches_0_freezes_the_weights(self, values: dict[str, Any], dtype: torch.dtype) -> None:
        if values.get("name") == "rprop":
            pytest.skip("rprop keeps step sizes of its own, which no schedule reaches")
        params, start = weights(dtype), weights(dtype)
        optimizer = built(values, params)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        steps(params, optimizer, 0, 1)
        assert all(torch.equal(param, start[name]) for name, param in params.items())


# ---- objectives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", BY_KIND["objective"], ids=title)
class TestObjectives:
    @pytest.fixture
    def parts(self, run_values: Make, values: dict[str, Any]) -> Parts:
        return build(load_config(run_values("objective", values)).config, World(torch.device("cpu")), Bus())

    def test_the_loss_is_finite_has_a_gradient_and_is_the_same_twice(self, parts: Parts) -> None:
        assert set(parts.objective.components) <= set(parts.models.loaded())
        (_, spec), *_ = parts.plan.micro_batches(0)
        batch = parts.data.load(spec, step=0)
        first = parts.objective.loss(parts.models, batch, parts.world.device)
        again = parts.objective.loss(parts.models, batch, parts.world.device)
        assert math.isfinite(first.total.item())
        assert first.total.item() > 0
        assert torch.equal(first.total, again.total)
        assert first.per_sample.shape == (len(batch.keys),)
        assert not first.per_sample.requires_grad
        first.total.backward()
        gradients = [param.grad for param in parts.trained.params.values() if param.grad is not None]
        assert gradients
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert any(bool(gradient.any()) for gradient in gradients)
        (_, other), *_ = parts.plan.micro_batches(1)
        assert parts.objective.loss(parts.models, parts.data.load(other, step=1), parts.world.device).total != first.total

    def test_a_cut_run_is_the_straight_one(self, run_values: Make, values: dict[str, Any], tmp_path: Path) -> None:
        for name, lengths in (("straight", (3,)), ("cut", (2, 3))):
            for length in lengths:
                plain = run_values("objective", values, run_dir=name, **{"train.steps": length})
                train(load_config(plain).config, resume=length != lengths[0])
        folders = [tmp_path / name / "state" / "step-000003" for name in ("straight", "cut")]
        for file in ("weights.safetensors", "optimizer.safetensors"):
            assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()


# ---- sources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", BY_KIND["data"], ids=title)
def test_sources_list_the_same_twice_in_order(run_values: Make, values: dict[str, Any]) -> None:
    config = load_config(run_values("data", values)).config.data[0]
    source = realise(config).build()
    first, again = source.listing(), realise(config).build().listing()
    assert first == again
    assert len(first.records) == 8
    keys = [record.key for record in first.records]
    assert keys == sorted(keys, key=str.encode)
    assert len(set(keys)) == len(keys)
    assert all(record.path.is_file() and record.caption for record in first.records)
    assert source.name


# ---- sinks ----------------------------------------------------------------------------------------------------------


def one_of_each(folder: Path) -> list[events.Event]:
    """Every kind of event, found by its class; a run starts first and ends last."""
    Image.new("RGB", (16, 16)).save(folder / "step-000001_p00_s1.png")
    plain: dict[Any, Any] = {int: 1, float: 0.5, str: str(folder / "step-000001_p00_s1.png"), bool: False, dict: {}}
    kinds = [
        kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, events.Event) and kind is not events.Event
    ]
    made = []
    for kind in sorted(kinds, key=lambda kind: (kind is not events.RunStarted, kind in (events.RunEnded, events.RunFailed), kind.__name__)):
        hints = [field.type for field in dataclasses.fields(kind) if not field.kw_only]
        made.append(kind(*[plain[get_origin(hint) or hint] for hint in hints]))
    return made


@pytest.mark.parametrize("values", BY_KIND["sinks"], ids=title)
def test_sinks_take_every_event_and_draw_no_numbers(run_values: Make, values: dict[str, Any], tmp_path: Path) -> None:
    run = load_config(run_values("sinks", values)).config
    sink = realise(run.sinks[0]).build(run)
    assert sink.name
    state = torch.get_rng_state()
    sent = one_of_each(tmp_path)
    assert len(sent) >= 11
    for event in sent:
        sink(event)
    assert torch.equal(torch.get_rng_state(), state)
