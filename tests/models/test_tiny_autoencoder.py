"""The tiny autoencoder: sizes read from tensors, both file layouts, and the names that lead from one to the other."""

from pathlib import Path

import pytest
import torch

from fluxsmith.errors import ModelFileError
from fluxsmith.io.safetensors import save_weights
from fluxsmith.models.load import load_ae
from fluxsmith.models.tiny_autoencoder import TinyAutoEncoder, TinyAutoEncoderParams, bfl_name

PARAMS = TinyAutoEncoderParams(8, 16, (1, 2, 1), (2, 1, 1))


def model() -> TinyAutoEncoder:
    torch.manual_seed(0)
    return TinyAutoEncoder(PARAMS).eval()


def test_sizes_are_read_from_shapes() -> None:
    shapes = {key: tuple(value.shape) for key, value in model().state_dict().items()}
    assert TinyAutoEncoderParams.from_shapes(shapes) == PARAMS
    with pytest.raises(ModelFileError, match=r"decoder\.layers\.0"):
        TinyAutoEncoderParams.from_shapes({key: shape for key, shape in shapes.items() if key.startswith("encoder")})


@torch.no_grad()
def test_shapes_and_squeezing() -> None:
    ae = model()
    assert ae.reduction == 4
    latents = ae.encode(torch.rand(2, 3, 16, 24) * 2 - 1)
    assert latents.shape == (2, 16, 4, 6)
    assert ae.decode(latents).shape == (2, 3, 16, 24)
    torch.testing.assert_close(ae.decode(latents * 0 + 1000), ae.decode(latents * 0 + 2000), msg="3 tanh(z / 3) bounds large latents")
    with pytest.raises(ValueError, match="posterior"):
        ae.encode(torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 4, 4))


def two_files(ae: TinyAutoEncoder) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """As in the two-file release: no `layers.`, and the decoder counts from 1 because the squeezing is its first layer."""
    halves: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
    for key, value in ae.state_dict().items():
        part, _, rest = key.partition(".layers.")
        index, _, leaf = rest.partition(".")
        halves[part == "decoder"][f"{int(index) + (part == 'decoder')}.{leaf}"] = value
    return halves


@torch.no_grad()
def test_names_of_the_two_file_release() -> None:
    ae = model()
    encoder, decoder = two_files(ae)
    assert "1.weight" in decoder
    joined = {bfl_name(key, "encoder"): value for key, value in encoder.items()} | {
        bfl_name(key, "decoder"): value for key, value in decoder.items()
    }
    assert joined.keys() == ae.state_dict().keys()
    other = TinyAutoEncoder(TinyAutoEncoderParams.from_shapes({key: tuple(value.shape) for key, value in joined.items()}))
    other.load_state_dict(joined)
    latents = torch.randn(1, 16, 3, 3)
    assert torch.equal(other.decode(latents), ae.decode(latents))


@torch.no_grad()
def test_loading_from_one_file(tmp_path: Path) -> None:
    ae = model()
    save_weights(tmp_path / "taef1.safetensors", ae.state_dict())
    loaded = load_ae(tmp_path / "taef1.safetensors")
    assert isinstance(loaded, TinyAutoEncoder)
    latents = torch.randn(1, 16, 3, 3)
    assert torch.equal(loaded.decode(latents), ae.decode(latents))
