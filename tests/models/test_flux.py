"""The seams of the transformer: hooks and their order, extra keys and values, target tokens, the mask, partial runs, compiled blocks."""

import pytest
import tiny_run
import torch
from streams import At, Noting, extra_keys, tokens
from torch import Tensor

from fluxsmith.errors import ModelFileError
from fluxsmith.models.flux import FluxDiT, FluxParams, axes_for_head, count_blocks
from fluxsmith.models.packing import image_ids
from fluxsmith.models.stream import BlockHook, IpTokens, Stream


@pytest.fixture(scope="module")
def dit() -> FluxDiT:
    return tiny_run.random_dit().eval()


@torch.no_grad()
def test_hooks_are_called_inside_out(dit: FluxDiT) -> None:
    calls: list[str] = []
    output = dit(tokens(), [Noting("a", calls), Noting("b", calls)])
    one_block = ["a before {}", "b before {}", "b after {}", "a after {}"]
    assert calls == [line.format(index) for index in range(2) for line in one_block]
    assert torch.equal(output, dit(tokens())), "a hook that changes nothing changes nothing"


@torch.no_grad()
def test_before_and_after_change_what_comes_next(dit: FluxDiT) -> None:
    class Twice(BlockHook):
        def after(self, index: int, stream: Stream) -> Stream:
            return stream._replace(img=stream.img * 2) if index == 1 else stream

    stream = dit.run_blocks(dit.embed(tokens()))
    expected = dit.head(stream._replace(img=stream.img * 2))
    assert torch.equal(dit(tokens(), [Twice()]), expected)
    moved = dit(tokens(), [At(1, lambda stream: stream._replace(txt=stream.txt * torch.arange(32)))])
    assert not torch.allclose(moved, dit(tokens()))


@torch.no_grad()
def test_running_in_parts_equals_running_whole(dit: FluxDiT) -> None:
    stream = dit.embed(tokens())
    parts = dit.run_blocks(dit.run_blocks(stream, stop=1), start=1)
    assert torch.equal(dit.head(parts), dit(tokens()))


@torch.no_grad()
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("after_block", [False, True])
def test_extra_keys_act_in_their_block(dit: FluxDiT, block: int, after_block: bool) -> None:
    def give(scale: float) -> Tensor:
        tokens_of_image = extra_keys(scale, after_block=after_block)
        return dit(tokens(), [At(block, lambda stream: stream._replace(ip=(tokens_of_image,)))])

    plain = dit(tokens())
    assert torch.equal(give(0.0), plain)
    assert not torch.allclose(give(1.0), plain, atol=1e-4)
    assert not torch.allclose(give(1.0), give(2.0), atol=1e-4)


@torch.no_grad()
def test_the_two_places_of_extra_keys_differ_and_add_up(dit: FluxDiT) -> None:
    """In a double block the place after the block is on the image stream itself: exactly `scale * attention` more."""
    stream = dit.embed(tokens())
    block = dit.double_blocks[0]

    def run(*ip: IpTokens) -> tuple[Tensor, Tensor]:
        return block(stream.img, stream.txt, block.modulations(stream.vec), stream.pe, None, ip)

    (plain_img, plain_txt), (img, txt) = run(), run(extra_keys(1.0, after_block=True))
    assert torch.equal(txt, plain_txt), "text queries do not see them"
    twice = run(extra_keys(2.0, after_block=True))[0]
    torch.testing.assert_close(twice - plain_img, 2 * (img - plain_img))
    both = run(extra_keys(1.0, after_block=True), extra_keys(1.0, after_block=True))[0]
    torch.testing.assert_close(both, twice)
    assert not torch.allclose(run(extra_keys(1.0, after_block=False))[0], img, atol=1e-4)


@torch.no_grad()
def test_only_target_tokens_are_predicted(dit: FluxDiT) -> None:
    """Tokens that a control appends are attended to, and cut off."""
    one = tokens()
    extra = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(1))
    ids = torch.cat((one.img_ids, image_ids(2, 4, 4, axis=1.0)), dim=1)
    longer = one._replace(img=torch.cat((one.img, extra), dim=1), img_ids=ids, n_target=one.img.shape[1])
    output = dit(longer)
    assert output.shape == dit(one).shape
    assert not torch.allclose(output, dit(one), atol=1e-4)
    assert torch.equal(dit(longer._replace(n_target=0))[:, :4], output)


@torch.no_grad()
def test_masked_tokens_have_no_effect(dit: FluxDiT) -> None:
    one = tokens()
    seen = torch.ones(2, 1, 1, 5 + 4, dtype=torch.bool)
    seen[..., 3:5] = False
    other = one._replace(txt=one.txt.clone())
    other.txt[:, 3:5] += 1
    assert not torch.allclose(dit(one), dit(other), atol=1e-4)
    torch.testing.assert_close(dit(one._replace(mask=seen)), dit(other._replace(mask=seen)))
    torch.testing.assert_close(dit(one._replace(mask=torch.ones_like(seen))), dit(one))


def test_guidance_is_needed_where_there_is_an_embedder(dit: FluxDiT) -> None:
    with pytest.raises(ValueError, match="guidance"):
        dit(tokens()._replace(guidance=None))
    assert not torch.allclose(dit(tokens()), dit(tokens()._replace(guidance=torch.ones(2))))


def test_sizes_are_read_from_shapes(dit: FluxDiT) -> None:
    shapes = {key: tuple(value.shape) for key, value in dit.state_dict().items()}
    assert FluxParams.from_shapes(shapes) == tiny_run.flux_params()
    pruned = {key: value for key, value in shapes.items() if not key.startswith("double_blocks")}
    assert count_blocks(pruned, "double_blocks.") == 0
    del shapes["img_in.weight"]
    with pytest.raises(ModelFileError, match=r"img_in\.weight"):
        FluxParams.from_shapes(shapes)


@pytest.mark.parametrize(("head", "axes"), [(128, (16, 56, 56)), (16, (4, 6, 6)), (32, (4, 14, 14)), (64, (8, 28, 28)), (24, (4, 10, 10))])
def test_axes_follow_the_rule_of_flux(head: int, axes: tuple[int, int, int]) -> None:
    assert axes_for_head(head) == axes
    assert sum(axes) == head


@pytest.mark.parametrize("head", [4, 18, 33])
def test_axes_of_other_heads_must_be_given(head: int) -> None:
    with pytest.raises(ModelFileError, match="axes_dim"):
        axes_for_head(head)
