"""Tiles cover every size without a gap, a seam or a NaN, and a codec that sees one cell at a time gives the same picture."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fluxsmith.models.tiling import Tiling, starts, tiled_decode, tiled_encode
from fluxsmith.models.tiny_autoencoder import TinyAutoEncoder, TinyAutoEncoderParams


class Local:
    """Each latent cell is the mean of its own pixels: tiles cannot change anything."""

    reduction = 8

    def __init__(self) -> None:
        self.largest = 0

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        self.largest = max(self.largest, *pixels.shape[-2:])
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def decode(self, latents: Tensor) -> Tensor:
        self.largest = max(self.largest, 8 * max(latents.shape[-2:]))
        return latents.repeat_interleave(8, -1).repeat_interleave(8, -2)


@pytest.mark.ledger("ST-31")
@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 23), columns=st.integers(1, 23), tile=st.integers(1, 12), overlap=st.integers(0, 11))
def test_any_size_in_any_tiles(rows: int, columns: int, tile: int, overlap: int) -> None:
    overlap = min(overlap, tile - 1)
    tiling = Tiling(8 * tile + 3, 8 * overlap + 5)  # pixels are rounded down to whole cells
    latents = torch.randn(2, 4, rows, columns, generator=torch.Generator().manual_seed(rows * 100 + columns))
    codec = Local()
    decoded = tiled_decode(codec, latents, tiling)
    torch.testing.assert_close(decoded, codec.decode(latents))
    pixels = torch.randn(1, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(1))
    codec = Local()
    torch.testing.assert_close(tiled_encode(codec, pixels, tiling), Local().encode(pixels))
    assert codec.largest <= 8 * tile, "no tile is larger than asked for"


@given(length=st.integers(1, 300), tile=st.integers(1, 64), overlap=st.integers(0, 63))
def test_starts_cover_everything_with_overlap(length: int, tile: int, overlap: int) -> None:
    overlap = min(overlap, tile - 1)
    places = starts(length, tile, overlap)
    assert places[0] == 0
    assert places[-1] + tile >= length
    assert places[-1] == max(0, length - tile)
    assert all(0 < second - first <= tile - overlap for first, second in zip(places, places[1:], strict=False))


@pytest.mark.parametrize(("tile", "overlap"), [(7, 0), (8, 8), (64, 64), (64, 80), (0, 0)])
def test_tiles_that_go_nowhere_are_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="leave no step"):
        tiled_decode(Local(), torch.zeros(1, 4, 8, 8), Tiling(tile, overlap))


def test_sides_must_fit_the_reduction() -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        tiled_encode(Local(), torch.zeros(1, 3, 64, 60), Tiling(64, 16))


@torch.no_grad()
@pytest.mark.ledger("ST-31")
@pytest.mark.parametrize("shape", [(5, 9), (12, 3), (17, 16)])
def test_a_real_codec_on_odd_remainders(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ae = TinyAutoEncoder(TinyAutoEncoderParams(8, 16, (1, 1, 1, 1), (1, 1, 1, 1))).eval()
    latents = torch.randn(1, 16, *shape)
    whole, tiled = ae.decode(latents), tiled_decode(ae, latents, Tiling(64, 32))
    assert tiled.shape == whole.shape
    assert tiled.isfinite().all()
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()
    half = tiled_decode(ae.bfloat16(), latents.bfloat16(), Tiling(64, 32))
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()
