"""IP-Adapters of both makers: pictures, scale, branches and schedule have an effect, and what is refused. Numbers: tests/parity."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from net_files import ip_adapter_file, vision_file
from PIL import Image
from small_dit import dit, tokens
from tiny_pipeline import latents, load
from torch._dynamo.testing import CompileCounterWithBackend

from fluxsmith.config.control import Ground
from fluxsmith.controls.ip_adapter import Attended, AttendHook, Config
from fluxsmith.controls.ip_adapter_model import IpAdapter, IpAdapterParams, KeyValue, Kind, our_name
from fluxsmith.errors import ModelFileError
from fluxsmith.generate.pipeline import Pipeline
from fluxsmith.io.header import TensorInfo
from fluxsmith.io.identify_parts import identify_parts
from fluxsmith.models.fill import check_keys, meta, shapes_of
from fluxsmith.models.stream import IpTokens, Window

Draw = Callable[..., Image.Image]
KINDS: tuple[Kind, ...] = ("instantx", "xlabs")
ENCODER = {"instantx": "siglip", "xlabs": "clip"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ip")
    made = {kind: str(ip_adapter_file(folder / f"{kind}.safetensors", kind)) for kind in KINDS}
    made["siglip"] = str(vision_file(folder / "siglip.safetensors", "siglip"))
    return made | {"clip": str(vision_file(folder / "clip.safetensors", "clip"))}


@pytest.fixture(scope="module")
def pipelines(plain_model: Path, files: dict[str, str], picture: Draw) -> dict[str, Pipeline]:
    common = {"type": "ip_adapter", "images": picture(1)}
    return {kind: load(plain_model, {**common, "path": files[kind], "encoder": files[ENCODER[kind]]}) for kind in KINDS}


def drawn(pipeline: Pipeline, *, request: dict[str, Any] | None = None, **options: Any) -> torch.Tensor:
    return latents(pipeline, **(request or {}), controls={"ip_adapter": options})


def differ(*results: torch.Tensor) -> bool:
    return all((a - b).abs().max() > 1e-5 for number, a in enumerate(results) for b in results[:number])


@pytest.mark.ledger("DS-15")
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_their_number_scale_and_span_have_an_effect(kind: Kind, pipelines: dict[str, Pipeline], picture: Draw) -> None:
    pipeline = pipelines[kind]
    one, other = picture(1), picture(2)
    cases = [{"scale": 0.0}, {}, {"scale": 0.5}, {"images": other}, {"images": [one, other]}, {"end": 0.0}, {"start": 1.0}]
    assert differ(*(drawn(pipeline, **case) for case in cases))
    assert torch.allclose(drawn(pipeline, images=[one, one]), drawn(pipeline), atol=1e-5)  # attention to the same thing twice


@pytest.mark.ledger("DS-15")
@pytest.mark.parametrize("kind", KINDS)
def test_the_negative_branch_sees_an_empty_picture_or_nothing(kind: Kind, pipelines: dict[str, Pipeline]) -> None:
    pipeline, guided = pipelines[kind], {"cfg": 3.0, "negative": "blue"}
    zero, none = drawn(pipeline, request=guided), drawn(pipeline, request=guided, negative="none")
    assert differ(zero, none)
    assert torch.equal(drawn(pipeline), drawn(pipeline, negative="none"))
    assert differ(drawn(pipeline, request=guided, scale=0.0), drawn(pipeline, request=guided, scale=0.0, negative="none"))


def test_what_looks_at_pictures_is_not_needed_while_drawing(pipelines: dict[str, Pipeline]) -> None:
    control = pipelines["instantx"].controls[0]
    assert len(control.nets) == 2
    assert control.denoising == ()


def rows(count: int, seed: int = 0) -> list[KeyValue]:
    generator = torch.Generator().manual_seed(seed)
    return [KeyValue(*torch.randn(2, 1, 2, 3, 16, generator=generator)) for _ in range(count)]


def test_two_adapters_add_up_and_leave_nothing_behind() -> None:
    base, own = dit(), tokens()
    stream = base.embed(own)
    first, second = Attended(rows(3), 0.5, after_block=True), Attended(rows(8, 1), 0.7, after_block=False)
    hooks = [*first.hooks(own), *second.hooks(own)]
    for index, count in ((0, 2), (2, 2), (3, 1), (7, 1)):
        seen = stream
        for hook in hooks:
            seen = hook.before(index, seen)
        assert [tokens_.after_block for tokens_ in seen.ip] == [True, False][-count:]
        for hook in reversed(hooks):
            seen = hook.after(index, seen)
        assert seen.ip == ()
    both = base(own, hooks)
    assert differ(base(own), base(own, first.hooks(own)), base(own, second.hooks(own)), both)


def test_scale_is_a_tensor_and_windows_are_all_alike() -> None:
    conditioner = Attended(rows(1), 0.5, after_block=False)
    (hook,) = conditioner.hooks(tokens())
    assert isinstance(hook, AttendHook)
    (ip,) = hook.ip
    assert isinstance(ip, IpTokens)
    assert (ip.scale.shape, float(ip.scale)) == ((), 0.5)
    assert conditioner.tile(Window(0, 0, 2, 2, 4, 4)) is conditioner


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks at it
def test_another_scale_and_another_number_of_pictures_compile_nothing_anew() -> None:
    torch._dynamo.reset()
    counter, base, plain, own, seen = CompileCounterWithBackend("eager"), tiny_run.random_dit(), tiny_run.random_dit(), tokens(), []
    base.single_blocks[0].compile(backend=counter, fullgraph=True, dynamic=True)
    for scale, pictures in ((0.5, 2), (0.7, 3)):
        keys = [KeyValue(one.key.repeat(1, 1, pictures, 1), one.value.repeat(1, 1, pictures, 1)) for one in rows(2)]
        hooks = Attended(keys, scale, after_block=False).hooks(own)
        torch.testing.assert_close(base(own, hooks), plain(own, hooks), atol=1e-5, rtol=0)
        seen.append(counter.frame_count)
    torch._dynamo.reset()
    assert seen == [1, 1]


def problems(**options: Any) -> str:
    config = Config.model_validate({"type": "ip_adapter", **options})
    return "\n".join(map(str, (*config.misfits(Ground()), *config.problems(Ground()))))


def test_what_is_refused_before_weights_are_read(files: dict[str, str], picture: Draw, plain_model: Path, tmp_path: Path) -> None:
    good = {"path": files["instantx"], "encoder": files["siglip"], "images": picture(1)}
    assert problems(**good) == ""
    assert "has no picture" in problems(**{**good, "images": ()})
    assert "has no path" in problems(**{**good, "path": ""})
    assert "google/siglip-so400m-patch14-384" in problems(**{**good, "encoder": ""})
    assert "openai/clip-vit-large-patch14" in problems(**{**good, "path": files["xlabs"], "encoder": ""})
    assert "this is a T5-XXL text encoder" in problems(**{**good, "path": str(plain_model / "t5xxl.safetensors")})
    assert "starts at 0.9 and ends at 0.1" in problems(**good, start=0.9, end=0.1)
    assert "picture cannot be opened" in problems(**{**good, "images": str(tmp_path / "none.png")})


def test_files_that_do_not_go_together(files: dict[str, str], plain_model: Path, tmp_path: Path, picture: Draw) -> None:
    def build(**options: Any) -> Pipeline:
        return load(plain_model, {"type": "ip_adapter", "path": files["instantx"], "encoder": files["siglip"], **options})

    with pytest.raises(ModelFileError, match="a SigLIP image encoder was expected"):
        build(encoder=files["clip"])
    longer = ip_adapter_file(tmp_path / "longer.safetensors", "instantx", layers=5)
    with pytest.raises(ModelFileError, match="for 5 blocks 32 wide, the model has 2 of 32"):
        build(path=str(longer))


def test_the_published_instantx_file_fits(manifests_root: Path) -> None:
    stored = json.loads((manifests_root / "ip-adapter.json").read_text())["tensors"]
    infos = {name: TensorInfo("BF16", tuple(shape), 0, 0) for name, shape in stored.items()}
    identity = identify_parts(infos)
    assert identity is not None
    assert (identity.role, identity.variant) == ("ip_adapter", "instantx")
    shapes = {our_name(name, "instantx"): info.shape for name, info in infos.items()}
    params = IpAdapterParams.from_shapes(shapes, "instantx")
    assert params == IpAdapterParams("instantx", 1152, 128, 4096, 3072, 57)
    check_keys(shapes_of(meta(lambda: IpAdapter(params))), shapes, "ip-adapter.bin")
