"""Layers of an encoder that visit the device: the same results, their weights on the host, places given back."""

import torch
from torch import nn

from fluxsmith.memory.layer_stream import LayerStream, layers_of
from fluxsmith.models.text_encoders import T5Params, T5Text


def encoder() -> T5Text:
    torch.manual_seed(0)
    return T5Text(T5Params(32, 16, 8, 32, 4, 2, 32)).eval().requires_grad_(False)


def ids() -> torch.Tensor:
    return torch.arange(12).view(2, 6)


@torch.no_grad()
def test_streamed_layers_compute_the_same_bits() -> None:
    plain = encoder()(ids())
    model = encoder()
    layers = layers_of(model)
    assert len(layers) == 4
    stream = LayerStream(layers[1:], torch.device("cpu"))
    stream.attach()
    assert all(param.device.type == "meta" for layer in layers[1:] for param in layer.parameters())
    assert all(param.device.type == "cpu" for param in layers[0].parameters())
    for _ in range(2):
        assert torch.equal(model(ids()), plain)
    weights = sum(p.numel() * 4 for layer in layers_of(encoder())[1:] for p in layer.parameters())
    assert stream.host_bytes >= weights


@torch.no_grad()
def test_places_on_the_device_are_given_back() -> None:
    model = encoder()
    plain = encoder()(ids())
    stream = LayerStream(layers_of(model), torch.device("cpu"))
    stream.attach()
    model(ids())
    assert len(stream.lane.slots) == 2
    stream.drop()
    assert not stream.lane.slots
    assert torch.equal(model(ids()), plain)


def test_stacks_within_stacks_count_once() -> None:
    inner = [nn.ModuleList(nn.Linear(2, 2) for _ in range(3)) for _ in range(3)]
    module = nn.ModuleDict({"layers": nn.ModuleList(nn.Sequential(one) for one in inner), "few": nn.ModuleList([nn.Linear(2, 2)])})
    assert layers_of(module) == list(module["layers"])
    assert layers_of(nn.Linear(2, 2)) == []
