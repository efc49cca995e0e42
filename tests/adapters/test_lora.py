"""LoRA's maths against its formula in float64, what dropout does, where factors start, and what a trainer is given."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fluxsmith.adapters.base import AdapterSet
from fluxsmith.adapters.formats.files import read_adapter, write_adapter
from fluxsmith.adapters.formats.state import lora_part
from fluxsmith.adapters.load import load_adapter
from fluxsmith.adapters.lora import Config, LoraPart
from fluxsmith.adapters.rows import LayerAdapter, part_modules
from fluxsmith.errors import ConfigError, ModelFileError, NumericError
from fluxsmith.models.flux import FluxDiT
from fluxsmith.models.linear import Linear
from fluxsmith.models.stream import Tokens

QKV = "dit.double_blocks.0.img_attn.qkv"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fill(adapters: AdapterSet) -> AdapterSet:
    """Factors that do something."""
    with torch.no_grad():
        for param in adapters.params.values():
            param.normal_()
    return adapters


def layer(parts: list[LoraPart], out: int = 12) -> tuple[Linear, LayerAdapter]:
    base = Linear(4, out).double()
    lora = LayerAdapter(parts, out).double()
    base.adapters["x"] = lora
    return base, lora


def part(name: str = "", rows: tuple[int, int] = (0, 12), rank: int = 3, alpha: float = 2.0) -> LoraPart:
    return LoraPart(lora_part(name, *rows, torch.randn(rank, 4), torch.randn(rows[1] - rows[0], rank), alpha))


def test_formula() -> None:
    base, lora = layer([part()])
    only = lora.parts[0]
    assert isinstance(only, LoraPart)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    lora.strength.fill_(0.6)
    wanted = x @ base.weight.T + 0.6 * 2 / 3 * (x @ only.down.T) @ only.up.T + base.bias
    assert (base.eval()(x) - wanted).abs().max() < 1e-12
    assert (lora.delta(base.weight) - 0.6 * 2 / 3 * (only.up @ only.down)).abs().max() < 1e-5


@pytest.mark.parametrize("names", ["qkv", "qv", "v", "k"])
def test_parts_touch_only_their_rows(names: str) -> None:
    rows = {"q": (0, 4), "k": (4, 8), "v": (8, 12)}
    base, lora = layer([part(name, rows[name]) for name in names])
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    difference = base(x) - (x @ base.weight.T + base.bias)
    for name, (start, stop) in rows.items():
        own = next((p for p in lora.parts if isinstance(p, LoraPart) and p.name == name), None)
        wanted = torch.zeros(()) if own is None else 2 / 3 * (x @ own.down.T) @ own.up.T
        assert (difference[..., start:stop] - wanted).abs().max() < 1e-12
    merged = x @ (base.weight + lora.delta(base.weight).double()).T + base.bias
    assert (merged - base(x)).abs().max() < 1e-5


def test_rank_dropout_keeps_whole_ranks_per_sample_and_the_mean() -> None:
    lora = part(rank=64).train()
    lora.dropouts = (0.0, 0.25)
    hidden = lora.drop(torch.ones(200, 7, 64))
    assert sorted(hidden.unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))  # the same ranks for all tokens of a sample
    assert abs(hidden.mean() - 1) < 0.03
    assert lora.drop(torch.ones(3, 64)).shape == (3, 64)  # modulation layers see (B, D)


def test_dropouts_act_in_training_only() -> None:
    for dropouts in ((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)):
        own = part(rank=8)
        base, lora = layer([own])
        own.dropouts, lora.module_dropout = dropouts[:2], dropouts[2]
        x = torch.randn(3, 6, 4, dtype=torch.float64)
        base.eval()
        still = base(x)
        assert torch.equal(still, base(x))
        base.train()
        seen = [base(x) for _ in range(20)]
        assert any(not torch.equal(seen[0], other) for other in seen)
    plain = x @ base.weight.T + base.bias
    assert {torch.allclose(out, plain) for out in seen} == {True, False}  # module dropout skips the whole adapter


def test_dropout_follows_the_global_generator() -> None:
    own = part()
    base, lora = layer([own])
    own.dropouts, lora.module_dropout = (0.3, 0.3), 0.3
    x, outs = torch.randn(2, 4, dtype=torch.float64), []
    for _ in range(2):
        torch.manual_seed(7)
        outs.append(base.train()(x))
    assert torch.equal(*outs)


def test_start_is_the_base(dit: FluxDiT) -> None:
    made = Config(rank=4).build({"dit": dit}, seed=1)
    for name, param in made.params.items():
        if name.endswith("up"):
            assert not param.any()
        else:
            width = param.shape[1]
            assert param.abs().max() <= width**-0.5
            assert param.detach().std() == pytest.approx(width**-0.5 / math.sqrt(3), rel=0.35)


def test_start_is_keyed_by_layer_not_by_order(loaded_models: dict[str, nn.Module], models: dict[str, nn.Module]) -> None:
    alone = Config(rank=4, targets=r"double_blocks\.1\.img_mlp\.2").build({"dit": models["dit"]}, seed=3)
    alone.detach()
    together = Config(rank=4, text_encoders=("clip_l",)).build(models, seed=3)
    together.detach()
    for name, param in alone.params.items():
        assert torch.equal(param, together.params[name])
    other = Config(rank=4).build({"dit": models["dit"]}, seed=4)
    assert not torch.equal(other.params[f"{QKV}.down"], together.params[f"{QKV}.down"])


def test_gaussian_start(dit: FluxDiT) -> None:
    made = Config(rank=8, init="gaussian").build({"dit": dit})
    assert made.params[f"{QKV}.down"].detach().std() == pytest.approx(1 / 8, rel=0.2)


def test_rslora_scale(dit: FluxDiT) -> None:
    made = fill(Config(rank=16, alpha=4, rslora=True, targets=r"0\.img_attn\.qkv").build({"dit": dit}))
    down, up = made.params[f"{QKV}.down"], made.params[f"{QKV}.up"]
    delta = made.adapters[QKV].delta(made.bases[QKV].weight)
    assert torch.allclose(delta, 4 / 4 * (up @ down), atol=1e-4)
    assert made.state().layers[QKV].parts[0].alpha == 16  # alpha / rank of the file is alpha / sqrt(rank)


def test_train_dtype_and_gradients(dit: FluxDiT) -> None:
    made = Config(rank=2, targets="blocks").build({"dit": dit}, dtype=torch.bfloat16)
    assert {param.dtype for param in made.params.values()} == {torch.bfloat16}
    base = made.bases[QKV]
    out = base(torch.randn(1, 3, base.in_features))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert made.params[f"{QKV}.up"].grad is not None


def test_names_are_stable(models: dict[str, nn.Module]) -> None:
    made = Config(split_qkv=True, text_encoders=("clip_l", "t5xxl")).build(models)
    assert {f"{QKV}.q.down", f"{QKV}.v.up", "dit.single_blocks.0.linear1.mlp.up", "dit.single_blocks.0.linear2.down"} <= set(made.params)
    assert "clip_l.text_model.encoder.layers.0.self_attn.q_proj.down" in made.params
    assert "t5xxl.encoder.block.1.layer.1.DenseReluDense.wi_0.up" in made.params


def test_groups(models: dict[str, nn.Module]) -> None:
    config = Config(text_encoders=("clip_l",), clip_l_lr=5e-5, lr_by_pattern={"single_blocks": 1e-3}, loraplus_ratio=16)
    made = config.build(models)
    groups = {group.name: group for group in made.groups}
    assert {(g.name, g.lr, g.lr_factor) for g in made.groups} == {
        ("dit", None, 1.0), ("dit up", None, 16.0), ("dit lr 0.001", 1e-3, 1.0), ("dit lr 0.001 up", 1e-3, 16.0),
        ("clip_l", 5e-5, 1.0), ("clip_l up", 5e-5, 16.0),
    }  # fmt: skip
    assert sum(len(group.params) for group in made.groups) == len(made.params)
    up = made.params["clip_l.text_model.encoder.layers.0.mlp.fc1.up"]
    assert any(param is up for param in groups["clip_l up"].params)


def test_attach_detach_enable(dit: FluxDiT) -> None:
    names = [name for name, _ in dit.named_parameters()]
    made = fill(Config(rank=2).build({"dit": dit}))
    assert [name for name, _ in dit.named_parameters() if ".adapters." not in name] == names
    with pytest.raises(ValueError, match="already has an adapter"):
        made.attach()
    base = made.bases[QKV]
    x = torch.randn(2, base.in_features)
    changed, plain = base(x), x @ base.weight.T + base.bias
    assert not torch.allclose(changed, plain)
    with made.disabled():
        assert torch.allclose(base(x), plain)
    assert torch.equal(base(x), changed)
    made.scale(0.0)
    assert torch.allclose(base(x), plain)
    made.scale(1.0)
    made.detach()
    assert torch.allclose(base(x), plain)


def test_two_sets_add_up(dit: FluxDiT, tmp_path: Path) -> None:
    first = fill(Config(rank=2, targets="attention").build({"dit": dit}))
    write_adapter(tmp_path / "a.safetensors", first.state(), dtype=torch.float32)
    second = load_adapter(tmp_path / "a.safetensors", {"dit": dit}, strength=0.5, name="second")
    base = first.bases[QKV]
    x = torch.randn(2, base.in_features)
    both = base(x)
    second.detach()
    one = base(x)
    first.detach()
    none = base(x)
    assert torch.allclose(both - none, 1.5 * (one - none), atol=1e-4)


def test_merge(dit: FluxDiT) -> None:
    made = fill(Config(rank=2, split_qkv=True).build({"dit": dit}))
    base = made.bases[QKV]
    x = torch.randn(2, base.in_features)
    with torch.no_grad():
        before = base(x)
        made.merge()
        assert torch.allclose(base(x), before, atol=1e-4)
    assert not base.adapters


def test_state_refuses_what_is_not_finite(dit: FluxDiT) -> None:
    made = Config(rank=2).build({"dit": dit})
    with torch.no_grad():
        made.params[f"{QKV}.up"][0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"1 tensors of the adapter are not finite, e\.g\. dit\.double_blocks\.0\.img_attn\.qkv\.up"):
        made.state()


def test_state_of_an_average(dit: FluxDiT) -> None:
    made = Config(rank=2).build({"dit": dit})
    average: dict[str, Tensor] = {name: torch.full_like(param, 3.0) for name, param in made.params.items()}
    assert made.state(average).layers[QKV].parts[0].up.unique().tolist() == [3.0]


def start_file(dit: FluxDiT, path: Path, **options: object) -> dict[str, Tensor]:
    made = fill(Config(**options).build({"dit": dit}, seed=9))
    write_adapter(path, made.state(), dtype=torch.float32)
    deltas = {name: adapter.delta(made.bases[name].weight) for name, adapter in made.adapters.items()}
    made.detach()
    return deltas


def test_init_from(dit: FluxDiT, tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    deltas = start_file(dit, path, rank=3, alpha=2, targets="attention")
    made = Config(rank=3, alpha=6, init_from=path, targets="blocks").build({"dit": dit})
    for name, delta in deltas.items():
        assert torch.allclose(made.adapters[name].delta(made.bases[name].weight), delta, atol=1e-4)  # whatever our alpha is
    assert not made.params["dit.double_blocks.0.img_mlp.0.up"].any()  # not in the file: fresh
    made.detach()
    with pytest.raises(ConfigError, match=r"has rank 3 .* asks for 4.*adapter\.rank = 3"):
        Config(rank=4, init_from=path, targets="attention").build({"dit": dit})
    with pytest.raises(ModelFileError, match="widen adapter.targets"):
        Config(rank=3, init_from=path, targets="mlp").build({"dit": dit})


def test_rank_from_file(dit: FluxDiT, tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    options = {"rank": 3, "alpha": 2, "targets": "attention", "rank_by_pattern": {"txt": 5}, "dropout": 0.1}
    deltas = start_file(dit, path, **options)
    made = Config(rank_from_file=True, init_from=path, dropout=0.2).build({"dit": dit})
    assert set(made.adapters) == set(deltas)
    assert made.params[f"{QKV}.down"].shape[0] == 3
    assert made.params["dit.double_blocks.0.txt_attn.qkv.down"].shape[0] == 5
    assert all(isinstance(own, LoraPart) and own.dropouts == (0.2, 0.0) for own in part_modules(made))


def test_adapter_of_another_size_is_refused(dit: FluxDiT, tmp_path: Path, fixtures_root: Path) -> None:
    with pytest.raises(ModelFileError, match="model of another size"):
        load_adapter(fixtures_root / "lora-encoder-tiny/lora_a_kohya.safetensors", {"dit": dit})
    with pytest.raises(ModelFileError, match="the model has no such layers"):
        load_adapter(fixtures_root / "text-encoder-lora-tiny/kohya.safetensors", {"dit": dit})
    assert read_adapter(fixtures_root / "lora-encoder-tiny/lora_a_kohya.safetensors").layers


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's compiler hides it by itself, unless errors
def test_blocks_compile_whole_and_a_new_strength_compiles_nothing(dit: FluxDiT, fixtures_root: Path) -> None:
    inputs = load_file(fixtures_root / "flux-dev-tiny/inputs.safetensors")
    tokens = Tokens(*(inputs[name] for name in ("img", "img_ids", "txt", "txt_ids", "y", "timesteps", "guidance")))
    made = Config(rank=4, split_qkv=True, targets="attention", alpha_by_pattern={r"\.1\.": 2.0}).build({"dit": dit})
    with torch.no_grad():
        for param in made.params.values():
            param.normal_(std=0.1)
    wanted = dit(tokens)
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    for block in dit.blocks:
        block.compile(fullgraph=True, backend=backend, dynamic=False)
    assert torch.allclose(dit(tokens), wanted, atol=1e-5)
    before = len(graphs)
    made.scale(0.5)
    assert not torch.allclose(dit(tokens), wanted)
    assert len(graphs) == before
